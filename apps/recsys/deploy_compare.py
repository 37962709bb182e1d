"""An exported ranking model beside the PyTorch model: the same raw rows, and rows as no training row was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from apps.errors import UserError
from apps.recsys.deploy_inputs import feed
from apps.recsys.loading import Trained
from export.verify import TOLERANCE, open_session

TIMED, REPEATS = (1, 256, 500), 9
"""Rows of the calls that are timed, and calls of each."""


def compare(trained: Trained, path: Path, frame: pd.DataFrame) -> dict[str, float]:
    """Run the file in onnxruntime and the model in PyTorch on the same rows, and time both.

    Args:
        trained: the model, on the CPU.
        path: of the file.
        frame: raw rows; each is also tried with ids never seen, and with missing values, which are then infinite.

    Returns:
        rows, max_error, max_relative_error (of each task over its largest probability, the worst task), CPU
        milliseconds `onnx_ms_<n>_rows` (lookups included) and `torch_ms_<n>_rows` (encoded already), file_bytes.

    Raises:
        UserError: outputs differ by more than the tolerance, or are no numbers.
    """
    session = open_session(path)
    both = [_both(session, trained, rows) for rows in (frame, unfamiliar(trained, frame))]
    both.append(_both(session, trained, unfamiliar(trained, frame), infinite=True))
    ours, expected = (np.concatenate(parts) for parts in zip(*both, strict=True))
    errors = np.abs(ours - expected).max(0)
    relative = float((errors / np.maximum(np.abs(expected).max(0), 1e-12)).max())  # of numpy, which lets NaN win
    if not relative <= TOLERANCE:
        raise UserError(
            f"export: outputs differ from PyTorch by {relative:.2g} of their range (over {TOLERANCE}); no file was kept"
        )
    figures = {"rows": float(len(ours)), "max_error": float(errors.max()), "max_relative_error": relative}
    for count in TIMED:
        figures |= _times(session, trained, frame.iloc[np.arange(count) % len(frame)])
    return figures | {"file_bytes": float(path.stat().st_size)}


def _both(session: Any, trained: Trained, rows: pd.DataFrame, infinite: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Of the file and of PyTorch; with `infinite`, missing numbers are infinite in what the file gets."""
    given = feed(trained.transform, rows)
    if infinite:
        signs = np.where(np.arange(len(rows)) % 4 < 2, np.float32(np.inf), np.float32(-np.inf))
        for one in trained.spec.dense:
            given[one.name] = np.where(np.isnan(given[one.name]), signs, given[one.name])
    ours = session.run(None, given)[0]
    return ours, trained.score(trained.transform.encode(rows, labels=False))


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


def _times(session: Any, trained: Trained, rows: pd.DataFrame) -> dict[str, float]:
    """Median CPU milliseconds of a call."""
    given, batch = feed(trained.transform, rows), trained.transform.encode(rows, labels=False)
    spent: dict[str, list[float]] = {"onnx": [], "torch": []}
    for _ in range(REPEATS):
        for name, call in (("onnx", lambda: session.run(None, given)), ("torch", lambda: trained.score(batch))):
            started = time.process_time()
            call()
            spent[name].append(time.process_time() - started)
    return {f"{name}_ms_{len(rows)}_rows": float(np.median(times)) * 1e3 for name, times in spent.items()}
