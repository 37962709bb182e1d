"""Latency, throughput and memory of a classifier beside its dense twin."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

import moecore
from apps.vision.data import VisionData
from apps.vision.loading import Trained
from apps.vision.models.vimoe import ImageSpec, ViMoE, dense_twin
from apps.vision.settings import ModelConfig, VisionConfig
from moecore.benchmark.timing import forward_call, interleave, peak_memory, training_call


def run_benchmark(
    config: VisionConfig, trained: Trained | None, batch_sizes: list[int], rounds: int
) -> list[dict[str, Any]]:
    """One row per model and batch size.

    Models: the MoE model, the same with every expert computed, and the dense ViT without MoE layers, which has equal
    active multiply-adds where `moe.hidden` is null.

    Args:
        config: settings; without a trained model its data are read for channels, size and classes.
        trained: the model to measure; None: fresh weights.
        batch_sizes: images per call.
        rounds: interleaved rounds.
    """
    spec = trained.model.images if trained else VisionData(config.data, config.run.seed).spec
    moe = trained.model if trained else ViMoE(config.model, spec)
    device = moe.mean.device.type
    models = {
        "dense": ViMoE(dense_twin(config.model), spec).to(device).eval(),
        "moe": moe.eval(),
        "moe, all experts": _all_experts(moe),
    }
    costs = {name: moecore.count_cost(model, model.example_input()) for name, model in models.items()}
    rows = []
    for batch in batch_sizes:
        x = moe.example_input(batch)
        forward = interleave({n: forward_call(m, x) for n, m in models.items()}, rounds, device=device)
        training = interleave({n: training_call(m, x) for n, m in models.items()}, rounds, device=device)
        for name in models:
            seconds = forward[name].median
            rows.append(
                {
                    "model": name,
                    "batch": batch,
                    "latency_ms": seconds * 1e3,
                    "images_per_s": batch / seconds,
                    "latency_ratio": forward[name].ratio,
                    "training_ms": training[name].median * 1e3,
                    "training_ratio": training[name].ratio,
                    "training_peak_mib": _peak(config.model, spec, name, batch) if device == "cpu" else None,
                    "params_total": costs[name].total_params,
                    "params_active": costs[name].active_params,
                    "multiply_adds": costs["moe"].all_experts_macs if "all" in name else costs[name].macs,
                }
            )
    return rows


def _all_experts(model: ViMoE) -> ViMoE:
    """The same weights with every expert computed for every token."""
    dense = copy.deepcopy(model)
    for module in dense.modules():
        if isinstance(module, moecore.MoE):
            module.executor = "dense"
    return dense


def _peak(config: ModelConfig, spec: ImageSpec, name: str, batch: int) -> float | None:
    """Peak memory of a training step in MiB, beyond weights and input; None where it is too small to tell."""
    if batch < 16:
        return None
    peak = peak_memory(functools.partial(_build, config, spec, name, batch))
    return None if peak is None else round(peak / 2**20, 1)


def _build(config: ModelConfig, spec: ImageSpec, name: str, batch: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = ViMoE(dense_twin(config) if name == "dense" else config, spec).train()
    return (_all_experts(model) if "all" in name else model), model.example_input(batch)
