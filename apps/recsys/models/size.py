"""What networks cost: multiply-adds per row, without towers."""

from __future__ import annotations

from torch import nn

from apps.recsys.batch import InputSpec
from apps.recsys.models.aw_moe import AWMoE
from apps.recsys.models.moae import MoAE
from apps.recsys.models.towers import WithTowers
from moecore.multigate_sparse import SparseMultiGate


def multiply_adds(network: nn.Module, spec: InputSpec) -> int:
    """Multiply-adds of one row in experts, gates and all that goes before them.

    Every weight counts once per row, but those of sparse experts for the rows that choose them, and those that AW-MoE
    applies to behaviours once for each of a full sequence.
    """
    if isinstance(network, AWMoE):
        length = next(one.max_len for one in spec.sequences if one.name == network.behaviours)
        behaviours = [network.encode, network.attend, network.level.gates]
        return _weights(network) + (length - 1) * sum(_weights(part) for part in behaviours)
    trunk = network.trunk if isinstance(network, WithTowers) else network
    total = _weights(trunk) - (_weights(trunk.towers) if isinstance(trunk, MoAE) else 0)
    for level in trunk.modules():
        if isinstance(level, SparseMultiGate):
            banks, count = level.experts, sum(bank.num_experts for bank in level.experts.values())
            chosen = sum(router.select.max_slots for router in level.gates.values())
            total -= round(_weights(banks) * (1 - chosen / count))
    return total


def _weights(module: nn.Module) -> int:
    beside = ("biases", "scales")  # of stacked experts: vectors, one per expert
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if p.dim() > 1 and not any(part in beside for part in name.split(".")))
