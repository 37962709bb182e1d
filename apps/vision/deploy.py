"""Export of a classifier."""

from __future__ import annotations

import copy
from pathlib import Path

from apps.errors import UserError
from apps.vision.data import VisionData
from apps.vision.loading import Trained
from export.onnx import ExportError
from export.onnx import export_onnx as write_onnx
from export.verify import TOLERANCE, compare_onnx
from moecore import __version__
from moecore.files import atomic_path


def export_onnx(trained: Trained, data: VisionData, path: Path) -> dict[str, float]:
    """Write the model as ONNX and compare it with PyTorch on test images.

    Args:
        trained: the model.
        data: whose test images to compare on.
        path: of the file.

    Returns:
        The comparison's figures.

    Raises:
        UserError: if the model has no ONNX form, or its outputs differ; a file from before then stays as it is.
    """
    model = copy.deepcopy(trained.model).cpu().eval()
    images = model.images
    metadata = {
        "task": "image classification",
        "classes": list(images.classes),
        "input": f"[batch, {images.channels}, {images.image_size}, {images.image_size}], pixels in [0, 1]",
        "moecore_version": __version__,
    }
    with atomic_path(path) as temporary:
        try:
            write_onnx(model, model.example_input(2), temporary, "images", "scores", metadata)
        except ExportError as error:
            raise UserError(f"export: {error}") from error
        comparison = compare_onnx(model, temporary, (batch for batch, _ in data.test_dataloader()))
        if not comparison.passed:
            raise UserError(
                f"export: outputs differ from PyTorch by {comparison.max_relative_error:.2g} of their range, "
                f"more than {TOLERANCE}; no file was kept"
            )
    return comparison.scalars()
