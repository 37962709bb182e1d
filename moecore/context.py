"""What a router may know beyond the token itself, and how it reaches routers inside a foreign model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass
class Context:
    """Side information for routers during one forward pass.

    Tensors may have the shape of any prefix of the input's leading dimensions: for an input `[B, N, D]` a
    `task` of shape `[B]` names one task per sample, one of shape `[B, N]` one task per token.
    """

    task: int | Tensor | None = None
    """Task index for routers with one gate per task or a task embedding."""
    ids: Tensor | None = None
    """Integer token ids for hash routing."""
    allowed: Tensor | None = None
    """Boolean mask of the experts that may be chosen, `[E]` or `[..., E]`."""
    carry: dict[str, Tensor] = field(default_factory=dict)
    """State that recurrent routers hand from layer to layer, by the name of their cell."""

    def per_token(self, lead: Sequence[int]) -> Context:
        """The same context with every tensor expanded to one row per token, `T = prod(lead)`."""
        changes = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and not (f.name == "allowed" and value.dim() == 1):
                changes[f.name] = _expand(value, lead, keep=1 if f.name == "allowed" else 0, name=f.name)
        return replace(self, **changes) if changes else self


def _expand(value: Tensor, lead: Sequence[int], keep: int, name: str) -> Tensor:
    """[prefix of lead, *keep] -> [T, *keep]."""
    prefix = value.shape[: value.dim() - keep]
    if tuple(prefix) != tuple(lead[: len(prefix)]):
        raise ValueError(
            f"context.{name} has shape {tuple(value.shape)}: its leading dimensions must be a prefix of {tuple(lead)}"
        )
    tail = value.shape[len(prefix) :]
    value = value.reshape(*prefix, *[1] * (len(lead) - len(prefix)), *tail)
    return value.expand(*lead, *tail).reshape(-1, *tail)


_CURRENT: ContextVar[Context | None] = ContextVar("moecore_routing_context", default=None)


def current_context() -> Context | None:
    """The context set by the innermost `routing_context`, or None."""
    return _CURRENT.get()


@contextmanager
def routing_context(
    task: int | Tensor | None = None, ids: Tensor | None = None, allowed: Tensor | None = None
) -> Iterator[Context]:
    """Hand side information to every MoE layer that runs inside, however deep in a foreign model.

    Under activation checkpointing, which runs layers a second time, call `backward()` inside too.

    Args:
        task: task index, one for all or one per sample or token (see `Context` for shapes).
        ids: integer token ids.
        allowed: boolean mask of the experts that may be chosen.

    Yields:
        The context, which a call to a layer may also be given as its argument.

    Example:
        >>> import torch, moecore
        >>> moe = moecore.MoE.build(8, num_experts=4, top_k=1)
        >>> with moecore.routing_context(allowed=torch.tensor([True, True, False, False])):
        ...     y = moe(torch.randn(3, 8))
    """
    context = Context(task=task, ids=ids, allowed=allowed)
    token = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(token)


def carry_across_layers(model: torch.nn.Module) -> None:
    """Give every forward pass of `model` a context of its own, so that recurrent routers inside can hand on state.

    A context that the caller opened is used as it is.
    """
    model.register_forward_pre_hook(_open_context)
    model.register_forward_hook(_close_context, always_call=True)


_OPENED: ContextVar[tuple] = ContextVar("moecore_opened_contexts", default=())


def _open_context(module: torch.nn.Module, args: object) -> None:
    token = _CURRENT.set(Context()) if _CURRENT.get() is None else None
    _OPENED.set((*_OPENED.get(), token))


def _close_context(module: torch.nn.Module, args: object, output: object) -> None:
    *rest, token = _OPENED.get()
    _OPENED.set(tuple(rest))
    if token is not None:
        _CURRENT.reset(token)
