"""Corpora as flat binary files with an index, the format of Time-300B (Time-MoE, arXiv 2409.16040).

A folder holds `data-i-of-n.bin`, the values of all sequences one after another, and `meta.json`:

    {"num_sequences": S, "dtype": "float32", "files": {"data-1-of-1.bin": values in it},
     "scales": [{"offset": first value, "length": number of values, "mean": optional, "std": optional}, ...]}

Offsets count over all files in the order of their names. With mean and std, stored values are deviations.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from apps.errors import UserError
from moecore.errors import choice

META = "meta.json"


class BinaryCorpus:
    """Sequences in a folder of binary files, of which only the index is held in memory.

    Args:
        folder: with `meta.json`.

    Raises:
        UserError: an index or files that do not fit together.
    """

    def __init__(self, folder: Path) -> None:
        meta = folder / META
        try:
            index = json.loads(meta.read_bytes())
            self.dtype = np.dtype(index["dtype"])
            files = {folder / name: int(count) for name, count in sorted(index["files"].items())}
            rows = index["scales"]
            self.offsets: Int[np.ndarray, " S"] = np.array([row["offset"] for row in rows], np.int64)
            self.lengths: Int[np.ndarray, " S"] = np.array([row["length"] for row in rows], np.int64)
            self.mean = np.array([row.get("mean", 0.0) if "std" in row else 0.0 for row in rows], np.float64)
            self.std = np.array([row.get("std", 1.0) if "mean" in row else 1.0 for row in rows], np.float64)
            complete = len(rows) == int(index["num_sequences"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{meta}: no index of a corpus ({type(error).__name__}: {error}); write it anew") from error
        if not complete:
            raise UserError(f"{meta}: num_sequences is not the number of scales; write the corpus anew")
        self.files = list(files)
        self.ends: Int[np.ndarray, " F"] = np.cumsum(list(files.values()), dtype=np.int64)
        self._check(meta, files)

    def _check(self, meta: Path, files: dict[Path, int]) -> None:
        if self.dtype.kind not in "fiu":
            raise UserError(f"{meta}: dtype {self.dtype} is no type of numbers")
        for file, count in files.items():
            size = file.stat().st_size if file.is_file() else -1
            if size != count * self.dtype.itemsize:
                found = "is missing" if size < 0 else f"has {size:,} bytes, not {count * self.dtype.itemsize:,}"
                raise UserError(f"{file}: {found}; copy the corpus again")
        total = self.ends[-1] if len(self.ends) else 0
        outside = (self.offsets < 0) | (self.lengths < 0) | (self.offsets + self.lengths > total)
        if outside.any():
            raise UserError(f"{meta}: sequence {outside.argmax()} lies outside of the files; write the corpus anew")

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int, start: int = 0, stop: int | None = None) -> Float[np.ndarray, " n"]:
        """Points start..stop-1 of a sequence; no others are read."""
        start, stop, _ = slice(start, stop).indices(int(self.lengths[index]))
        first = int(self.offsets[index])
        values = self._values(first + start, first + max(start, stop)).astype(np.float64)
        values[~np.isfinite(values)] = np.nan
        return values * self.std[index] + self.mean[index]

    def _values(self, start: int, stop: int) -> np.ndarray:
        """Values start..stop-1 of all files together."""
        parts = []
        while start < stop:
            file = int(np.searchsorted(self.ends, start, side="right"))
            begin = int(self.ends[file - 1]) if file else 0
            count = min(stop, int(self.ends[file])) - start
            offset = (start - begin) * self.dtype.itemsize
            parts.append(np.fromfile(self.files[file], self.dtype, count, offset=offset))
            start += count
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)


def write_binary(
    folder: str | Path,
    sequences: Iterable[Sequence[float] | np.ndarray],
    dtype: str = "float32",
    file_values: int = 2**28,
) -> Path:
    """Write sequences as a binary corpus; the folder appears when it is whole. Empty sequences are left out.

    Args:
        folder: to make; it must not exist.
        sequences: taken one at a time.
        dtype: of the values in the files, "float32" or "float64".
        file_values: values per file.

    Raises:
        UserError: a folder that exists, or no sequence.
    """
    choice("dtype", dtype, ("float32", "float64"))
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists; remove it or choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    temporary.mkdir()
    try:
        lengths, files = _write_values(temporary, sequences, np.dtype(dtype), file_values)
        if not lengths:
            raise UserError(f"{folder}: no sequence to write")
        offsets = np.cumsum([0, *lengths[:-1]]).tolist()
        scales = [{"offset": offset, "length": length} for offset, length in zip(offsets, lengths, strict=True)]
        meta = {"num_sequences": len(lengths), "dtype": dtype, "files": files, "scales": scales}
        (temporary / META).write_text(json.dumps(meta))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_values(
    folder: Path, sequences: Iterable[Sequence[float] | np.ndarray], dtype: np.dtype, file_values: int
) -> tuple[list[int], dict[str, int]]:
    """Write the files; lengths of the sequences, and values per file."""
    lengths: list[int] = []
    counts: list[int] = []
    for sequence in sequences:
        values = np.asarray(sequence, dtype)
        if values.ndim != 1:
            raise UserError(f"sequence {len(lengths)}: an array of shape {values.shape}; give one value per time")
        if not len(values):
            continue
        if not counts or counts[-1] >= file_values:
            counts.append(0)
        with open(folder / f"{len(counts)}", "ab") as file:
            values.tofile(file)
        counts[-1] += len(values)
        lengths.append(len(values))
    width = len(str(len(counts)))  # names in order of their numbers: readers sort them as text
    files = {f"data-{i:0{width}}-of-{len(counts)}.bin": count for i, count in enumerate(counts, 1)}
    for i, name in enumerate(files, 1):
        os.replace(folder / f"{i}", folder / name)
    return lengths, files
