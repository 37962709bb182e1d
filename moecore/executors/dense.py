"""Every expert on every token, unchosen ones weighted zero: static shapes, the form for export."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from moecore.executors.layouts import EveryLayout
from moecore.experts import ExpertBank
from moecore.routing import Assignment


def run_dense(
    x: Float[Tensor, " T *unit"], bank: ExpertBank, assignment: Assignment, weights: Float[Tensor, "*pairs"]
) -> Float[Tensor, " T *out"]:
    """Weighted sum over all experts. Costs E / K times the sparse executors and needs E times their memory."""
    out = bank(x[None], EveryLayout())  # [E, T, *out]
    table = assignment.dense(weights).to(out.dtype)  # [T, E]
    table = table.t().reshape(*table.shape[::-1], *[1] * (out.dim() - 2))
    return (out * table).sum(0)
