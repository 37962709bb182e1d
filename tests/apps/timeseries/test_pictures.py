"""Pictures of series: files by ids, gaps, and expert colours where units lie."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import moecore
from apps.figures import expert_color
from apps.timeseries import pictures
from apps.timeseries.pictures import Example
from apps.timeseries.prediction import SeriesForecast
from apps.timeseries.routing import ByLabel, ExpertUse
from apps.timeseries.series import Series
from apps.timeseries.traits import Traits

LEVELS = (0.1, 0.5, 0.9)


def series_of(y, id: str = "a", start: object = "2024-01-01", freq: str | int = "h") -> Series:
    return Series.plain(id, np.asarray(y, float), start if isinstance(start, int) else pd.Timestamp(start), freq)


def forecast_of(series: Series, horizon: int = 4) -> SeriesForecast:
    mean = np.arange(horizon, dtype=float)
    return SeriesForecast(series, len(series), mean, np.stack([mean - 1, mean, mean + 1]))


def example_of(y, context: int = 8, horizon: int = 4, **changes) -> Example:
    series, mean = series_of(y), np.arange(horizon, dtype=float)
    quantiles = np.stack([mean - 1, mean, mean + 1])
    given = {"series": series, "row": 0, "origin": len(series) - horizon, "context": context, "label": "a: $x$"}
    given |= {"mean": mean, "naive": mean + 0.5, "quantiles": quantiles, "levels": LEVELS}
    return Example(**(given | changes))


def use_of(starts, experts, number: int = 3, context: int = 8) -> ExpertUse:
    metrics = moecore.LayerMetrics([1 / number] * number, 0.0, 1.0, 1.0, 0, 1.0, 0.0)
    starts = np.array(starts)
    ends = np.append(starts[1:], context)
    ends = np.where(ends > starts, ends, context)
    table = ByLabel.zeros(1, number)
    return ExpertUse(metrics, table, {}, {}, starts, ends, Traits(number), {0: np.array(experts)})


def drawn(figure: Figure) -> Figure:
    """The figure, once it has been drawn without a warning (which here is an error)."""
    figure.savefig(io.BytesIO(), format="svg")
    return figure


def test_a_png_for_every_series_whatever_it_is_called(tmp_path):
    ids = ["a", "A", "a/b", "a\\b", "", "..", "../../etc", "a-2", "ü $x$", "x" * 300, "a\n", "CON"]
    forecasts = [forecast_of(series_of(np.arange(9.0), id)) for id in ids]
    folder = pictures.plot_forecasts("SegMoE", forecasts, LEVELS, tmp_path / "deep" / "plots")
    assert folder == tmp_path / "deep" / "plots"
    files = list(folder.iterdir())
    assert list((tmp_path).iterdir()) == [tmp_path / "deep"]
    names = {file.name.casefold() for file in files}
    assert len(names) == len(ids)
    assert {"a.png", "a_b.png", "series.png"} <= names
    for file in files:
        assert len(file.name) < 100
        with Image.open(file) as image:
            image.verify()


@pytest.mark.parametrize(
    "series",
    [
        series_of([1, np.nan, 2, np.nan, np.nan, 3], start="1700-01-01", freq="YS-JAN"),
        series_of([np.nan, 5.0], start=7, freq=3),
        series_of([4.0] * 50, start=pd.Timestamp("2024-03-31", tz="Europe/Berlin")),
    ],
)
def test_gaps_whole_numbers_time_zones_and_single_steps(series, tmp_path):
    one = SeriesForecast(series, len(series), np.array([2.0]), np.array([[1.0], [2.0], [3.0]]))
    none = SeriesForecast(series, len(series), np.array([2.0, 3.0]), None)
    pictures.plot_forecasts("m", [one, none], LEVELS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_gaps_are_gaps_and_single_values_are_dots():
    axes = Figure().subplots()
    y = np.array([1.0, 2.0, np.nan, 4.0, np.nan, np.nan, 7.0])
    pictures.line(axes, np.arange(7), y, "black", "truth")
    assert np.isnan(axes.lines[0].get_ydata()[[2, 4, 5]]).all()
    assert list(axes.lines[1].get_xdata()) == [3, 6]


def test_forecasts_show_truth_naive_and_intervals_for_each_window():
    examples = [example_of(np.arange(20.0)), example_of([np.nan] * 6 + [1.0] * 6), example_of(np.arange(5.0))]
    examples.append(example_of(np.arange(20.0), quantiles=None, levels=()))
    figure = drawn(pictures.forecasts(examples, "SegMoE"))
    visible = [axes for axes in figure.axes if axes.axison]
    assert len(visible) == 4
    labels = visible[0].get_legend_handles_labels()[1]
    assert labels == ["80%", "seasonal naive", "observed", "SegMoE"]
    assert "80%" not in visible[3].get_legend_handles_labels()[1]
    truth = visible[0].lines[1]
    assert list(truth.get_ydata())[-4:] == [16, 17, 18, 19]


def test_components_stand_below_their_window():
    parts = {"trend": np.arange(4.0), "seasonality": np.zeros(4)}
    figure = drawn(pictures.components([example_of(np.arange(20.0), components=parts)] * 2, "LDLMoE"))
    assert len(figure.axes) == 2 * 3
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["", "trend", "seasonality"]


def test_errors_by_step_and_calibration():
    steps = np.arange(1.0, 7)
    lines = {"SegMoE": steps, "SeasonalNaive": steps + 1}
    figure = drawn(pictures.by_step({"MSE": lines, "MAE": lines, "coverage of the 80% interval": lines}))
    assert sum(axes.axison for axes in figure.axes) == 3
    assert figure.axes[2].lines[-1].get_ydata()[0] == pytest.approx(0.8)
    figure = drawn(pictures.calibration({"SegMoE": np.array([0.2, np.nan, 0.8])}, LEVELS))
    assert list(figure.axes[0].lines[1].get_xdata()) == list(LEVELS)


def test_specialisation_has_a_mark_per_layer():
    panels = {
        "series": {"block 0": (0.2, 0.01), "block 1": (0.0, 0.02)},
        "month": {"block 0": (0, 0), "block 1": (0, 0)},
    }
    figure = drawn(pictures.specialisation(panels))
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.0, 0.2]
    assert list(figure.axes[0].lines[0].get_xdata()) == [0.02, 0.01]


def spans(axes) -> list[str]:
    return [to_hex(patch.get_facecolor()) for patch in axes.patches]


def test_segments_are_coloured_by_their_experts_with_borders_between():
    use = {"one": use_of([0, 3, 6], [2, 0, -1]), "two": use_of([0], [1])}
    figure = drawn(pictures.context_routing(example_of(np.arange(20.0)), use, {"one": "block 0", "two": "block 1"}))
    first, second = figure.axes
    assert spans(first) == [to_hex(expert_color(e)) for e in (2, 0)]  # what was not observed stays white
    assert spans(second) == [to_hex(expert_color(1))]
    widths = [patch.get_width() for patch in first.patches]
    assert widths == pytest.approx([3 / 24, 3 / 24])  # in days, of hours
    assert len(first.lines) == 2  # the series and a border
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["expert 0", "expert 1", "expert 2"]


def test_points_are_strips_below_the_series():
    use = {"one": use_of(list(range(80)), [0] * 30 + [1] * 50, context=80)}
    figure = drawn(pictures.context_routing(example_of(np.arange(100.0), context=80), use, {"one": "block 0"}))
    series, strip = figure.axes
    assert spans(series) == []
    assert [patch.get_width() * 24 for patch in strip.patches] == pytest.approx([30, 50])


def test_what_lies_before_the_series_is_not_drawn_nor_are_covariates():
    """Eight points of context, of which the series has five; the units of a covariate follow the target's."""
    use = {"one": use_of([0, 4, 0, 4], [0, 1, 2, 2])}
    figure = drawn(pictures.context_routing(example_of(np.arange(9.0)), use, {"one": "block 0"}))
    widths = [patch.get_width() * 24 for patch in figure.axes[0].patches]
    assert widths == pytest.approx([1, 4])
    assert spans(figure.axes[0]) == [to_hex(expert_color(e)) for e in (0, 1)]
