"""The serving examples where nothing but onnxruntime and NumPy is installed, beside forecasts of the app."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from apps.timeseries.forecaster import Forecaster
from apps.timeseries.models.base import Windows
from export.deliver import traced
from export.exportable import Exportable
from export.lowering import lower
from export.onnx import save
from tests.apps.serving import serve
from tests.apps.timeseries.conftest import hourly

pytestmark = pytest.mark.usefixtures("exporting")


@pytest.fixture
def series(tmp_path) -> Path:
    """A file with text beside the numbers, a gap, and missing values at the end."""
    frame = hourly(1)
    frame.loc[[40, 130, 148, 149], "y"] = np.nan
    frame.to_csv(tmp_path / "series.csv", index=False)
    return tmp_path / "series.csv"


def numbers(printed: str) -> np.ndarray:
    return np.array([[float(value) for value in line.split()] for line in printed.splitlines()])


def file_of(one: Exportable, path: Path) -> Path:
    return save(lower(traced(one), "sparse"), path, one.metadata)


def expected(run: Path, series: Path, h: int, start: int = 0) -> pd.DataFrame:
    """Of the app, for `h` points after the last value."""
    frame = pd.read_csv(series, parse_dates=["ds"])[start:].dropna()
    return Forecaster.from_checkpoint(run).predict(frame, h=h)


def test_points_and_bounds(ready, segmoe_run, series, tmp_path):
    file = file_of(ready("segmoe")[""], tmp_path / "m.onnx")
    found = numbers(serve("timeseries", file, series, "y"))
    wanted = expected(segmoe_run, series, 6)[["SegMoE", "SegMoE-lo-80", "SegMoE-hi-80"]]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_time_moe_in_one_pass_and_step_by_step(ready, trained_runs, series, tmp_path):
    """The step starts after the last gap."""
    run, made = trained_runs(run__name="timemoe", model__name="timemoe"), ready("timemoe")
    whole, step = (file_of(one, tmp_path / f"{key}.onnx") for key, one in made.items())
    found = numbers(serve("timeseries", whole, series, "y"))[:, 0]
    np.testing.assert_allclose(found, expected(run, series, 4)["TimeMoE"], rtol=1e-4)
    found = numbers(serve("timeseries", step, series, "y", 11))[:, 0]
    np.testing.assert_allclose(found, expected(run, series, 11, start=131)["TimeMoE"], rtol=1e-4)


def test_paths_of_moirai(ready, series, tmp_path):
    """Printed quantiles leave as many of the model's own paths below them as their levels say."""
    one, count = ready("moirai_moe")[""], 2000
    found = numbers(serve("timeseries_paths", file_of(one, tmp_path / "m.onnx"), series, "y", count))
    y = pd.read_csv(series)["y"].dropna().to_numpy()
    context = pd.read_csv(series)["y"].to_numpy()[124:148]
    past = torch.tensor((context - y.mean()) / y.std(), dtype=torch.float32)[None]
    paths = one.module.model.sample(Windows(past), 6, count)[0].numpy() * y.std() + y.mean()  # [S, H]
    for level, bound in zip((0.5, 0.1, 0.9), found.T, strict=True):
        assert ((paths < bound - 1e-4).mean(0) < level + 0.05).all()
        assert ((paths < bound + 1e-4).mean(0) > level - 0.05).all()
