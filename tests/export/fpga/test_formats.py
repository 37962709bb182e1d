"""Formats and the rounding rule against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.errors import ExportError
from export.fpga.formats import Fixed, Requantise, choose, declare, divide, shift_right


@given(st.integers(-(2**40), 2**40), st.integers(-10, 30), st.integers(2, 32), st.booleans())
def test_requantising_is_round_half_up_then_saturate_or_wrap(value, shift, width, wrap):
    exact = math.floor(Fraction(value) / Fraction(2) ** shift + Fraction(1, 2))
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    codes, outside = Requantise(shift, width, wrap)(np.array([value]))
    assert outside == (not low <= exact <= high)
    assert codes[0] == ((exact - low) % 2**width + low if wrap else min(max(exact, low), high))


@given(st.integers(-(2**50), 2**50), st.integers(1, 2**20))
def test_quotients_round_half_up(numerator, denominator):
    expected = math.floor(Fraction(numerator, denominator) + Fraction(1, 2))
    assert divide(np.array([numerator]), denominator)[0] == expected


def test_halves_go_up_and_the_shift_to_the_left_is_exact():
    assert shift_right(np.array([-6, -5, -2, 2, 5, 6]), 2).tolist() == [-1, -1, 0, 1, 1, 2]
    assert shift_right(np.array([-3, 3]), -4).tolist() == [-48, 48]


@given(st.floats(-1e6, 1e6, allow_subnormal=False), st.floats(-1e6, 1e6, allow_subnormal=False), st.integers(4, 32))
def test_the_chosen_format_is_the_finest_that_holds_the_range(a, b, width):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    form = choose(low, high, width)
    assert not form.overflows(np.array([low, high]))
    if max(-low, high) > 0:
        finer = Fixed(width, form.integer - 1)
        assert low < finer.low * finer.step or high > finer.high * finer.step
    assert choose(low, high, width, 2) == Fixed(width, form.integer + 2)


@pytest.mark.parametrize(
    ("low", "high", "integer"), [(-1, 0.5, 1), (0, 1, 2), (-1, 1, 2), (0, 0.2499, -1), (-8, 7.99, 4), (0, 0, 1)]
)
def test_formats_by_hand(low, high, integer):
    assert choose(low, high, 16) == Fixed(16, integer)


def test_codes_and_values():
    form = Fixed(8, 4)
    codes = form.encode(np.array([0.03124, 0.03125, -0.03125, -0.0313, 7.99, -9.0, np.inf, -np.inf]))
    assert codes.tolist() == [0, 1, 0, -1, 127, -128, 127, -128]
    assert form.decode(np.array([16, -128])).tolist() == [1.0, -8.0]
    assert form.overflows(np.array([7.96, 7.97, -8.04, np.inf])) == 2
    coarse = Fixed(4, 6)  # multiples of four
    assert coarse.encode(np.array([5.9, 6.0])).tolist() == [1, 2]
    assert coarse.decode(np.array([-3])).tolist() == [-12.0]


def test_too_wide_an_accumulator_is_one_line():
    assert declare(64, "layer", "lower it") == 64
    with pytest.raises(ExportError, match=r"^layer: needs an accumulator of 65 bits, at most 64 .*; lower it$"):
        declare(65, "layer", "lower it")
