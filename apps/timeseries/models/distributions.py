"""Moirai's output distribution: a mixture of four components, for every point of a patch.

Woo et al., "Unified Training of Universal Time Series Forecasting Transformers", arXiv 2402.02592: a Student t for most
series, a narrow normal for what is nearly certain, a negative binomial for counts, a log-normal for right-skewed
series.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Gamma, LogNormal, Normal, StudentT
from torch.nn import functional as F

COMPONENTS = ("student_t", "normal", "negative_binomial", "log_normal")
"""In the order of the mixture's weights."""
PARAMETERS = ("df", "loc", "scale", "fixed_loc", "total_count", "logits", "log_loc", "log_scale")
"""In the order of the head's output, after the weights' logits."""
FIXED_SCALE = 1e-3
"""Deviation of the narrow normal component."""
MAX_SAMPLE = 1e4
"""Bound of samples of the heavy-tailed components, in units of the scaled series: far beyond any data, far from
overflow."""


def _positive(x: Tensor) -> Tensor:
    return F.softplus(x).clamp(min=torch.finfo(x.dtype).eps)


@dataclass(frozen=True)
class NegativeBinomial:
    """Counts, whose log-probability the gamma function extends to all x >= 0.

    A distribution over whole numbers still: probabilities sum to one there. The integral over the reals is close to one
    for wide distributions and smaller for those that sit at zero.
    """

    total_count: Float[Tensor, "*N"]
    logits: Float[Tensor, "*N"]

    def log_prob(self, x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Log-probability at x >= 0."""
        r = self.total_count
        choose = torch.lgamma(x + r) - torch.lgamma(x + 1) - torch.lgamma(r)
        return choose + r * F.logsigmoid(-self.logits) + x * F.logsigmoid(self.logits)

    def sample(self, shape: torch.Size) -> Float[Tensor, "*S N"]:
        """Whole numbers, by way of a Poisson whose rate is gamma-distributed."""
        rate = Gamma(self.total_count, 1.0, validate_args=False).sample(shape) * self.logits.exp()
        return torch.poisson(rate.clamp(max=MAX_SAMPLE))


Components = tuple[StudentT, Normal, NegativeBinomial, LogNormal]
"""In the order of `COMPONENTS`."""


def _components(*parameters: Tensor) -> Components:
    """From `PARAMETERS`, within their bounds."""
    df, loc, scale, fixed_loc, count, logits, log_loc, log_scale = parameters
    return (
        StudentT(df, loc, scale, validate_args=False),
        Normal(fixed_loc, FIXED_SCALE, validate_args=False),
        NegativeBinomial(count, logits),
        LogNormal(log_loc, log_scale, validate_args=False),
    )


def _log_likelihood(x: Tensor, log_weights: Tensor, components: Components) -> Float[Tensor, "*N"]:
    student, normal, counts, skewed = components
    can_count, can_skew = x >= 0, x > 0
    # Outside its support a component sees a value inside, so that the masked branch has a finite gradient too.
    counted = counts.log_prob(torch.where(can_count, x, 0.0)).masked_fill(~can_count, -torch.inf)
    skew = skewed.log_prob(torch.where(can_skew, x, 1.0)).masked_fill(~can_skew, -torch.inf)
    each = torch.stack([student.log_prob(x), normal.log_prob(x), counted, skew], -1)
    return (each + log_weights).logsumexp(-1)


def log_likelihood(x: Float[Tensor, "*N"], bounded: Float[Tensor, "*N 12"]) -> Float[Tensor, "*N"]:
    """`Mixture.log_prob` of the mixtures that `Mixture.bounded` describes."""
    weights, parameters = bounded.split([len(COMPONENTS), len(PARAMETERS)], -1)
    return _log_likelihood(x, weights.log(), _components(*parameters.unbind(-1)))


@dataclass(frozen=True)
class Mixture:
    """A mixture of `COMPONENTS` at every point, from what the head gives without bounds."""

    raw: Float[Tensor, "*N 12"]

    @cached_property
    def log_weights(self) -> Float[Tensor, "*N 4"]:
        """Logarithms of the mixture's weights."""
        return self.raw[..., : len(COMPONENTS)].log_softmax(-1)

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """`PARAMETERS`, `[*N]` each, within their bounds."""
        df, loc, scale, fixed_loc, count, logits, log_loc, log_scale = self.raw[..., len(COMPONENTS) :].unbind(-1)
        df, count = 2 + F.softplus(df), _positive(count)
        return df, loc, _positive(scale), fixed_loc, count, logits, log_loc, _positive(log_scale)

    @property
    def bounded(self) -> Float[Tensor, "*N 12"]:
        """Weights that sum to one, then `PARAMETERS`: all that defines the mixture."""
        return torch.cat([self.log_weights.exp(), torch.stack(self.parameters, -1)], -1)

    @cached_property
    def components(self) -> Components:
        """The four distributions, in the order of `COMPONENTS`."""
        return _components(*self.parameters)

    def log_prob(self, x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Log-likelihood of finite values; components that cannot give a value have no part in it."""
        return _log_likelihood(x, self.log_weights, self.components)

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...] = ()) -> Float[Tensor, "*S N"]:
        """Draw from the global generator, `shape` samples of every point; none exceeds `MAX_SAMPLE`."""
        shape = torch.Size(shape)
        each = torch.stack([component.sample(shape) for component in self.components], -1)
        noise = torch.empty_like(each).exponential_()
        chosen = (self.log_weights - noise.log()).argmax(-1, keepdim=True)  # Gumbel's trick: a draw by the weights
        return each.gather(-1, chosen).squeeze(-1).clamp(-MAX_SAMPLE, MAX_SAMPLE)


class MixtureHead(nn.Module):
    """From hidden states to a mixture for every point of the next patch.

    Args:
        width: D.
        patch_size: P.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.project = nn.Linear(width, (len(COMPONENTS) + len(PARAMETERS)) * patch_size)

    def forward(self, x: Float[Tensor, "*N D"]) -> Mixture:
        """[..., D] -> mixtures [..., P], in float32 at least."""
        raw = self.project(x).unflatten(-1, (-1, self.patch_size)).transpose(-1, -2)  # [..., P, 12]
        return Mixture(raw if raw.dtype == torch.float64 else raw.float())
