"""Rows that exported ranking models are compared on, of the log and such as no training row was; timing of calls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from apps.recsys.batch import Batch
from apps.recsys.data import RecsysData
from apps.recsys.deploy_inputs import feed
from apps.recsys.loading import Trained
from export.exportable import Exportable, Sample, in_torch
from export.measure import session_of, timed

COMPARED, UNFAMILIAR = 4096, 512
"""Test rows that a file is compared on at most; how many of them also with what was never seen."""
TOGETHER = 512
"""Rows of a call."""
CANDIDATES = 500
"""Rows of the call that is timed besides one: candidates of a user."""
REPEATS = 15


@dataclass(frozen=True)
class Compared:
    """Rows of a call, as the model reads them and as a file does."""

    batch: Batch
    """With labels if the rows are as they are in the log."""
    feed: dict[str, np.ndarray]


def compared_rows(trained: Trained, data: RecsysData) -> list[Compared]:
    """Test rows, then some of them with ids never seen, every third one missing, and every second number missing; then
    these again, missing numbers now infinite in what a file gets."""
    found = first_rows(trained, data, "test", COMPARED)
    strange = unfamiliar(trained, _frame(data, "test", UNFAMILIAR))
    found.append(Compared(trained.transform.encode(strange, labels=False), feed(trained.transform, strange)))
    return [*found, Compared(found[-1].batch, _infinite(trained, found[-1].feed))]


def first_rows(trained: Trained, data: RecsysData, part: str, count: int) -> list[Compared]:
    """The first rows of a part, in batches, with their labels."""
    frame, transform = _frame(data, part, count), trained.transform
    starts = range(0, len(frame), TOGETHER)
    parts = [frame.iloc[start : start + TOGETHER] for start in starts]
    return [Compared(transform.encode(rows), feed(transform, rows)) for rows in parts]


def _frame(data: RecsysData, part: str, count: int) -> pd.DataFrame:
    kept: list[pd.DataFrame] = []
    for frame in data.parts[part].frames(data.schema.columns(), count):
        kept.append(frame)
        if sum(map(len, kept)) >= count:
            break
    return pd.concat(kept, ignore_index=True).head(count)


def unfamiliar(trained: Trained, frame: pd.DataFrame) -> pd.DataFrame:
    """The same rows with ids that no vocabulary knows, every third one missing; every second number is missing."""
    transform, rows = trained.transform, range(len(frame))
    schema, columns = transform.schema, {}

    def unseen(table: str, i: int) -> int | str:
        return 10**12 + i if transform.vocabularies[table].integer else f"never seen {i}"

    for one in trained.spec.sparse:
        columns[one.name] = [None if i % 3 == 2 else unseen(one.table, i) for i in rows]
    for one in trained.spec.sequences:
        columns[one.name] = [[] if i % 3 == 2 else [unseen(one.table, i), unseen(one.table, i + 1)] for i in rows]
    strange = frame.assign(
        **{schema.column(name): pd.Series(values, frame.index, object) for name, values in columns.items()}
    )
    for one in trained.spec.dense:
        column = schema.column(one.name)
        strange[column] = strange[column].astype(object).where(np.arange(len(frame)) % 2 == 0)
    return strange


def _infinite(trained: Trained, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Missing numbers as infinities of both signs."""
    found = dict(given)
    for one in trained.spec.dense:
        signs = np.where(np.arange(len(given[one.name])) % 4 < 2, np.float32(np.inf), np.float32(-np.inf))
        found[one.name] = np.where(np.isnan(given[one.name]), signs, given[one.name])
    return found


def time_candidates(exportable: Exportable, path: Path) -> dict[str, float]:
    """Milliseconds of CPU time that a file and PyTorch eager take for the candidates of a user: medians, one thread.

    The file looks ids up and encodes numbers; for PyTorch that is done already.
    """
    first = exportable.samples[0]
    rows = np.arange(CANDIDATES) % len(first.tensors[0])
    sample = Sample(tuple(t[rows] for t in first.tensors), {name: array[rows] for name, array in first.feed.items()})
    session, run = session_of(path), in_torch(exportable.module)
    calls = {"export": lambda: session.run(None, dict(sample.feed)), "torch": lambda: run(sample)}
    seconds = timed(calls, REPEATS)
    return {f"{name}_{CANDIDATES}_rows_ms_p50": 1e3 * float(np.median(each)) for name, each in seconds.items()}
