"""Classes of new images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apps.errors import UserError
from apps.progress import track
from apps.vision.augment import for_evaluation
from apps.vision.models.vimoe import ImageSpec, ViMoE
from apps.vision.settings import DataConfig
from apps.vision.sources import SUFFIXES, Unreadable, decode


def predict_images(model: ViMoE, source: Path, config: DataConfig, top: int = 3) -> tuple[list[dict[str, Any]], int]:
    """One row per image: file, class, probability, and the next best classes.

    Args:
        model: in eval mode.
        source: an image, or a folder searched for images in all its subfolders.
        config: batch size, and whether unreadable images are skipped.
        top: classes per image.

    Returns:
        Rows, and how many images were skipped.
    """
    files = image_files(source)
    rows: list[dict[str, Any]] = []
    skipped = 0
    chunks = [files[i : i + config.batch_size] for i in range(0, len(files), config.batch_size)]
    for chunk in track(chunks, "predicting", show=len(chunks) > 1):
        images, names = [], []
        for file in chunk:
            try:
                images.append(read_image(file, model.images))
                names.append(file)
            except Unreadable as error:
                if config.on_error == "raise":
                    skip = "--data.on_error skip leaves it out" if len(files) > 1 else "give an image or a folder"
                    raise UserError(f"{file}: unreadable image ({error}); {skip}") from error
                skipped += 1
        if images:
            rows += _rows(model, names, torch.stack(images), top)
    return rows, skipped


def image_files(source: Path) -> list[Path]:
    """An image, or all images in a folder and its subfolders, in order.

    Raises:
        UserError: if there is none.
    """
    if source.is_file():
        return [source]
    if not source.exists():
        raise UserError(f"input={source}: no such file or folder")
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"input={source}: no images in it ({' '.join(sorted(SUFFIXES))})")
    return files


def read_image(file: Path, spec: ImageSpec) -> Float[Tensor, "C S S"]:
    """An image as the model takes it, the same as in its evaluation."""
    return for_evaluation(spec)(decode(file, spec.channels)).float() / 255


@torch.no_grad()
def _rows(model: ViMoE, files: list[Path], images: Float[Tensor, "B C S S"], top: int) -> list[dict[str, Any]]:
    probs = model(images.to(model.mean.device)).softmax(-1).cpu()
    best = probs.topk(min(top, probs.shape[1]), -1)
    rows = []
    for file, values, indices in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
        row: dict[str, Any] = {"file": str(file)}
        for rank, (value, index) in enumerate(zip(values, indices, strict=True), 1):
            suffix = "" if rank == 1 else f"_{rank}"
            row |= {f"class{suffix}": model.images.classes[index], f"probability{suffix}": round(value, 6)}
        rows.append(row)
    return rows
