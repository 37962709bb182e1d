"""One grouped GEMM per linear map over all experts (`F.grouped_mm`): the choice for bf16 on recent GPUs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moecore.executors.layouts import SortedLayout
from moecore.executors.plan import Combine, Dispatch, make_plan
from moecore.experts import ExpertBank
from moecore.routing import Assignment

_ALIGNMENT = 16  # bytes that row strides must be multiples of


def run_grouped_mm(
    x: Float[Tensor, " T *unit"], bank: ExpertBank, assignment: Assignment, weights: Float[Tensor, "*pairs"]
) -> Float[Tensor, " T *out"]:
    """Weighted sum of each token's experts, all experts in one call per linear map.

    Raises:
        ValueError: for float64, or for a width that `F.grouped_mm` cannot align.
    """
    problem = why_not(x, bank)
    if problem:
        raise ValueError(f"executor='grouped_mm': {problem}; use executor='sorted'")
    if x.shape[0] == 0 or assignment.expert.numel() == 0:
        return _nothing(x, bank, weights)
    plan = make_plan(assignment)
    rows = Dispatch.apply(x.flatten(1), plan).view(-1, *x.shape[1:])  # [P, *unit]
    if rows.shape[0] == 0:
        return _nothing(x, bank, weights)
    layout = SortedLayout(plan.counts.cumsum(0).to(torch.int32), plan.expert)
    out = bank(rows, layout)
    combine = plan.weights(weights).to(out.dtype)
    return Combine.apply(out.flatten(1), combine, plan).view(x.shape[0], *out.shape[1:])


def _nothing(x: Tensor, bank: ExpertBank, weights: Tensor) -> Tensor:
    """Zeros that still hang on every input, so that gradients are zeros rather than missing."""
    anchor = sum(p.sum() for p in bank.parameters()) * 0 + weights.sum() * 0
    return x.new_zeros(*x.shape[:-1], bank.out_width) + x.sum() * 0 + anchor.to(x.dtype)


def why_not(x: Tensor, bank: ExpertBank) -> str | None:
    """What keeps `F.grouped_mm` from taking this bank and dtype, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped GEMMs take float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    for parameter in bank.parameters():
        if parameter.dim() == 3 and any(size * x.element_size() % _ALIGNMENT for size in parameter.shape[1:]):
            return (
                f"weights {tuple(parameter.shape)} have a row of {x.element_size()}-byte numbers that is no multiple "
                f"of {_ALIGNMENT} bytes"
            )
    return None
