"""Measures of the tasks, against slow counting, geometry, and published figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_jaccard_index

from apps.errors import UserError
from apps.vision.multitask.edges import edge_counts, matching_distance
from apps.vision.multitask.metrics import MEASURES, Edges, delta_m, delta_per_task, make_measure
from apps.vision.multitask.tasks import TASKS, TaskSpec

CLASSES = ("sky", "road", "car", "tree")
SPECS = [TaskSpec(name, CLASSES if kind.channels is None else ()) for name, kind in TASKS.items()]
PASCAL = {
    "semseg/miou": 72.8,
    "parts/miou": 62.1,
    "saliency/miou": 66.3,
    "normals/mean_angle": 14.5,
    "edges/odsf": 71.7,
}
"""M³ViT small on PASCAL-Context, as published."""
PASCAL_SINGLE = {
    "semseg/miou": 66.2,
    "parts/miou": 59.9,
    "saliency/miou": 66.3,
    "normals/mean_angle": 13.9,
    "edges/odsf": 68.8,
}


def example(task: TaskSpec, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(prediction as decoded, label) of a task with a fifth of the labels unknown."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 12, 16)
    unknown = torch.rand(shape, generator=generator) < 0.2
    if task.name == "normals":
        pair = [F.normalize(torch.randn(count, 3, 12, 16, generator=generator), dim=1) for _ in range(2)]
        return pair[0], torch.where(unknown[:, None], 0.0, pair[1])
    if task.name == "depth":
        pair = [10 * torch.rand(shape, generator=generator) + 0.1 for _ in range(2)]
        return pair[0], torch.where(unknown, 0.0, pair[1])
    if task.name in ("saliency", "edges"):
        label = (torch.rand(shape, generator=generator) < 0.2).float()
        return torch.rand(shape, generator=generator), torch.where(unknown, -1.0, label)
    shape = shape if task.kind.dense else shape[:1]
    pair = torch.randint(0, 4, (2, *shape), generator=generator)
    return pair[0], torch.where(unknown if task.kind.dense else unknown[:, 0, 0], -1, pair[1])


def measured(task: TaskSpec | str, prediction: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    """The figures of one batch."""
    measure = make_measure(TaskSpec(task) if isinstance(task, str) else task)
    measure.update(prediction, label)
    return measure.compute()


def test_every_task_has_a_measure():
    assert MEASURES.keys() == TASKS.keys()


@pytest.mark.parametrize("task", SPECS, ids=lambda task: task.name)
def test_figures_are_floats_and_the_first_judges_the_task(task):
    found = measured(task, *example(task, 3))
    assert next(iter(found)) == task.kind.metric
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("task", SPECS, ids=lambda task: task.name)
def test_batches_and_processes_add_up(task):
    prediction, label = example(task, 7)
    whole = measured(task, prediction, label)
    first, second = make_measure(task), make_measure(task)
    first.update(prediction[:2], label[:2])
    first.update(prediction[2:3], label[2:3])
    second.update(prediction[3:], label[3:])
    first.merge_state(second)
    assert first.compute() == pytest.approx(whole, rel=1e-6)
    first.reset()
    first.update(prediction, label)
    assert first.compute() == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("task", SPECS, ids=lambda task: task.name)
def test_unknown_pixels_do_not_matter(task):
    prediction, label = example(task, 3)
    other, _ = example(task, 3, seed=1)
    known = label != task.kind.unknown
    if task.name == "edges":  # thinning looks around: whole images
        label[1] = -1
        known = (label != -1).flatten(1).any(1)[:, None, None]
    assert measured(task, prediction, label) == measured(task, torch.where(known, prediction, other), label)


@pytest.mark.parametrize("task", SPECS, ids=lambda task: task.name)
def test_where_nothing_is_known_there_are_no_figures(task):
    prediction, label = example(task, 3)
    found = measured(task, prediction, torch.full_like(label, task.kind.unknown))
    assert all(math.isnan(value) for value in found.values())


def test_iou_is_that_of_sets_of_pixels():
    prediction, label = example(SPECS[0], 5)
    found = measured(SPECS[0], prediction, label)
    known = label >= 0
    for i, name in enumerate(CLASSES):
        given, wanted = (prediction == i) & known, label == i
        assert found[f"iou/{name}"] == pytest.approx(float((given & wanted).sum() / (given | wanted).sum()))
    assert found["miou"] == pytest.approx(sum(found[f"iou/{name}"] for name in CLASSES) / 4)
    assert found["miou"] == pytest.approx(float(multiclass_jaccard_index(prediction, label, 4, ignore_index=-1)))
    assert found["pixel_accuracy"] == pytest.approx(float((prediction == label).sum() / known.sum()))


def test_classes_that_do_not_occur_leave_the_mean_and_those_only_predicted_do_not():
    label = torch.tensor([[[0, 0, 1, 1], [-1, -1, -1, -1]]])
    prediction = torch.tensor([[[0, 0, 1, 2], [3, 3, 3, 3]]])
    found = measured(SPECS[0], prediction, label)
    assert (found["iou/sky"], found["iou/road"], found["iou/car"]) == (1, 0.5, 0)
    assert math.isnan(found["iou/tree"])  # predicted only where nothing is known
    assert found["miou"] == pytest.approx(0.5)
    assert found["pixel_accuracy"] == 0.75


def test_saliency_is_the_mean_over_images_at_the_best_threshold():
    generator = torch.Generator().manual_seed(5)
    label = (torch.rand(6, 9, 11, generator=generator) < 0.3).float()
    prediction = (0.6 * label + 0.5 * torch.rand(6, 9, 11, generator=generator)).clamp(max=1)
    label[torch.rand(6, 9, 11, generator=generator) < 0.1] = -1
    ious, fs = [], []
    for threshold in np.linspace(0.2, 0.9, 15):
        iou, precision, recall = [], [], []
        for values, truth in zip(prediction, label, strict=True):
            chosen, salient = (values > threshold) & (truth >= 0), truth == 1
            hits = (chosen & salient).sum().item()
            iou.append(hits / (chosen | salient).sum().item())
            precision.append(hits / chosen.sum().item() if chosen.any() else 0)
            recall.append(hits / salient.sum().item())
        p, r = np.mean(precision), np.mean(recall)
        ious.append(np.mean(iou))
        fs.append(2 * p * r / (p + r))
    assert 0 < np.argmax(ious) < 14
    found = measured("saliency", prediction, label)
    assert found == pytest.approx({"miou": max(ious), "max_f": max(fs)})


@pytest.mark.parametrize(
    ("salient", "other", "iou"),
    [(0.95, 0.89, 1), (0.95, 0.91, 0.25), (0.21, 0.19, 1), (0.19, 0.1, 0), (0.51, 0.49, 1), (0.54, 0.51, 0.25)],
)
def test_saliency_tells_apart_what_a_threshold_lies_between(salient, other, iou):
    label = torch.zeros(1, 4, 4)
    label[0, 0] = 1
    prediction = torch.where(label == 1, salient, other)
    assert measured("saliency", prediction, label)["miou"] == pytest.approx(iou)


def test_an_image_without_salient_pixels_is_right_where_none_is_predicted():
    label = torch.zeros(2, 4, 4)
    label[1, :2] = 1
    prediction = torch.zeros(2, 4, 4)
    prediction[1, :2] = 1
    assert measured("saliency", prediction, label) == {"miou": 1, "max_f": 1}
    prediction[0, 0, 0] = 1
    assert measured("saliency", prediction, label) == {"miou": 0.5, "max_f": 0.5}


def test_depth_by_hand():
    label = torch.tensor([[[2.0, 4.0], [0.0, 8.0]]])
    prediction = torch.tensor([[[2.0, 5.0], [99.0, 6.5]]])
    found = measured("depth", prediction, label)
    assert found["rmse"] == pytest.approx(math.sqrt((0 + 1 + 2.25) / 3))
    assert found["abs_rel"] == pytest.approx((0 + 1 / 4 + 1.5 / 8) / 3)
    assert found["delta_1_25"] == pytest.approx(2 / 3)  # 5/4 is not below 1.25; 8/6.5 is
    assert measured("depth", -prediction, label)["delta_1_25"] == 0


def test_angles_are_those_by_which_normals_were_turned():
    generator = torch.Generator().manual_seed(2)
    label = F.normalize(torch.randn(2, 3, 20, 25, generator=generator, dtype=torch.float64), dim=1)
    axis = F.normalize(torch.linalg.cross(label, torch.randn(label.shape, generator=generator).double(), dim=1), dim=1)
    degrees = 180 * torch.rand(2, 20, 25, generator=generator, dtype=torch.float64) ** 3
    turn = torch.deg2rad(degrees)[:, None]
    prediction = label * turn.cos() + torch.linalg.cross(axis, label, dim=1) * turn.sin()
    found = measured("normals", prediction.float(), label.float())
    assert found["mean_angle"] == pytest.approx(float(degrees.mean()), abs=1e-4)
    assert found["median_angle"] == pytest.approx(float(degrees.median()), abs=0.01)
    for name, limit in (("within_11_25", 11.25), ("within_22_5", 22.5), ("within_30", 30)):
        assert found[name] == pytest.approx(float((degrees < limit).double().mean()))


def test_small_angles_are_not_lost_to_rounding_and_no_direction_is_a_right_angle():
    label = torch.zeros(1, 3, 1, 4)
    label[:, 2] = 1
    turned = torch.tensor([math.sin(1e-4), 0, math.cos(1e-4)])
    found = measured("normals", turned[None, :, None, None].expand_as(label), label)
    assert found["mean_angle"] == pytest.approx(math.degrees(1e-4), rel=1e-3)
    assert measured("normals", torch.zeros_like(label), label)["mean_angle"] == pytest.approx(90)
    opposite = measured("normals", -label, label)
    assert opposite["mean_angle"] == pytest.approx(180)
    assert opposite["median_angle"] == pytest.approx(180, abs=0.01)


def test_edges_sum_counts_over_images_and_take_the_best_threshold():
    prediction, label = example(TaskSpec("edges"), 4)
    measure = Edges(thresholds=9, tolerance=0.1)
    measure.update(prediction, label)
    thresholds, distance = np.arange(1, 10) / 10, matching_distance(12, 16, 0.1)
    counts = [edge_counts(p, t, thresholds, distance) for p, t in zip(prediction.numpy(), label.numpy(), strict=True)]
    matched, predicted = sum(c.matched for c in counts), sum(c.predicted for c in counts)
    labelled = sum(c.labelled for c in counts)
    precision, recall = matched / np.maximum(predicted, 1), matched / labelled
    ods = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-9))
    assert measure.compute()["odsf"] == pytest.approx(ods)
    best = [np.argmax(2 * c.matched / (c.predicted + c.labelled)) for c in counts]
    matched, predicted = (
        sum(getattr(c, name)[i] for c, i in zip(counts, best, strict=True)) for name in ("matched", "predicted")
    )
    assert measure.compute()["oisf"] == pytest.approx(2 * matched / (predicted + labelled))


def test_images_may_each_have_their_own_threshold_in_oisf_alone():
    """In one image the edge is weak, in the other a false line is stronger than that."""
    prediction, label = torch.zeros(2, 24, 24), torch.zeros(2, 24, 24)
    label[:, :, 5] = 1
    prediction[0, :, 5] = 0.3
    prediction[1, :, 5], prediction[1, :, 18] = 0.9, 0.5
    found = measured("edges", prediction, label)
    assert found["oisf"] == 1
    assert found["odsf"] == pytest.approx(2 * 48 / (72 + 48))  # at 0.3; above 0.5 one of two lines is found: 2/3


def test_false_edges_count_in_images_without_any_but_alone_make_no_figure():
    prediction, label = torch.zeros(2, 24, 24), torch.zeros(2, 24, 24)
    label[0, :, 5] = 1
    prediction[:, :, 5] = 0.9
    assert measured("edges", prediction, label) == pytest.approx({"odsf": 2 / 3, "oisf": 1})
    assert all(math.isnan(value) for value in measured("edges", prediction[1:], label[1:]).values())


def test_accuracy_is_of_known_images():
    found = measured("classification", torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, -1]))
    assert found == {"accuracy": pytest.approx(2 / 3)}


def names_of(figures: dict[str, float]) -> list[str]:
    """Tasks of some figures."""
    return [name.split("/")[0] for name in figures]


def test_delta_m_of_pascal_is_the_published_one_with_edges_and_lower_without():
    five = names_of(PASCAL)
    assert round(delta_m(PASCAL, PASCAL_SINGLE, five), 2) == 2.71
    assert round(delta_m(PASCAL, PASCAL_SINGLE, [task for task in five if task != "edges"]), 2) == 2.33


def test_delta_m_of_nyud_is_the_published_one():
    figures, single = {"semseg/miou": 49.1, "depth/rmse": 0.557}, {"semseg/miou": 43.9, "depth/rmse": 0.585}
    assert round(delta_m(figures, single, names_of(figures)), 2) == 8.32
    each = delta_per_task(figures, single, names_of(figures))
    assert each == pytest.approx({"semseg": 100 * 5.2 / 43.9, "depth": 100 * 0.028 / 0.585})


def test_worse_is_negative_for_errors_too():
    figures, single = {"depth/rmse": 0.6, "edges/odsf": 0.3}, {"depth/rmse": 0.5, "edges/odsf": 0.4}
    worse = delta_per_task(figures, single, names_of(figures))
    assert worse == pytest.approx({"depth": -20, "edges": -25})


@pytest.mark.parametrize("baseline", [{}, {"edges/odsf": 0.0}, {"edges/odsf": math.nan}, {"edges/odsf": None}])
def test_a_missing_baseline_is_named(baseline):
    baselines = {name: value for name, value in PASCAL_SINGLE.items() if name != "edges/odsf"} | baseline
    with pytest.raises(UserError, match=r"^tasks\.baselines: edges/odsf is \S+; add the figure .* edges alone, other"):
        delta_m(PASCAL, baselines, names_of(PASCAL))
