"""From a trained backbone to the accelerator's folder: fit, compare, simulate, and only then write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.edge_moe.check import ASSUMED, MSE_LIMIT, Calibration, Golden, Outputs, calibrate, golden, require_agreement
from export.edge_moe.fixed import ACTIVATION, Fixed
from export.edge_moe.folder import Contents, write_folder
from export.edge_moe.layout import GOLDEN, Tensors, accelerator_tensors, specs
from export.edge_moe.ranges import clip_upper_ends, described, require_finite, require_ranges, weight_ranges
from export.edge_moe.rescale import rescaled
from export.edge_moe.settings import ACCELERATOR, require_settings
from export.notes import require_replaceable
from moecore.errors import require


@dataclass(frozen=True)
class Backbone:
    """What the accelerator is to run: a trained M³ViT up to its decoders."""

    weights: Mapping[str, Tensor]
    """By the names of the published code, see `export.edge_moe.layout.accelerator_tensors`."""
    settings: Mapping[str, Any]
    """What the weights do not show, by the names of `ACCELERATOR`."""
    mean: Sequence[float]
    """Per channel, of pixels in [0, 1]."""
    std: Sequence[float]
    """The same."""
    tasks: tuple[str, ...]
    """Names, in the order of the gates."""
    outputs: Outputs
    """The model itself: bytes of images and the number of a task -> its last tokens, class token first."""


@dataclass(frozen=True)
class _Fitted:
    """Tensors that the accelerator's types hold."""

    tensors: Tensors
    formats: dict[str, Fixed]
    clipped: dict[str, int]
    moved: dict[str, int]
    output_exponent: int


def export_edge_moe(
    backbone: Backbone, images: Tensor, path: Path, task: str | None = None, rescale: bool = False
) -> dict[str, float]:
    """Write the files that the published accelerator of M³ViT reads, with golden activations and a report of ranges.

    Args:
        backbone: of exactly the accelerator's architecture.
        images: calibration images, uint8 `[B, 3, 128, 256]`; the first becomes the golden one.
        path: folder to make, or to replace if it is of this kind; written whole or not at all.
        task: whose golden activation lies where the testbench looks for it; None: the first.
        rescale: move powers of two between weights where one is too large for its type (`export.edge_moe.rescale`).

    Returns:
        Figures of the comparison with the model, of the simulated fixed point, and of the headroom.

    Raises:
        ExportError: for a model that differs from what the accelerator has compiled in, has values outside its types,
            or whose exported form does not give the model's outputs.
        ConfigError: for images of another size, or a task that the model does not have.
    """
    require_settings(backbone.settings)
    size = ACCELERATOR["image_size"]
    fits = images.dtype == torch.uint8 and images.dim() == 4 and tuple(images.shape[1:]) == size and len(images) > 0
    require(fits, "images", f"{images.dtype} {tuple(images.shape)}", f"give at least one uint8 image of {size}")
    first = backbone.tasks[0] if task is None else task
    require(first in backbone.tasks, "task", task, f"this model has {', '.join(backbone.tasks)}")
    require_replaceable(path)
    images = images.cpu()
    model = _fitted(backbone, rescale)
    scale = 2.0**model.output_exponent
    calibration = calibrate(model.tensors, images, len(backbone.tasks), backbone.outputs, scale)
    require_ranges(calibration.ranges, {}, "train with more weight decay, or export as fpga with wider activations")
    require_agreement(calibration)
    goldens = golden(model.tensors, model.formats, images[:1], backbone.tasks)
    report = _report(backbone, model, calibration, goldens, first)
    files, size_bytes = write_folder(path, Contents(model.tensors, images[0], goldens, first, report))
    return _figures(report, calibration, goldens) | {"files": float(files), "folder_bytes": float(size_bytes)}


def _fitted(backbone: Backbone, rescale: bool) -> _Fitted:
    num_tasks = len(backbone.tasks)
    formats = {name: spec.fixed for name, spec in specs(num_tasks).items()}
    tensors = accelerator_tensors(backbone.weights, backbone.mean, backbone.std, num_tasks)
    require_finite(weight_ranges(tensors))
    moved, exponent = {}, 0
    remedy = "rescale moves powers of two between weights, which may bring it there"
    if rescale:
        change = rescaled(tensors, formats, num_tasks)
        tensors, moved, exponent = change.tensors, change.moved, change.output_exponent
        remedy = "no rescaling that means the same brings it there: train with more weight decay, or export as fpga"
    tensors, clipped = clip_upper_ends(tensors, formats)
    require_ranges(weight_ranges(tensors), formats, remedy)
    return _Fitted(tensors, formats, clipped, moved, exponent)


def _report(
    backbone: Backbone, model: _Fitted, calibration: Calibration, goldens: Mapping[str, Golden], first: str
) -> dict[str, Any]:
    """All that is in edge_moe.json but the names of files."""
    weights, activations = weight_ranges(model.tensors), calibration.ranges
    return {
        "accelerator": ACCELERATOR,
        "tasks": list(backbone.tasks),
        "golden_task": first,
        "golden_activation": GOLDEN,
        "normalisation_folded": {"mean": list(backbone.mean), "std": list(backbone.std), "pixels": "bytes / 256"},
        "output_scale": 2.0**model.output_exponent,
        "rescaled_channels": model.moved,
        "clipped_by_one_step": model.clipped,
        "tensors": {name: described(name, weights, fixed) for name, fixed in model.formats.items()},
        "activations": {name: described(name, activations, ACTIVATION) for name in activations},
        "comparison": {
            "runs": calibration.runs,
            "runs_left_out_as_near_ties": calibration.near_ties,
            "max_relative_error": calibration.max_relative_error,
        },
        "fixed_point": {
            task: {"mse": each.mse, "mse_limit": MSE_LIMIT, "routing_agreement": each.routing_agreement}
            for task, each in goldens.items()
        },
        "queues": {task: _queues(each) for task, each in goldens.items()},
        "assumed": list(ASSUMED),
    }


def _queues(each: Golden) -> dict[str, Any]:
    """Per MoE layer the experts in the order in which they are loaded, and how many tokens each of all has."""
    return {
        f"l{layer}": {"order": queues.order, "tokens": np.diff(queues.offset).tolist()}
        for layer, queues in each.trace.queues.items()
    }


def _figures(report: Mapping[str, Any], calibration: Calibration, goldens: Mapping[str, Golden]) -> dict[str, float]:
    figures = {
        "runs_compared": float(calibration.runs),
        "runs_near_ties": float(calibration.near_ties),
        "max_relative_error": calibration.max_relative_error,
    }
    for kind in ("tensors", "activations"):
        bits = [each["headroom_bits"] for each in report[kind].values() if each["headroom_bits"] is not None]
        figures[f"headroom_bits/{kind}"] = min(bits)
    for task, each in goldens.items():
        figures[f"fixed_point_mse/{task}"] = each.mse[GOLDEN]
        figures[f"fixed_point_routing_agreement/{task}"] = each.routing_agreement
    return figures
