"""Corpora of many series to pretrain on, read in pieces: the formats that Time-MoE is published with, and series.

A corpus is a .jsonl or .json file of sequences (`{"sequence": [...]}` or a list each), an array in .npy (a row per
sequence) or .npz (an array per sequence), a folder `meta.json` + `data-i-of-n.bin`, or a folder of any of these.
Values are read as float64, whatever they are stored as; what is not finite is missing.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from apps.errors import UserError
from apps.timeseries.frames import read_series
from apps.timeseries.pretraining_binary import META, BinaryCorpus
from apps.timeseries.series import Series
from apps.timeseries.tables import is_table

PICKLES = (".pkl", ".pickle")
FORMATS = (".jsonl", ".json", ".npy", ".npz")
CONVERT = "save the sequences as .jsonl, .npy or with apps.timeseries.pretraining_binary.write_binary"


class Corpus(Protocol):
    """Sequences of different lengths, each readable in part."""

    lengths: Int[np.ndarray, " S"]
    """Points of each sequence."""

    def __len__(self) -> int:
        """Number of sequences."""

    def read(self, index: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, " n"]:
        """Points start..stop-1 of a sequence, NaN where missing."""


class ArrayCorpus:
    """Sequences in memory.

    Args:
        sequences: of numbers.
    """

    def __init__(self, sequences: Iterable[Sequence[float] | np.ndarray]) -> None:
        self.sequences = [np.asarray(sequence) for sequence in sequences]
        self.lengths = np.array([len(sequence) for sequence in self.sequences], np.int64)

    def __len__(self) -> int:
        return len(self.sequences)

    def read(self, index: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, " n"]:
        """Points start..stop-1 of a sequence."""
        return finite(self.sequences[index][start:stop])


class SeriesCorpus(ArrayCorpus):
    """The targets of series."""

    def __init__(self, series: Iterable[Series]) -> None:
        super().__init__(one.y for one in series)


class JoinedCorpus:
    """Several corpora as one, in their order."""

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.corpora = list(corpora)
        self.lengths = np.concatenate([corpus.lengths for corpus in self.corpora])
        self.ends = np.cumsum([len(corpus) for corpus in self.corpora])

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, " n"]:
        """Points start..stop-1 of a sequence."""
        which = int(np.searchsorted(self.ends, index, side="right"))
        corpus = self.corpora[which]
        return corpus.read(index - int(self.ends[which]) + len(corpus), start, stop)


class LinesCorpus:
    """A .jsonl file, of which only the places of its lines are held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        offsets, lengths, at = [], [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    offsets.append(at)
                    lengths.append(_count(line, f"{path}: line {number}"))
                at += len(line)
        self.offsets, self.lengths = np.array(offsets, np.int64), np.array(lengths, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, " n"]:
        """Points start..stop-1 of a sequence; its whole line is read for them."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            line = file.readline()
        where = f"{self.path}: sequence {index}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); mend or remove the line") from error
        return finite(_sequence(values, where)[start:stop])


class ArrayFileCorpus:
    """A .npy file of numbers, a sequence per row, mapped and not loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        shape = self._open().shape
        if len(shape) not in (1, 2):
            raise UserError(f"{path}: an array of shape {shape}; store one sequence, or one per row")
        self.lengths = np.full(1 if len(shape) == 1 else shape[0], shape[-1], np.int64)

    def _open(self) -> np.ndarray:
        array = _load(self.path, mmap_mode="r")
        if array.dtype.kind not in "fiub":
            raise UserError(f"{self.path}: values of type {array.dtype}; store numbers")
        return array

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, " n"]:
        """Points start..stop-1 of a sequence."""
        return finite(np.atleast_2d(self._open())[index, start:stop])


def open_corpus(path: str | Path) -> Corpus:
    """Open a corpus file or folder, or a file of series (.csv, .parquet).

    Raises:
        UserError: a path that is not there, in no known format, without a sequence, or damaged.
    """
    path = Path(path)
    if path.is_dir() and not (path / META).is_file():
        inner = sorted(
            p for p in path.iterdir() if p.is_dir() or p.suffix.lower() in (*FORMATS, *PICKLES) or is_table(p)
        )
        parts = [open_corpus(p) for p in inner if p.is_file() or _is_corpus(p)]
        if not parts:
            raise UserError(f"{path}: no corpus in this folder; expected {META} or files {' '.join(FORMATS)}")
        return parts[0] if len(parts) == 1 else JoinedCorpus(parts)
    try:
        corpus = _open(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file or folder") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not len(corpus):
        raise UserError(f"{path}: no sequence in it")
    return corpus


def _is_corpus(folder: Path) -> bool:
    """Whether a folder holds anything to open at any depth."""
    return any(p.name == META or p.suffix.lower() in FORMATS or is_table(p) for p in folder.rglob("*") if p.is_file())


def _open(path: Path) -> Corpus:
    suffix = path.suffix.lower()
    if path.is_dir():
        return BinaryCorpus(path)
    if suffix in PICKLES:
        raise UserError(f"{path}: a pickle can run code and is not opened; {CONVERT}")
    if suffix == ".jsonl":
        return LinesCorpus(path)
    if suffix == ".json":
        return ArrayCorpus(_json(path))
    if suffix == ".npy":
        return ArrayFileCorpus(path)
    if suffix == ".npz":
        arrays = _load(path)
        return ArrayCorpus(_sequence(arrays[name], f"{path}: array {name!r}") for name in arrays.files)
    if is_table(path):
        return SeriesCorpus(read_series(path))
    if not path.exists():
        raise FileNotFoundError(path)
    raise UserError(f"{path}: no known format ({' '.join(FORMATS)}, .csv, .parquet); {CONVERT}")


def finite(values: np.ndarray) -> Float[np.ndarray, " n"]:
    """As float64, NaN for what is not finite."""
    values = np.array(values, np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


def _load(path: Path, **options: object) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False, **options)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged, or pickled objects, which can run code; {CONVERT}") from error


def _json(path: Path) -> list[np.ndarray]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); a file of one sequence per line is named .jsonl") from error
    if isinstance(values, dict):
        values = [values]
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of sequences")
    if values and not isinstance(values[0], (list, dict)):
        values = [values]  # one sequence
    return [_sequence(value, f"{path}: sequence {i}") for i, value in enumerate(values)]


def _sequence(value: object, where: str) -> np.ndarray:
    """Numbers of one sequence; null is missing."""
    if isinstance(value, dict):
        value = value.get("sequence")
    try:
        array = np.asarray(value)
        array = array.astype(np.float64) if array.dtype.kind == "O" else array
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.dtype.kind not in "fiub" and array.size):
        raise UserError(f'{where}: expected numbers, or {{"sequence": [numbers]}} with one value per time')
    return array


def _count(line: bytes, where: str) -> int:
    """Number of values in a line of JSON, without parsing it."""
    start = line.find(b'"sequence"') if line.lstrip()[:1] == b"{" else 0
    opened = line.find(b"[", start) if start >= 0 else -1
    closed = line.find(b"]", opened)
    if opened < 0 or closed < 0:
        raise UserError(f'{where}: expected {{"sequence": [numbers]}} or a list of numbers')
    values = line[opened + 1 : closed]
    return values.count(b",") + 1 if values.strip() else 0
