"""Expert banks: the weights of E experts in stacked tensors, applied to rows that an executor has laid out.

A bank never sees a router. It computes on rows `x` through a `Layout`, which knows which rows belong to which
expert; the same few lines therefore run sorted, grouped, dense, or one expert at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moecore.activations import Activation, resolve_activation
from moecore.errors import choice, require


@runtime_checkable
class Layout(Protocol):
    """How rows are laid out over experts. R stands for the rows' leading dimensions."""

    def linear(self, x: Tensor, weight: Float[Tensor, "E F D"], bias: Float[Tensor, "E F"] | None) -> Tensor:
        """Each row times the weight of its expert: [R, D] -> [R, F]."""

    def pick(self, table: Float[Tensor, "E D"], x: Tensor) -> Tensor:
        """The entry of each row's expert, in a shape that broadcasts against rows `x`."""

    def parts(self, x: Tensor, sizes: Sequence[int]) -> list[tuple[int, Tensor, Layout]]:
        """Rows split over consecutive ranges of experts: (range number, rows, layout), empty ranges left out."""


@dataclass(frozen=True)
class FFN:
    """Weights of a bank of plain two-layer experts, all that an executor's fast path needs.

    Each expert computes `down @ act(up @ x)`, or `down @ (act(gate @ x) * (up @ x))` when it has a gate.
    """

    up: Float[Tensor, "E F D"]
    down: Float[Tensor, "E O F"]
    gate: Float[Tensor, "E F D"] | None
    up_bias: Float[Tensor, "E F"] | None
    down_bias: Float[Tensor, "E O"] | None
    gate_bias: Float[Tensor, "E F"] | None
    activation: str


class ExpertBank(nn.Module, ABC):
    """Base of all banks.

    Attributes:
        num_experts: E.
        width: D of the rows it takes; `out_width` of those it gives.
    """

    def __init__(self, num_experts: int, width: int, out_width: int | None = None) -> None:
        super().__init__()
        require(num_experts >= 1, "num_experts", num_experts, "must be at least 1")
        require(width >= 1, "width", width, "must be at least 1")
        self.num_experts, self.width, self.out_width = num_experts, width, out_width or width

    @abstractmethod
    def forward(self, x: Float[Tensor, "*R D"], layout: Layout) -> Float[Tensor, "*S O"]:
        """Apply to every row its expert, as laid out."""

    def ffn(self) -> FFN | None:
        """The weights, if the experts are plain FFNs whose activation has a name here; else None."""
        return None


def _stacked(num_experts: int, rows: int, columns: int) -> nn.Parameter:
    """E matrices `[rows, columns]`, each initialised as `nn.Linear` does."""
    bound = 1 / math.sqrt(columns)
    return nn.Parameter(torch.empty(num_experts, rows, columns).uniform_(-bound, bound))


def _biases(num_experts: int, rows: int, columns: int, wanted: bool) -> nn.Parameter | None:
    bound = 1 / math.sqrt(columns)
    return nn.Parameter(torch.empty(num_experts, rows).uniform_(-bound, bound)) if wanted else None


class MLPBank(ExpertBank):
    """Two-layer experts `down(act(up(x)))`.

    Args:
        num_experts: E.
        width: D.
        hidden: F, hidden units per expert: fine-grained experts have few, coarse ones many.
        activation: a name of `moecore.ACTIVATIONS`, a module or a function.
        bias: whether the linear maps have biases.
        dropout: on the hidden units, in training.
        out_width: width of the output, D by default.
    """

    gated = False

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        activation: str | Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        out_width: int | None = None,
    ) -> None:
        super().__init__(num_experts, width, out_width)
        require(hidden >= 1, "hidden", hidden, "must be at least 1")
        self.hidden, self.dropout = hidden, dropout
        self.activation_name, self.activation = resolve_activation(activation)
        self.up = _stacked(num_experts, hidden, width)
        self.up_bias = _biases(num_experts, hidden, width, bias)
        self.gate = _stacked(num_experts, hidden, width) if self.gated else None
        self.gate_bias = _biases(num_experts, hidden, width, bias and self.gated)
        self.down = _stacked(num_experts, self.out_width, hidden)
        self.down_bias = _biases(num_experts, self.out_width, hidden, bias)

    def forward(self, x: Float[Tensor, "*R D"], layout: Layout) -> Float[Tensor, "*S O"]:
        """[R, D] -> [R, O]."""
        return layout.linear(self.hidden_units(x, layout), self.down, self.down_bias)

    def hidden_units(self, x: Float[Tensor, "*R D"], layout: Layout) -> Float[Tensor, "*S F"]:
        """[R, D] -> [R, F], activated."""
        hidden = layout.linear(x, self.up, self.up_bias)
        if self.gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(layout.linear(x, self.gate, self.gate_bias)) * hidden
        return F.dropout(hidden, self.dropout, self.training)

    def ffn(self) -> FFN | None:
        """The stacked weights, unless dropout or an unknown activation stands in the way."""
        if self.activation_name is None or (self.training and self.dropout > 0):
            return None
        return FFN(self.up, self.down, self.gate, self.up_bias, self.down_bias, self.gate_bias, self.activation_name)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"num_experts={self.num_experts}, width={self.width}, hidden={self.hidden}, "
            f"activation={self.activation_name}, bias={self.up_bias is not None}"
        )


class GLUBank(MLPBank):
    """Gated experts `down(act(gate(x)) * up(x))`: SwiGLU with the default SiLU (arXiv 2002.05202).

    Arguments as `MLPBank`; three matrices per expert instead of two, no biases by default.
    """

    gated = True

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        activation: str | Activation = "silu",
        bias: bool = False,
        dropout: float = 0.0,
        out_width: int | None = None,
    ) -> None:
        super().__init__(num_experts, width, hidden, activation, bias, dropout, out_width)


class SegmentBank(ExpertBank):
    """Experts that consume a whole segment `[L, D]` at once, so that its tokens mix inside the expert.

    For experts that treat a segment's tokens one by one, give the layer `unit=L` and any other bank
    (Seg-MoE, arXiv 2601.21641, describes the former and publishes the latter).

    Args:
        num_experts: E.
        length: L, tokens per segment.
        width: D of a token.
        hidden: F, hidden units per expert.
        activation: as for `MLPBank`.
        bias: whether the linear maps have biases.
        dropout: on the hidden units, in training.
    """

    def __init__(
        self,
        num_experts: int,
        length: int,
        width: int,
        hidden: int,
        activation: str | Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_experts, width)
        require(length >= 1, "length", length, "must be at least 1")
        self.length = length
        self.mlp = MLPBank(num_experts, length * width, hidden, activation, bias, dropout)

    def forward(self, x: Float[Tensor, "*R L D"], layout: Layout) -> Float[Tensor, "*S L D"]:
        """[R, L, D] -> [R, L, D]."""
        if x.shape[-2] != self.length:
            raise ValueError(f"segment length {x.shape[-2]}: this bank takes segments of {self.length} tokens")
        return self.mlp(x.flatten(-2), layout).unflatten(-1, x.shape[-2:])


class ConstantBank(ExpertBank):
    """Experts that cost next to nothing (MoE++, arXiv 2410.07348).

    "zero" gives 0, "copy" gives x, "constant" gives `a x + (1 - a) v` with a learned vector v and `a` the sigmoid of a
    linear map of x (the published softmax over two logits). Useful beside real experts in a `MixedBank`.
    """

    def __init__(self, num_experts: int, width: int, kind: str = "constant") -> None:
        super().__init__(num_experts, width)
        choice("kind", kind, ("zero", "copy", "constant"))
        self.kind = kind
        if kind == "constant":
            self.vector = nn.Parameter(torch.zeros(num_experts, width))
            self.mix = nn.Parameter(torch.empty(num_experts, width).normal_(std=0.02))

    def forward(self, x: Float[Tensor, "*R D"], layout: Layout) -> Float[Tensor, "*S D"]:
        """[R, D] -> [R, D]."""
        if self.kind == "zero":
            return x * 0.0
        if self.kind == "copy":
            return x * 1.0
        a = (x * layout.pick(self.mix, x).to(x.dtype)).sum(-1, keepdim=True).sigmoid()
        return a * x + (1 - a) * layout.pick(self.vector, x).to(x.dtype)


class MixedBank(ExpertBank):
    """Several banks as one: experts are numbered through in order.

    Args:
        banks: banks of equal input and output width.
    """

    def __init__(self, banks: Sequence[ExpertBank]) -> None:
        widths = sorted({(bank.width, bank.out_width) for bank in banks})
        require(len(widths) == 1, "banks", widths, "must all have the same input and output width")
        super().__init__(sum(bank.num_experts for bank in banks), *widths[0])
        self.banks = nn.ModuleList(banks)

    def forward(self, x: Float[Tensor, "*R D"], layout: Layout) -> Float[Tensor, "*S O"]:
        """[R, D] -> [R, O]."""
        sizes = [bank.num_experts for bank in self.banks]
        return torch.cat([self.banks[i](rows, part) for i, rows, part in layout.parts(x, sizes)])


BANKS: dict[str, type[ExpertBank]] = {
    "mlp": MLPBank,
    "glu": GLUBank,
    "segment": SegmentBank,
    "constant": ConstantBank,
    "mixed": MixedBank,
}
"""Banks by name; configurations build `mlp` and `glu`, the others are for layers built from parts."""
