"""Maps of every task for new images, written as pictures and as numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from apps import output
from apps.errors import UserError
from apps.progress import track
from apps.vision.models.m3vit import M3ViT
from apps.vision.multitask.pictures import picture
from apps.vision.multitask.tasks import TaskSpec
from apps.vision.prediction import image_files
from apps.vision.settings import DataConfig
from apps.vision.sources import Unreadable, decode
from moecore.files import atomic_path


def predict_images(model: M3ViT, source: Path, target: Path, config: DataConfig) -> str:
    """Write the predictions for an image, or for all images of a folder, at the size of each image.

    Below `target`, for every image `<name>/<task>.png` (with the suffix in the name where two images differ in nothing
    else) to look at and `<name>/<task>.npy` with the numbers: classes
    int16, saliency and edges probabilities, depth metres, normals [3, H, W]. `predictions.json` lists the images with
    their classes.

    Args:
        model: in eval mode.
        source: an image, or a folder searched for images in all its subfolders.
        target: folder, made if need be.
        config: whether unreadable images are skipped.

    Returns:
        A line that says what was written.

    Raises:
        UserError: for an image that cannot be read, or a target that is a file.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"output={target}: is a file; the maps of several tasks need a folder")
    files = image_files(source)
    stems = Counter(file.with_suffix("") for file in files)
    rows: list[dict[str, Any]] = []
    skipped = 0
    for file in track(files, "predicting", show=len(files) > 1):
        try:
            image = decode(file, model.spec.channels)
        except Unreadable as error:
            if config.on_error == "raise":
                raise UserError(f"{file}: unreadable image ({error}); --data.on_error skip leaves it out") from error
            skipped += 1
            continue
        alone = stems[file.with_suffix("")] == 1  # else a.png and a.jpg would go to one folder
        name = (file.with_suffix("") if alone else file).relative_to(source if source.is_dir() else file.parent)
        found = predict_image(model, image.float() / 255)
        rows.append({"file": str(file), "folder": str(name), **_write(model, found, target / name)})
    output.write_json(target / "predictions.json", rows)
    return f"{len(rows)} prediction(s): {target}" + (f" ({skipped} unreadable images skipped)" if skipped else "")


@torch.no_grad()
def predict_image(model: M3ViT, image: Float[Tensor, "C H W"]) -> dict[str, Tensor]:
    """Decoded predictions of every task for an image of any size, maps at that size.

    The image is resized to the model's size, so that proportions may change; scores and logits are resized back before
    they are decoded.

    Args:
        model: in eval mode.
        image: pixels in [0, 1].
    """
    spec = model.spec
    size = tuple(image.shape[1:])
    resized = F.interpolate(image[None], (spec.height, spec.width), mode="bilinear", antialias=True)
    predictions = model(resized.to(model.mean.device))
    found = {}
    for task in spec.tasks:
        value = predictions[task.name].float()
        value = F.interpolate(value, size, mode="bilinear") if task.kind.dense else value
        found[task.name] = task.kind.decode(value)[0].cpu()
    return found


def _write(model: M3ViT, found: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """Write one image's maps; returns what `predictions.json` says of it."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = {}
    for task in model.spec.tasks:
        value = found[task.name]
        if not task.kind.dense:
            classes[task.name] = task.classes[int(value)]
            continue
        _save_picture(folder / f"{task.name}.png", task, value)
        with atomic_path(folder / f"{task.name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, value.numpy().astype(np.int16) if task.classes else value.numpy())
    return classes


def _save_picture(path: Path, task: TaskSpec, value: Tensor) -> None:
    pixels = (picture(task, value) * 255).round().astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="png")
