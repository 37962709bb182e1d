"""The MoE layer: route, execute experts, combine, add shared experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moecore.config import MoEConfig
from moecore.context import Context, current_context
from moecore.errors import choice, require
from moecore.executors import EXECUTORS, execute
from moecore.experts import ExpertBank
from moecore.routing import Router, Routing
from moecore.shared import SharedExpert

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda units: units.mean(-2),
    "first": lambda units: units[..., 0, :],
    "flatten": lambda units: units.flatten(-2),
}
"""How a router sees a unit of several tokens, `[T, L, D] -> [T, R]`."""


TRACED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
"""Whether `torch.compile` follows context variables. Older versions go on with the context they saw first, without a
word; there the layer stays out of the compiled graph."""


def _kept_out_of_old_compilers(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return forward if TRACED else torch.compiler.disable(forward)


class MoE(nn.Module):
    """A sparse layer: each token (or segment, or whole sample) goes through the experts its router picks.

    Dropless unless the router has a capacity. Keeps no state between calls; to see what was routed where, run the
    model inside `moecore.record`.

    Args:
        router: decides; see `moecore.routing.Router`.
        experts: work; see `moecore.experts`.
        shared: an expert that every token passes, added to the routed output.
        unit: what is routed as one: "token", "sequence" (all positions of a sample), or a number of consecutive
            tokens (a segment).
        pool: how the router sees a unit of several tokens: "mean", "first" (the class token) or "flatten".
        executor: a name of `moecore.EXECUTORS`, or "auto".
        aux_loss: the layer's mix of balance losses, name -> coefficient, for `moecore.balance_loss`.

    Example:
        >>> import torch, moecore
        >>> moe = moecore.MoE.build(64, num_experts=8, top_k=2, hidden=128)
        >>> moe(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        router: Router,
        experts: ExpertBank,
        shared: SharedExpert | None = None,
        unit: str | int = "token",
        pool: str = "mean",
        executor: str = "auto",
        aux_loss: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        choice("executor", executor, ("auto", *EXECUTORS))
        choice("pool", pool, POOLS)
        if isinstance(unit, str):
            choice("unit", unit, ("token", "sequence"))
        else:
            require(unit >= 1, "unit", unit, "a segment has at least 1 token")
        self.router, self.experts, self.shared = router, experts, shared
        self.unit, self.pool, self.executor = unit, pool, executor
        self.aux_loss = dict(aux_loss or {})
        self._recorder: Callable[[Routing], None] | None = None
        """Set by `moecore.record` while it is active."""

    @classmethod
    def build(cls, width: int, **options: Any) -> MoE:
        """A layer from the options of `moecore.MoEConfig`, for tokens of width `width`."""
        return cls.from_config(MoEConfig(**options), width)

    @classmethod
    def from_config(cls, config: MoEConfig, width: int) -> MoE:
        """A layer from a configuration."""
        from moecore.build import build_moe  # here, because it imports this module

        return build_moe(config, width)

    @_kept_out_of_old_compilers
    def forward(self, x: Float[Tensor, "*lead D"], context: Context | None = None) -> Float[Tensor, "*lead O"]:
        """[..., D] -> [..., O].

        Args:
            x: tokens; at least `[B, N, D]` when sequences or segments are routed.
            context: task, ids or masks for the router; by default that of the enclosing `routing_context`.

        Raises:
            ValueError: for tokens without positions where sequences or segments are routed.
        """
        units, lead = self._units(x)  # [T, D] or [T, L, D]
        seen = units if units.dim() == 2 else POOLS[self.pool](units)  # [T, R]
        context = context or current_context()
        context = None if context is None else context.per_token(lead)
        routing = self.router(seen, context)
        y = execute(units, self.experts, routing.assignment, routing.weights, self.executor)
        if self.shared is not None:
            y = self.shared(units, onto=y)  # in place: y is fresh, and nothing before it needs it for backward
        if self._recorder is not None:
            task = None if context is None else context.task
            self._recorder(replace(routing, lead=lead, aux_loss=self.aux_loss, task=task))
        return self._tokens(y, x)

    def _units(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Cut the input into what is routed as one; also the shape that their number T unfolds to."""
        if self.unit == "token":
            return x.reshape(-1, x.shape[-1]), tuple(x.shape[:-1])
        if x.dim() < 3:
            raise ValueError(f"input of shape {tuple(x.shape)}: unit={self.unit!r} routes sequences [B, N, D]")
        x = x.flatten(0, -3)
        batch, length, width = x.shape
        if self.unit == "sequence":
            # A sample without positions is nothing to route, and has no mean to route it by.
            return (x, (batch,)) if length else (x.reshape(0, 1, width), (batch, 0))
        segments = self._segments(length)
        padded = F.pad(x, (0, 0, 0, segments * self.unit - length))  # zeros on the right up to whole segments
        return padded.reshape(batch * segments, self.unit, width), (batch, segments)

    def _segments(self, length: int) -> int:
        """Segments that hold `length` tokens; written so that export sees sizes divide."""
        return (length + self.unit - 1) // self.unit

    def _tokens(self, y: Tensor, x: Tensor) -> Tensor:
        """Back to the shape of the input, padding cut off."""
        if self.unit in ("token", "sequence"):
            return y.reshape(*x.shape[:-1], y.shape[-1])
        length = x.shape[-2]
        return y.reshape(*x.shape[:-2], self._segments(length) * self.unit, y.shape[-1])[..., :length, :]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but who listens: a copy made inside `moecore.record` is not part of that recording."""
        return {**self.__dict__, "_recorder": None}

    def extra_repr(self) -> str:
        """Unit and executor, for `print(model)`."""
        return f"unit={self.unit!r}, executor={self.executor!r}"
