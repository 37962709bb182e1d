"""Batches for training and validation, what a model is told of its data, and where series come from."""

from __future__ import annotations

import dataclasses
import gzip
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from apps.errors import UserError
from apps.timeseries.data import SeriesData
from apps.timeseries.models.spec import SeriesSpec
from apps.timeseries.settings import DataConfig
from apps.timeseries.sources import CATALOGUE, default_split, load_series
from tests.apps.timeseries.conftest import hourly


def make(file, seed: int = 0, train_horizon: int | None = None, **changes) -> SeriesData:
    return SeriesData(DataConfig(source=str(file), context=24, horizon=6, **changes), seed, train_horizon)


def trainer(ready: int = 0, limit: int | None = None, rank: int = 0, world: int = 1) -> SimpleNamespace:
    """What a data module asks of a trainer."""
    progress = SimpleNamespace(total=SimpleNamespace(ready=ready))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(fit_loop=loop, global_rank=rank, world_size=world, limit_train_batches=limit)


def batches(data: SeriesData, **state) -> list[torch.Tensor]:
    data.trainer = trainer(**state)
    return [batch.sequence for batch in data.train_dataloader()]


def test_an_epoch_holds_every_window_once_in_an_order_of_its_own(waves):
    data = make(waves)
    first = batches(data)
    second = batches(data, ready=len(first))
    whole = data.train_set.batch(np.arange(len(data.train_set))).sequence
    key = lambda x: sorted(map(tuple, x.tolist()))  # noqa: E731
    assert key(torch.cat(first)) == key(torch.cat(second)) == key(whole)
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert [len(b) for b in first[:-1]] == [64] * (len(first) - 1)
    assert all(torch.equal(a, b) for a, b in zip(first, batches(make(waves)), strict=True))
    assert not torch.equal(first[0], batches(make(waves, seed=1))[0])


def test_training_continues_with_the_batch_it_has_reached(waves):
    first = batches(make(waves))
    rest = batches(make(waves), ready=2)
    assert all(torch.equal(a, b) for a, b in zip(first[2:], rest, strict=True))


def test_processes_share_the_batches(waves):
    parts = [batches(make(waves, batch_size=16), rank=rank, world=2) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    rows = torch.cat([torch.cat(part) for part in parts])
    assert len(rows.unique(dim=0)) == len(rows)


def test_futures_are_as_long_as_the_model_learns_from(waves):
    data = make(waves, train_horizon=11)
    batch = data.train_set.batch(np.array([0]))
    assert (batch.past.shape, batch.future.shape) == ((1, 24), (1, 11))
    assert data.windows("val").batch(np.array([0])).future.shape == (1, 6)
    assert data.windows("test", 3).batch(np.array([0])).future.shape == (1, 3)


def test_splits_leave_room_for_the_longest_horizon(waves):
    data = make(waves, test_horizons=(3, 9))
    assert {border.test - border.val for border in data.store.borders} == {18}
    assert len(data.windows("test", 9)) == 3 * 10


def test_validation_windows_may_be_thinned(waves):
    every, third = make(waves), make(waves, val_stride=3)
    index = third.windows("val", stride=3).index
    own = every.windows("val").index
    expected = np.concatenate([own[own[:, 0] == which][::3] for which in range(3)])
    assert index.tolist() == expected.tolist()
    rows = sum(len(batch) for batch in third.val_dataloader())
    assert rows == len(index)


def test_a_model_is_told_of_context_horizon_season_and_covariates(tmp_path, waves):
    assert make(waves).spec == SeriesSpec(24, 6, 24)
    assert make(waves, season=7).spec.season == 7
    frame = hourly(1, 200).assign(price=1.0, load=2.0, area=3.0)
    days = pd.DataFrame({"unique_id": "d", "ds": pd.date_range("2020-01-01", periods=90), "y": np.arange(90.0)})
    pd.concat([frame, days.assign(price=1.0, load=2.0, area=4.0)]).to_csv(tmp_path / "c.csv", index=False)
    names = {"futr_columns": ("price",), "hist_columns": ("load",), "stat_columns": ("area",)}
    data = make(tmp_path / "c.csv", **names)
    spec = data.spec
    assert spec == SeriesSpec(24, 6, 24, ("price",), ("load",), ("area",))  # of most points, not of most series
    assert SeriesSpec.from_plain(spec.plain()) == spec
    batch = data.train_set.batch(np.array([0, len(data.train_set) - 1]))
    assert batch.futr.shape == (2, 30, 1)
    assert batch.hist.shape == (2, 24, 1)
    assert batch.stat.tolist() == [[3.0], [4.0]]


def test_nothing_to_train_or_validate_on_is_one_line(tmp_path):
    hourly(2, 20).to_csv(tmp_path / "short.csv", index=False)
    data = make(tmp_path / "short.csv")
    with pytest.raises(UserError, match=r"^data.horizon=6: no series is long enough to validate on; lower it"):
        data.val_dataloader()
    assert len(data.train_set)
    pd.DataFrame({"unique_id": "a", "ds": [1], "y": [2.0]}).to_csv(tmp_path / "one.csv", index=False)
    with pytest.raises(UserError, match=r"no series is long enough to train on"):
        _ = make(tmp_path / "one.csv", freq="1").train_set


@pytest.mark.parametrize("zipped", [False, True])
def test_benchmarks_are_found_below_the_root_and_split_as_published(tmp_path, zipped):
    time = pd.date_range("2016-07-01", periods=14_500, freq="h")
    table = pd.DataFrame({"date": time, "HUFL": np.arange(14_500.0), "OT": -np.arange(14_500.0)})
    text = table.to_csv(index=False).encode()
    (tmp_path / "ett").mkdir()
    name = "ETTh1.csv.gz" if zipped else "ETTh1.csv"
    (tmp_path / "ett" / name).write_bytes(gzip.compress(text, 1) if zipped else text)
    config = DataConfig(source="ETTh1", root=str(tmp_path), context=336, horizon=96)
    data = SeriesData(config, 0)
    assert [series.id for series in data.store.series] == ["HUFL", "OT"]
    counts = [len(data.train_set), len(data.windows("val")), len(data.windows("test"))]
    assert counts == [2 * 8209, 2 * 2785, 2 * 2785]


def test_splits_by_default():
    assert {name: default_split(DataConfig(source=name)) for name in CATALOGUE} == {
        "ETTh1": "ett_hour",
        "ETTh2": "ett_hour",
        "ETTm1": "ett_minute",
        "ETTm2": "ett_minute",
        "weather": "ratio",
        "electricity": "ratio",
        "traffic": "ratio",
    }
    assert default_split(DataConfig(source="my.csv")) == default_split(DataConfig()) == "tail"
    assert default_split(DataConfig(source="ETTh1", split="ratio")) == "ratio"


def test_series_come_from_the_library_or_from_files(waves):
    assert len(load_series(DataConfig())) == 24
    assert [s.id for s in load_series(DataConfig(source=str(waves)))] == ["s0", "s1", "s2"]
    with pytest.raises(
        UserError, match=r"^data.source=nowhere: no such file or folder, and none of statsmodels, .*ETTh1"
    ):
        load_series(DataConfig(source="nowhere"))


def test_raw_units_where_asked_for(waves):
    data = make(waves, scale="none")
    assert data.store.mean.tolist() == [0, 0, 0]
    assert data.store.std.tolist() == [1, 1, 1]
    batch = data.train_set.batch(np.array([0]))
    np.testing.assert_allclose(batch.past[0], data.store.series[0].y[:24], rtol=1e-6)


def test_strides_thin_training_windows(waves):
    every, fifth = make(waves).train_set, make(waves, stride=5).train_set
    assert fifth.index[fifth.index[:, 0] == 1, 1].tolist() == every.index[every.index[:, 0] == 1, 1][::5].tolist()
    short = make(waves, min_context=4).train_set
    assert short.index[:, 1].min() == 4
    assert bool(torch.isnan(short.batch(np.array([0])).past[0, :20]).all())
    assert dataclasses.replace(DataConfig(), min_context=96).min_context == 96
