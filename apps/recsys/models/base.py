"""What all ranking models take and give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor, nn

from apps.recsys.batch import Batch
from moecore.factorized import FactorizedInput


@dataclass(frozen=True)
class Behaviours:
    """A sequence whose values a model looks at one by one."""

    values: Float[Tensor, "B L d"]
    mask: Bool[Tensor, "B L"]
    """True where there is a value."""
    target: Float[Tensor, "B d"] | None
    """Embedding of the candidate, in the same table."""


@dataclass(frozen=True)
class Slot:
    """Where a feature lies in `Fields.features`."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Fields:
    """Embedded features of a batch."""

    features: Float[Tensor, "B D"] | FactorizedInput
    """All features side by side; sequences pooled."""
    behaviours: dict[str, Behaviours] = field(default_factory=dict)
    """Sequences that the encoder was asked to hand on, value by value."""


@dataclass(frozen=True)
class Output:
    """What a model says of a batch."""

    logits: Float[Tensor, "B T"]
    """Per task; of a conditional task, given that its condition holds."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Further losses of training (contrastive, balance), already multiplied by their coefficients."""


class RankModel(nn.Module, ABC):
    """Base of all ranking models."""

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """Logits of every task."""
