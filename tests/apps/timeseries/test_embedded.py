"""Series that need no download."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from apps.errors import UserError
from apps.timeseries.embedded import embedded_series, synthetic_series


def test_the_real_series_are_what_statsmodels_documents() -> None:
    series = {one.id: one for one in embedded_series()}

    assert len(series) == 24
    co2 = series["co2"]
    assert (len(co2), co2.freq, co2.season, np.isnan(co2.y).sum()) == (2284, "W-SAT", 52, 59)
    assert co2.times(2283, 2284)[0] == pd.Timestamp("2001-12-29")
    assert (series["sunspots"].start, series["sunspots"].y[-1]) == (pd.Timestamp("1700-01-01"), 2.9)
    assert series["elnino"].times(731, 732)[0] == pd.Timestamp("2010-12-01")
    assert series["nile"].times(99, 100)[0] == pd.Timestamp("1970-01-01")
    assert series["macrodata/unemp"].times(202, 203)[0] == pd.Timestamp("2009-07-01")
    assert series["interest_inflation/R"].times(106, 107)[0] == pd.Timestamp("1998-10-01")
    assert series["danish_data/lry"].times(54, 55)[0] == pd.Timestamp("1987-07-01")
    assert {one.season for one in series.values()} == {1, 4, 12, 52}


def test_one_data_set_by_name() -> None:
    assert [one.id for one in embedded_series("nile")] == ["nile"]
    with pytest.raises(UserError, match=r"^data\.source=danube: no embedded series; choose statsmodels, co2"):
        embedded_series("danube")


def test_synthetic_series_are_finite_different_and_the_same_again() -> None:
    series = synthetic_series(300, 200, seed=3)
    y = np.stack([one.y for one in series])

    assert y.shape == (300, 200)
    assert np.isfinite(y).all()
    assert (y.std(1) > 0).mean() > 0.99
    assert len(np.unique(y[:, 0])) > 200
    np.testing.assert_array_equal(y[:10], [one.y for one in synthetic_series(10, 200, seed=3)])
    assert (synthetic_series(1, 200, seed=4)[0].y != y[0]).any()


def test_many_synthetic_series_have_seasons_that_a_forecast_can_use() -> None:
    y = np.stack([one.y for one in synthetic_series(256, 512)])
    y = y - y.mean(1, keepdims=True)

    spectrum = np.abs(np.fft.rfft(y, axis=1))[:, 5:] ** 2  # periods below 100 points
    peak = spectrum.max(1) / np.median(spectrum, 1)

    assert 0.3 < (peak > 100).mean() < 0.95


@pytest.mark.parametrize("length", [1, 2, 9])
def test_short_synthetic_series(length: int) -> None:
    assert [len(one) for one in synthetic_series(3, length)] == [length] * 3
