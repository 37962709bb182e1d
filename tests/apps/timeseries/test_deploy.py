"""Export: files that give what PyTorch gives, and nothing where there is no form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.timeseries.loading import load_trained
from apps.timeseries.models.base import Windows

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("untyped")

SIZES = {
    "timemoe": {
        "model__timemoe__hidden_size": 16,
        "model__timemoe__intermediate_size": 16,
        "model__timemoe__num_layers": 1,
        "model__timemoe__num_heads": 2,
        "model__timemoe__num_experts": 2,
        "model__timemoe__horizons": "[1,4]",
    },
    "moirai_moe": {"model__moirai_moe__d_model": 8, "model__moirai_moe__num_layers": 1, "model__moirai_moe__d_ff": 8},
}


def trained(ts, small, folder: Path, name: str) -> Path:
    flags = small(folder, model__name=name, run__name=name, run__report="false", **SIZES.get(name, {}))
    assert ts("train", *flags).code == 0
    return folder / "timeseries" / name


@pytest.mark.parametrize("name", ["segmoe", "dlinear"])
def test_a_pass_takes_any_number_of_windows_with_gaps(ts, small, segmoe_run, tmp_path, name):
    figures, run = tmp_path / "figures.json", segmoe_run if name == "segmoe" else trained(ts, small, tmp_path, name)
    done = ts("export", "--ckpt_path", run, "--output", tmp_path / "model.onnx", "--json", figures)
    assert (done.code, done.err) == (0, "")
    assert json.loads(figures.read_text())["max_relative_error"] < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    length = session.get_inputs()[0].shape[1]
    context = np.random.default_rng(0).normal(size=(3, length)).astype(np.float32)
    context[1, :5] = context[2, 7:9] = np.nan
    forecast = session.run(None, {"context": context})[0]
    model = load_trained(run / "checkpoints" / "best.ckpt").model.eval()
    with torch.no_grad():
        expected = model.forecast(Windows(torch.from_numpy(context)), forecast.shape[1]).mean.numpy()
    np.testing.assert_allclose(forecast, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_time_moe_has_a_file_for_decoding_too(ts, small, tmp_path):
    run = trained(ts, small, tmp_path, "timemoe")
    done = ts("export", "--ckpt_path", run, "--output", tmp_path / "t.onnx", "--json", tmp_path / "f.json")
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "t.step.onnx").is_file()
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["step_max_relative_error"] < 1e-4
    assert figures["step_horizon"] == 8


def test_sampling_has_no_onnx_form(ts, small, tmp_path):
    run = trained(ts, small, tmp_path, "moirai_moe")
    done = ts("export", "--ckpt_path", run, "--output", tmp_path / "m.onnx")
    assert done.code == 2
    assert done.err.startswith("error: export: Moirai-MoE forecasts by sampling paths")
    assert not (tmp_path / "m.onnx").exists()
