"""Export of multi-task models: whole or for one task as ONNX, and checkpoints of one task alone."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import moecore
from apps.errors import UserError
from apps.vision.arguments import Export
from apps.vision.models.m3vit import M3ViT
from apps.vision.models.task_slice import leaving
from apps.vision.multitask.data import MultiTaskData
from apps.vision.multitask.loading import Trained, load_trained, slice_checkpoint
from apps.vision.multitask.metrics import make_measure
from apps.vision.multitask.tasks import TaskSpec
from export.decisions import largest, nothing
from export.exportable import Exportable, Outputs, Score, samples_of
from moecore import __version__
from moecore.files import atomic_path

COMPARED = 1000
"""Test images that files are compared on at most, whole batches."""


class Predictions(nn.Module):
    """Images -> the predictions of some tasks: a tensor of one, a tuple of several.

    Args:
        model: of the tasks.
        tasks: to predict.
    """

    def __init__(self, model: M3ViT, tasks: Sequence[str]) -> None:
        super().__init__()
        self.model, self.tasks = model, tuple(tasks)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Tensor | tuple[Tensor, ...]:
        """[B, C, H, W] in [0, 1] -> predictions, in the order of the tasks."""
        predictions = self.model(images, self.tasks)
        found = tuple(predictions[task] for task in self.tasks)
        return found if len(found) > 1 else found[0]


class Tokens(nn.Module):
    """Images -> what the decoder of a task reads: the same backbone for every task, with other gates.

    Args:
        model: of all tasks.
        task: whose gates apply.
    """

    def __init__(self, model: M3ViT, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, images: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """[B, C, H, W] in [0, 1] -> [B, N, D] of each block that the decoder reads."""
        return tuple(self.model.features(images, self.task))


def cut_out(trained: Trained, data: MultiTaskData, args: Export) -> M3ViT:
    """The model for one task, with the experts that its gates choose on training images.

    Raises:
        UserError: for a model that holds one task already, or does not have this one.
    """
    model = trained.model
    if model.slice is not None:
        raise UserError(f"ckpt_path={trained.path}: holds {model.slice.task} alone; give the run of all tasks")
    images = calibration_images(data, args.calibration)
    return model.for_task(args.task, images, args.margin, args.min_share)


def calibration_images(data: MultiTaskData, count: int) -> Iterator[Float[Tensor, "B C H W"]]:
    """The first training images, as they are evaluated, in batches."""
    images = data.first_images("train", count)
    count = min(count, len(images))
    for start in range(0, count, 32):
        yield images.plain(list(range(start, min(start + 32, count))))[0]


def exportable(trained: Trained, data: MultiTaskData, args: Export) -> Exportable:
    """Images in [0, 1] -> a prediction per task, of the whole model or of the one for `args.task`.

    Args:
        trained: the model.
        data: whose test images files are compared on, and whose training images ranges are taken from.
        args: of the verb.
    """
    model = trained.model if args.task is None or trained.model.slice else cut_out(trained, data, args)
    if args.task is not None:
        model.refuse_unknown(args.task)
    model = copy.deepcopy(model).cpu().eval()
    spec, batches, labels, rows = model.spec, [], [], 0
    for images, truth in data.test_dataloader():
        batches.append(images)
        labels.append(truth)
        rows += len(images)
        if rows >= COMPARED:
            break
    ready = Exportable(
        module=Predictions(model, spec.names),
        inputs=("images",),
        outputs=spec.names,
        example=(model.example_input(2),),
        samples=samples_of(("images",), *((images,) for images in batches)),
        calibration=samples_of(("images",), *((images,) for images in calibration_images(data, args.calibration))),
        metadata={
            "task": ", ".join(spec.names),
            "classes": {task.name: list(task.classes) for task in spec.tasks if task.classes},
            "input": f"[batch, {spec.channels}, {spec.height}, {spec.width}], pixels in [0, 1]",
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
            "moecore_version": __version__,
        },
        decide=largest(axis=1),
        score=_score(spec.tasks[0], labels),
    )
    return _switched(ready, model) if args.format == "fpga" and args.task is None and model.task_aware else ready


def _switched(ready: Exportable, model: M3ViT) -> Exportable:
    """The backbone alone, one table of gates per task; decoders, which differ in more than gates, stay on the host."""
    tasks = {task: Tokens(model, task).eval() for task in model.spec.names}
    outputs = tuple(f"tokens_{block}" for block in model.decoder.blocks)
    first = next(iter(tasks.values()))
    return dataclasses.replace(ready, module=first, tasks=tasks, outputs=outputs, decide=nothing, score=None)


def _score(task: TaskSpec, labels: Sequence[Mapping[str, Tensor]]) -> Score:
    """The figure that judges the first task."""

    def measured(outputs: Outputs) -> float:
        measure, start = make_measure(task), 0
        for truth in (batch[task.name] for batch in labels):
            prediction = torch.from_numpy(outputs[0][start : start + len(truth)])
            measure.update(task.kind.decode(prediction), truth)
            start += len(truth)
        return measure.compute()[task.kind.metric]

    return Score(f"{task.name}_{task.kind.metric}", measured, relative=not task.kind.higher_is_better)


def export_task(trained: Trained, data: MultiTaskData, path: Path, args: Export) -> dict[str, Any]:
    """Write a checkpoint of one task, compared on test images with the whole model.

    Returns:
        What it holds and costs, how many tokens would have left, and the largest difference of outputs, over all
        images and over those that keep inside.
    """
    small = cut_out(trained, data, args)
    with atomic_path(path) as temporary:
        torch.save(slice_checkpoint(trained, small), temporary)
        small = load_trained(temporary, trained.config).model  # what is compared is what was written
        figures = _held(trained, small, data) | _compared(trained.model, small, data)
        figures["file_bytes"] = temporary.stat().st_size
    return figures


def _held(trained: Trained, small: M3ViT, data: MultiTaskData) -> dict[str, float]:
    """Experts, parameters and multiply-adds, with their shares of the whole model's on all tasks."""
    experts = {
        f"experts/{name.removeprefix('backbone.')}": float(len(kept)) for name, kept in small.slice.experts.items()
    }
    x = small.example_input()
    own, whole = moecore.count_cost(small, x), moecore.count_cost(trained.model, x)
    return {
        **experts,
        "params_total": own.total_params,
        "params_share": own.total_params / whole.total_params,
        "multiply_adds": own.macs,
        "multiply_adds_share": own.macs / whole.macs,
    }


@torch.no_grad()
def _compared(model: M3ViT, small: M3ViT, data: MultiTaskData) -> dict[str, float]:
    """Differences of outputs on test images, and tokens that would have left."""
    task, (name,) = small.slice.task, small.spec.names
    left, tokens, stayed, count, worst, worst_inside, scale = 0, 0, 0, 0, 0.0, 0.0, 0.0
    for images, _ in data.test_dataloader():
        images = images.to(model.mean.device)
        with moecore.record(small) as recording:
            ours = small(images)[name]
        theirs = model(images, [task])[task]
        difference = (ours - theirs).abs().flatten(1).amax(1)  # [B]
        scale = max(scale, float(theirs.abs().max()))
        inside = torch.ones(len(images), dtype=torch.bool, device=images.device)
        for gone in leaving(small, recording).values():
            left, tokens = left + int(gone.sum()), tokens + gone.numel()
            inside &= ~gone.flatten(1).any(1)
        stayed, count = stayed + int(inside.sum()), count + len(images)
        worst = max(worst, float(difference.max()))
        worst_inside = max(worst_inside, float(torch.where(inside, difference, 0.0).max()))
    return {
        "images": float(count),
        "images_inside": float(stayed),
        "tokens_left_share": left / max(tokens, 1),
        "max_difference": worst,
        "max_difference_inside": worst_inside if stayed else math.nan,
        "max_relative_difference_inside": worst_inside / max(scale, 1e-12) if stayed else math.nan,
    }
