"""The fast path for banks of plain FFN experts: one expert at a time over sorted rows, backward by hand.

Working expert by expert keeps an expert's rows and weights in cache, and writing gradients straight into the stacked
tensors avoids E full-size temporaries. Saved for backward are only hidden units; the input rows are gathered again,
and the gradient of a combine weight comes from the hidden layer (`<dh, h>`), so that no expert output is kept.

Shapes: T tokens of U rows of width D (U > 1 where whole segments or samples are routed), P dispatched tokens,
F hidden units, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecore.executors.plan import sum_rows
from moecore.executors.workspace import carve
from moecore.experts import FFN

aten = torch.ops.aten


def _silu(x: Tensor, out: Tensor) -> Tensor:
    return aten.silu.out(x, out=out)


def _silu_grad(grad: Tensor, x: Tensor) -> Tensor:
    return aten.silu_backward.grad_input(grad, x, grad_input=grad)


def _gelu(x: Tensor, out: Tensor) -> Tensor:
    return aten.gelu.out(x, out=out)


def _gelu_grad(grad: Tensor, x: Tensor) -> Tensor:
    return aten.gelu_backward.grad_input(grad, x, grad_input=grad)


def _gelu_tanh(x: Tensor, out: Tensor) -> Tensor:
    return aten.gelu.out(x, approximate="tanh", out=out)


def _gelu_tanh_grad(grad: Tensor, x: Tensor) -> Tensor:
    return aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)


def _relu(x: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(x, min=0, out=out)


def _relu_grad(grad: Tensor, x: Tensor) -> Tensor:
    return grad.mul_(x > 0)


KERNELS = {
    "silu": (_silu, _silu_grad),
    "gelu": (_gelu, _gelu_grad),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_grad),
    "relu": (_relu, _relu_grad),
}
"""Activation into a buffer, and its gradient in place, by name."""


@dataclass(frozen=True)
class Rows:
    """The plan as bare tensors, so that it fits an operator's signature."""

    token: Tensor  # [P]
    row: Tensor  # [P]
    offsets: Tensor  # [T]
    counts: list[int]  # [E]
    shared: bool
    """Every expert takes every token, in order: nothing need be gathered."""


def _gather(x: Tensor, rows: Rows, token: Tensor, out: Tensor) -> Tensor:
    """Rows [n, W] of one expert."""
    return x if rows.shared else torch.index_select(x, 0, token, out=out[: token.numel()])


def _linear(x: Tensor, weight_t: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(x, weight_t, out=out) if bias is None else torch.addmm(bias, x, weight_t, out=out)


def _each(stacked: Tensor | None, experts: int) -> Sequence[Tensor | None]:
    """The experts' slices of a stacked tensor that may not be there."""
    return [None] * experts if stacked is None else stacked.unbind()


def _each_t(stacked: Tensor | None, experts: int) -> Sequence[Tensor | None]:
    """The same, each transposed."""
    return _each(None if stacked is None else stacked.transpose(1, 2), experts)


def _pieces(kept: Tensor | None, counts: list[int], save: bool) -> Sequence[Tensor | None]:
    """Each expert's rows of a buffer: its own if they are kept, else the top of the one that all reuse."""
    if kept is None:
        return [None] * len(counts)
    return kept.split(counts) if save else [kept[:n] for n in counts]


def forward(
    x: Tensor, weights: Tensor, rows: Rows, ffn: FFN, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Tokens [T, U*D] -> tokens [T, U*O] and, if `save`, of all rows [P*U, F]: up, activated, gate."""
    activate, _ = KERNELS[ffn.activation]
    (experts, hidden, width), out_width = ffn.up.shape, ffn.down.shape[1]
    unit = x.shape[1] // width
    counts = [n * unit for n in rows.counts]
    most, total = max(counts, default=0), sum(counts)
    gathered, product, y, *spare = carve(
        x,
        (most // unit, x.shape[1]),
        (most, hidden),
        (total, out_width),
        *[(0 if save else most, hidden)] * 3,
    )
    ups, activated, gates = (x.new_empty(total, hidden) for _ in range(3)) if save else spare
    gates = None if ffn.gate is None else gates
    for n, token, out, up_w, up_b, up, gate_w, gate_b, gate, a, down_w, down_b in zip(
        counts,
        rows.token.split(rows.counts),
        y.split(counts),
        *(_each_t(ffn.up, experts), _each(ffn.up_bias, experts), _pieces(ups, counts, save)),
        *(_each_t(ffn.gate, experts), _each(ffn.gate_bias, experts), _pieces(gates, counts, save)),
        _pieces(activated, counts, save),
        *(_each_t(ffn.down, experts), _each(ffn.down_bias, experts)),
        strict=True,
    ):
        if n == 0:
            continue
        xe = _gather(x, rows, token, gathered).view(-1, width)
        _linear(xe, up_w, up_b, up)
        if gate is None:
            h = activate(up, a)
        else:
            activate(_linear(xe, gate_w, gate_b, gate), a)
            h = torch.mul(a, up, out=product[:n] if save else a)
        _linear(h, down_w, down_b, out)
    return sum_rows(y.view(-1, unit * out_width), rows.row, rows.offsets, weights), ups, activated, gates


@dataclass(frozen=True)
class Saved:
    """What forward kept for backward, rows sorted by expert [P*U, F]."""

    up: Tensor
    activated: Tensor
    gate: Tensor | None


def backward(
    grad: Tensor, x: Tensor, weights: Tensor, rows: Rows, ffn: FFN, saved: Saved
) -> tuple[Tensor, Tensor, FFN]:
    """Gradients of tokens [T, U*D], combine weights [P] and the bank."""
    (experts, hidden, width), out_width = ffn.up.shape, ffn.down.shape[1]
    unit = x.shape[1] // width
    counts = [n * unit for n in rows.counts]
    most = max(rows.counts, default=0)
    x_rows, dy_rows, dx_rows, *scratch = carve(
        x, (most, x.shape[1]), (most, grad.shape[1]), (sum(counts), width), *[(most * unit, hidden)] * 2
    )
    # Zeros are for experts without rows: every other gradient is written whole.
    fresh = torch.zeros_like if 0 in counts else torch.empty_like
    grads = FFN(*(None if w is None else fresh(w) for w in tensors(ffn)), ffn.activation)
    by_row = torch.empty_like(weights).scatter_(0, rows.row, weights)  # weights in order of rows
    ids = torch.arange(most * unit, device=x.device)
    dots = []
    parts = zip(
        rows.token.split(rows.counts),
        by_row.split(rows.counts),
        saved.up.split(counts),
        saved.activated.split(counts),
        [None] * experts if saved.gate is None else saved.gate.split(counts),
        dx_rows.split(counts),
        strict=True,
    )
    for expert, (token, w, up, a, gate, dx) in enumerate(parts):
        if token.numel() == 0:
            continue
        dy = _gather(grad, rows, token, dy_rows).view(-1, out_width)
        w = w.repeat_interleave(unit) if unit > 1 else w
        dot, du, dg = _hidden_grads(dy, w, ffn, grads, expert, Saved(up, a, gate), scratch, ids)
        dots.append(dot)
        xe = _gather(x, rows, token, x_rows).view(-1, width)
        torch.mm(du, ffn.up[expert], out=dx)
        _weight_grads(xe, du, grads.up[expert], _at(grads.up_bias, expert))
        if dg is not None:
            dx.addmm_(dg, ffn.gate[expert])
            _weight_grads(xe, dg, grads.gate[expert], _at(grads.gate_bias, expert))
    dx = sum_rows(dx_rows.view(-1, x.shape[1]), rows.row, rows.offsets)
    dots = torch.cat(dots).view(-1, unit).sum(1) if dots else weights.new_empty(0)
    return dx, dots.index_select(0, rows.row), grads


def tensors(ffn: FFN) -> tuple[Tensor | None, ...]:
    """The six tensors of a bank, in the order of its fields."""
    return ffn.up, ffn.down, ffn.gate, ffn.up_bias, ffn.down_bias, ffn.gate_bias


def _at(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _hidden_grads(
    dy: Tensor,
    w: Tensor,
    ffn: FFN,
    grads: FFN,
    expert: int,
    saved: Saved,
    scratch: Sequence[Tensor],
    ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One expert's down projection: <dy, y> per row, and the gradients of its pre-activations (up, gate)."""
    _, activation_grad = KERNELS[ffn.activation]
    n = dy.shape[0]
    h, dh = (buffer[:n] for buffer in scratch)
    torch.mm(dy, ffn.down[expert], out=dh)  # before the combine weight
    product = saved.activated if saved.gate is None else torch.mul(saved.activated, saved.up, out=h)
    dots = _row_dots(dh, product, ids[:n])
    if grads.down_bias is not None:
        dots = dots + dy @ ffn.down_bias[expert]
        torch.mv(dy.t(), w, out=grads.down_bias[expert])
    # The combine weight enters h for the gradient of the down projection, and dh for everything below it.
    w = w[:, None]
    torch.mm(dy.t(), torch.mul(product, w, out=h), out=grads.down[expert])
    dh.mul_(w)
    if saved.gate is None:
        return dots, activation_grad(dh, saved.up), None
    du = torch.mul(dh, saved.activated, out=h)
    return dots, du, activation_grad(dh.mul_(saved.up), saved.gate)


def _row_dots(a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """Inner product of corresponding rows [n, F] in one pass; `ids` counts the rows."""
    return aten._embedding_bag_per_sample_weights_backward(a, b, ids, ids, ids, 0)


def _weight_grads(x: Tensor, dy: Tensor, dw: Tensor, db: Tensor | None) -> None:
    """Gradients of weight and bias of `y = x @ weight.T + bias`, written into `dw` and `db`."""
    torch.mm(dy.t(), x, out=dw)
    if db is not None:
        torch.sum(dy, 0, out=db)
