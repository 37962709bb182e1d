"""Measures, against sums done by hand and by loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional import symmetric_mean_absolute_percentage_error

from apps.timeseries.metrics import ErrorSums, central_intervals, seasonal_scale

NAN = float("nan")
LEVELS = (0.1, 0.5, 0.9)


def drawn(count: int = 50, horizon: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Truth with gaps, forecasts with quantiles in order, three series of which one has no scale."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(1, 2, (count, horizon))
    truth[rng.random(truth.shape) < 0.2] = NAN
    quantiles = np.sort(rng.normal(1, 2, (count, len(LEVELS), horizon)), 1)
    series = rng.integers(0, 3, count)
    scale = np.array([0.5, 2.0, 0.0])[series]
    return {"truth": truth, "mean": quantiles[:, 1], "quantiles": quantiles, "scale": scale, "series": series}


def looped(data: dict[str, np.ndarray], points: list[tuple[int, int]]) -> dict[str, float]:
    """Every measure over some points (window, step), one at a time."""
    sums = {name: [0.0, 0.0] for name in ("mse", "mae", "mase", "smape", "crps", "coverage_80", "width_80")}
    for n, h in points:
        y, f = data["truth"][n, h], data["mean"][n, h]
        if np.isnan(y):
            continue
        low, _, high = data["quantiles"][n, :, h]
        pinball = [
            (y - q) * a if y >= q else (q - y) * (1 - a)
            for a, q in zip(LEVELS, data["quantiles"][n, :, h], strict=True)
        ]
        terms = {
            "mse": ((f - y) ** 2, 1),
            "mae": (abs(f - y), 1),
            "smape": (200 * abs(f - y) / (abs(f) + abs(y)), 1),
            "crps": (2 * np.mean(pinball), abs(y)),
            "coverage_80": (float(low <= y <= high), 1),
            "width_80": (high - low, 1),
        }
        if data["scale"][n] > 0:
            terms["mase"] = (abs(f - y) / data["scale"][n], 1)
        for name, (top, bottom) in terms.items():
            sums[name][0] += top
            sums[name][1] += bottom
    return {name: top / bottom if bottom else NAN for name, (top, bottom) in sums.items()}


def test_by_hand():
    sums = ErrorSums(2, 1, (0.1, 0.9))
    truth, mean = np.array([[10.0, NAN], [0.0, -4.0]]), np.array([[12.0, 5.0], [0.0, -1.0]])
    quantiles = np.stack([mean - 1, mean + 2], 1)
    sums.update(truth, mean, quantiles, scale=np.array([2.0, 2.0]))
    # errors 2, 0, 3; pinball at 0.1: .9 * 1, .1 * 1, .9 * 2; at 0.9: .1 * 4, .1 * 2, .1 * 5
    expected = {
        "mse": (4 + 0 + 9) / 3,
        "mae": 5 / 3,
        "mase": 2.5 / 3,
        "smape": (400 / 22 + 0 + 600 / 5) / 3,
        "crps": (2 * (0.9 + 0.1 + 1.8) / 14 + 2 * (0.4 + 0.2 + 0.5) / 14) / 2,
        "coverage_80": 1 / 3,
        "width_80": 3.0,
    }
    assert sums.overall() == pytest.approx(expected)
    assert sums.per_step()["mae"] == pytest.approx([1.0, 3.0])
    assert sums.count.tolist() == [2, 1]
    assert sums.calibration() == pytest.approx([2 / 3, 1.0])


def test_loops_agree_overall_per_step_and_per_series():
    data = drawn()
    sums = ErrorSums(4, 3, LEVELS)
    sums.update(**data)
    everywhere = [(n, h) for n in range(50) for h in range(4)]
    assert sums.overall() == pytest.approx(looped(data, everywhere))
    for h in range(4):
        mine = {name: values[h] for name, values in sums.per_step().items()}
        assert mine == pytest.approx(looped(data, [(n, h) for n in range(50)]))
    for s in range(3):
        mine = {name: values[s] for name, values in sums.per_series().items()}
        points = [(n, h) for n, h in everywhere if data["series"][n] == s]
        assert mine == pytest.approx(looped(data, points), nan_ok=True)
    assert np.isnan(sums.per_series()["mase"][2])  # its scale is zero
    assert np.isfinite(sums.overall()["mase"])


def test_batches_and_merged_sums_are_the_whole():
    data = drawn()
    whole, first, second = (ErrorSums(4, 3, LEVELS) for _ in range(3))
    whole.update(**data)
    for sums, rows in ((first, slice(0, 7)), (first, slice(7, 30)), (second, slice(30, 50))):
        sums.update(**{name: torch.tensor(values[rows]) for name, values in data.items()})  # tensors do as well
    first.merge(second)
    assert first.overall() == pytest.approx(whole.overall())
    assert first.calibration() == pytest.approx(whole.calibration())
    for name, values in whole.per_series().items():
        assert first.per_series()[name] == pytest.approx(values, nan_ok=True)
    with pytest.raises(ValueError, match="something else"):
        first.merge(ErrorSums(4, 2, LEVELS))


def test_smape_is_that_of_torchmetrics_in_percent():
    data = drawn()
    seen = np.isfinite(data["truth"])
    sums = ErrorSums(4)
    sums.update(data["truth"], data["mean"])
    theirs = symmetric_mean_absolute_percentage_error(
        torch.tensor(data["mean"][seen]), torch.tensor(data["truth"][seen])
    )
    assert sums.overall()["smape"] == pytest.approx(100 * float(theirs), rel=1e-5)


def test_right_quantiles_are_calibrated_and_the_best():
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = normal.sample((4000, 1))
    losses = []
    for width in (0.6, 1.0, 1.5):
        sums = ErrorSums(1, 1, LEVELS)
        quantiles = width * normal.icdf(torch.tensor(LEVELS))[None, :, None].expand(4000, 3, 1)
        sums.update(truth, torch.zeros(4000, 1), quantiles)
        losses.append(sums.overall()["crps"])
        if width == 1.0:
            assert sums.calibration() == pytest.approx(LEVELS, abs=0.02)
            assert sums.overall()["coverage_80"] == pytest.approx(0.8, abs=0.02)
    assert losses[1] == min(losses)


def test_nothing_observed_is_nan_and_a_broken_forecast_is_seen():
    sums = ErrorSums(2, 1, LEVELS)
    sums.update(np.full((3, 2), NAN), np.zeros((3, 2)), np.zeros((3, 3, 2)))
    assert all(np.isnan(value) for value in sums.overall().values())
    broken = ErrorSums(1)
    broken.update(np.ones((2, 1)), np.array([[1.0], [NAN]]))
    assert np.isnan(broken.overall()["mae"])


@pytest.mark.parametrize(
    ("levels", "shapes", "match"),
    [
        ((), [(2, 3), (2, 4)], "truth and forecast"),
        ((0.5,), [(2, 3), (2, 3)], "come with levels"),
        ((), [(2, 3), (2, 3), (2, 1, 3)], "come with levels"),
        ((0.5,), [(2, 3), (2, 3), (2, 2, 3)], "quantiles are"),
    ],
)
def test_what_does_not_fit_is_refused(levels, shapes, match):
    with pytest.raises(ValueError, match=match):
        ErrorSums(3, 1, levels).update(*(np.zeros(shape) for shape in shapes))


def test_intervals_are_between_symmetric_levels():
    assert central_intervals((0.1, 0.25, 0.5, 0.75, 0.9, 0.99)) == {50: (1, 3), 80: (0, 4)}
    assert central_intervals((0.9, 0.1)) == {80: (1, 0)}


def test_scale_of_mase():
    assert seasonal_scale(np.array([1.0, 2.0, 4.0, NAN, 7.0]), 2) == 3.0  # 3 is compared to 1, 4 to 2
    assert np.isnan(seasonal_scale(np.array([1.0, 2.0]), 2))
    assert seasonal_scale(np.ones(5), 1) == 0.0
