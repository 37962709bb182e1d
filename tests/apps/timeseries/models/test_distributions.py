"""The mixture against scipy, by integration and by its own samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor
from torch.nn import functional as F

from apps.timeseries.models.distributions import (
    COMPONENTS,
    FIXED_SCALE,
    MAX_SAMPLE,
    PARAMETERS,
    Mixture,
    MixtureHead,
    log_likelihood,
)

RAW = torch.tensor([0.3, -0.4, 0.1, 0.7, 1.0, 0.2, -0.5, 0.4, 1.5, 0.6, 0.1, -0.3], dtype=torch.float64)
"""Weights' logits, then df, loc, scale; loc; total_count, logits; loc, scale."""


def only(component: str) -> Mixture:
    """All the weight on one component."""
    raw = RAW.clone()
    raw[:4] = torch.where(torch.arange(4) == COMPONENTS.index(component), 0.0, -1e4)
    return Mixture(raw)


def by_scipy(x: float) -> float:
    """Likelihood written out."""
    raw = RAW.numpy()
    softplus = np.log1p(np.exp(raw))
    density = [
        stats.t.pdf(x, 2 + softplus[4], raw[5], softplus[6]),
        stats.norm.pdf(x, raw[7], FIXED_SCALE),
        0.0 if x < 0 else _negative_binomial(x, softplus[8], raw[9]),
        stats.lognorm.pdf(x, softplus[11], scale=math.exp(raw[10])),
    ]
    return float(special.softmax(raw[:4]) @ density)


def _negative_binomial(x: float, r: float, logits: float) -> float:
    p = special.expit(logits)
    return math.gamma(x + r) / math.gamma(x + 1) / math.gamma(r) * (1 - p) ** r * p**x


@pytest.mark.parametrize("x", [-3.0, -0.2, 0.0, 0.4, 0.4007, 0.5, 1.0, 2.7, 9.0])
def test_the_likelihood_written_out(x):
    ours = Mixture(RAW).log_prob(torch.tensor(x, dtype=torch.float64)).exp()
    assert float(ours) == pytest.approx(by_scipy(x), rel=1e-9)


@pytest.mark.parametrize(
    ("component", "grid"),
    [
        ("student_t", torch.linspace(-8, 8, 200_001, dtype=torch.float64).sinh()),
        ("normal", torch.linspace(0.39, 0.41, 20_001, dtype=torch.float64)),
        ("log_normal", torch.linspace(-20, 20, 100_001, dtype=torch.float64).exp()),
    ],
)
def test_densities_integrate_to_one(component, grid):
    total = torch.trapezoid(only(component).log_prob(grid).exp(), grid)
    assert float(total) == pytest.approx(1, abs=1e-3)


def test_counts_sum_to_one():
    counts = torch.arange(0, 400, dtype=torch.float64)
    assert float(only("negative_binomial").log_prob(counts).exp().sum()) == pytest.approx(1, abs=1e-9)


def test_no_component_outside_its_support():
    for component in ("negative_binomial", "log_normal"):
        mixture = Mixture(torch.cat([only(component).raw[:4].clamp(min=-5.0), RAW[4:]]))
        student = mixture.log_weights[0] + mixture.components[0].log_prob(torch.tensor(-2.0, dtype=torch.float64))
        assert float(mixture.log_prob(torch.tensor(-2.0, dtype=torch.float64))) == pytest.approx(float(student))


@pytest.mark.parametrize("size", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("x", [-1e4, -1.0, -1e-8, 0.0, 1e-30, 0.5, 3.0, 1e4])
def test_gradients_are_finite(x, size):
    raw = (torch.randn(500, 12) * size).requires_grad_()
    value = torch.full((500,), x, requires_grad=True)
    likelihood = Mixture(raw).log_prob(value)
    assert likelihood.isfinite().all()
    likelihood.sum().backward()
    assert raw.grad.isfinite().all()
    assert value.grad.isfinite().all()


def test_gradient_is_that_of_the_likelihood():
    raw = RAW.clone().requires_grad_()
    for x in (-1.0, 0.0, 0.401, 2.5):
        value = torch.tensor(x, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda r, value=value: Mixture(r).log_prob(value), raw)


@pytest.mark.parametrize("component", COMPONENTS)
def test_samples_follow_each_component(component):
    samples = only(component).sample((20_000,))
    raw, softplus = RAW.numpy(), F.softplus(RAW).numpy()
    if component == "negative_binomial":
        wanted = stats.nbinom(softplus[8], special.expit(-raw[9]))
        assert torch.equal(samples, samples.round())
        for k in range(6):
            assert float((samples == k).double().mean()) == pytest.approx(wanted.pmf(k), abs=0.012)
        return
    wanted = {
        "student_t": stats.t(2 + softplus[4], raw[5], softplus[6]),
        "normal": stats.norm(raw[7], FIXED_SCALE),
        "log_normal": stats.lognorm(softplus[11], scale=math.exp(raw[10])),
    }[component]
    assert stats.kstest(samples.numpy(), wanted.cdf).statistic < 0.015


def test_samples_follow_the_weights():
    samples = Mixture(RAW.expand(7, 12)).sample((4_000,))
    assert samples.shape == (4_000, 7)
    narrow = ((samples - RAW[7]).abs() < 5 * FIXED_SCALE).double().mean()  # next to nothing else is there
    assert float(narrow) == pytest.approx(float(RAW[:4].softmax(0)[1]), abs=0.015)


def test_extreme_parameters_give_bounded_samples():
    samples = Mixture(torch.randn(2_000, 12) * 40).sample((3,))
    assert samples.isfinite().all()
    assert samples.abs().max() <= MAX_SAMPLE


def test_large_counts_stay_counts():
    raw = only("negative_binomial").raw.float()
    raw[9] = 100.0  # a mean beyond float32
    assert (Mixture(raw).sample((1_000,)) > 0.9 * MAX_SAMPLE).all()


def test_the_head_gives_every_point_its_own_mixture():
    head, x = MixtureHead(6, 5), torch.randn(2, 3, 6)
    mixture = head(x)
    assert mixture.raw.shape == (2, 3, 5, 12)
    weight, bias = head.project.weight, head.project.bias
    parameter, point = 7, 2
    wanted: Tensor = x @ weight[parameter * 5 + point] + bias[parameter * 5 + point]
    torch.testing.assert_close(mixture.raw[..., point, parameter], wanted)


def test_half_precision_is_left_for_the_likelihood():
    assert MixtureHead(4, 2).bfloat16()(torch.randn(3, 4).bfloat16()).raw.dtype == torch.float32


def test_bounded_parameters_are_all_there_is_to_know():
    raw = torch.randn(5, 12, dtype=torch.float64)
    mixture, x = Mixture(raw), torch.tensor([-1.0, 0.0, 0.5, 2.0, 3.3], dtype=torch.float64)
    torch.testing.assert_close(log_likelihood(x, mixture.bounded), mixture.log_prob(x))
    torch.testing.assert_close(mixture.bounded[:, :4], raw[:, :4].softmax(-1))
    named = dict(zip(PARAMETERS, mixture.bounded[:, 4:].unbind(-1), strict=True))
    torch.testing.assert_close(named["df"], 2 + F.softplus(raw[:, 4]))
    torch.testing.assert_close(named["log_scale"], F.softplus(raw[:, 11]))
    torch.testing.assert_close(named["logits"], raw[:, 9])
