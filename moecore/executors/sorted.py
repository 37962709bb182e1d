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
from torch.utils.flop_counter import register_flop_formula

from moecore.executors import ffn as kernels
from moecore.executors.layouts import SingleLayout
from moecore.executors.plan import Combine, Dispatch, Plan, make_plan
from moecore.experts import FFN, ExpertBank
from moecore.routing import Assignment


def run_sorted(
    x: Float[Tensor, T *unit], bank: ExpertBank, assignment: Assignment, weights: Float[Tensor, "*pairs"]
) -> Float[Tensor, T *out]:
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
        x, combine, token, row, offsets, up, activated, gate, *tensors = ctx.saved_tensors
        rows = kernels.Rows(token, row, offsets, ctx.counts, ctx.shared)
        saved = kernels.Saved(up, activated, gate)
        dx, dw, grads = kernels.backward(grad.contiguous(), x, combine, rows, FFN(*tensors, ctx.activation), saved)
        return dx, dw, *[None] * 7, *kernels.tensors(grads)


@torch.library.custom_op("moecore::sorted_ffn", mutates_args=())
def sorted_ffn(
    x: Tensor,
    combine: Tensor,
    token: Tensor,
    row: Tensor,
    offsets: Tensor,
    counts: Tensor,
    shared: bool,
    activation: str,
    save: bool,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_bias: Tensor | None,
) -> list[Tensor]:
    """The fast path as one operator: output, and what backward needs (up, activated, gate; empty without `save`)."""
    ffn = FFN(up, down, gate, up_bias, down_bias, gate_bias, activation)
    rows = kernels.Rows(token, row, offsets, counts.tolist(), shared)
    y, *hidden = kernels.forward(x, combine, rows, ffn, save)
    return [y, *(x.new_empty(0) if h is None or not save else h for h in hidden)]


@sorted_ffn.register_fake
def _(x, combine, token, row, offsets, counts, shared, activation, save, up, down, gate, *biases):
    unit = x.shape[1] // up.shape[2]
    y = x.new_empty(x.shape[0], unit * down.shape[1])
    hidden = token.shape[0] * unit, up.shape[1]
    kept = [save, save, save and gate is not None]
    return [y, *(x.new_empty(hidden if keep else 0) for keep in kept)]


def _save_for_backward(ctx, inputs, output):
    x, combine, token, row, offsets, counts, ctx.shared, ctx.activation, _, *tensors = inputs
    ctx.save_for_backward(x, combine, token, row, offsets, counts, *output[1:], *tensors)


def _compiled_backward(ctx, grads):
    x, combine, token, row, offsets, counts, *rest = ctx.saved_tensors
    hidden, tensors = rest[:3], rest[3:]
    grads = sorted_ffn_backward(
        grads[0].contiguous(),
        x,
        combine,
        token,
        row,
        offsets,
        counts,
        ctx.shared,
        ctx.activation,
        hidden,
        *tensors,
    )
    grads = [g if t is not None else None for g, t in zip(grads, [x, combine, *tensors], strict=True)]
    return grads[0], grads[1], *[None] * 7, *grads[2:]


sorted_ffn.register_autograd(_compiled_backward, setup_context=_save_for_backward)


@torch.library.custom_op("moecore::sorted_ffn_backward", mutates_args=())
def sorted_ffn_backward(
    grad: Tensor,
    x: Tensor,
    combine: Tensor,
    token: Tensor,
    row: Tensor,
    offsets: Tensor,
    counts: Tensor,
    shared: bool,
    activation: str,
    hidden: list[Tensor],
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_bias: Tensor | None,
) -> list[Tensor]:
    """Gradients of x, combine weights and the six bank tensors; empty where there is no such tensor."""
    ffn = FFN(up, down, gate, up_bias, down_bias, gate_bias, activation)
    rows = kernels.Rows(token, row, offsets, counts.tolist(), shared)
    saved = kernels.Saved(*hidden[:2], None if gate is None else hidden[2])
    dx, dw, grads = kernels.backward(grad, x, combine, rows, ffn, saved)
    return [dx, dw, *(x.new_empty(0) if g is None else g for g in kernels.tensors(grads))]


@sorted_ffn_backward.register_fake
def _(grad, x, combine, token, row, offsets, counts, shared, activation, hidden, *tensors):
    return [
        torch.empty_like(x),
        torch.empty_like(combine),
        *(x.new_empty(0) if t is None else torch.empty_like(t) for t in tensors),
    ]


def _flops(x_shape, token_shape, tensor_shapes) -> int:
    """Two per multiply-add: every dispatched row meets every matrix of its expert."""
    matrices = [shape for shape in tensor_shapes if shape is not None and len(shape) == 3]
    unit = x_shape[1] // tensor_shapes[0][2]
    return sum(2 * token_shape[0] * unit * shape[1] * shape[2] for shape in matrices)


@register_flop_formula(torch.ops.moecore.sorted_ffn)
def _forward_flops(x, combine, token, row, offsets, counts, shared, activation, save, *tensors, **_) -> int:
    return _flops(x, token, tensors)


@register_flop_formula(torch.ops.moecore.sorted_ffn_backward)
def _backward_flops(grad, x, combine, token, row, offsets, counts, shared, activation, hidden, *tensors, **_) -> int:
    return 2 * _flops(x, token, tensors)
