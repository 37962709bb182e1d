"""Moirai-MoE: scales, missing values, packed series, constants."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from apps.timeseries.models.base import Windows
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.timeseries.models.moirai_tokens import make_grid
from tests.apps.timeseries.models.moirai_cases import NAN, TINY, P, forecast, hidden, model, windows


def test_a_missing_patch_is_as_good_as_none():
    """Missing at the start, or as padding: what is left gives the same forecast."""
    made, given = model(), windows(futr=1, hist=1)
    short = Windows(given.past[:, 7:], given.future, given.futr[:, 7:], given.hist[:, 7:])
    gaps = {name: getattr(given, name).clone() for name in ("past", "futr", "hist")}
    for values in gaps.values():
        values[:, :7] = NAN
    gapped = dataclasses.replace(given, **gaps)
    torch.testing.assert_close(made.loss(gapped), made.loss(short))
    torch.testing.assert_close(forecast(made, gapped), forecast(made, short))


def test_a_covariate_that_is_missing_throughout_is_none():
    made, given = model(), windows(futr=2, hist=1)
    with_gap = torch.cat([given.futr, torch.full_like(given.futr[..., :1], NAN)], -1)
    torch.testing.assert_close(made.loss(given), made.loss(dataclasses.replace(given, futr=with_gap)))


def test_constants_are_tokens_known_from_the_start():
    made, given = model(), windows(futr=1, hist=1)
    stat = torch.tensor([[3.0, -2e4]]).double().expand(len(given), -1)
    before, with_them = make_grid(given, P).tokens, make_grid(dataclasses.replace(given, stat=stat), P).tokens
    assert with_them.values.shape[1] == before.values.shape[1] + 2
    torch.testing.assert_close(with_them.values[:, -2:, 0], stat.asinh())
    losses = [made.loss(dataclasses.replace(given, stat=s)) for s in (stat, stat + 1, torch.full_like(stat, NAN))]
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[2], made.loss(given))  # missing ones are none
    paths = made.sample(dataclasses.replace(given, stat=stat), 9, 3)
    assert paths.shape == (len(given), 3, 9)
    assert paths.isfinite().all()


def test_a_missing_point_is_not_a_point_at_the_mean():
    made, given = model(), windows(batch=1)
    missing = given.past.clone()
    missing[:, 9] = NAN
    at_mean = missing.clone()
    at_mean[:, 9] = missing.nanmean()
    grids = [make_grid(dataclasses.replace(given, past=past), P) for past in (missing, at_mean)]
    assert torch.equal(
        grids[0].tokens.values[:, 2], torch.where(grids[0].tokens.observed[:, 2], grids[0].tokens.values[:, 2], 0)
    )
    embedded = [made.encoder.embed(grid.tokens.values[:, 2], grid.tokens.observed[:, 2]) for grid in grids]
    assert not torch.allclose(*embedded)
    made.encoder.embed.missing.weight.data.zero_()
    scaled = [made.encoder.embed(grids[0].tokens.values[:, 2], grid.tokens.observed[:, 2]) for grid in grids]
    assert torch.equal(*scaled)


def test_what_is_complete_has_no_missing_part():
    made, values = model(), torch.randn(3, P).double()
    before = made.encoder.embed(values, torch.ones(3, P, dtype=torch.bool))
    made.encoder.embed.missing.weight.data.fill_(9.0)
    assert torch.equal(made.encoder.embed(values, torch.ones(3, P, dtype=torch.bool)), before)


def test_scale_is_mean_and_deviation_of_what_the_context_shows():
    given = windows(18, 12, futr=1)
    given.past[:, 4:7] = NAN
    grid = make_grid(given, P)
    for row, (mean, std) in enumerate(zip(grid.scale.mean, grid.scale.std, strict=True)):
        shown = given.past[row][given.past[row].isfinite()]
        torch.testing.assert_close((mean.item(), std.item()), (shown.mean().item(), shown.std().item()))
    scaled = grid.tokens.values[grid.tokens.variate.expand(3, -1) == 1].view(3, -1)[:, 2:32]
    known = given.futr[..., 0]
    wanted = (known - known[:, :18].mean(1, keepdim=True)) / known[:, :18].std(1, keepdim=True)
    torch.testing.assert_close(scaled[:, :30], wanted)


def test_a_packed_series_without_context_is_scaled_by_itself():
    given = windows(16, 12, batch=1)
    segments = (torch.arange(28) >= 20).long()[None]
    scaled = make_grid(dataclasses.replace(given, segments=segments), P).target.values[0, 5:].flatten()
    tail = given.future[0, 4:]
    torch.testing.assert_close(scaled, (tail - tail.mean()) / tail.std())


def test_missing_points_have_no_likelihood():
    """A gap in the last patch is the same as a shorter horizon."""
    made, given = model(), windows(horizon=8)
    future = given.future.clone()
    future[:, 6:] = NAN
    gapped = made.loss(dataclasses.replace(given, future=future))
    torch.testing.assert_close(gapped, made.loss(dataclasses.replace(given, future=given.future[:, :6])))
    assert not torch.isclose(gapped, made.loss(given))


@pytest.mark.parametrize("future", [True, False])
def test_nothing_to_learn_from(future):
    given = Windows(torch.full((2, 9), NAN), torch.full((2, 5), NAN) if future else None)
    made = model().float()
    loss = made.loss(given)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in made.parameters())
    assert made.head.project.weight.grad is not None


def test_a_short_context_without_future():
    made = model()
    assert made.loss(Windows(torch.randn(2, 3).double())) == 0
    assert made.loss(Windows(torch.randn(2, 5).double())) != 0


def test_packed_series_do_not_see_each_other():
    """Two series in one row, borders on and off the grid of patches, are as two rows."""
    made = model()
    first, second = torch.randn(1, 12).double(), 100 + 9 * torch.randn(1, 18).double()
    segments = torch.tensor([[0] * 12 + [1] * 18])
    x = torch.cat([first, second], 1)
    packed = made.loss(Windows(x[:, :24], x[:, 24:], segments=segments))
    apart = [made.loss(Windows(first)), made.loss(Windows(second[:, :12], second[:, 12:]))]
    points = [8, 14]
    wanted = sum(n * loss for n, loss in zip(points, apart, strict=True)) / sum(points)
    torch.testing.assert_close(packed, wanted)


@pytest.mark.parametrize("length", [20, 18])
def test_packed_series_that_share_a_patch(length):
    made, given = model(), windows(length, 12, batch=1)
    border = length - 10  # in the middle of a patch
    segments = (torch.arange(length + 12) >= border).long()[None]
    other = dataclasses.replace(given, past=given.past.clone())
    other.past[:, :border] = 5.0 + 3 * torch.randn(1, border).double()
    before, clock = hidden(made, dataclasses.replace(given, segments=segments))
    after, _ = hidden(made, dataclasses.replace(other, segments=segments))
    later = clock >= 2  # the shared patch, which is the second series', and what follows
    torch.testing.assert_close(before[:, later], after[:, later], rtol=0, atol=1e-12)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize(("factor", "offset"), [(3.0, 0.0), (1e-7, 1e-6), (1e5, -4e6)])
def test_forecasts_scale_with_the_series(factor, offset):
    made, given = model(), windows(futr=1)
    scaled = dataclasses.replace(given, past=factor * given.past + offset, futr=7 * given.futr - 2)
    torch.testing.assert_close(forecast(made, scaled), factor * forecast(made, given) + offset, rtol=1e-6, atol=0)


@pytest.mark.parametrize("constant", [0.0, 7.0, 0.1, -1e6])
def test_constant_series_and_covariates(constant):
    made = MoiraiMoE(TINY)
    given = windows(futr=1, hist=1)._map(lambda t: t.float())
    flat = Windows(*(torch.full_like(t, constant) for t in (given.past, given.future, given.futr, given.hist)))
    loss = made.loss(flat)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)
    grid = make_grid(flat, P)
    torch.testing.assert_close(grid.scale.restore(grid.target.values.flatten(1)), torch.full((3, 32), constant))
    assert grid.tokens.values.abs().max() < 0.2
    assert made.forecast(flat, 9).mean.isfinite().all()


def test_a_future_beyond_all_bounds():
    made = MoiraiMoE(TINY)
    given = Windows(torch.zeros(2, 16), torch.full((2, 8), 1e30))
    loss = made.loss(given)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)
