"""Sparse gates in exported files: experts of one layer take the form that every export can skip when not chosen."""

from __future__ import annotations

import torch
from torch import nn

from apps.recsys.model_settings import ModelConfig
from moecore.experts import MLPBank
from moecore.multigate_bank import StackBank
from moecore.multigate_sparse import SparseMultiGate


def run_chosen_only(model: nn.Module, config: ModelConfig) -> None:
    """Replace banks of one layer, in place, by FFNs that give the same: their second layer is the identity.

    Experts of several layers, or with LayerNorm, end in an activation or normalise inside, which the node of an
    exported mixture has no place for; they stay, and all of them are computed.

    Args:
        model: in eval mode; its weights become those of the new banks.
        config: its settings.
    """
    levels = [module for module in model.modules() if isinstance(module, SparseMultiGate)]
    for level in levels:
        activation = getattr(config, config.name).experts.activation
        for group, bank in level.experts.items():
            if isinstance(bank, StackBank) and len(bank.weights) == 1 and not len(bank.scales):
                level.experts[group] = _as_ffn(bank, activation)


@torch.no_grad()
def _as_ffn(bank: StackBank, activation: str) -> MLPBank:
    count, units, width = bank.weights[0].shape
    made = MLPBank(count, width, units, activation, out_width=units).eval()
    made.up, made.up_bias = bank.weights[0], bank.biases[0]
    made.down.copy_(torch.eye(units))
    made.down_bias.zero_()
    return made
