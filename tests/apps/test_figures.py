"""Charts at the edges: one point, one layer, many experts, odd names."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from apps import figures

NAN, INF = float("nan"), float("inf")
NAMES = ["cat", "$\\foo$", "$5", "<b>&'\"", "", " ", "a_b^c", "ein sehr langer Name für eine Klasse"]


def drawn(figure: Figure) -> Figure:
    """The figure, once it has been drawn without a warning (which here is an error)."""
    figure.savefig(io.BytesIO(), format="svg")
    return figure


def shown(figure: Figure) -> int:
    """Frames that a reader sees."""
    return sum(axes.axison for axes in figure.axes)


@pytest.mark.parametrize("values", [[0.5], [NAN], [INF, 1.0]])
def test_curves_of_any_length_and_value(values):
    steps = list(range(len(values)))
    figure = drawn(figures.curves({"loss": {"train": (steps, values), "validation": (steps, values)}, "lr": {}}))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "lr"]
    assert len(figure.axes[0].lines) == 2
    assert figure.axes[0].get_legend() is not None


@pytest.mark.parametrize("layers", [1, 3, 4, 5])
def test_load_has_one_frame_per_layer_and_none_empty(layers):
    shares = np.full((2, 4), 0.25)
    figure = drawn(figures.load_over_time({f"block {i}": ([1, 9], shares) for i in range(layers)}))
    assert shown(figure) == layers


def test_load_of_one_step():
    drawn(figures.load_over_time({"block 0": ([7], np.full((1, 3), 1 / 3))}))


@pytest.mark.parametrize(("maps", "rows", "columns"), [(1, 1, 1), (4, 2, 17), (2, 130, 3)])
def test_heat_maps_of_any_shape(maps, rows, columns):
    values = {f"block {i}": np.random.default_rng(0).random((rows, columns)) for i in range(maps)}
    figure = drawn(figures.heatmaps(values, [f"class {i}" for i in range(rows)], "class", "expert"))
    assert shown(figure) == 2 * maps  # with a colour bar each


def test_a_heat_map_of_zeros():
    drawn(figures.heatmaps({"block 0": np.zeros((2, 3))}, ["a", "b"], "class", "expert"))


@pytest.mark.parametrize("classes", [2, 20, 21, 45])
def test_confusion_writes_counts_while_there_is_room(classes):
    names = (NAMES * 20)[:classes]
    figure = drawn(figures.confusion(np.eye(classes, dtype=int) * 3, names))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == (["3"] * classes if classes <= 20 else [])


def test_confusion_with_a_class_that_never_occurs():
    counts = np.array([[2, 1], [0, 0]])
    drawn(figures.confusion(counts, ["a", "b"]))


def test_names_are_no_formulas():
    figure = drawn(figures.confusion(np.eye(8, dtype=int), NAMES))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == NAMES


def test_bars_are_in_order_from_the_top_with_their_marks():
    figure = drawn(figures.bars({"block 0": 0.3, "block 1": 0.1}, {"block 0": 0.2, "block 1": 0.0}, "share", "chance"))
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.1, 0.3]
    assert list(axes.lines[0].get_xdata()) == [0.0, 0.2]
    figures.bars({"a": 0.0}, {"a": 0.0}, "share", "chance")


def test_colours_of_experts_repeat_only_after_twenty():
    assert len({figures.expert_color(e) for e in range(20)}) == 20
    assert figures.expert_color(23) == figures.expert_color(3)
