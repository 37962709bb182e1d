"""Distribution heads of LDL-MoE: what an expert says of every step, and how experts add up.

The paper (arXiv 2602.04678) has a continuous and a discrete variant; both forms here are ours. Units are deviations of
the context, relative to a location that the head is not told. What experts give is mixed linearly: quantile functions
of the continuous head are averaged (Vincent's average, which keeps the mixture as sharp as its experts), probabilities
of the discrete one (a mixture distribution). B windows, H steps, P numbers per step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from apps.timeseries.models.ldl_mmd import discrete_mmd2, mmd2

HALF_NORMAL = 1 / math.sqrt(2 * math.pi)
"""Mean of the positive part of a standard normal."""
WIDEST_BIN = 8.0
"""Centre of the outermost bins."""


class Head(nn.Module, ABC):
    """A family of distributions.

    Attributes:
        width: P, numbers per step.
    """

    width: int

    @abstractmethod
    def activate(self, raw: Float[Tensor, "*N P"]) -> Float[Tensor, "*N P"]:
        """What an expert computes -> parameters, which may be averaged over experts."""

    @abstractmethod
    def mean(self, parameters: Float[Tensor, "B H P"]) -> Float[Tensor, "B H"]:
        """Mean of each distribution."""

    @abstractmethod
    def quantiles(self, parameters: Float[Tensor, "B H P"], levels: Sequence[float]) -> Float[Tensor, "B Q H"]:
        """Quantiles; they rise with the level."""

    @abstractmethod
    def discrepancy(self, parameters: Float[Tensor, "B H P"], truth: Float[Tensor, "B H"]) -> Float[Tensor, "B H"]:
        """Squared MMD between each distribution and the one value that came."""


class ContinuousHead(Head):
    """A normal deviate bent by four numbers: shift + right n+ - left n- + tail n abs(n).

    n+ and n- are the positive and the negative part of n, a standard normal. Left, right and tail are positive, so the
    value rises with n, and quantiles follow from those of n.

    Args:
        num_samples: S, draws per distribution for the discrepancy.
        shifted: whether there is a shift; without, the mean is what left and right differ by.
    """

    def __init__(self, num_samples: int, shifted: bool = True) -> None:
        super().__init__()
        self.num_samples, self.shifted = num_samples, shifted
        self.width = 4 if shifted else 3

    def activate(self, raw: Float[Tensor, "*N P"]) -> Float[Tensor, "*N P"]:
        """Softplus of all but the shift; tails start light."""
        shift, left, right, tail = raw.split([self.width - 3, 1, 1, 1], -1)
        return torch.cat([shift, F.softplus(left), F.softplus(right), F.softplus(tail - 2)], -1)

    def mean(self, parameters: Float[Tensor, "B H P"]) -> Float[Tensor, "B H"]:
        """Shift, and what the sides differ by."""
        left, right = parameters[..., -3], parameters[..., -2]
        lean = HALF_NORMAL * (right - left)
        return parameters[..., 0] + lean if self.shifted else lean

    def quantiles(self, parameters: Float[Tensor, "B H P"], levels: Sequence[float]) -> Float[Tensor, "B Q H"]:
        """Values at the normal's quantiles."""
        at = torch.special.ndtri(torch.tensor(tuple(levels), dtype=torch.float64)).to(parameters)
        return self._values(parameters, at).transpose(1, 2)

    def discrepancy(self, parameters: Float[Tensor, "B H P"], truth: Float[Tensor, "B H"]) -> Float[Tensor, "B H"]:
        """The kernel score of S reparameterised draws from the global generator, its estimate unbiased."""
        noise = torch.randn(*truth.shape, self.num_samples, dtype=truth.dtype, device=truth.device)
        return mmd2(self._values(parameters, noise), truth[..., None])

    def _values(self, parameters: Float[Tensor, "B H P"], n: Float[Tensor, "*N S"]) -> Float[Tensor, "B H S"]:
        left, right, tail = (parameters[..., i, None] for i in (-3, -2, -1))
        values = torch.where(n > 0, right, left) * n + tail * n * n.abs()
        return values + parameters[..., :1] if self.shifted else values


class BinsHead(Head):
    """Probabilities of fixed bins, the discrete variant; finer near zero than far away.

    The truth becomes a label distribution: its weight is shared by the two nearest centres in proportion, which keeps
    its mean; beyond the outermost centres (8 deviations of the context) it counts as lying there.

    Args:
        num_bins: P >= 2.
    """

    def __init__(self, num_bins: int) -> None:
        super().__init__()
        self.width = num_bins
        centres = torch.sinh(torch.linspace(-3.0, 3.0, num_bins, dtype=torch.float64))
        centres = (WIDEST_BIN * centres / centres[-1]).float()
        middles = (centres[1:] + centres[:-1]) / 2
        first, last = 2 * centres[:1] - middles[:1], 2 * centres[-1:] - middles[-1:]
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("edges", torch.cat([first, middles, last]), persistent=False)

    def activate(self, raw: Float[Tensor, "*N P"]) -> Float[Tensor, "*N P"]:
        """Softmax; zeros give a standard normal, roughly."""
        prior = self.edges.diff().log() - self.centres.square() / 2
        return (raw + prior).softmax(-1)

    def mean(self, parameters: Float[Tensor, "B H P"]) -> Float[Tensor, "B H"]:
        """Mean of the centres."""
        return (parameters * self.centres).sum(-1)

    def quantiles(self, parameters: Float[Tensor, "B H P"], levels: Sequence[float]) -> Float[Tensor, "B Q H"]:
        """Probability is spread evenly inside a bin."""
        cumulated = F.pad(parameters.cumsum(-1), (1, 0))  # [B, H, P + 1]
        at = torch.tensor(tuple(levels), dtype=cumulated.dtype, device=cumulated.device) * cumulated[..., -1:]
        bin = (torch.searchsorted(cumulated, at.contiguous(), right=True) - 1).clamp(0, self.width - 1)  # [B, H, Q]
        low, high = cumulated.gather(-1, bin), cumulated.gather(-1, bin + 1)
        share = ((at - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return torch.lerp(self.edges[bin], self.edges[bin + 1], share).transpose(1, 2)

    def label(self, truth: Float[Tensor, "*N"]) -> Float[Tensor, "*N P"]:
        """The label distribution of each value."""
        centres = self.centres
        truth = truth.clamp(float(centres[0]), float(centres[-1]))
        low = (torch.searchsorted(centres, truth.detach(), right=True) - 1).clamp(0, self.width - 2)
        share = ((truth - centres[low]) / (centres[low + 1] - centres[low]))[..., None]
        weights = truth.new_zeros(*truth.shape, self.width)
        return weights.scatter(-1, low[..., None], 1 - share).scatter(-1, low[..., None] + 1, share)

    def discrepancy(self, parameters: Float[Tensor, "B H P"], truth: Float[Tensor, "B H"]) -> Float[Tensor, "B H"]:
        """Exact, between probabilities and label distribution."""
        return discrete_mmd2(parameters, self.label(truth), self.centres)
