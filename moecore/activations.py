"""Activations by name, and which of them a foreign model's activation is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecore.errors import choice

Activation = Callable[[Tensor], Tensor]


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


# Functions with a name, not lambdas: a module that holds one must pickle.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": _relu2,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": _identity,
}
"""Elementwise activations by the name that configurations use."""


def resolve_activation(activation: str | Activation) -> tuple[str | None, Activation]:
    """Name (None if it has none here) and function of an activation given by name, module or function."""
    if isinstance(activation, str):
        choice("activation", activation, ACTIVATIONS)
        return activation, ACTIVATIONS[activation]
    name = _identify(activation)
    return name, ACTIVATIONS[name] if name else activation


@torch.no_grad()
def _identify(activation: Activation) -> str | None:
    """Name of the activation that gives the same values, whatever library it comes from."""
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        return None
    probe = torch.linspace(-6, 6, 97)
    values = activation(probe.clone())
    for name, candidate in ACTIVATIONS.items():
        if torch.allclose(values, candidate(probe), rtol=0, atol=2e-6):
            return name
    return None
