"""The fast path as opaque operators, so that `torch.compile` takes a model with MoE layers as one graph.

Sizes inside depend on the load of each expert; seen from outside, every shape is static.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from moecore.executors import ffn as kernels
from moecore.experts import FFN

_PLAN = "Tensor x, Tensor combine, Tensor token, Tensor row, Tensor offsets, Tensor counts, bool shared, str activation"
_BANK = "Tensor up, Tensor down, Tensor? gate, Tensor? up_bias, Tensor? down_bias, Tensor? gate_bias"


@torch.library.custom_op("moecore::sorted_ffn", mutates_args=(), schema=f"({_PLAN}, bool save, {_BANK}) -> Tensor[]")
def sorted_ffn(x, combine, token, row, offsets, counts, shared, activation, save, *bank):
    """Output, and the two tensors that backward needs (`kernels.Saved`; empty without `save`)."""
    rows = kernels.Rows(token, row, offsets, counts.tolist(), shared)
    y, *hidden = kernels.forward(x, combine, rows, FFN(*bank, activation), save)
    return [y, *(h if save else x.new_empty(0) for h in hidden)]


@sorted_ffn.register_fake
def _(x, combine, token, row, offsets, counts, shared, activation, save, up, down, gate, *biases):
    unit = x.shape[1] // up.shape[2]
    hidden = token.shape[0] * unit, up.shape[1]
    return [x.new_empty(x.shape[0], unit * down.shape[1]), *(x.new_empty(hidden if save else 0) for _ in range(2))]


@torch.library.custom_op(
    "moecore::sorted_ffn_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_PLAN}, Tensor[] hidden, {_BANK}) -> Tensor[]",
)
def sorted_ffn_backward(grad, x, combine, token, row, offsets, counts, shared, activation, hidden, *bank):
    """Gradients of x, combine weights and the six bank tensors; empty where there is no such tensor."""
    rows = kernels.Rows(token, row, offsets, counts.tolist(), shared)
    ffn = FFN(*bank, activation)
    dx, dw, grads = kernels.backward(grad, x, combine, rows, ffn, kernels.Saved(*hidden))
    return [dx, dw, *(x.new_empty(0) if g is None else g for g in kernels.tensors(grads))]


@sorted_ffn_backward.register_fake
def _(grad, x, combine, token, row, offsets, counts, shared, activation, hidden, *bank):
    return [torch.empty_like(x), torch.empty_like(combine), *(x.new_empty(0 if t is None else t.shape) for t in bank)]


def _save_for_backward(ctx, inputs, output) -> None:
    *plan, ctx.shared, ctx.activation, _ = inputs[:9]
    ctx.save_for_backward(*plan, *output[1:], *inputs[9:])


def _backward(ctx, grads):
    plan, hidden, bank = ctx.saved_tensors[:6], ctx.saved_tensors[6:8], ctx.saved_tensors[8:]
    out = sorted_ffn_backward(grads[0].contiguous(), *plan, ctx.shared, ctx.activation, list(hidden), *bank)
    dx, dw, *of_bank = out
    return dx, dw, *[None] * 7, *(None if t is None else g for g, t in zip(of_bank, bank, strict=True))


sorted_ffn.register_autograd(_backward, setup_context=_save_for_backward)


def _flops(x_shape, token_shape, bank_shapes) -> int:
    """Two per multiply-add: every dispatched row meets every matrix of its expert."""
    unit = x_shape[1] // bank_shapes[0][2]
    matrices = [shape for shape in bank_shapes if shape is not None and len(shape) == 3]
    return sum(2 * token_shape[0] * unit * shape[1] * shape[2] for shape in matrices)


@register_flop_formula(torch.ops.moecore.sorted_ffn)
def _forward_flops(x, combine, token, row, offsets, counts, shared, activation, save, *bank, **_) -> int:
    return _flops(x, token, bank)


@register_flop_formula(torch.ops.moecore.sorted_ffn_backward)
def _backward_flops(grad, x, combine, token, row, offsets, counts, shared, activation, hidden, *bank, **_) -> int:
    return 2 * _flops(x, token, bank)
