"""Cost of all tasks and of one, by the whole model and by the one cut out for the task, beside the dense twin."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

import moecore
from apps.vision.models.m3vit import M3ViT
from apps.vision.models.vimoe import dense_twin
from apps.vision.multitask.data import MultiTaskData
from apps.vision.multitask.deploy import Predictions, calibration_images
from apps.vision.multitask.loading import Trained
from apps.vision.settings import VisionConfig
from moecore.benchmark.timing import forward_call, interleave

CALIBRATION = 256
"""Training images that show which experts a task's gates choose."""


def run_benchmark(
    config: VisionConfig, trained: Trained | None, batch_sizes: list[int], rounds: int
) -> list[dict[str, Any]]:
    """One row per model and batch size; ratios are to the whole model running the backbone for each task, as published.

    Args:
        config: settings; data are read for sizes, tasks and, with a trained model, calibration.
        trained: the model to measure; None: fresh weights, and all experts in the models for one task.
        batch_sizes: images per call.
        rounds: interleaved rounds.
    """
    if trained:
        whole = trained.model
        data = MultiTaskData(config.data, whole.spec.names, config.run.seed, spec=whole.spec)
    else:
        data = MultiTaskData(config.data, config.tasks.names, config.run.seed)
        whole = M3ViT(config.model, data.spec).eval()
    images = list(calibration_images(data, CALIBRATION)) if trained else None
    models = _contenders(config, whole, images)
    x = whole.example_input()
    costs = {name: moecore.count_cost(model, x) for name, model in models.items()}
    base = next(iter(costs.values())).macs
    rows = []
    for batch in batch_sizes:
        x = whole.example_input(batch)
        calls = {name: forward_call(model, x) for name, model in models.items()}
        timings = interleave(calls, rounds, device=whole.mean.device.type)
        for name, timing in timings.items():
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "latency_ms": timing.median * 1e3,
                    "latency_ratio": timing.ratio,
                    "multiply_adds": costs[name].macs,
                    "multiply_adds_ratio": costs[name].macs / base,
                    "params": costs[name].total_params,
                }
            )
    return rows


def _contenders(config: VisionConfig, whole: M3ViT, images: list | None) -> dict[str, nn.Module]:
    """By name; the base of all ratios first."""
    names = whole.spec.names
    dense = M3ViT(dense_twin(dataclasses.replace(config.model, pretrained=None)), whole.spec).to(whole.mean.device)
    what = "all tasks" if len(names) > 1 else names[0]
    models: dict[str, nn.Module] = {
        f"{what}, a pass each": Predictions(_with_prefix(whole, shared=False), names),
        f"{what}, shared prefix": Predictions(_with_prefix(whole, shared=True), names),
        f"{what}, dense, one pass": Predictions(dense.eval(), names),
    }
    if whole.slice is not None:
        return models
    for task in names:
        models[f"{task}, whole model"] = Predictions(whole, [task])
        models[f"{task}, cut out"] = Predictions(whole.for_task(task, images), [task])
    return models


def _with_prefix(model: M3ViT, shared: bool) -> M3ViT:
    """The same weights, with what tasks have in common computed once or for each."""
    other = copy.copy(model)
    own = dataclasses.replace(model.config.m3vit, share_prefix=shared)
    other.config = dataclasses.replace(model.config, m3vit=own)
    return other
