"""The layer shapes that are measured, and their dense counterparts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecore


@dataclass(frozen=True)
class Shape:
    """One layer: T tokens of width D; E experts of F hidden units, K of them per token, and a shared expert."""

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    shared: int = 0

    @property
    def dense_hidden(self) -> int:
        """Hidden units of the FFN with as many multiply-adds as a token has active here."""
        return self.top_k * self.hidden + self.shared

    def input(self) -> Tensor:
        """Tokens [T, D]."""
        return torch.randn(self.tokens, self.width)

    def moe(self, executor: str = "auto", glu: bool = True) -> moecore.MoE:
        """Our layer."""
        return moecore.MoE.build(
            self.width,
            num_experts=self.experts,
            top_k=self.top_k,
            hidden=self.hidden,
            shared_hidden=self.shared,
            glu=glu,
            activation="silu" if glu else "gelu",
            bias=not glu,
            executor=executor,
        )

    def dense(self, glu: bool = True) -> nn.Module:
        """The FFN of equal active multiply-adds."""
        return DenseGLU(self.width, self.dense_hidden) if glu else DenseMLP(self.width, self.dense_hidden)


SHAPES = {
    "vision": Shape("vision", tokens=8192, width=192, hidden=768, experts=8, top_k=2),
    "timeseries": Shape("timeseries", tokens=4096, width=384, hidden=192, experts=16, top_k=2, shared=192),
    "recsys": Shape("recsys", tokens=2048, width=64, hidden=256, experts=4, top_k=4),
}
"""Coarse experts, fine-grained experts with a shared one, and small experts that are all on."""


class DenseGLU(nn.Module):
    """SwiGLU FFN as PyTorch users write it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DenseMLP(nn.Module):
    """GELU FFN as PyTorch users write it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.down(F.gelu(self.up(x)))


def skewed(layer: moecore.MoE, x: Tensor, share: float = 0.5) -> moecore.MoE:
    """The layer with its router biased so that one expert is chosen by a given share of the tokens."""
    score = layer.router.score
    score.bias = nn.Parameter(torch.zeros(score.weight.shape[0]))
    low, high = -10.0, 10.0
    with torch.no_grad():
        for _ in range(30):
            score.bias[0] = (low + high) / 2
            load = layer.router(x).assignment.load()[0] / len(x)
            low, high = (score.bias[0].item(), high) if load < share else (low, score.bias[0].item())
    return layer


def build(shape: Shape, executor: str | None) -> tuple[nn.Module, Tensor]:
    """Layer (the dense one for None) and input, always the same."""
    torch.manual_seed(0)
    return (shape.dense() if executor is None else shape.moe(executor)), shape.input()
