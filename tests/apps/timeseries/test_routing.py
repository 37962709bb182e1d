"""Which expert handled what: counts against plain loops over the layers' own decisions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import moecore
from apps.timeseries.model_settings import LDLMoEConfig, MoiraiMoEConfig, SegMoEConfig, TimeMoEConfig
from apps.timeseries.models.ldl_moe import LDLMoE
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.timeseries.models.segmoe import SegMoE
from apps.timeseries.models.timemoe import TimeMoE
from apps.timeseries.phases import Phases, calendar
from apps.timeseries.routing import (
    ByLabel,
    affordable,
    contexts,
    expert_use,
    sampled,
    shares,
    trace_macs,
)
from apps.timeseries.series import Series
from apps.timeseries.traits import Traits
from apps.timeseries.windows import Borders, SeriesStore, WindowSet, evaluation_index

CONTEXT, HORIZON = 24, 6


def wave(id: str, length: int, start: str | int = "2024-01-01 05:00", freq: str | int = "h", seed: int = 0) -> Series:
    rng = np.random.default_rng(seed)
    y = np.sin(2 * np.pi * np.arange(length) / 24) + 0.3 * rng.standard_normal(length)
    return Series.plain(id, y, pd.Timestamp(start) if isinstance(start, str) else start, freq)


def windows_of(series: list[Series], context: int = CONTEXT, horizon: int = HORIZON) -> WindowSet:
    borders = [Borders(len(s) // 2, 3 * len(s) // 4, len(s)) for s in series]
    store = SeriesStore(series, borders)
    return WindowSet(store, evaluation_index(store, "test", context, horizon), context, horizon)


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    seg = SegMoEConfig(patch_size=4, d_model=8, d_ff=8, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=3)
    seg = dataclasses.replace(seg, segments=(1, 4))
    moirai = MoiraiMoEConfig(patch_size=5, d_model=8, d_ff=8, num_layers=1, num_heads=2, num_experts=3, num_samples=4)
    time = TimeMoEConfig(hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2, num_experts=3, horizons=(1, 4))
    ldl = LDLMoEConfig(pattern=True, d_model=8, d_ff=8, num_samples=4, num_experts=3)
    made = {
        "segmoe": SegMoE(seg, CONTEXT, HORIZON),
        "moirai": MoiraiMoE(moirai),
        "timemoe": TimeMoE(time),
        "ldl": LDLMoE(ldl, CONTEXT, HORIZON),
    }
    return {name: model.eval() for name, model in made.items()}


UNITS = {
    "segmoe": {"blocks.0": list(range(0, 24, 4)), "blocks.1": [0, 16]},
    "moirai": {"blocks.0": [-1, 4, 9, 14, 19]},  # a patch ends where the horizon begins
    "timemoe": {"0": list(range(24)), "1": list(range(24))},
    "ldl": {"trend": [0], "seasonality": [0], "changepoint": [0], "experts": [0]},
}


@pytest.mark.parametrize("name", UNITS)
def test_units_lie_where_the_model_cuts_the_context(name):
    windows = windows_of([wave("a", 120)])
    use = expert_use(models()[name], windows, np.arange(3))
    assert len(use) == len(UNITS[name])
    for (layer, one), (part, starts) in zip(use.items(), UNITS[name].items(), strict=True):
        assert part in layer
        given = one.starts.tolist()
        assert given[: len(starts)] == starts or (name == "moirai" and given == [max(s, 0) for s in starts])
        assert one.ends.tolist()[-1] == CONTEXT
        assert one.ends.tolist()[:-1] == given[1:]
        assert one.whole == (name == "ldl")


@pytest.mark.parametrize("name", ["segmoe", "timemoe", "ldl"])
def test_counts_against_one_window_at_a_time(name):
    model = models()[name]
    windows = windows_of([wave("a", 120), wave("b", 100, "2024-03-01 17:00", seed=1)])
    rows = np.array([0, 7, len(windows) - 1])
    use = expert_use(model, windows, rows)
    experts = 3
    series = {layer: np.zeros((2, experts), int) for layer in use}
    hours = {layer: np.zeros((24, experts), int) for layer in use}
    for row in rows:
        number, origin = windows.index[row]
        with torch.no_grad(), moecore.record(model) as recording:
            model.trace(windows.batch(np.array([row])))
        for routing in recording:
            starts = use[routing.name].starts
            for unit, chosen in enumerate(routing.assignment.chosen().numpy()):
                first = origin if len(starts) == 1 else origin - CONTEXT + starts[unit]
                hour = (windows.store.series[number].start.hour + first) % 24
                series[routing.name][number] += chosen
                hours[routing.name][hour] += chosen
    for layer, one in use.items():
        assert np.array_equal(one.series.counts, series[layer])
        assert np.array_equal(one.phase["hour of the day"].counts, hours[layer])
        load = series[layer].sum(0) / series[layer].sum()
        assert np.allclose(one.load, load)
        assert one.dead == [e for e in range(experts) if load[e] == 0]


@pytest.mark.parametrize("name", UNITS)
def test_maps_and_weights_are_kept_of_the_windows_asked_for(name):
    windows = windows_of([wave("a", 120)])
    use = expert_use(models()[name], windows, np.arange(4), keep=[9])
    for one in use.values():
        assert set(one.maps) == set(one.weights) == {9}
        assert one.maps[9].shape == one.starts.shape
        assert one.weights[9].sum() == pytest.approx(1)
        main = np.bincount(one.maps[9], minlength=3)
        assert set(np.flatnonzero(main)) <= set(np.flatnonzero(one.weights[9]))


def test_padding_counts_nowhere():
    series = wave("short", 40)
    series.y[10:19] = np.nan
    windows = windows_of([series])
    windows.index = np.array([[0, 20], [0, 30]])
    use = expert_use(models()["timemoe"], windows, np.array([0]), keep=[0, 1])
    for one in use.values():
        seen = np.isfinite(series.y)
        units = seen[:20].sum() + seen[6:30].sum()
        assert one.series.counts.sum() == 2 * units
        assert one.phase["hour of the day"].counts.sum() == 2 * units
        expected = np.concatenate([np.zeros(4, bool), seen[:20]])  # four points before the series begins
        assert np.array_equal(one.maps[0] >= 0, expected)


def test_models_without_layers_use_no_experts():
    dense = SegMoE(
        SegMoEConfig(patch_size=4, d_model=8, d_ff=8, num_layers=1, num_heads=2), CONTEXT, HORIZON, dense=True
    )
    assert expert_use(dense.eval(), windows_of([wave("a", 120)]), np.arange(2)) == {}


def test_shuffled_labels_lose_what_experts_know():
    """A layer whose expert is the series itself: all is known of it, nothing after shuffling."""
    table = ByLabel(np.diag([40, 40]), np.full((3, 2, 2), 20))
    assert table.specialisation == pytest.approx(1)
    assert table.chance == pytest.approx(0, abs=1e-9)
    joined = table.grouped([0, 0], 1)
    assert joined.counts.tolist() == [[40, 40]]
    assert joined.shuffled.tolist() == [[[40, 40]]] * 3


def test_shuffles_keep_the_totals_of_experts_and_differ_from_each_other():
    windows = windows_of([wave("a", 120), wave("b", 120, seed=1), wave("c", 150, seed=2)])
    different = 0
    for one in expert_use(models()["ldl"], windows, np.arange(len(windows))).values():
        for tables in (one.series, *one.phase.values()):
            assert (tables.shuffled.sum(1) == tables.counts.sum(0)).all()
            different += not np.array_equal(tables.shuffled[0], tables.shuffled[1])
        assert (one.series.shuffled.sum(2) == one.series.counts.sum(1)).all()
    assert different > 0


@pytest.mark.parametrize(
    ("freq", "title", "start", "phases"),
    [
        ("h", "hour of the day", "2024-01-01 22:00", [22, 23, 0]),
        ("2h", "hour of the day", "2024-01-01 20:00", [20, 22, 0]),
        ("15min", "hour of the day", "2024-01-01 22:30", [22, 22, 23]),
        ("s", "minute of the hour", "2024-01-01 00:04:58", [0, 0, 1]),
        ("D", "day of the week", "2024-01-06", [5, 6, 0]),
        ("B", "day of the week", "2024-01-04", [3, 4, 0]),
        ("W-SUN", "month", "2024-01-21", [0, 0, 1]),
        ("MS", "month", "2024-11-01", [10, 11, 0]),
        ("ME", "month", "2024-11-30", [10, 11, 0]),
        ("BME", "month", "2024-11-29", [10, 11, 0]),
        ("QS-JAN", "quarter", "2024-07-01", [2, 3, 0]),
        ("YS-JAN", None, "2024-01-01", []),
    ],
)
def test_phases_by_the_calendar(freq, title, start, phases):
    series = Series.plain("a", np.zeros(3), pd.Timestamp(start), freq)
    named = calendar(series, series.season)
    found = Phases([series], np.array([series.season]))
    first, size, phase = found.at(np.zeros(3, int), np.arange(3))
    if title is None:
        assert named is None
        assert (found.count, size.tolist()) == (0, [0, 0, 0])
    else:
        assert named.title == title
        assert phase.tolist() == phases
        assert set(size) == {len(named.names)}
        assert set(first) == {0}


def test_phases_by_position_where_there_is_no_calendar():
    whole = Series.plain("whole", np.zeros(12))
    assert Phases([whole], np.array([5])).at(np.zeros(12, int), np.arange(12))[2].tolist() == [
        *range(5),
        *range(5),
        0,
        1,
    ]
    long = Phases([Series.plain("long", np.zeros(100))], np.array([96]))
    assert long.count == 24
    assert long.at(np.zeros(4, int), np.array([0, 3, 4, 96]))[2].tolist() == [0, 0, 1, 0]


def test_several_calendars_have_rows_of_their_own():
    series = [
        wave("h", 30),
        Series.plain("y", np.zeros(9), pd.Timestamp("2024-01-01"), "YS-JAN"),
        wave("m", 30, freq="MS"),
    ]
    found = Phases(series, np.array([s.season for s in series]))
    assert found.parts() == {"hour of the day": slice(0, 24), "month": slice(24, 36)}
    first, size, phase = found.at(np.array([0, 1, 2]), np.array([2, 2, 2]))
    assert (first.tolist(), size.tolist()) == ([0, 0, 24], [24, 0, 12])
    assert phase.tolist() == [7, 0, 2]


def test_traits_by_hand():
    """One expert takes a rising half, another a flat one."""
    past = np.array([[0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, np.nan]])
    traits = Traits(3)
    chosen = np.zeros((1, 2, 3), bool)
    chosen[0, 0, 0] = chosen[0, 1, 1] = True
    traits.add(past, chosen, np.array([0, 4]), np.array([4, 8]))
    level, rise, rough = traits.table()
    assert level.tolist() == pytest.approx([-1, 1, 0])
    assert rise.tolist() == pytest.approx([1, -1, 0])
    assert rough.tolist() == pytest.approx([1, -1, 0])
    single = Traits(2)
    single.add(past, np.eye(2, dtype=bool)[None], np.array([1, 5]), np.array([2, 6]))
    assert single.table()[1].tolist() == pytest.approx([1, -1])  # a point's rise is the step to it


def test_earlier_contexts_follow_the_test_windows():
    windows = windows_of([wave("a", 120)])
    found = contexts(windows)
    assert np.array_equal(found.index[: len(windows)], windows.index)
    assert len(found) > len(windows)
    assert found.index[len(windows) :, 1].max() < windows.index[:, 1].min()
    assert len(windows) == len(windows_of([wave("a", 120)]))  # itself unchanged


def test_samples_take_the_first_ones_before_others():
    assert sampled(5, 9).tolist() == [0, 1, 2, 3, 4]
    some = sampled(100, 20, first=15)
    assert some[:15].tolist() == list(range(15))
    assert len(set(some.tolist())) == 20
    few = sampled(100, 10, first=15)
    assert len(set(few.tolist())) == 10
    assert few.max() < 15
    even = np.arange(0, 2400, 24)
    assert len(set((sampled(2400, 100, 2400) % 24).tolist())) > 12 > len(set((even % 24).tolist()))


def test_budgets_and_shares():
    assert [affordable(macs, 100, least=2, most=50) for macs in (0, 1, 10, 1000)] == [50, 50, 10, 2]
    assert shares(np.array([[1, 3], [0, 0]])).tolist() == [[0.25, 0.75], [0, 0]]


def test_multiply_adds_of_a_trace_grow_with_the_windows():
    model = models()["segmoe"]
    one, two = (windows_of([wave("a", 120)]).batch(np.arange(n)) for n in (1, 2))
    assert 0 < trace_macs(model, one) < trace_macs(model, two) == 2 * trace_macs(model, one)
