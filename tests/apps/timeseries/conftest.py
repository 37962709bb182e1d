"""Series and tiny trained forecasters that several files use, and command lines of the app."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from apps.timeseries import APP
from apps.timeseries.series import Series
from tests.apps.conftest import Result, run

RECIPE = Path(__file__).parents[3] / "configs" / "timeseries" / "tiny.yaml"
TINY = {
    "data.context": "24",
    "data.horizon": "6",
    "data.batch_size": "16",
    "model.segmoe.patch_size": "4",
    "model.segmoe.d_model": "8",
    "model.segmoe.d_ff": "8",
    "model.segmoe.num_layers": "2",
    "model.segmoe.num_heads": "2",
    "model.segmoe.num_kv_heads": "1",
    "model.segmoe.segments": "[2,3]",
    "model.segmoe.num_experts": "3",
    "model.moirai_moe.patch_size": "4",
    "model.moirai_moe.d_model": "8",
    "model.moirai_moe.d_ff": "8",
    "model.moirai_moe.num_layers": "1",
    "model.moirai_moe.num_heads": "2",
    "model.moirai_moe.num_experts": "3",
    "model.moirai_moe.num_samples": "8",
    "model.ldl_moe.d_model": "8",
    "model.ldl_moe.d_ff": "8",
    "model.ldl_moe.num_samples": "4",
    "model.timemoe.hidden_size": "8",
    "model.timemoe.intermediate_size": "16",
    "model.timemoe.num_layers": "1",
    "model.timemoe.num_heads": "2",
    "model.timemoe.num_experts": "3",
    "model.timemoe.horizons": "[1,4]",
    "optim.lr": "0.003",
    "optim.ema_decay": "null",
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": "1",
    "trainer.limit_train_batches": "4",
    "trainer.limit_val_batches": "2",
    "trainer.log_every_n_steps": "1",
    "trainer.enable_progress_bar": "false",
    "run.report": "false",
}
"""Half a second of training; what the tests rely on is written out, so that other defaults change nothing."""


run_app = functools.partial(run, app=APP)
"""Runs a command line of the app in this process."""


@pytest.fixture(scope="session")
def ts() -> Callable[..., Result]:
    """Runs a command line of the app in this process."""
    return run_app


def hourly(count: int = 3, length: int = 150) -> pd.DataFrame:
    """A long frame of daily waves with noise."""
    rng, time = np.random.default_rng(0), np.arange(length)
    ds = pd.date_range("2024-01-01", periods=length, freq="h")
    frames = []
    for i in range(count):
        y = 10 * (i + 1) + np.sin(2 * np.pi * (time + 5 * i) / 24) + 0.1 * rng.standard_normal(length)
        frames.append(pd.DataFrame({"unique_id": f"s{i}", "ds": ds, "y": y}))
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="session")
def waves(tmp_path_factory) -> Path:
    """A CSV file of three hourly series."""
    file = tmp_path_factory.mktemp("data") / "waves.csv"
    hourly().to_csv(file, index=False)
    return file


@pytest.fixture(scope="session")
def small(waves) -> Callable[..., list[str]]:
    """Flags of a run that takes half a second; keyword arguments change them, `__` for dots."""

    def make(root: Path, **changes: object) -> list[str]:
        given = {name.replace("__", "."): value for name, value in changes.items()}
        settings = TINY | {"run.root": root, "data.source": waves} | given
        return [f"--{name}={value}" for name, value in settings.items()]

    return make


@pytest.fixture(scope="session")
def trained_runs(ts, small, tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run with such settings, trained once per test process; tests only read it."""
    known: dict[tuple, Path] = {}

    def get(**changes: object) -> Path:
        key = tuple(sorted((name, str(value)) for name, value in changes.items()))
        if key not in known:
            root = tmp_path_factory.mktemp("runs")
            done = ts("train", *small(root, **changes))
            assert (done.code, done.err) == (0, ""), done.err
            (known[key],) = (root / "timeseries").iterdir()
        return known[key]

    return get


@pytest.fixture(scope="session")
def segmoe_run(trained_runs) -> Path:
    """A trained Seg-MoE."""
    return trained_runs(run__name="segmoe")


@pytest.fixture
def exporting(untyped, monkeypatch) -> None:
    """Models can be traced, and what is exported is timed for a moment only."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("export.latency.SECONDS", 0.05)


@pytest.fixture
def ready(trained_runs) -> Callable[..., dict[str, Any]]:
    """What there is to export of a tiny trained model; keyword arguments are settings of its training."""
    from apps.timeseries.deploy import exportables
    from apps.timeseries.loading import load_trained
    from apps.timeseries.verbs import make_data

    def make(name: str, device: bool = False, **changes: object) -> dict[str, Any]:
        run = trained_runs(run__name=name, model__name=name, **changes)
        trained = load_trained(run / "checkpoints" / "best.ckpt")
        return exportables(trained, make_data(trained.config), calibration=40, device=device)

    return make


@pytest.fixture
def read_json() -> Callable[[Path], Any]:
    """Reads a JSON file."""
    return lambda path: json.loads(Path(path).read_text())


@pytest.fixture
def load() -> Callable[..., dict[str, Any]]:
    """A checkpoint of a run as plain data."""

    def read(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
        return torch.load(run / "checkpoints" / name, weights_only=True)

    return read


def series_of(y: Any, id: str = "s", freq: str | int = "h") -> Series:
    """A series without covariates, by its values."""
    start = 0 if isinstance(freq, int) else pd.Timestamp("2024-01-01").as_unit("us")
    return Series.plain(id, np.asarray(y, float), start, freq)


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two trees of plain data and tensors differ, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if not torch.equal(a, b):
            yield path
    elif isinstance(a, dict) and isinstance(b, dict):
        yield from (f"{path}/{key}" for key in a.keys() ^ b.keys())
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}/{i}")
    elif a != b:
        yield path
