"""Measuring a classifier on a data set: scores, errors, calibration, and what its experts did."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

import moecore
from apps.progress import track
from apps.timing import clock
from apps.vision.models.vimoe import ViMoE


@dataclass
class Evaluation:
    """Scores of a whole data set and statistics of the routing."""

    scores: Float[Tensor, "N C"]
    labels: Int[Tensor, " N"]
    routing: dict[str, moecore.LayerMetrics]
    expert_counts: dict[str, Int[Tensor, "N E"]]
    """Per layer, tokens of each image that went to each expert."""
    images_per_second: float
    """Over the forward passes, CPU time if on a CPU."""
    maps: dict[str, Int[Tensor, "N ..."]] = field(default_factory=dict)
    """Per layer the main expert of every unit of every image (`moecore.token_map`), as int16."""

    def label_counts(self, layer: str) -> Int[Tensor, "C E"]:
        """Tokens of each class that went to each expert of a layer."""
        return moecore.sum_by_label(self.expert_counts[layer], self.labels, self.scores.shape[1])

    def specialisation(self, layer: str) -> float:
        """Share of the class that the choice of expert gives away."""
        return moecore.specialisation(self.label_counts(layer))

    def chance(self, layer: str, draws: int = 5) -> float:
        """The same with labels shuffled among the images: what so many images give by chance."""
        generator = torch.Generator().manual_seed(0)
        counts, classes = self.expert_counts[layer], self.scores.shape[1]
        shuffled = [self.labels[torch.randperm(len(self.labels), generator=generator)] for _ in range(draws)]
        return sum(moecore.specialisation(moecore.sum_by_label(counts, y, classes)) for y in shuffled) / draws

    @property
    def confusion(self) -> Int[Tensor, "C C"]:
        """Counts, true class by predicted class."""
        return multiclass_confusion_matrix(self.scores, self.labels, self.scores.shape[1])

    def scalars(self) -> dict[str, float]:
        """Figures by flat name."""
        classes = self.scores.shape[1]
        figures = {
            "images": float(len(self.labels)),
            "accuracy": float(multiclass_accuracy(self.scores, self.labels, classes, average="micro")),
            "macro_f1": float(multiclass_f1_score(self.scores, self.labels, classes, average="macro")),
            "log_loss": float(F.cross_entropy(self.scores, self.labels)),
            "calibration_error": float(multiclass_calibration_error(self.scores.softmax(-1), self.labels, classes)),
            "images_per_second": self.images_per_second,
        }
        if classes > 5:
            figures["top5_accuracy"] = float(
                multiclass_accuracy(self.scores, self.labels, classes, top_k=5, average="micro")
            )
        for layer, metrics in self.routing.items():
            figures |= {f"routing/{layer}/{name}": value for name, value in metrics.scalars().items()}
            figures[f"routing/{layer}/specialisation"] = self.specialisation(layer)
        return figures


@torch.no_grad()
def evaluate(model: ViMoE, batches: object, progress: bool = True) -> Evaluation:
    """Run a model over batches of (images, labels).

    Args:
        model: put into eval mode.
        batches: an iterable of batches with a length.
        progress: show a bar.
    """
    model.eval()
    device = model.mean.device
    stats = moecore.RoutingStats()
    scores, labels, seconds = [], [], 0.0
    maps: dict[str, list[Tensor]] = {}
    counts: dict[str, list[Tensor]] = {}
    for images, target in track(batches, "evaluating", progress):
        started = clock(device)
        with moecore.record(model) as recording:
            out = model(images.to(device))
        seconds += clock(device) - started
        scores.append(out.float().cpu())
        labels.append(target)
        stats.update(recording)
        for routing in recording:
            counts.setdefault(routing.name, []).append(moecore.expert_counts(routing).cpu())
            maps.setdefault(routing.name, []).append(moecore.token_map(routing).short().cpu())
    return Evaluation(
        torch.cat(scores),
        torch.cat(labels),
        stats.metrics(),
        {name: torch.cat(parts) for name, parts in counts.items()},
        sum(map(len, labels)) / max(seconds, 1e-9),
        {name: torch.cat(parts) for name, parts in maps.items()},
    )
