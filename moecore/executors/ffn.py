"""The fast path for banks of plain FFN experts: a few experts at a time over sorted rows, backward by hand.

Rows are sorted by expert, so consecutive experts own consecutive rows. Experts are worked on in groups whose hidden
units fit a cache: matrix products run per expert, everything else once per group. Gradients go straight into the
stacked tensors, which avoids E full-size temporaries. Saved for backward are only hidden units; the input rows are
gathered again, a gated activation is computed again, and the gradient of a combine weight comes from the hidden layer
(`<dh, h>`), so that no expert output is kept.

Shapes: T tokens of U rows of width D (U > 1 where whole segments or samples are routed), P dispatched tokens,
F hidden units, O output width, n rows of one group or expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moecore.executors.plan import sum_rows
from moecore.executors.workspace import carve
from moecore.experts import FFN

aten = torch.ops.aten

GROUP = 2**17
"""Hidden units (rows times F) that a group of experts may have; a larger expert is a group by itself."""


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


@dataclass(frozen=True)
class Saved:
    """Hidden units that forward kept for backward, rows sorted by expert [P*U, F]."""

    up: Tensor
    other: Tensor
    """With a gate, its pre-activation; without, the activated units."""


@dataclass(frozen=True)
class Group:
    """Consecutive experts with rows."""

    experts: list[int]
    sizes: list[int]
    """Rows of each expert."""
    tokens: slice
    """Their dispatched tokens."""
    rows: slice
    """Their rows: U times as many."""


def _groups(counts: list[int], unit: int, hidden: int) -> Iterator[Group]:
    """Experts in groups of at most `GROUP` hidden units; those without rows left out."""
    experts: list[int] = []
    start = position = 0
    for expert, count in enumerate(counts):
        if experts and (position + count - start) * unit * hidden > GROUP:
            yield _group(experts, counts, start, position, unit)
            experts, start = [], position
        if count:
            experts.append(expert)
        position += count
    if experts:
        yield _group(experts, counts, start, position, unit)


def _group(experts: list[int], counts: list[int], start: int, stop: int, unit: int) -> Group:
    sizes = [counts[e] * unit for e in experts]
    return Group(experts, sizes, slice(start, stop), slice(start * unit, stop * unit))


def _gather(x: Tensor, rows: Rows, group: Group, width: int, buffer: Tensor) -> Sequence[Tensor]:
    """Each expert's input rows [n, D] from tokens [T, U*D]."""
    if rows.shared:
        return [x.view(-1, width)] * len(group.experts)
    token = rows.token[group.tokens]
    return torch.index_select(x, 0, token, out=buffer[: token.numel()]).view(-1, width).split(group.sizes)


def _pick(stacked: Tensor | None, group: Group) -> list[Tensor | None]:
    """The group's slices of a stacked tensor that may not be there."""
    return [None if stacked is None else stacked[e] for e in group.experts]


def _linear(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, group: Group, out: Tensor) -> Tensor:
    """Each expert's rows times its weight (and plus its bias), into `out` [n, F]."""
    for x, w, b, y in zip(xs, _pick(weight, group), _pick(bias, group), out.split(group.sizes), strict=True):
        if b is None:
            torch.mm(x, w.t(), out=y)
        else:
            torch.addmm(b, x, w.t(), out=y)
    return out


def forward(x: Tensor, weights: Tensor, rows: Rows, ffn: FFN, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, U*D] -> tokens [T, U*O] and, if `save`, what `Saved` has of all rows [P*U, F]."""
    activate, _ = KERNELS[ffn.activation]
    (_, hidden, width), out_width = ffn.up.shape, ffn.down.shape[1]
    unit = x.shape[1] // width
    groups = list(_groups(rows.counts, unit, hidden))
    most = max((sum(g.sizes) for g in groups), default=0)
    total = sum(rows.counts) * unit
    gathered, product, y, *spare = carve(
        x, (most // unit, x.shape[1]), (most, hidden), (total, out_width), *[(0 if save else most, hidden)] * 2
    )
    kept = [x.new_empty(total, hidden) for _ in spare] if save else spare
    for group in groups:
        n = sum(group.sizes)
        up, other = (buffer[group.rows] if save else buffer[:n] for buffer in kept)
        xs = _gather(x, rows, group, width, gathered)
        _linear(xs, ffn.up, ffn.up_bias, group, up)
        if ffn.gate is None:
            h = activate(up, other)
        else:
            h = activate(_linear(xs, ffn.gate, ffn.gate_bias, group, other), product[:n]).mul_(up)
        _linear(h.split(group.sizes), ffn.down, ffn.down_bias, group, y[group.rows])
    y = sum_rows(y.view(-1, unit * out_width), rows.row, rows.offsets, weights)
    return y, *kept


def backward(
    grad: Tensor, x: Tensor, weights: Tensor, rows: Rows, ffn: FFN, saved: Saved
) -> tuple[Tensor, Tensor, FFN]:
    """Gradients of tokens [T, U*D], combine weights [P] and the bank."""
    (_, hidden, width), out_width = ffn.up.shape, ffn.down.shape[1]
    unit = x.shape[1] // width
    groups = list(_groups(rows.counts, unit, hidden))
    most = max((sum(g.sizes) for g in groups), default=0)
    total = sum(rows.counts) * unit
    work = [(most, hidden)] * (2 if ffn.gate is None else 3)
    x_rows, dy_rows, dx_rows, *scratch = carve(
        x, (most // unit, x.shape[1]), (most // unit, grad.shape[1]), (total, width), *work
    )
    # Zeros are for experts without rows: every other gradient is written whole.
    fresh = torch.zeros_like if 0 in rows.counts else torch.empty_like
    grads = FFN(*(None if w is None else fresh(w) for w in tensors(ffn)), ffn.activation)
    by_row = torch.empty_like(weights).scatter_(0, rows.row, weights)  # weights in order of rows
    by_row = by_row.repeat_interleave(unit) if unit > 1 else by_row
    dots = x.new_empty(total)
    for group in groups:
        dys = _gather(grad, rows, group, out_width, dy_rows)
        kept = Saved(saved.up[group.rows], saved.other[group.rows])
        w = by_row[group.rows]
        du, dg = _hidden_grads(dys, w, ffn, grads, group, kept, scratch, dots[group.rows])
        xs = _gather(x, rows, group, width, x_rows)
        dxs = dx_rows[group.rows].split(group.sizes)
        _linear_grads(xs, du, ffn.up, grads.up, grads.up_bias, group, dxs, add=False)
        if dg is not None:
            _linear_grads(xs, dg, ffn.gate, grads.gate, grads.gate_bias, group, dxs, add=True)
    dx = sum_rows(dx_rows.view(-1, x.shape[1]), rows.row, rows.offsets)
    dots = dots.view(-1, unit).sum(1) if unit > 1 else dots
    return dx, dots.index_select(0, rows.row), grads


def tensors(ffn: FFN) -> tuple[Tensor | None, ...]:
    """The six tensors of a bank, in the order of its fields."""
    return ffn.up, ffn.down, ffn.gate, ffn.up_bias, ffn.down_bias, ffn.gate_bias


def _hidden_grads(
    dys: Sequence[Tensor],
    w: Tensor,
    ffn: FFN,
    grads: FFN,
    group: Group,
    saved: Saved,
    scratch: Sequence[Tensor],
    dots: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Through the down projection: <dy, y> per row into `dots`, and the gradients of the pre-activations (up, gate)."""
    activate, activation_grad = KERNELS[ffn.activation]
    h, dh, *spare = (buffer[: w.numel()] for buffer in scratch)
    for dy, down, out in zip(dys, _pick(ffn.down, group), dh.split(group.sizes), strict=True):
        torch.mm(dy, down, out=out)  # before the combine weight
    activated = activate(saved.other, spare[0]) if spare else saved.other
    product = torch.mul(activated, saved.up, out=h) if spare else activated
    dots.copy_(_row_dots(dh, product))
    # The combine weight enters h for the gradient of the down projection, and dh for everything below it.
    torch.mul(product, w[:, None], out=h)
    parts = zip(dys, group.experts, h.split(group.sizes), w.split(group.sizes), dots.split(group.sizes), strict=True)
    for dy, expert, h_e, w_e, dots_e in parts:
        torch.mm(dy.t(), h_e, out=grads.down[expert])
        if grads.down_bias is not None:
            dots_e.add_(dy @ ffn.down_bias[expert])
            torch.mv(dy.t(), w_e, out=grads.down_bias[expert])
    dh.mul_(w[:, None])
    if not spare:
        return activation_grad(dh, saved.up), None
    du = torch.mul(dh, activated, out=h)
    return du, activation_grad(dh.mul_(saved.up), saved.other)


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of corresponding rows [n, F] in one pass."""
    ids = torch.arange(a.shape[0], device=a.device)
    return aten._embedding_bag_per_sample_weights_backward(a, b, ids, ids, ids, 0)


def _linear_grads(
    xs: Sequence[Tensor],
    dy: Tensor,
    weight: Tensor,
    dw: Tensor,
    db: Tensor | None,
    group: Group,
    dxs: Sequence[Tensor],
    add: bool,
) -> None:
    """Gradients of `y = x @ weight.T + bias` per expert, into `dw`, `db` and `dxs` (added to these if `add`)."""
    for x, dy_e, expert, dx in zip(xs, dy.split(group.sizes), group.experts, dxs, strict=True):
        torch.mm(dy_e.t(), x, out=dw[expert])
        if db is not None:
            torch.sum(dy_e, 0, out=db[expert])
        if add:
            dx.addmm_(dy_e, weight[expert])
        else:
            torch.mm(dy_e, weight[expert], out=dx)
