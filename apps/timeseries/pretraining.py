"""Sequences of one length to pretrain on, cut from corpora or packed from their short series, and mixtures of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from apps.loading import derive_seed
from apps.timeseries.embedded import embedded_series, synthetic_series
from apps.timeseries.models.base import Windows
from apps.timeseries.pretraining_corpora import Corpus, SeriesCorpus, open_corpus
from apps.timeseries.pretraining_packing import Packing
from apps.timeseries.series import Series
from moecore.errors import choice, require

Normalize = Literal["zero", "max", "none"]


class CorpusWindows(Dataset):
    """Sequences of N points from a corpus; hands out whole batches by (epoch, index) pairs.

    A series of at least N points gives a window every `stride` points and one that ends with it, so that its last
    points are learned from. Shorter series come whole, each once an epoch: several in a sequence, told apart by
    `segments`, with NaN after the last (a segment of its own); or without packing one a sequence, with NaN before it.

    Args:
        corpus: what to cut from. Series of less than two points are passed over.
        length: N.
        horizon: H, how many points of a sequence are handed out as its future.
        stride: points between windows; None: N, so that only the last two windows of a series may overlap.
        normalize: each series as a whole, before windows are cut: zero (mean 0, deviation 1), max (by the largest
            absolute value) or none. Constant series become zeros under "zero".
        pack: put short series together.
        seed: of the packing.
    """

    def __init__(
        self,
        corpus: Corpus,
        length: int,
        horizon: int,
        stride: int | None = None,
        normalize: Normalize = "zero",
        pack: bool = True,
        seed: int = 0,
    ) -> None:
        require(1 <= horizon < length, "horizon", horizon, f"must lie between 1 and length - 1 = {length - 1}")
        require(stride is None or stride >= 1, "stride", stride, "must be at least 1, or null")
        choice("normalize", normalize, ("zero", "max", "none"))
        self.corpus, self.length, self.horizon, self.normalize, self.pack = corpus, length, horizon, normalize, pack
        self._windows = _cut(corpus.lengths, length, stride or length)
        self._short = np.flatnonzero((corpus.lengths < length) & (corpus.lengths > 1))
        self._packing = Packing(corpus.lengths[self._short], length, seed) if pack else None
        self._moments = np.full((len(corpus), 2), np.nan)  # found when first needed: a corpus may be larger than memory

    def __len__(self) -> int:
        return len(self._windows) + len(self._short if self._packing is None else self._packing)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Windows:
        """A batch from its (epoch, index) pairs."""
        y = np.full((len(keys), self.length), np.nan, np.float32)
        segments = np.zeros((len(keys), self.length), np.int64)
        for row, (epoch, index) in enumerate(keys):
            if index < len(self._windows):
                which, start = self._windows[index]
                y[row] = self._read(int(which), int(start), int(start) + self.length)
            elif self._packing is None:
                values = self._read(int(self._short[index - len(self._windows)]))
                y[row, self.length - len(values) :] = values
            else:
                self._fill(y[row], segments[row], self._packing.pieces(epoch, index - len(self._windows)))
        sequence, past = torch.from_numpy(y), self.length - self.horizon
        return Windows(
            sequence[:, :past], sequence[:, past:], segments=torch.from_numpy(segments) if self.pack else None
        )

    def _fill(self, y: np.ndarray, segments: np.ndarray, pieces: Int[np.ndarray, " k"]) -> None:
        """Lay short series one after another into a row."""
        at = 0
        for number, piece in enumerate(pieces):
            values = self._read(int(self._short[piece]))
            y[at : at + len(values)] = values
            segments[at:] = number
            at += len(values)
        segments[at:] = len(pieces)

    def _read(self, index: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, " n"]:
        """Part of a normalised series."""
        if self.normalize == "none":
            return self.corpus.read(index, start, stop)
        if np.isnan(self._moments[index, 0]):
            whole = self.corpus.read(index)
            self._moments[index] = _moments(whole, self.normalize)
            values = whole[start:stop]
        else:
            values = self.corpus.read(index, start, stop)
        shift, scale = self._moments[index]
        return (values - shift) / scale


def _cut(lengths: Int[np.ndarray, " S"], length: int, stride: int) -> Int[np.ndarray, "W 2"]:
    """Series and first point of every whole window; the last one of a series ends with it."""
    long = np.flatnonzero(lengths >= length)
    last = lengths[long] - length
    counts = -(-last // stride) + 1
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([np.repeat(long, counts), np.minimum(number * stride, np.repeat(last, counts))], 1)


def _moments(y: Float[np.ndarray, " n"], normalize: Normalize) -> tuple[float, float]:
    """What to subtract from a series and what to divide it by."""
    y = y[~np.isnan(y)]
    if not len(y):
        return 0.0, 1.0
    largest = float(np.abs(y).max())
    if normalize == "max":
        return 0.0, largest or 1.0
    std = float(y.std())
    mean = float(y[0] if (y == y[0]).all() else y.mean())  # a mean of equal values may differ from them by rounding
    return mean, std if std > 1e-10 * largest else 1.0


class Mixture(Dataset):
    """Sequences of several sources in given shares; an epoch draws on each source where the last one stopped.

    A source that is used up within an epoch starts over in another order, and each of its sequences is seen once before
    any is seen again.

    Args:
        sources: with sequences of equal shape.
        shares: of each in the sequences of an epoch; any positive numbers.
        size: sequences per epoch; None: as many as the sources have together.
        seed: of the orders.
    """

    def __init__(
        self, sources: Sequence[CorpusWindows], shares: Sequence[float], size: int | None = None, seed: int = 0
    ) -> None:
        require(len(sources) == len(shares) and len(shares) > 0, "shares", tuple(shares), "give one for each source")
        require(all(share > 0 for share in shares), "shares", tuple(shares), "must be positive")
        require(all(len(source) > 0 for source in sources), "sources", len(sources), "every source needs a sequence")
        shapes = {(source.length, source.horizon, source.pack) for source in sources}
        require(len(shapes) == 1, "sources", len(sources), "must agree in length, horizon and pack")
        self.sources, self.seed = list(sources), seed
        total = sum(len(source) for source in sources) if size is None else size
        ends = np.round(np.cumsum(shares) / np.sum(shares) * total).astype(np.int64)
        self.counts: Int[np.ndarray, " C"] = np.diff(ends, prepend=0)
        """Sequences of each source in an epoch."""
        self._ends = ends
        self._order = functools.lru_cache(maxsize=2 * len(self.sources))(self._draw_order)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_order"}  # a cache cannot be pickled

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._order = functools.lru_cache(maxsize=2 * len(self.sources))(self._draw_order)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Windows:
        """A batch from its (epoch, index) pairs."""
        found = [self._find(epoch, index) for epoch, index in keys]
        which = np.array([source for source, _ in found])
        rows = [np.flatnonzero(which == source) for source in range(len(self.sources))]
        parts = [self.sources[i].__getitems__([found[row][1] for row in r]) for i, r in enumerate(rows) if len(r)]
        back = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable"))
        segments = None if parts[0].segments is None else torch.cat([part.segments for part in parts])
        future = torch.cat([part.future for part in parts])
        return Windows(torch.cat([part.past for part in parts]), future, segments=segments)[back]

    def _find(self, epoch: int, index: int) -> tuple[int, tuple[int, int]]:
        """Source of an index, and the source's own epoch and index."""
        source = int(np.searchsorted(self._ends, index, side="right"))
        count = int(self.counts[source])
        place = epoch * count + index - int(self._ends[source]) + count
        again, at = divmod(place, len(self.sources[source]))
        return source, (again, int(self._order(source, again)[at]))

    def _draw_order(self, source: int, again: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, source, again))
        return torch.randperm(len(self.sources[source]), generator=generator)


def corpus_windows(
    corpora: Mapping[str, float],
    length: int,
    horizon: int,
    *,
    stride: int | None = None,
    normalize: Normalize = "zero",
    pack: bool = True,
    synthetic: int = 2000,
    size: int | None = None,
    seed: int = 0,
    train: Sequence[Series] = (),
) -> Mixture:
    """A mixture of corpora by name.

    Args:
        corpora: share of each: "synthetic", "train", "statsmodels", or the path of a corpus or a file of series.
        length: points of a sequence.
        horizon: points of it that are its future.
        stride: see `CorpusWindows`.
        normalize: see `CorpusWindows`.
        pack: see `CorpusWindows`.
        synthetic: synthetic series to draw, each of 2 x `length` points.
        size: sequences per epoch.
        seed: of synthetic series, packing and order.
        train: the series that "train" means.
    """

    def opened(name: str) -> Corpus:
        if name == "synthetic":
            return SeriesCorpus(synthetic_series(synthetic, 2 * length, seed))
        if name == "train":
            return SeriesCorpus(train)
        return SeriesCorpus(embedded_series()) if name == "statsmodels" else open_corpus(name)

    sources = [CorpusWindows(opened(name), length, horizon, stride, normalize, pack, seed) for name in corpora]
    return Mixture(sources, list(corpora.values()), size, seed)
