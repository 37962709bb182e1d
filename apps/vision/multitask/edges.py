"""Agreement of predicted with labelled boundaries: thinning, one-to-one matching within a tolerance, F-measure.

The protocol of the Berkeley benchmark (Martin, Fowlkes, Malik, TPAMI 2004; Arbeláez et al., TPAMI 2011), which several
tasks at once took over by way of "seism" (Pont-Tuset, Marques, TPAMI 2016). A predicted map is thinned to its ridges
and cut at many thresholds; each cut is matched with the labelled boundary, where a pixel is matched once only, with one
of the other map no farther than a share of the image's diagonal. Our matchings are of maximum cardinality. Those of the
benchmark also keep distances short, on a sparser graph, but leave a pixel unmatched only at a price so high that counts
hardly differ. Non-maxima are suppressed in a way of our own; another way moves F-measures by a few points, so that
figures compare with each other rather than with those of other programs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

TOLERANCE = 0.0075
"""Share of the diagonal within which pixels match: the benchmark's, also of PASCAL. NYUD is mostly given at 0.011."""
SMOOTHING = 1.5
"""Standard deviation in pixels of the Gaussian under which the curvature of a prediction is taken."""
ROUNDING = 1e-6
"""Differences of probability that are none: plateaus come out of filters and interpolation not quite flat."""
_AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
"""(row, column) of the eight neighbours, anticlockwise from the right: bits 0 to 7 of a neighbourhood."""


@dataclass(frozen=True)
class EdgeCounts:
    """Boundary pixels of one image; those that depend on the threshold, at each."""

    matched: Int[ndarray, " T"]
    predicted: Int[ndarray, " T"]
    labelled: int


def matching_distance(height: int, width: int, tolerance: float = TOLERANCE) -> float:
    """Pixels within which two match: the share of the diagonal, at least one step to any of the eight neighbours.

    The bound is ours, for images whose diagonal is below 189 pixels (at 0.0075): thinning alone may put a line of even
    width one pixel to either side.
    """
    return max(tolerance * math.hypot(height, width), math.sqrt(2))


def f_measure(matched: ndarray, predicted: ndarray, labelled: ndarray | int) -> Float[ndarray, "*S"]:
    """Harmonic mean of precision and recall from counts, in [0, 1]; nan where nothing is labelled."""
    total = np.asarray(predicted + labelled, dtype=np.float64)
    return np.divide(2 * matched, total, out=np.full(total.shape, np.nan), where=np.asarray(labelled) > 0)


def edge_counts(
    prediction: Float[ndarray, "H W"],
    label: Float[ndarray, "H W"],
    thresholds: Float[ndarray, " T"],
    distance: float,
) -> EdgeCounts:
    """Thin and match one image.

    Args:
        prediction: probabilities; thinned by `ridges`, then by `thin` at each threshold.
        label: 1 on boundaries (any width: it is thinned too), 0 elsewhere, -1 unknown. Unknown pixels count on neither
            side.
        thresholds: ascending, above 0; a pixel is predicted where it reaches the threshold.
        distance: in pixels, see `matching_distance`.
    """
    known = label >= 0
    strength = np.where(known, ridges(prediction), 0)
    target = thin(label > 0.5)
    candidates = np.nonzero(strength >= thresholds[0])  # P rows, P columns
    # from the label, which has fewer pixels
    near = neighbours(np.argwhere(target), strength >= thresholds[0], distance).T.tocsr()  # [P, L]
    reachable = np.diff(near.indptr) > 0
    sizes = np.searchsorted(np.sort(strength[candidates]), thresholds)  # [T]: candidates below each
    matched, predicted = np.zeros((2, len(thresholds)), dtype=np.int64)
    for i, threshold in enumerate(thresholds):
        if i and sizes[i] == sizes[i - 1]:  # same pixels as before
            matched[i], predicted[i] = matched[i - 1], predicted[i - 1]
            continue
        kept = thin(strength >= threshold)[candidates]  # [P]
        matched[i], predicted[i] = matching_size(near[np.flatnonzero(kept & reachable)]), kept.sum()
    return EdgeCounts(matched, predicted, int(target.sum()))


def ridges(strength: Float[ndarray, "H W"]) -> Float[ndarray, "H W"]:
    """Non-maximum suppression: the strength where it is no less than on both sides across the edge, else 0.

    Canny's (TPAMI 1986), except that across is where the smoothed map curves down most (Steger, TPAMI 1998): on a
    ridge itself there is no gradient to give a direction. Flanks, where the map curves up more than down, are no
    ridges. Plateaus, as where a sigmoid saturates, stay; `thin` narrows them.
    """
    exact = strength.astype(np.float64)
    yy, xx, xy = (
        ndimage.gaussian_filter(exact, SMOOTHING, order, mode="nearest") for order in ((2, 0), (0, 2), (1, 1))
    )
    rows, columns = np.nonzero((strength > 0) & (yy + xx <= ROUNDING))  # [N]
    along = np.arctan2(2 * xy, xx - yy)[rows, columns] / 2  # of the Hessian's greater eigenvalue
    dy, dx = np.cos(along), -np.sin(along)  # of the lesser one
    own = exact[rows, columns]
    kept = np.ones(len(rows), dtype=bool)
    for side in (-1, 1):
        beside = ndimage.map_coordinates(exact, (rows + side * dy, columns + side * dx), order=1, mode="nearest")
        kept &= own + ROUNDING >= beside
    ridge = np.zeros_like(strength)
    ridge[rows[kept], columns[kept]] = strength[rows[kept], columns[kept]]
    return ridge


def _deletable() -> Bool[ndarray, "2 256"]:
    """For either subiteration of `thin`: whether a pixel goes whose neighbours are those of the bits."""
    x = (np.arange(256) >> np.arange(8)[:, None] & 1).astype(bool)  # [8, 256]
    after, second_after = np.roll(x, -1, axis=0), np.roll(x, -2, axis=0)
    lines = (~x & (after | second_after))[::2].sum(0)  # that meet in the pixel
    filled = np.minimum((x | after)[::2].sum(0), (x | after)[1::2].sum(0))
    inessential = (lines == 1) & (filled >= 2) & (filled <= 3)
    upper = ~((x[1] | x[2] | ~x[7]) & x[0])
    lower = ~((x[5] | x[6] | ~x[3]) & x[4])
    return np.stack((inessential & upper, inessential & lower))


_DELETABLE = _deletable()


def thin(mask: Bool[ndarray, "H W"]) -> Bool[ndarray, "H W"]:
    """Lines of one pixel's width, with the connections and holes of the mask (Guo, Hall, CACM 1989).

    Looks at set pixels only, so that cost follows their number, not the image's size.
    """
    padded = np.pad(mask, 1)
    flat, width = padded.reshape(-1), padded.shape[1]
    offsets = np.array([dy * width + dx for dy, dx in _AROUND])
    alive = np.flatnonzero(flat)
    before = -1
    while len(alive) != before:
        before = len(alive)
        for deletable in _DELETABLE:
            bits = np.packbits(flat[alive[:, None] + offsets], axis=1, bitorder="little")[:, 0]
            gone = deletable[bits]
            flat[alive[gone]] = False
            alive = alive[~gone]
    return padded[1:-1, 1:-1]


def neighbours(points: Int[ndarray, "P 2"], target: Bool[ndarray, "H W"], distance: float) -> csr_array:
    """Which of the target's L set pixels, in reading order, lie within `distance` of each point: boolean [P, L]."""
    reach = int(distance)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    within = dy**2 + dx**2 <= distance**2 + 1e-9  # whole numbers against a rounded root
    count = int(target.sum())
    numbers = np.full(target.shape, -1)
    numbers[target] = np.arange(count)
    numbers = np.pad(numbers, reach, constant_values=-1)
    width = numbers.shape[1]
    centre = (points[:, 0] + reach) * width + points[:, 1] + reach
    found = numbers.reshape(-1)[centre[:, None] + (dy * width + dx)[within]]  # [P, offsets]
    hit = found >= 0
    starts = np.concatenate(([0], hit.sum(1).cumsum()))
    return csr_array((np.ones(starts[-1], dtype=bool), found[hit], starts), shape=(len(points), count))


def matching_size(near: csr_array) -> int:
    """Pairs of a maximum-cardinality matching of rows with columns [P, L].

    Taken as a maximum flow (Dinic), about 0.01 s for maps of 480x640: SciPy's `maximum_bipartite_matching` may be
    quicker, but for some such maps it takes minutes; its assignment solver takes 20 times as long.
    """
    points, targets = near.shape
    if near.nnz == 0:
        return 0
    # nodes: source, points, targets, sink; every capacity is 1
    sink = points + targets + 1
    heads = np.concatenate((np.arange(points) + 1, near.indices + points + 1, np.full(targets, sink)))
    starts = np.concatenate(([0], points + near.indptr, points + near.nnz + 1 + np.arange(targets), [len(heads)]))
    graph = csr_array(
        (np.ones(len(heads), np.int32), heads.astype(np.int32), starts.astype(np.int32)), shape=(sink + 1, sink + 1)
    )
    return int(maximum_flow(graph, 0, sink, method="dinic").flow_value)
