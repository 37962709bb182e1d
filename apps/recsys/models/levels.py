"""Levels of experts by the settings: weighted all together, or chosen by sparse gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apps.recsys.model_settings import GateConfig, MLPConfig
from apps.recsys.models.towers import make_stack
from moecore.errors import require
from moecore.multigate import MultiGate
from moecore.multigate_bank import StackBank
from moecore.multigate_sparse import SparseMultiGate


def make_level(
    counts: Mapping[str, int],
    sees: Mapping[str, Sequence[str]],
    widths: int | Mapping[str, int],
    gate_width: int,
    experts: MLPConfig,
    gates: GateConfig,
    top_k: int | None = None,
    balance: float = 0.0,
) -> MultiGate | SparseMultiGate:
    """One level.

    Args:
        counts: group -> experts.
        sees: gate -> the groups it sees.
        widths: of what experts read, one number or one by group.
        gate_width: of what gates read.
        experts: settings of each expert.
        gates: settings of the gates.
        top_k: experts that a gate uses; None: all it sees.
        balance: top_k: coefficient of the balance loss.

    Raises:
        ConfigError: settings that sparse gates do not have.
    """
    by_group = dict.fromkeys(counts, widths) if isinstance(widths, int) else widths
    if top_k is None:
        stacks = {group: make_stack(experts, count, by_group[group]) for group, count in counts.items()}
        return MultiGate(stacks, sees, gate_width, gates.weight, gates.bias, gates.norm)
    require(gates.weight == "softmax", "gates.weight", gates.weight, "sparse gates (top_k) are softmax")
    require(not gates.bias, "gates.bias", gates.bias, "sparse gates (top_k) have none; set false")
    require(not gates.norm, "gates.norm", gates.norm, "sparse gates (top_k) are not normalised; set false")
    banks = {
        group: StackBank(count, by_group[group], experts.units, experts.activation, experts.norm, experts.dropout)
        for group, count in counts.items()
    }
    return SparseMultiGate(banks, sees, gate_width, top_k, aux_loss={"switch": balance} if balance else {})
