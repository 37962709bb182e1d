"""Maximum mean discrepancy between what is predicted and what came, the loss of LDL-MoE (arXiv 2602.04678).

The paper names the loss; kernel and estimator here are ours: a mean of Gaussian kernels of several bandwidths, the
unbiased estimator of Gretton et al. 2012 (JMLR 13, equation 3). A forecast meets one truth, y. The term E k(y, y')
is then a constant, and what is left, E k(x, x') - 2 E k(x, y), is the kernel score: a proper scoring rule (Gneiting
and Raftery 2007, section 5.1), which a forecast minimises on average only by the true distribution.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

WIDEST, NUM_BANDWIDTHS = 4.0, 5
"""Bandwidths are 4, 2, 1, 1/2 and 1/4, in deviations of the context: from a level shift to a quiet hour's noise."""


def kernel(distance: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Mean over the bandwidths s of exp(-distance^2 / (2 s^2)): 1 at distance 0."""
    value = torch.exp(distance.square() / (-2 * WIDEST**2))
    total = value
    for _ in range(NUM_BANDWIDTHS - 1):
        value = value.square().square()  # half the bandwidth: the fourth power, which is cheaper than an exponential
        total = total + value
    return total / NUM_BANDWIDTHS


def mmd2(x: Float[Tensor, "*N S"], y: Float[Tensor, "*N T"]) -> Float[Tensor, "*N"]:
    """Unbiased estimate of the squared discrepancy between the distributions of two samples; can be negative.

    Args:
        x: S >= 2 values.
        y: T >= 1 values; with one alone, E k(y, y') is left out and the result is the kernel score.
    """
    cross = kernel(x[..., :, None] - y[..., None, :]).mean((-2, -1))
    return _among(x) - 2 * cross + (_among(y) if y.shape[-1] > 1 else 0.0)


def _among(x: Float[Tensor, "*N S"]) -> Float[Tensor, "*N"]:
    """Mean kernel of all pairs of different values."""
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    return kernel(x[..., first] - x[..., second]).mean(-1)


def discrete_mmd2(
    p: Float[Tensor, "*N K"], q: Float[Tensor, "*N K"], centres: Float[Tensor, " K"]
) -> Float[Tensor, "*N"]:
    """The squared discrepancy of two distributions over the same K points, exactly."""
    gap = p - q
    with torch.autocast(gap.device.type, enabled=False):  # differences of products of small numbers
        return ((gap @ kernel(centres[:, None] - centres)) * gap).sum(-1)
