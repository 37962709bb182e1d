"""Scores for the rows of a log, and the best candidates of every user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from apps.errors import UserError
from apps.recsys.arguments import Predict
from apps.recsys.loading import Trained
from apps.recsys.tables import Table, open_table
from moecore.files import atomic_path

ROWS = 16_384
"""Rows scored at a time."""


def score_frame(trained: Trained, frame: pd.DataFrame) -> pd.DataFrame:
    """A probability per task, `p_<task>`, beside what says which row it is.

    Args:
        trained: the model.
        frame: with the feature columns of its schema; labels are not needed.

    Returns:
        The columns of user, item and time that the schema names (all columns of the frame if it names none), and
        `p_<task>`, with the frame's index.

    Raises:
        UserError: a column is missing, or a value cannot be what the schema says.
    """
    schema = trained.transform.schema
    parts = [trained.transform.encode(frame.iloc[i : i + ROWS], labels=False) for i in range(0, len(frame), ROWS)]
    named = [c for c in (schema.user, schema.item, schema.time) if c is not None and c in frame]
    scored = frame[list(dict.fromkeys(named))].copy() if named else frame.copy()
    scores = [trained.score(part) for part in parts]
    for i, task in enumerate(trained.spec.tasks):
        scored[f"p_{task.name}"] = [value for part in scores for value in part[:, i]]
    return scored


def rank_frame(trained: Trained, scored: pd.DataFrame, top: int, by: str | None = None) -> pd.DataFrame:
    """The best rows of every user, the best first, with their `rank` from 1.

    Args:
        trained: the model.
        scored: as `score_frame` gives it.
        top: rows per user.
        by: task to rank by; None: the first.

    Raises:
        UserError: the schema names no user, the rows have none, or there is no such task.
    """
    user, tasks = trained.transform.schema.user, [task.name for task in trained.spec.tasks]
    if user is None or user not in scored:
        raise UserError(f"top={top}: ranks the candidates of each user; give the column of users ({user or 'user'})")
    by = by or tasks[0]
    if by not in tasks:
        raise UserError(f"by={by}: no such task; choose one of {', '.join(tasks)}")
    ordered = scored.sort_values(f"p_{by}", ascending=False, kind="stable")
    kept = ordered[ordered.groupby(user, sort=False, dropna=False).cumcount() < top]
    kept = kept.sort_values(user, kind="stable")
    return kept.assign(rank=kept.groupby(user, sort=False, dropna=False).cumcount() + 1)


def predict_file(trained: Trained, args: Predict) -> str:
    """Score a file or folder and write the result; says what was written."""
    table = open_table(args.input)
    if args.top is None and args.output.endswith(".csv"):
        count = _stream(trained, table, args.output)
        return f"{count:,} rows: {args.output}"
    scored = pd.concat([score_frame(trained, frame) for frame in _frames(table)], ignore_index=True)
    if args.top is not None:
        scored = rank_frame(trained, scored, args.top, args.by)
    write_frame(scored, args.output)
    return f"{len(scored):,} rows: {args.output}"


def _frames(table: Table) -> Iterator[pd.DataFrame]:
    for unit in range(len(table.units)):
        yield from table.chunks(unit)


def _stream(trained: Trained, table: Table, output: str) -> int:
    """CSV piece by piece, so that a log larger than memory can be scored."""
    count = 0
    with atomic_path(Path(output)) as temporary, open(temporary, "w", newline="") as file:
        for frame in _frames(table):
            score_frame(trained, frame).to_csv(file, index=False, header=count == 0)
            count += len(frame)
    return count


def write_frame(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a table as .csv, .parquet or .json (records), whole or not at all."""
    path = Path(path)
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            frame.to_parquet(temporary, index=False)
        elif path.suffix == ".json":
            temporary.write_text(json.dumps(json.loads(frame.to_json(orient="records", date_format="iso")), indent=2))
        else:
            frame.to_csv(temporary, index=False)
    return path
