"""The default on CPUs: sort tokens by expert, then run one expert after the other on its rows.

Plain FFN banks take the fast path of `moecore.executors.ffn`; any other bank is called once per expert, with
autograd. Under `torch.compile` the fast path is one opaque operator, so that a whole model still compiles as one
graph.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moecore.executors import ffn as kernels
from moecore.executors.compiled import sorted_ffn
from moecore.executors.layouts import SingleLayout
from moecore.executors.plan import Combine, Dispatch, Plan, make_plan
from moecore.experts import FFN, ExpertBank
from moecore.routing import Assignment


def run_sorted(
    x: Float[Tensor, " T *unit"], bank: ExpertBank, assignment: Assignment, weights: Float[Tensor, "*pairs"]
) -> Float[Tensor, " T *out"]:
    """Weighted sum of each token's experts, expert by expert."""
    plan = make_plan(assignment)
    combine = plan.weights(weights).to(x.dtype)
    weights_of_bank = bank.ffn()
    if weights_of_bank is None or weights_of_bank.activation not in kernels.KERNELS:
        return _run_any_bank(x, bank, plan, combine)
    flat = x.flatten(1).contiguous()  # [T, U*D]
    y = _run_ffn(flat, combine, plan, assignment.complete, _cast(weights_of_bank, x.dtype))
    # No view where none is needed: adding to a view in place would cost its backward a copy.
    return y if x.dim() == 2 else y.view(*x.shape[:-1], bank.out_width)


def _run_any_bank(x: Tensor, bank: ExpertBank, plan: Plan, combine: Float[Tensor, " P"]) -> Tensor:
    rows = Dispatch.apply(x.flatten(1), plan).view(-1, *x.shape[1:])  # [P, *unit]
    cut: dict[int, tuple[Tensor, ...]] = {}
    parts = rows.split(plan.counts.tolist())
    done = [bank(part, SingleLayout(expert, cut)) for expert, part in enumerate(parts) if part.shape[0]]
    out = torch.cat(done) if done else bank(rows, SingleLayout(0, cut))  # [P, *out]
    return Combine.apply(out.flatten(1), combine.to(out.dtype), plan).view(x.shape[0], *out.shape[1:])


def _cast(ffn: FFN, dtype: torch.dtype) -> FFN:
    """The weights in the dtype of the input, as autocast would have them."""
    if ffn.up.dtype == dtype:
        return ffn
    return FFN(*(None if w is None else w.to(dtype) for w in kernels.tensors(ffn)), ffn.activation)


def _run_ffn(x: Tensor, combine: Tensor, plan: Plan, shared: bool, ffn: FFN) -> Tensor:
    save = torch.is_grad_enabled()
    args = (x, combine, plan.token, plan.row, plan.offsets, plan.counts, shared, ffn.activation, save)
    if torch.compiler.is_compiling():
        return sorted_ffn(*args, *kernels.tensors(ffn))[0]
    return _SortedFFN.apply(*args, *kernels.tensors(ffn))


class _SortedFFN(torch.autograd.Function):
    """The fast path in eager mode."""

    @staticmethod
    def forward(ctx, x, combine, token, row, offsets, counts, shared, activation, save, *tensors):
        ffn = FFN(*tensors, activation)
        rows = kernels.Rows(token, row, offsets, counts.tolist(), shared)
        y, *hidden = kernels.forward(x, combine, rows, ffn, save)
        if save:
            ctx.counts, ctx.shared, ctx.activation = rows.counts, shared, activation
            ctx.save_for_backward(x, combine, token, row, offsets, *hidden, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, combine, token, row, offsets, up, other, *tensors = ctx.saved_tensors
        rows = kernels.Rows(token, row, offsets, ctx.counts, ctx.shared)
        saved = kernels.Saved(up, other)
        dx, dw, grads = kernels.backward(grad.contiguous(), x, combine, rows, FFN(*tensors, ctx.activation), saved)
        return dx, dw, *[None] * 7, *kernels.tensors(grads)
