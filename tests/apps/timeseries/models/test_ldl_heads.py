"""Discrepancy and distribution heads, against slow loops and other people's distributions."""

from __future__ import annotations

import math

import pytest
import torch

from apps.timeseries.models.ldl_heads import BinsHead, ContinuousHead
from apps.timeseries.models.ldl_mmd import discrete_mmd2, mmd2

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)


def slow_kernel(a: float, b: float) -> float:
    return sum(math.exp(-((a - b) ** 2) / (2 * s**2)) for s in (0.25, 0.5, 1.0, 2.0, 4.0)) / 5


def slow_mmd2(x: list[float], y: list[float]) -> float:
    """Gretton et al. 2012, equation 3, term by term."""
    within = 0.0
    for sample in (x, y):
        pairs = [slow_kernel(a, b) for i, a in enumerate(sample) for j, b in enumerate(sample) if i != j]
        within += sum(pairs) / len(pairs) if pairs else 0.0
    cross = [slow_kernel(a, b) for a in x for b in y]
    return within - 2 * sum(cross) / len(cross)


@pytest.mark.parametrize("size", [1, 5])
def test_mmd_is_the_double_loop(size):
    x, y = torch.randn(3, 7), 2 + torch.randn(3, size)
    expected = [slow_mmd2(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert mmd2(x, y).tolist() == pytest.approx(expected, abs=1e-6)


def test_mmd_is_unbiased_and_tells_distributions_apart():
    same = mmd2(torch.randn(20_000, 4), torch.randn(20_000, 3))
    assert abs(same.mean()) < 4 * same.std() / 20_000**0.5
    assert same.min() < 0  # the biased estimate never is
    other = mmd2(torch.randn(20_000, 4), 1 + torch.randn(20_000, 3))
    assert other.mean() > 0.05


def test_with_one_truth_it_is_a_proper_score():
    """On average the true distribution is best: narrower, wider and shifted ones are worse."""
    truth = torch.randn(40_000, 1)
    shapes = {"true": (1.0, 0.0), "narrow": (0.6, 0.0), "wide": (1.6, 0.0), "shifted": (1.0, 0.4)}
    noise = torch.randn(40_000, 4)
    scores = {name: mmd2(scale * noise + shift, truth).mean() for name, (scale, shift) in shapes.items()}
    assert min(scores, key=scores.get) == "true"


def test_discrete_discrepancy_is_that_of_weighted_points():
    centres = torch.tensor([-1.0, 0.0, 2.0])
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.0, 1.0, 0.0])
    gap = (p - q).tolist()
    expected = sum(
        gap[i] * gap[j] * slow_kernel(float(centres[i]), float(centres[j])) for i in range(3) for j in range(3)
    )
    assert float(discrete_mmd2(p, q, centres)) == pytest.approx(expected, abs=1e-6)


def parameters(head: ContinuousHead | BinsHead, batch: int = 2, steps: int = 3) -> torch.Tensor:
    return head.activate(torch.randn(batch, steps, head.width))


@pytest.mark.parametrize(
    "head", [ContinuousHead(8), ContinuousHead(8, shifted=False), BinsHead(16)], ids=["c", "u", "b"]
)
def test_quantiles_rise_and_have_the_mean_between_them(head):
    values = parameters(head, 50)
    quantiles = head.quantiles(values, LEVELS)
    assert quantiles.shape == (50, 7, 3)
    assert (quantiles.diff(dim=1) >= 0).all()
    fine = head.quantiles(values, tuple((i + 0.5) / 2000 for i in range(2000)))
    torch.testing.assert_close(fine.mean(1), head.mean(values), atol=0.03, rtol=0.02)


def test_continuous_draws_have_the_quantiles_and_the_mean_said():
    head = ContinuousHead(4)
    values = parameters(head, 1, 1)
    draws = head._values(values.expand(1, 1, 4), torch.randn(1, 1, 200_000))[0, 0]
    assert draws.mean() == pytest.approx(float(head.mean(values)), abs=0.02)
    said = head.quantiles(values, LEVELS)[0, :, 0]
    torch.testing.assert_close(draws.quantile(torch.tensor(LEVELS)), said, atol=0.03, rtol=0.02)


def test_equal_sides_without_tail_are_a_normal():
    values = torch.tensor([[[0.5, 2.0, 2.0, 0.0]]])
    said = ContinuousHead(4).quantiles(values, LEVELS)[0, :, 0]
    torch.testing.assert_close(said, torch.distributions.Normal(0.5, 2.0).icdf(torch.tensor(LEVELS)))


def test_bins_are_probabilities_that_start_near_a_normal():
    head = BinsHead(32)
    assert (parameters(head).sum(-1) - 1).abs().max() < 1e-6
    start = head.activate(torch.zeros(1, 1, 32))
    normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(LEVELS))
    torch.testing.assert_close(head.quantiles(start, LEVELS)[0, :, 0], normal, atol=0.05, rtol=0)


def test_labels_keep_the_value_and_end_at_the_outermost_bins():
    head = BinsHead(10)
    truth = torch.tensor([-20.0, -8.0, -0.3, 0.0, 2.5, 8.0, 20.0])
    labels = head.label(truth)
    torch.testing.assert_close(labels.sum(-1), torch.ones(7))
    assert ((labels > 0).sum(-1) <= 2).all()
    torch.testing.assert_close(labels @ head.centres, truth.clamp(-8, 8))


@pytest.mark.parametrize("head", [ContinuousHead(8), BinsHead(24)], ids=["continuous", "bins"])
def test_minimising_the_discrepancy_finds_a_skewed_distribution(head):
    """A shifted exponential: the head's 80 % interval holds 80 %, and the lower side is the short one."""
    raw = torch.zeros(1, 1, head.width, requires_grad=True)
    optimizer = torch.optim.Adam([raw], 0.05)
    for _ in range(120):
        truth = torch.empty(256, 1).exponential_() - 1
        loss = head.discrepancy(head.activate(raw).expand(256, 1, -1), truth).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    low, middle, high = head.quantiles(head.activate(raw.detach()), (0.1, 0.5, 0.9))[0, :, 0].tolist()
    fresh = torch.empty(20_000).exponential_() - 1
    assert ((low <= fresh) & (fresh <= high)).float().mean() == pytest.approx(0.8, abs=0.05)
    assert high - middle > 1.5 * (middle - low)
