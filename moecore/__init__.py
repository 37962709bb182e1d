"""Mixture-of-Experts building blocks in plain PyTorch.

Names are imported on first use, so that `import moecore` (and a command line that only reads settings) is quick.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOME = {
    "ACTIVATIONS": "activations",
    "Assignment": "routing",
    "AUX_LOSSES": "config",
    "balance_loss": "balance",
    "BANKS": "experts",
    "build_moe": "build",
    "build_router": "build",
    "carry_across_layers": "context",
    "ConfigError": "errors",
    "ConstantBank": "experts",
    "Context": "context",
    "CONTROLLERS": "build",
    "Cost": "cost",
    "count_cost": "cost",
    "current_context": "context",
    "DenseFFN": "ffn",
    "entropy_loss": "balance",
    "execute": "executors",
    "EXECUTORS": "executors",
    "expert_counts": "inspect",
    "expert_label_counts": "inspect",
    "ExpertBank": "experts",
    "ExpertStack": "multigate_experts",
    "FeatureGate": "multigate_parts",
    "find_ffns": "ffn",
    "GateHealth": "multigate_health",
    "GateRecord": "multigate",
    "GateStats": "multigate_health",
    "GLUBank": "experts",
    "importance_cv2": "balance",
    "LayerMetrics": "inspect",
    "load_cv2": "balance",
    "LOSSES": "balance",
    "LossFreeBias": "controllers",
    "MixedBank": "experts",
    "MLPBank": "experts",
    "MoE": "layer",
    "MoEConfig": "config",
    "MultiGate": "multigate",
    "mutual_information": "inspect",
    "place": "topology",
    "record": "inspect",
    "prune": "transforms.prune",
    "Recording": "inspect",
    "release_workspace": "executors.workspace",
    "replace_ffn": "topology",
    "Router": "routing",
    "Routing": "routing",
    "routing_context": "context",
    "routing_degree": "inspect",
    "routing_metrics": "inspect",
    "RoutingStats": "inspect",
    "run_reference": "reference",
    "schedule": "topology",
    "SCORES": "build",
    "SegmentBank": "experts",
    "SELECTIONS": "selection",
    "SelfGate": "multigate_parts",
    "SharedExpert": "shared",
    "SoftMoE": "soft",
    "SparseMultiGate": "multigate_sparse",
    "SparsityController": "controllers",
    "specialisation": "inspect",
    "split": "transforms.upcycle",
    "StackBank": "multigate_bank",
    "sum_by_label": "inspect",
    "switch_loss": "balance",
    "task_information_loss": "balance",
    "token_map": "inspect",
    "upcycle": "transforms.upcycle",
    "update_controllers": "controllers",
    "WEIGHTINGS": "weighting",
    "z_loss": "balance",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'moecore' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moecore.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
