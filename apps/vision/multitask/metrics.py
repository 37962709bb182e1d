"""Measures of the tasks, summed over a data set and over processes, and the one figure of all tasks together.

A figure is nan where the data set has nothing to take it over. Figures are flat: the first is the task's `Kind.metric`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from apps.errors import UserError
from apps.vision.multitask import edges
from apps.vision.multitask.tasks import TASKS, UNKNOWN, TaskSpec

SALIENCY_THRESHOLDS = torch.linspace(0.2, 0.9, 15)
"""Of probability, as in the multi-task literature."""
DELTA_1 = 1.25
"""Ratio of depths up to which one counts as right."""
BINS_PER_DEGREE = 100
"""Of the histogram of angles."""
EDGE_THRESHOLDS = 33
"""A third of the Berkeley benchmark's 99, for a third of the time. `odsf` stays within 0.1 points unless the best
threshold is at an end of the range: where it is 0.05 or 0.95 it loses 0.3, where it is 0.02 about 1."""


def _counts(*shape: int) -> Int[Tensor, "*S"]:
    """Zeros to count in; what is counted may exceed the whole numbers of float32."""
    return torch.zeros(shape, dtype=torch.long)


def _sums(*shape: int) -> Float[Tensor, "*S"]:
    """Zeros to sum in: float32, as not all devices have float64."""
    return torch.zeros(shape)


class Sums(Metric):
    """A measure whose states add up over batches and processes.

    Args:
        states: by name, zero.
    """

    full_state_update = False

    def __init__(self, **states: Tensor) -> None:
        super().__init__()
        for name, state in states.items():
            self.add_state(name, state, "sum")


class ClassMaps(Sums):
    """Segmentation: intersection over union of classes, from one confusion matrix of all known pixels of the data set.

    `miou` is the mean over the classes that occur in labels or predictions, background included where it is a class.
    That is the field's (PASCAL VOC's) figure on any data set whose labels have every class; a class that occurs in
    neither has no IoU (nan), one that is only predicted, or labelled and never hit, has 0.

    Args:
        classes: their names.
    """

    counts: Tensor

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(counts=_counts(len(classes), len(classes)))  # label by prediction
        self.classes = tuple(classes)

    def update(self, prediction: Int[Tensor, "B H W"], label: Int[Tensor, "B H W"]) -> None:
        """Count pixels by label and prediction."""
        known = label != UNKNOWN
        cell = label[known] * len(self.classes) + prediction[known]
        self.counts += cell.bincount(minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> dict[str, float]:
        """`miou`, `pixel_accuracy`, and `iou/<class>` of every class."""
        counts = self.counts.cpu()
        hits = counts.diagonal()
        iou = hits / (counts.sum(0) + counts.sum(1) - hits)  # 0/0 = nan: occurs in neither
        each = {f"iou/{name}": value for name, value in zip(self.classes, iou.tolist(), strict=True)}
        return {"miou": float(iou.nanmean()), "pixel_accuracy": float(hits.sum() / counts.sum()), **each}


class Saliency(Sums):
    """Saliency: figures of each image at 15 thresholds from 0.2 to 0.9, averaged over images, at the best threshold.

    That is how papers on several tasks at once have it since Maninis et al. 2019 (arXiv 1904.08918): `miou` is the IoU
    of the salient pixels alone (the rest is no second class), and `max_f` the F-measure, with precision and recall in
    equal weight, of mean precision and mean recall. An image without salient pixels counts as 1 where none is
    predicted, else as 0; images of unknown label do not count.
    """

    iou: Tensor
    precision: Tensor
    recall: Tensor
    images: Tensor

    def __init__(self) -> None:
        steps = len(SALIENCY_THRESHOLDS)
        super().__init__(iou=_sums(steps), precision=_sums(steps), recall=_sums(steps), images=_counts())

    def update(self, prediction: Float[Tensor, "B H W"], label: Float[Tensor, "B H W"]) -> None:
        """Add the figures of each image; `prediction` are probabilities."""
        levels = len(SALIENCY_THRESHOLDS) + 1
        # [B, H, W]: how many thresholds the probability exceeds
        level = torch.bucketize(prediction.contiguous(), SALIENCY_THRESHOLDS.to(prediction))
        image = torch.arange(len(label), device=label.device)[:, None, None]
        known = label != UNKNOWN
        cell = ((2 * image + (label > 0.5)) * levels + level)[known]
        counts = cell.bincount(minlength=2 * levels * len(label)).view(-1, 2, levels)  # [B, salient, level]
        above = counts.flip(2).cumsum(2).flip(2)[:, :, 1:]  # [B, 2, T]
        false, hits = above.unbind(1)
        salient = counts[:, 1].sum(1, keepdim=True)  # [B, 1]
        measured = known.flatten(1).any(1)  # [B]
        nothing = (salient + false) == 0
        for name, whole in (("iou", salient + false), ("precision", hits + false), ("recall", salient)):
            share = torch.where(nothing, 1.0, hits / whole.clamp(min=1))  # [B, T]
            getattr(self, name).add_(share[measured].sum(0))
        self.images += measured.sum()

    def compute(self) -> dict[str, float]:
        """`miou` and `max_f`."""
        precision, recall = self.precision / self.images, self.recall / self.images
        f = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return {"miou": float((self.iou / self.images).max()), "max_f": float(f.max())}


class Depth(Sums):
    """Depth over all known pixels of the data set (Eigen et al. 2014, arXiv 1406.2283)."""

    squared: Tensor
    relative: Tensor
    close: Tensor
    pixels: Tensor

    def __init__(self) -> None:
        super().__init__(squared=_sums(), relative=_sums(), close=_counts(), pixels=_counts())

    def update(self, prediction: Float[Tensor, "B H W"], label: Float[Tensor, "B H W"]) -> None:
        """Add errors; both in metres."""
        known = label > 0
        depth, truth = prediction[known], label[known]  # [pixels]
        self.squared += (depth - truth).square().sum()
        self.relative += ((depth - truth).abs() / truth).sum()
        self.close += ((depth < DELTA_1 * truth) & (truth < DELTA_1 * depth)).sum()
        self.pixels += len(truth)

    def compute(self) -> dict[str, float]:
        """`rmse` in metres, `abs_rel`, and `delta_1_25`, the share of pixels less than a factor of 1.25 off."""
        rmse = (self.squared / self.pixels).sqrt()
        relative, close = self.relative / self.pixels, self.close / self.pixels
        return {"rmse": float(rmse), "abs_rel": float(relative), "delta_1_25": float(close)}


class Normals(Sums):
    """Angles between surface normals over all known pixels of the data set (Fouhey et al. 2013)."""

    degrees: Tensor
    histogram: Tensor

    def __init__(self) -> None:
        super().__init__(degrees=_sums(), histogram=_counts(180 * BINS_PER_DEGREE))

    def update(self, prediction: Float[Tensor, "B 3 H W"], label: Float[Tensor, "B 3 H W"]) -> None:
        """Add angles; both are unit vectors. One of length 0 that is predicted counts as a right angle."""
        known = label.abs().sum(1) > 0  # [B, H, W]
        # Kahan's formula: exact for small angles too, where the arc cosine of a product is not
        half = torch.atan2((prediction - label).norm(dim=1), (prediction + label).norm(dim=1))
        angle = torch.rad2deg(2 * half[known])  # [pixels]
        bins = (angle * BINS_PER_DEGREE).long().clamp(max=len(self.histogram) - 1)
        self.degrees += angle.sum()
        self.histogram += bins.bincount(minlength=len(self.histogram))

    def compute(self) -> dict[str, float]:
        """`mean_angle` and `median_angle` in degrees (the median to 0.01), and shares of pixels `within_<degrees>`."""
        up_to = self.histogram.cpu().cumsum(0)
        pixels = up_to[-1]
        mean = float(self.degrees.cpu() / pixels)
        middle = int(torch.searchsorted(up_to, (pixels + 1) // 2))
        median = (middle + 0.5) / BINS_PER_DEGREE if pixels > 0 else math.nan
        limits = {"within_11_25": 11.25, "within_22_5": 22.5, "within_30": 30}
        shares = {name: float(up_to[int(at * BINS_PER_DEGREE) - 1] / pixels) for name, at in limits.items()}
        return {"mean_angle": mean, "median_angle": median, **shares}


class Edges(Sums):
    """Boundaries: F-measure at the threshold best for the data set, and at that best for each image.

    See `apps.vision.multitask.edges`. Runs on the CPU: for 33 thresholds about 0.02 s an image of 64x96, 0.5 to 0.8 s
    one of 480x640.

    Args:
        thresholds: how many, evenly spread between 0 and 1; 99 in the Berkeley benchmark.
        tolerance: share of the diagonal within which pixels match; 0.011 is usual for NYUD.
    """

    matched: Tensor
    predicted: Tensor
    labelled: Tensor
    best: Tensor

    def __init__(self, thresholds: int = EDGE_THRESHOLDS, tolerance: float = edges.TOLERANCE) -> None:
        super().__init__(
            matched=_counts(thresholds), predicted=_counts(thresholds), labelled=_counts(), best=_counts(2)
        )
        self.thresholds = np.arange(1, thresholds + 1) / (thresholds + 1)
        self.tolerance = tolerance

    def update(self, prediction: Float[Tensor, "B H W"], label: Float[Tensor, "B H W"]) -> None:
        """Add the counts of each image; `prediction` are probabilities."""
        distance = edges.matching_distance(*label.shape[1:], self.tolerance)
        for strength, truth in zip(prediction.float().cpu().numpy(), label.cpu().numpy(), strict=True):
            counts = edges.edge_counts(strength, truth, self.thresholds, distance)
            f = edges.f_measure(counts.matched, counts.predicted, counts.labelled)  # [T]
            # of equal ones the highest threshold: where nothing is labelled (nan), that with the fewest false pixels
            best = len(f) - 1 - int(np.nan_to_num(f)[::-1].argmax())
            self.matched += torch.from_numpy(counts.matched).to(self.device)
            self.predicted += torch.from_numpy(counts.predicted).to(self.device)
            self.labelled += counts.labelled
            pair = (counts.matched[best], counts.predicted[best])
            self.best += torch.tensor(pair, device=self.device)

    def compute(self) -> dict[str, float]:
        """`odsf` and `oisf`."""
        labelled = self.labelled.cpu().numpy()
        ods = edges.f_measure(self.matched.cpu().numpy(), self.predicted.cpu().numpy(), labelled)  # [T]
        matched, predicted = self.best.cpu().numpy()
        return {
            "odsf": float(ods.max()),
            "oisf": float(edges.f_measure(matched, predicted, labelled)),
        }


class Classification(Sums):
    """Share of the images of known class that are given it."""

    right: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__(right=_counts(), images=_counts())

    def update(self, prediction: Int[Tensor, " B"], label: Int[Tensor, " B"]) -> None:
        """Count images."""
        known = label != UNKNOWN
        self.right += (known & (prediction == label)).sum()
        self.images += known.sum()

    def compute(self) -> dict[str, float]:
        """`accuracy`."""
        return {"accuracy": float(self.right / self.images)}


MEASURES: dict[str, Callable[[TaskSpec], Sums]] = {
    "semseg": lambda task: ClassMaps(task.classes),
    "parts": lambda task: ClassMaps(task.classes),
    "saliency": lambda _: Saliency(),
    "depth": lambda _: Depth(),
    "normals": lambda _: Normals(),
    "edges": lambda _: Edges(),
    "classification": lambda _: Classification(),
}
"""Makers of the measures by the task's name."""


def make_measure(task: TaskSpec) -> Metric:
    """The measure of a task.

    Its `update(prediction, label)` takes what `Kind.decode` gives and the label as `apps.vision.multitask.tasks` has
    it, on the measure's device; `compute()` gives figures by name, the first being `Kind.metric`.
    """
    return MEASURES[task.name](task)


def delta_per_task(
    figures: Mapping[str, float], baselines: Mapping[str, float], tasks: Sequence[str]
) -> dict[str, float]:
    """Relative change of each task's figure against that of a single-task model, in percent; positive is better.

    Args:
        figures: `<task>/<metric>`, such as `semseg/miou`, of the model with several tasks.
        baselines: the same of single-task models.
        tasks: names of the tasks.

    Raises:
        UserError: the baseline of a task is missing, not finite or 0.
    """
    deltas = {}
    for task in tasks:
        name = f"{task}/{TASKS[task].metric}"
        baseline = baselines.get(name)
        if not baseline or not math.isfinite(baseline):
            raise UserError(
                f"tasks.baselines: {name} is {'missing' if baseline is None else baseline}; add the figure of a model "
                f"trained for {task} alone, other than 0"
            )
        change = 100 * (figures[name] - baseline) / baseline
        deltas[task] = change if TASKS[task].higher_is_better else -change
    return deltas


def delta_m(figures: Mapping[str, float], baselines: Mapping[str, float], tasks: Sequence[str]) -> float:
    """Mean over the tasks of `delta_per_task`, in percent (Maninis et al. 2019, arXiv 1904.08918).

    Only comparable over the same set of tasks and the same baselines. M³ViT (arXiv 2210.14793) gives +2.71 for five
    tasks of PASCAL-Context, while its released code leaves edges out: the same model then has +2.33.

    Raises:
        UserError: as `delta_per_task`.
    """
    return fmean(delta_per_task(figures, baselines, tasks).values())
