"""One grouped GEMM per linear map over all experts (`F.grouped_mm`): the choice for bf16 on recent GPUs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moecore.executors.layouts import SortedLayout
from moecore.executors.plan import Combine, Dispatch, make_plan
from moecore.experts import ExpertBank
from moecore.routing import Assignment

_ALIGNMENT = 16  # bytes that row strides must be multiples of
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _traces(dtype: torch.dtype) -> bool:
    """Whether `torch.compile` can see through a grouped GEMM: some versions run more dtypes than they can trace."""
    a, b = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((8, 8), (1, 8, 8)))
    try:
        F.grouped_mm(a, b, offs=torch.empty(1, dtype=torch.int32, device="meta"))
    except RuntimeError:
        return False
    return True


_TRACED = tuple(dtype for dtype in _DTYPES if _traces(dtype))


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
    dtype = str(x.dtype).removeprefix("torch.")
    if x.dtype not in _DTYPES:
        return f"grouped GEMMs take float32, bfloat16 and float16, not {dtype}"
    if torch.compiler.is_compiling() and x.dtype not in _TRACED:
        return f"this version of torch compiles grouped GEMMs in bfloat16 only, not in {dtype}"
    for parameter in bank.parameters():
        if parameter.dim() == 3 and any(size * x.element_size() % _ALIGNMENT for size in parameter.shape[1:]):
            return (
                f"weights {tuple(parameter.shape)} have a row of {x.element_size()}-byte numbers that is no multiple "
                f"of {_ALIGNMENT} bytes"
            )
    return None
