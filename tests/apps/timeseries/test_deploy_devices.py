"""Forms with fixed shapes: Time-MoE point by point, others over contexts without gaps, and what there is none of."""

from __future__ import annotations

import shutil

import pytest
import torch

from apps.errors import UserError
from apps.timeseries import deploy
from apps.timeseries.models.base import Windows, observed
from export.compare import compare
from export.deliver import traced
from export.lowering import lower
from export.verify import in_onnxruntime, refuse_inexact

pytestmark = pytest.mark.usefixtures("exporting")


def test_devices_take_time_moe_point_by_point(ready):
    (one,) = ready("timemoe", device=True).values()
    capacity = 24 + 4
    for sample in (*one.samples, *one.calibration):
        points, keys, values, position = sample.tensors
        assert points.shape == (1, 1)
        assert keys.shape == values.shape == (1, 1, 2, capacity, 4)
        assert 0 <= int(position) < capacity
        assert bool((keys[:, :, :, int(position) :] == 0).all())
    places = [int(sample.tensors[3]) for sample in one.samples]
    assert max(places[:8]) > 18
    assert min(places[:8]) < 6
    found = compare(one, in_onnxruntime(lower(traced(one, static=True), "sparse")))
    refuse_inexact(found)
    assert found.score is not None


def test_what_devices_cannot_take_is_one_line(ts, trained_runs, tmp_path):
    run = trained_runs(run__name="moirai_moe", model__name="moirai_moe")
    line = ts("export", "--ckpt_path", run, "--output", tmp_path / "m.fpga", "--format", "fpga").line
    assert line == "export: Moirai-MoE takes NaN for points to come, which devices do not; use format=onnx"
    assert not (tmp_path / "m.fpga").exists()


def test_devices_get_windows_without_gaps(ready, monkeypatch):
    monkeypatch.setattr(deploy, "_test_windows", lambda *_: [gappy(), gappy(missing=2)])
    (one,) = ready("dlinear", device=True).values()
    assert [len(sample.tensors[0]) for sample in one.samples] == [3, 2]
    assert all(bool(observed(sample.tensors[0]).all()) for sample in one.samples)
    monkeypatch.setattr(deploy, "_test_windows", lambda *_: [gappy(missing=4)])
    with pytest.raises(UserError, match=r"^export: no test window without gaps"):
        ready("dlinear", device=True)


def gappy(missing: int = 1) -> Windows:
    past = torch.randn(4, 24)
    past[:missing, 3] = torch.nan
    return Windows(past, torch.randn(4, 6))


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("make") is None, reason="no g++ or make")
def test_time_moe_in_fixed_point(ts, trained_runs, tmp_path, read_json):
    run = trained_runs(run__name="timemoe", model__name="timemoe")
    options = ["--format", "fpga", "--output", tmp_path / "m.fpga", "--json", tmp_path / "f.json"]
    done = ts("export", "--ckpt_path", run, *options, "--fpga.compared", 10)
    assert (done.code, done.err) == (0, "")
    figures = read_json(tmp_path / "f.json")
    assert figures["rms_relative_error"] < 1e-3
    assert (figures["rows"], figures["decision_agreement"]) == (10, 1)
    assert not any(name.startswith("rollout") for name in figures)
    manifest = read_json(tmp_path / "m.fpga" / "manifest.json")
    assert manifest["metadata"]["capacity"] == 28
