"""Executors: tokens, a bank, an assignment and weights -> the weighted sum of each token's experts.

One meaning, several strategies; all of them match `moecore.reference`. An executor knows neither the router's name
nor the bank's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor

from moecore.errors import choice
from moecore.executors.dense import run_dense
from moecore.executors.grouped_mm import run_grouped_mm, why_not
from moecore.executors.sorted import run_sorted
from moecore.experts import ExpertBank
from moecore.routing import Assignment

Executor = Callable[[Tensor, ExpertBank, Assignment, Tensor], Tensor]

EXECUTORS: dict[str, Executor] = {
    "sorted": run_sorted,
    "grouped_mm": run_grouped_mm,
    "dense": run_dense,
}
"""Executors by name."""

_TRACED: ContextVar[Executor | None] = ContextVar("moecore_traced_executor", default=None)


@contextmanager
def traced_with(executor: Executor) -> Iterator[None]:
    """Run every bank inside through `executor`, whatever the layers are set to: how models are traced for export.

    Args:
        executor: called as those of `EXECUTORS` are.
    """
    token = _TRACED.set(executor)
    try:
        yield
    finally:
        _TRACED.reset(token)


def execute(
    x: Float[Tensor, " T *unit"],
    bank: ExpertBank,
    assignment: Assignment,
    weights: Float[Tensor, "*pairs"],
    executor: str = "auto",
) -> Float[Tensor, " T *out"]:
    """Run a bank on routed tokens.

    Args:
        x: T tokens, or T units of several tokens each (`[T, L, D]`) where segments or samples are routed as one.
        bank: the experts.
        assignment: who works on what.
        weights: combine weights in the shape of `assignment.expert`.
        executor: a name of `EXECUTORS`, or "auto".

    Returns:
        For each token the weighted sum of its experts' outputs; zeros for a token without experts. Under autocast
        the experts run, and the result comes, in the autocast dtype.
    """
    choice("executor", executor, ("auto", *EXECUTORS))
    traced = _TRACED.get()
    if traced is not None:
        return traced(x, bank, assignment, weights)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    if executor == "auto":
        executor = _fitting(x, bank)
    return EXECUTORS[executor](x, bank, assignment, weights)


def _fitting(x: Tensor, bank: ExpertBank) -> str:
    """Dense where shapes must be static, grouped GEMMs where the hardware has them, sorted anywhere else."""
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return "dense"
    if x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] >= 9:
        return "sorted" if why_not(x, bank) else "grouped_mm"
    return "sorted"
