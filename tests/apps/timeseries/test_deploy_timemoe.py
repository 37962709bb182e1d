"""Time-MoE's files: the pass, the cached step, whole forecasts by it, and the step for devices."""

from __future__ import annotations

import pytest
import torch

from apps.timeseries.deploy import exportables
from apps.timeseries.loading import load_trained
from apps.timeseries.verbs import make_data
from export.deliver import traced
from export.errors import ExportError
from export.lowering import lower
from export.onnx import save

pytestmark = pytest.mark.usefixtures("exporting")


def test_time_moe_has_a_file_for_decoding_too(ts, trained_runs, tmp_path, read_json):
    run = trained_runs(run__name="timemoe", model__name="timemoe")
    done = ts("export", "--ckpt_path", run, "--output", tmp_path / "t.onnx", "--json", tmp_path / "f.json")
    assert (done.code, done.err) == (0, "")
    figures, kept = read_json(tmp_path / "f.json"), read_json(tmp_path / "export.json")
    assert figures["step_max_relative_error"] < 1e-4 > figures["step_rollout_max_relative_error"]
    assert (figures["step_rollout_horizon"], figures["step_rollouts"], figures["step_rows"]) == (8, 4, 21)
    assert figures["step_export_ms_p50"] < figures["step_torch_ms_p50"]
    assert figures["step_rollout_ms_p50"] < figures["step_rollout_torch_ms_p50"]
    assert kept.keys() == {"t.onnx", "t.step.onnx"}
    assert kept["t.step.onnx"]["rollout_horizon"] == 8
    assert figures["step_decisions"] == 21 * 5  # predictions of both heads, and no keys


def test_a_step_whose_forecasts_differ_is_not_kept(ready, tmp_path):
    made = ready("timemoe")["step"]
    path = save(lower(traced(made), "sparse"), tmp_path / "m.step.onnx")
    assert made.further(path, True)["rollout_max_relative_error"] < 1e-5
    model = made.module.model
    model.config.max_positions = 24 + 3
    assert made.further(path, True)["rollout_horizon"] == 4
    with torch.no_grad():
        model.heads[-1].weight.mul_(1.01)
    assert made.further(path, False)["rollout_max_relative_error"] > 1e-3
    with pytest.raises(ExportError, match=r"^forecasts differ from PyTorch by .*; no file was kept$"):
        made.further(path, True)


def test_weights_of_half_the_bits_are_exported_in_full(trained_runs):
    trained = load_trained(trained_runs(run__name="timemoe", model__name="timemoe") / "checkpoints" / "best.ckpt")
    trained.model.bfloat16()
    made = exportables(trained, make_data(trained.config), calibration=4, device=False)
    for one in made.values():
        assert {parameter.dtype for parameter in one.module.parameters()} == {torch.float32}
        assert {tensor.dtype for sample in one.samples for tensor in sample.tensors} == {torch.float32}
