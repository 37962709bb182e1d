"""The tasks by name: what each predicts, how labels are kept, its loss, and which figure judges it.

Labels of a batch are a dictionary task -> tensor; what is unknown carries a value of its own, so that images may have
labels for some tasks or some pixels only:

- semseg, parts: class numbers int64 [B, H, W], unknown -1.
- saliency, edges: 0 or 1, float32 [B, H, W], unknown -1.
- depth: metres, float32 [B, H, W], unknown 0.
- normals: unit vectors, float32 [B, 3, H, W], unknown all 0; in the camera's frame: x right, y up, z to the camera.
- classification: class numbers int64 [B], unknown -1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

UNKNOWN = -1
"""Label of what is unknown, for classes, saliency and edges."""
EDGE_SHARE = 0.95
"""Weight of edge pixels in the loss of edges, against 1 minus it for all others, as published."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(prediction, label) -> scalar, the mean over what is known; 0 with a gradient of zeros where nothing is."""


def _mean(values: Tensor, known: Tensor) -> Float[Tensor, ""]:
    """Mean of the values that are known, without a look at how many there are."""
    return torch.where(known, values, 0.0).sum() / known.sum().clamp(min=1)


def class_loss(scores: Float[Tensor, "B C *S"], label: Tensor) -> Float[Tensor, ""]:
    """Cross-entropy of class scores with class numbers [B, *S]."""
    known = label != UNKNOWN
    return _mean(F.cross_entropy(scores.float(), label.clamp(min=0), reduction="none"), known)


def saliency_loss(logits: Float[Tensor, "B 1 H W"], label: Float[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """Binary cross-entropy in which salient and other pixels of the batch weigh equally much."""
    known = label != UNKNOWN
    share = _mean(label, known)  # of salient pixels
    weight = torch.where(label > 0.5, 1 - share, share)
    values = F.binary_cross_entropy_with_logits(logits[:, 0].float(), label.clamp(min=0), reduction="none")
    return _mean(2 * weight * values, known)


def edge_loss(logits: Float[Tensor, "B 1 H W"], label: Float[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """Binary cross-entropy with a fixed weight for edge pixels, as there are few."""
    weight = torch.where(label > 0.5, EDGE_SHARE, 1 - EDGE_SHARE)
    values = F.binary_cross_entropy_with_logits(logits[:, 0].float(), label.clamp(min=0), reduction="none")
    return _mean(weight * values, label != UNKNOWN)


def depth_loss(depth: Float[Tensor, "B 1 H W"], label: Float[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """Mean absolute error in metres."""
    return _mean((depth[:, 0].float() - label).abs(), label > 0)


def normals_loss(normals: Float[Tensor, "B 3 H W"], label: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
    """Mean absolute difference of the unit vectors' components."""
    known = label.abs().sum(1) > 0  # [B, H, W]
    return _mean((F.normalize(normals.float(), dim=1) - label).abs().mean(1), known)


@dataclass(frozen=True)
class Kind:
    """What all instances of a task have in common."""

    title: str
    channels: int | None
    """Channels of the prediction; None: one per class."""
    loss: Loss
    decode: Callable[[Tensor], Tensor]
    """Prediction [B, C, ...] -> what a label looks like; probabilities for saliency and edges."""
    weight: float
    """Of its loss, as published where published."""
    metric: str
    """The figure that judges it, in the names of `apps.vision.multitask.metrics`."""
    higher_is_better: bool
    unknown: float
    """Value of a label that is unknown."""
    dense: bool = True
    """Whether it predicts something for every pixel, rather than for the image."""


def _most_likely(scores: Tensor) -> Tensor:
    return scores.argmax(1)


def _probability(logits: Tensor) -> Tensor:
    return logits[:, 0].float().sigmoid()


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=1)


def _plane(values: Tensor) -> Tensor:
    return values[:, 0].float()


TASKS: dict[str, Kind] = {
    "semseg": Kind("segmentation", None, class_loss, _most_likely, 1.0, "miou", True, UNKNOWN),
    "parts": Kind("human parts", None, class_loss, _most_likely, 2.0, "miou", True, UNKNOWN),
    "saliency": Kind("saliency", 1, saliency_loss, _probability, 5.0, "miou", True, UNKNOWN),
    "depth": Kind("depth", 1, depth_loss, _plane, 1.0, "rmse", False, 0),
    "normals": Kind("surface normals", 3, normals_loss, _unit, 10.0, "mean_angle", False, 0),
    "edges": Kind("edges", 1, edge_loss, _probability, 50.0, "odsf", True, UNKNOWN),
    "classification": Kind("classification", None, class_loss, _most_likely, 1.0, "accuracy", True, UNKNOWN, False),
}
"""Tasks by name. A further one is a line here, a measure in `metrics`, and a name in `settings.TaskName`."""


@dataclass(frozen=True)
class TaskSpec:
    """One task of a data set: its name and, where it predicts classes, their names."""

    name: str
    classes: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """What it has in common with the task of other data sets."""
        return TASKS[self.name]

    @property
    def channels(self) -> int:
        """Channels of the prediction."""
        return self.kind.channels or len(self.classes)


@dataclass(frozen=True)
class SceneSpec:
    """What a multi-task model must know of its images and tasks; kept with its weights."""

    height: int
    width: int
    tasks: tuple[TaskSpec, ...]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    channels: int = 3

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of their gates."""
        return tuple(task.name for task in self.tasks)

    def task(self, name: str) -> TaskSpec:
        """The task of a name."""
        return self.tasks[self.names.index(name)]

    @classmethod
    def from_dict(cls, values: Mapping) -> SceneSpec:
        """From plain data, as `apps.tree.plain` gives it."""
        tasks = tuple(TaskSpec(task["name"], tuple(task["classes"])) for task in values["tasks"])
        rest = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**{**rest, "tasks": tasks})
