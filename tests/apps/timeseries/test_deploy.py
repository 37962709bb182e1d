"""Export: files that give what PyTorch gives, and nothing where there is no form."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.timeseries.forecaster import Forecaster
from apps.timeseries.loading import load_trained
from apps.timeseries.models.base import Windows
from export.compare import compare
from export.deliver import traced
from export.exportable import in_torch
from export.lowering import lower
from export.measure import session_of
from export.verify import in_onnxruntime, refuse_inexact
from tests.apps.timeseries.conftest import differences, hourly

pytestmark = pytest.mark.usefixtures("exporting")


def test_a_pass_takes_any_number_of_windows_with_gaps(ts, segmoe_run, tmp_path, read_json):
    figures, path = tmp_path / "figures.json", tmp_path / "model.onnx"
    done = ts("export", "--ckpt_path", segmoe_run, "--output", path, "--json", figures)
    assert (done.code, done.err) == (0, "")
    found = read_json(figures)
    assert found["max_relative_error"] < 1e-4
    assert (found["rows"], found["decision_agreement"], found["routing_agreement"]) == (21, 1, 1)
    assert found["mse_export"] == pytest.approx(read_json(segmoe_run / "test.json")["h6/mse"], rel=1e-4)
    assert not list(
        differences(found, {name: read_json(tmp_path / "export.json")["model.onnx"][name] for name in found})
    )
    session = session_of(path)
    length = session.get_inputs()[0].shape[1]
    context = np.random.default_rng(0).normal(size=(3, length)).astype(np.float32)
    context[1, :5] = context[2, 7:9] = np.nan
    forecast = session.run(None, {"context": context})[0]
    model = load_trained(segmoe_run / "checkpoints" / "best.ckpt").model.eval()
    with torch.no_grad():
        expected = model.forecast(Windows(torch.from_numpy(context)), forecast.shape[1]).mean.numpy()
    np.testing.assert_allclose(forecast, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ldl_moe", {}),
        ("ldl_moe", {"model__ldl_moe__pattern": "true", "model__ldl_moe__heads": "bins"}),
        ("segmoe", {"model__segmoe__block": 4, "model__segmoe__num_layers": 1}),
    ],
)
def test_other_passes(ready, name, changes):
    (one,) = ready(name, **changes).values()
    found = compare(one, in_onnxruntime(lower(traced(one), "sparse")))
    refuse_inexact(found)
    assert found.rows == 21
    assert {len(sample.tensors[0]) for sample in one.calibration} == {40}


def test_files_keep_the_intervals_of_the_model(ready, segmoe_run):
    """Bounds that a host makes of the metadata are those of `predict`."""
    one = ready("segmoe")[""]
    forecaster = Forecaster.from_checkpoint(segmoe_run)
    frame = hourly(1)
    expected = forecaster.predict(frame, h=6)
    y = frame["y"].to_numpy()
    context = ((y - y.mean()) / y.std())[-24:]
    deviations = np.array(one.metadata["intervals"]["deviations"])
    point = in_torch(one.module)(dataclasses.replace(one.single(), tensors=(torch.tensor(context[None]).float(),)))[0]
    found = (point + deviations * context.std()) * y.std() + y.mean()
    np.testing.assert_allclose(found, expected[["SegMoE-lo-80", "SegMoE-median", "SegMoE-hi-80"]].T, rtol=1e-4)


def test_series_too_short_to_test_on(ts, segmoe_run, tmp_path):
    line = ts("export", "--ckpt_path", segmoe_run, "--data.horizon=140", "--output", tmp_path / "m.onnx").line
    assert line == "data.horizon=140: no series is long enough to test on; lower it"
    assert not list(Path(tmp_path).iterdir())
