"""A classifier ready for export."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from torch import Tensor

from apps.vision.data import VisionData
from apps.vision.loading import Trained
from export.decisions import largest
from export.exportable import Exportable, Outputs, Sample, Score, samples_of
from moecore import __version__

COMPARED = 1000
"""Test images that files are compared on at most."""


def exportable(trained: Trained, data: VisionData, calibration: int) -> Exportable:
    """Images in [0, 1] -> scores of the classes.

    Args:
        trained: the model.
        data: whose test images files are compared on, and whose training images ranges are taken from.
        calibration: how many of the latter.
    """
    model = copy.deepcopy(trained.model).cpu().eval()
    images = model.images
    batches, labels, rows = [], [], 0
    for pixels, label in data.test_dataloader():
        batches.append(pixels[: COMPARED - rows])
        labels.append(label[: COMPARED - rows])
        rows += len(batches[-1])
        if rows >= COMPARED:
            break
    truth = np.concatenate([label.numpy() for label in labels])

    def accuracy(outputs: Outputs) -> float:
        return float((outputs[0].argmax(1) == truth[: len(outputs[0])]).mean())

    return Exportable(
        module=model,
        inputs=("images",),
        outputs=("scores",),
        example=(model.example_input(2),),
        samples=_samples(iter(batches)),
        calibration=_samples(_training(data, calibration)),
        metadata={
            "task": "image classification",
            "classes": list(images.classes),
            "input": f"[batch, {images.channels}, {images.image_size}, {images.image_size}], pixels in [0, 1]",
            "mean": images.mean,
            "std": images.std,
            "moecore_version": __version__,
        },
        decide=largest(),
        score=Score("accuracy", accuracy),
    )


def _samples(batches: Iterator[Float[Tensor, "B C H W"]]) -> list[Sample]:
    return samples_of(("images",), *((batch,) for batch in batches))


def _training(data: VisionData, count: int) -> Iterator[Float[Tensor, "B C H W"]]:
    """The first training images, as they are evaluated."""
    images = data.images("train")
    count = min(count, len(images))
    for start in range(0, count, 32):
        yield images.plain(list(range(start, min(start + 32, count))))[0]
