"""Thinning and matching of boundaries, against slow matching by augmenting paths, topology, and cases done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.sparse import csr_array, eye_array, hstack
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from apps.vision.multitask.edges import (
    edge_counts,
    f_measure,
    matching_distance,
    matching_size,
    neighbours,
    ridges,
    thin,
)

HALF = np.array([0.5])
EIGHT = np.ones((3, 3), dtype=bool)


def matched_slowly(prediction: np.ndarray, label: np.ndarray, distance: float) -> int:
    """Pairs of a maximum matching of two boundary maps: one augmenting path per pixel (Kuhn)."""
    targets = [(int(y), int(x)) for y, x in zip(*np.nonzero(label), strict=True)]
    owner: dict[tuple[int, int], tuple[int, int]] = {}

    def assign(point: tuple[int, int], tried: set[tuple[int, int]]) -> bool:
        for target in targets:
            if target in tried or math.dist(point, target) > distance + 1e-9:
                continue
            tried.add(target)
            if target not in owner or assign(owner[target], tried):
                owner[target] = point
                return True
        return False

    return sum(assign((int(y), int(x)), set()) for y, x in zip(*np.nonzero(prediction), strict=True))


def count(prediction: np.ndarray, label: np.ndarray, distance: float) -> tuple[int, int, int]:
    """(matched, predicted, labelled) of maps that are thin already, given as 0 and 1."""
    counts = edge_counts(prediction.astype(np.float32), label.astype(np.float32), HALF, distance)
    return int(counts.matched[0]), int(counts.predicted[0]), counts.labelled


def column(x: int, height: int = 20, width: int = 20) -> np.ndarray:
    """A vertical line."""
    image = np.zeros((height, width))
    image[:, x] = 1
    return image


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([0, 0.9, 1, math.sqrt(2), 2, 2.3, math.sqrt(5), 4.1]),
    st.sampled_from([0.05, 0.2, 0.5]),
    st.sampled_from([0.05, 0.2, 0.5]),
)
def test_matchings_are_as_large_as_any(seed, shape, distance, points, targets):
    rng = np.random.default_rng(seed)
    prediction, label = rng.random(shape) < points, rng.random(shape) < targets
    near = neighbours(np.argwhere(prediction), label, distance)
    assert matching_size(near) == matched_slowly(prediction, label, distance)


@pytest.mark.parametrize("distance", [0, 1, math.sqrt(2), 3, 5.99])
def test_neighbours_are_the_pixels_within_the_distance(distance):
    rng = np.random.default_rng(3)
    target = rng.random((12, 17)) < 0.3
    points = rng.integers(0, (12, 17), (40, 2))
    away = np.linalg.norm(points[:, None] - np.argwhere(target)[None], axis=-1)
    expected = away <= distance + 1e-9
    np.testing.assert_array_equal(neighbours(points, target, distance).toarray(), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, math.sqrt(2), 2.5]))
def test_counts_at_every_threshold_are_those_of_matching_anew(seed, distance):
    rng = np.random.default_rng(seed)
    prediction = np.round(ndimage.gaussian_filter(rng.random((14, 18)), 0.7), 2).astype(np.float32)
    label = rng.choice([-1, 0, 1], (14, 18), p=[0.1, 0.7, 0.2]).astype(np.float32)
    thresholds = np.linspace(0.2, 0.8, 25)  # some with the same pixels as the one before
    counts = edge_counts(prediction, label, thresholds, distance)
    target, strength = thin(label == 1), np.where(label == -1, 0, ridges(prediction))
    for i, threshold in enumerate(thresholds):
        cut = thin(strength >= threshold)
        assert counts.predicted[i] == cut.sum()
        assert counts.matched[i] == matched_slowly(cut, target, distance)
    assert counts.labelled == target.sum()


def test_matchings_of_large_maps_are_those_of_an_assignment_solver():
    """Boundaries of regions against the same ones, bent by a few pixels: exchanges run along whole contours."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:360, :480]
    seeds = rng.uniform(0, (360, 480), (50, 2))
    bend = [120 * ndimage.gaussian_filter(rng.normal(size=(360, 480)), 8) for _ in range(2)]
    maps = []
    for rows, columns in ((y, x), (y + bend[0], x + bend[1])):
        region = ((rows[..., None] - seeds[:, 0]) ** 2 + (columns[..., None] - seeds[:, 1]) ** 2).argmin(-1)
        maps.append(thin((region != np.roll(region, 1, 0)) | (region != np.roll(region, 1, 1))))
    near = neighbours(np.argwhere(maps[1]), maps[0], 4.5)
    points, targets = near.shape
    unmatched = eye_array(points) * 1000.0  # a column of its own for each point that finds no partner
    _, columns = min_weight_full_bipartite_matching(csr_array(hstack((near.astype(float), unmatched))))
    expected = (columns < targets).sum()
    assert 0.5 * points < expected < 0.97 * points
    assert matching_size(near) == expected


def test_a_map_matches_itself():
    label = column(9) + np.eye(20) > 0
    label = thin(label)
    assert count(label, label, 0) == (label.sum(),) * 3
    counts = edge_counts(label.astype(np.float32), label.astype(np.float32), HALF, 0)
    assert f_measure(counts.matched, counts.predicted, counts.labelled) == [1]


@pytest.mark.parametrize(("distance", "matched"), [(0.99, 0), (1, 20), (1.5, 20)])
def test_a_shift_by_one_pixel_matches_within_the_tolerance_only(distance, matched):
    assert count(column(10), column(9), distance) == (matched, 20, 20)


def test_a_doubled_line_matches_once():
    matched, predicted, labelled = count(column(8) + column(12), column(10), 3)
    assert (matched, predicted, labelled) == (20, 40, 20)
    assert f_measure(matched, predicted, labelled) == pytest.approx(2 * 0.5 * 1 / 1.5)  # precision 1/2, recall 1
    assert count(column(10), column(8) + column(12), 3) == (20, 20, 40)


def test_nothing_predicted_and_nothing_labelled():
    empty = np.zeros((20, 20))
    assert count(empty, column(9), 3) == (0, 0, 20)
    assert count(column(9), empty, 3) == (0, 20, 0)
    assert count(empty, empty, 3) == (0, 0, 0)
    found = f_measure(np.array([0, 0, 0]), np.array([0, 20, 0]), np.array([20, 0, 0]))
    np.testing.assert_array_equal(found, [0, np.nan, np.nan])


def test_unknown_pixels_count_on_neither_side():
    label = column(9)
    label[12:] = -1
    assert count(column(9), label, 0) == (12, 12, 12)
    assert count(column(3), label, 0) == (0, 12, 12)
    assert count(column(9), np.full((20, 20), -1), 3) == (0, 0, 0)


def test_the_tolerance_is_a_share_of_the_diagonal_and_at_least_a_step_to_a_neighbour():
    assert matching_distance(480, 640) == pytest.approx(6)
    assert matching_distance(480, 640, 0.011) == pytest.approx(8.8)
    assert matching_distance(64, 96) == math.sqrt(2)
    diagonal = np.eye(20)
    shifted = np.roll(diagonal, 1, axis=0)
    shifted[0] = 0
    assert count(shifted, diagonal, matching_distance(20, 20))[0] == 19


def distance_from_line(angle: float, size: int = 61) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance of each pixel from a line through the centre, and position along it."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


@pytest.mark.parametrize("angle", np.deg2rad([0, 17, 45, 60, 90, 135, 158]))
@pytest.mark.parametrize("offset", [0, 0.5])
def test_a_blurred_line_of_width_five_becomes_one_pixel_wide_at_its_ridge(angle, offset):
    across, along = distance_from_line(angle)
    strength = (0.9 * np.exp(-((across - offset) ** 2) / (2 * 1.1**2))).astype(np.float32)
    assert (strength[30] > 0.1).sum() >= 5 or (strength[:, 30] > 0.1).sum() >= 5
    line = thin(ridges(strength) >= 0.1) & (np.abs(along) < 25)
    assert np.abs(across - offset)[line].max() <= 0.75
    steps = 50 * max(abs(math.cos(angle)), abs(math.sin(angle)))  # pixels of a digital line of length 50
    assert abs(line.sum() - steps) <= 0.12 * steps


def test_ridges_keep_their_strength_and_lesser_ones_beside_them():
    across, _ = distance_from_line(0)
    strength = 0.9 * np.exp(-((across + 8) ** 2) / 4) + 0.3 * np.exp(-((across - 8) ** 2) / 4)
    ridge = ridges(strength.astype(np.float32))
    rows = ridge[5:-5]
    kept = np.nonzero(rows.max(0) > 0.05)[0]
    np.testing.assert_array_equal(kept, [22, 38])
    np.testing.assert_allclose(rows[:, kept], np.broadcast_to([0.9, 0.3], (51, 2)), rtol=1e-4)


def test_a_saturated_line_is_thinned_to_its_middle():
    across, along = distance_from_line(np.deg2rad(30))
    strength = (np.abs(across) <= 2.5).astype(np.float32)
    line = thin(ridges(strength) >= 0.5) & (np.abs(along) < 20)
    assert np.abs(across)[line].max() <= 1.2
    assert ndimage.label(line, EIGHT)[1] == 1
    assert abs(line.sum() - 40 * math.cos(np.deg2rad(30))) < 6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.3, 0.5, 0.7]))
def test_thinning_keeps_pieces_and_holes(seed, blur, share):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random((30, 40)), blur)
    mask = noise > np.quantile(noise, 1 - share)
    before = mask.copy()
    thinned = thin(mask)
    np.testing.assert_array_equal(mask, before)
    assert not (thinned & ~mask).any()
    assert ndimage.label(thinned, EIGHT)[1] == ndimage.label(mask, EIGHT)[1]
    assert (
        ndimage.label(np.pad(~thinned, 1, constant_values=True))[1]
        == ndimage.label(np.pad(~mask, 1, constant_values=True))[1]
    )
    np.testing.assert_array_equal(thin(thinned), thinned)
    if blur:  # noise may have holes on all sides of a block
        assert not ndimage.binary_erosion(thinned, EIGHT).any()


def test_thick_bars_become_lines():
    bar = np.zeros((21, 40), dtype=bool)
    bar[8:13, 4:36] = True
    line = thin(bar)
    assert (line.sum(0)[8:32] == 1).all()
    assert line[10, 8:32].all()
