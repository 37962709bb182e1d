"""Windows of corpora, packing and mixtures."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.loading import ResumableBatches
from apps.timeseries.models.base import Windows
from apps.timeseries.pretraining import CorpusWindows, Mixture, corpus_windows
from apps.timeseries.pretraining_corpora import ArrayCorpus
from apps.timeseries.pretraining_packing import Packing
from moecore.errors import ConfigError


def counting(*lengths: int) -> ArrayCorpus:
    """Series i holds 1000 i + 1, 1000 i + 2, ..."""
    return ArrayCorpus([1000 * i + np.arange(1, n + 1) for i, n in enumerate(lengths)])


def everything(windows: CorpusWindows | Mixture, epoch: int = 0) -> Windows:
    return windows.__getitems__([(epoch, i) for i in range(len(windows))])


def values(batch: Windows) -> list[list[int]]:
    """Observed values of each row."""
    return [row[~row.isnan()].int().tolist() for row in batch.sequence]


def test_windows_reach_the_last_point() -> None:
    windows = CorpusWindows(counting(20, 8, 16), 8, 3, normalize="none")

    batch = everything(windows)

    assert batch.past.shape == (6, 5)
    assert batch.future.shape == (6, 3)
    assert batch.past.dtype == torch.float32
    assert batch.sequence[:, 0].tolist() == [1, 9, 13, 1001, 2001, 2009]
    assert batch.sequence[2].tolist() == list(range(13, 21))


def test_the_published_example_of_dropped_tails_is_covered() -> None:
    windows = CorpusWindows(counting(2000), 1024, 64, normalize="none")

    assert [int(row[-1]) for row in everything(windows).sequence] == [1024, 2000]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 12), st.integers(2, 12))
def test_every_point_is_seen_and_in_order(lengths: list[int], stride: int, length: int) -> None:
    stride = min(stride, length)
    windows = CorpusWindows(counting(*lengths), length, 1, stride, normalize="none")
    if not len(windows):
        assert max(lengths) < 2
        return

    batch = everything(windows)

    seen = {value for row in values(batch) for value in row}
    assert seen == {1000 * i + k for i, n in enumerate(lengths) if n > 1 for k in range(1, n + 1)}
    for row, segments in zip(batch.sequence, batch.segments, strict=True):
        for number in segments.unique():
            part = row[segments == number]
            part = part[~part.isnan()]
            assert (part.diff() == 1).all()  # of one series alone


def test_short_series_share_a_sequence_and_are_told_apart() -> None:
    windows = CorpusWindows(counting(3, 4, 2), 10, 4, normalize="none")

    batch = everything(windows)

    assert len(batch) == 1
    row, segments = batch.sequence[0], batch.segments[0]
    assert sorted(row[:9].tolist()) == [1, 2, 3, 1001, 1002, 1003, 1004, 2001, 2002]
    assert row[9].isnan()
    assert segments.tolist() == sorted(segments.tolist())
    for number in range(3):
        assert len({int(v) // 1000 for v in row[segments == number]}) == 1
    assert segments[9] == 3  # nobody's


def test_without_packing_a_short_series_ends_its_sequence() -> None:
    windows = CorpusWindows(counting(3, 1), 6, 2, normalize="none", pack=False)

    batch = everything(windows)

    assert batch.segments is None
    assert batch.sequence.nan_to_num(-1).tolist() == [[-1, -1, -1, 1, 2, 3]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=40), st.integers(0, 5))
def test_packing_is_complete_within_capacity_and_tight(lengths: list[int], epoch: int) -> None:
    sizes = np.array(lengths, np.int64)
    packing = Packing(sizes, 16, seed=1)

    rows = [packing.pieces(epoch, i).tolist() for i in range(len(packing))]

    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert all(0 < sizes[row].sum() <= 16 for row in rows)
    loads = sorted(sizes[row].sum() for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > 16  # no two sequences would fit into one


def test_packing_is_drawn_anew_each_epoch_and_the_same_for_a_seed() -> None:
    def rows(seed: int, epoch: int) -> list[list[int]]:
        packing = Packing(np.full(64, 5), 16, seed)
        packing.pieces(epoch + 1, 0)  # what was asked before does not matter
        return [packing.pieces(epoch, i).tolist() for i in range(len(packing))]

    assert rows(0, 1) == rows(0, 1)
    assert rows(0, 1) != rows(0, 2)
    assert rows(0, 1) != rows(1, 1)


@pytest.mark.parametrize("normalize", ["zero", "max", "none"])
def test_normalisation_is_of_the_whole_series_and_of_integers_too(normalize: str) -> None:
    y = np.arange(10, 70, 10)  # the published loader makes -1 0 0 0 1 1 of it
    windows = CorpusWindows(ArrayCorpus([y]), 4, 1, normalize=normalize)

    rows = everything(windows).sequence.numpy()

    wanted = {"zero": (y - y.mean()) / y.std(), "max": y / 60, "none": y}[normalize]
    np.testing.assert_allclose(rows, [wanted[:4], wanted[2:]], rtol=1e-6)
    np.testing.assert_array_equal(everything(windows).sequence.numpy(), rows)  # moments are remembered


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9])
def test_a_constant_series_becomes_zeros(constant: float) -> None:
    windows = CorpusWindows(ArrayCorpus([np.full(7, constant)]), 4, 1)

    assert (everything(windows).sequence == 0).all()


def test_missing_values_stay_missing_and_do_not_count() -> None:
    y = np.array([1.0, np.nan, 3.0, np.inf, 5.0])

    row = everything(CorpusWindows(ArrayCorpus([y]), 5, 1)).sequence[0]

    np.testing.assert_allclose(row.numpy(), [-1.224745, np.nan, 0, np.nan, 1.224745], rtol=1e-5)
    assert everything(CorpusWindows(ArrayCorpus([np.full(5, np.nan)]), 5, 1)).sequence.isnan().all()


def test_batches_of_the_shuffled_order() -> None:
    windows = CorpusWindows(counting(64, 3), 8, 2, normalize="none")
    batches = [windows.__getitems__(keys) for keys in ResumableBatches(len(windows), 4, seed=0)]

    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert sorted(v for batch in batches for row in values(batch) for v in row) == [*range(1, 65), 1001, 1002, 1003]


def mixture(size: int | None = None) -> Mixture:
    sources = [CorpusWindows(counting(8 * n), 8, 2, normalize="none", seed=n) for n in (10, 3)]
    return Mixture(sources, [1, 3], size)


def test_a_mixture_keeps_to_its_shares_and_repeats_evenly() -> None:
    mixed = mixture(12)

    assert len(mixed) == 12
    assert mixed.counts.tolist() == [3, 9]
    firsts = [[row[0] for row in values(everything(mixed, epoch))] for epoch in range(4)]
    large = [first for epoch in firsts for first in epoch[:3]]
    assert len(set(large[:10])) == 10  # no sequence of the large source twice before all were seen
    for epoch in firsts:
        assert np.unique(epoch[3:], return_counts=True)[1].tolist() == [3, 3, 3]


def test_a_mixture_gives_rows_in_the_order_asked_also_after_a_trip_to_another_process() -> None:
    mixed, keys = mixture(12), [(1, 11), (0, 0), (2, 5), (0, 1)]

    alone = [values(mixed.__getitems__([key]))[0] for key in keys]

    assert values(mixed.__getitems__(keys)) == alone
    assert values(pickle.loads(pickle.dumps(mixed)).__getitems__(keys)) == alone  # noqa: S301 - our own


def test_a_mixture_of_synthetic_and_real_series() -> None:
    mixed = corpus_windows({"synthetic": 0.75, "statsmodels": 0.25}, 128, 32, synthetic=20, size=64)

    batch = everything(mixed)

    assert mixed.counts.tolist() == [48, 16]
    assert batch.past.shape == (64, 96)
    assert batch.future.shape == (64, 32)
    assert batch.segments.shape == (64, 128)
    assert batch.sequence.isfinite().any(1).all()
    assert batch.sequence.nan_to_num().abs().max() < 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 8}, "horizon=8: must lie between 1 and length - 1 = 7"),
        ({"stride": 0}, "stride=0"),
        ({"normalize": "minmax"}, "normalize='minmax': choose one of max, none, zero"),
    ],
)
def test_settings_that_cannot_work(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CorpusWindows(counting(9), **{"length": 8, "horizon": 2} | change)


def test_mixtures_that_cannot_work() -> None:
    source = CorpusWindows(counting(9), 8, 2)
    with pytest.raises(ConfigError, match="positive"):
        Mixture([source], [0.0])
    with pytest.raises(ConfigError, match="agree in length"):
        Mixture([source, CorpusWindows(counting(9), 8, 3)], [1, 1])
    with pytest.raises(ConfigError, match="every source needs a sequence"):
        Mixture([source, CorpusWindows(counting(1), 8, 2)], [1, 1])
