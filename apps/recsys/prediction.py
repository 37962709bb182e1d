"""Scores for the rows of a log, and the best candidates of every user."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from jaxtyping import Int

from apps.errors import UserError
from apps.recsys.arguments import Predict
from apps.recsys.loading import Trained
from apps.recsys.score_files import join, whole_ids, write_pieces
from apps.recsys.tables import ParquetTable, Table, expect, open_table
from apps.recsys.vocabulary import read_ids

ROWS = 16_384
"""Rows scored at a time."""
PENDING = 1_000_000
"""Candidates held at least before those that are not among the best are dropped."""


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
    frame = frame.rename(columns=str)
    parts = [trained.transform.encode(frame.iloc[i : i + ROWS], labels=False) for i in _starts(frame)]
    named = [column for column in _names(trained) if column in frame]
    scored = frame[named].copy() if named else frame.copy()
    scores = np.concatenate([trained.score(part) for part in parts])
    return scored.assign(**{f"p_{task.name}": scores[:, i] for i, task in enumerate(trained.spec.tasks)})


def _starts(frame: pd.DataFrame) -> range:
    return range(0, max(len(frame), 1), ROWS)


def _names(trained: Trained) -> list[str]:
    """Columns that say which row one is."""
    schema = trained.transform.schema
    return list(dict.fromkeys(c for c in (schema.user, schema.item, schema.time) if c is not None))


def rank_frame(trained: Trained, scored: pd.DataFrame, top: int, by: str | None = None) -> pd.DataFrame:
    """The best rows of every user, the best first, with their `rank` from 1.

    Args:
        trained: the model.
        scored: as `score_frame` gives it.
        top: rows per user.
        by: task to rank by; None: the first.

    Returns:
        Users in order, those without an id last, as one; of equal scores the earlier row comes first.

    Raises:
        UserError: the schema names no user, the rows have none, or there is no such task.
    """
    user, task = check_ranking(trained, top, by)
    expect("the table", scored.columns, [user])
    users = _user_order(scored[user])
    order = np.lexsort((-scored[f"p_{task}"].to_numpy(), users))
    ordered = users[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered) + 1
    kept = rank <= top
    return scored.iloc[order[kept]].assign(rank=rank[kept])


def check_ranking(trained: Trained, top: int, by: str | None) -> tuple[str, str]:
    """Column of the users, and task to rank by.

    Raises:
        UserError: there is none.
    """
    user, tasks = trained.transform.schema.user, [task.name for task in trained.spec.tasks]
    if top < 1:
        raise UserError(f"top={top}: must be at least 1")
    if user is None:
        raise UserError(
            f"top={top}: ranks the candidates of each user, and the schema of this model names no user; train with one"
        )
    by = tasks[0] if by is None else by
    if by not in tasks:
        raise UserError(f"by={by}: no such task; choose one of {', '.join(tasks)}")
    return user, by


def _user_order(column: pd.Series) -> Int[np.ndarray, " n"]:
    """Place of each row's user; ids that are numbers here and text there are the same user."""
    ids = read_ids(column)
    values = ids.integers
    if values is None:
        values = ids.as_text().fill_null("").to_numpy(zero_copy_only=False)
    codes, known = pd.factorize(values, sort=True)
    return np.where(ids.missing, len(known), codes)


def predict_file(trained: Trained, args: Predict) -> str:
    """Score a file or folder, in pieces, and write the result; says what was written.

    Raises:
        UserError: in one line, before anything is written: a column is missing, or what to rank by.
    """
    schema, table = trained.transform.schema, open_table(args.input)
    if args.top is None and args.by is not None:
        raise UserError(f"by={args.by}: is for ranking; say with --top how many candidates to keep of every user")
    user = [] if args.top is None else [check_ranking(trained, args.top, args.by)[0]]
    features = [schema.column(name) for name in schema.features]
    table.expect([*features, *user])
    named = [column for column in _names(trained) if column in table.columns]
    columns = list(dict.fromkeys([*features, *named])) if named else None
    pieces = _scored(trained, table, columns)
    if args.top is not None:
        pieces = iter([_best(trained, pieces, args.top, args.by)])
    elif args.output.endswith(".parquet") and not isinstance(table, ParquetTable):
        pieces = iter([join(pieces)])  # what type a column of a text file has is known at its end only
    return f"{write_pieces(pieces, args.output):,} rows: {args.output}"


def _scored(trained: Trained, table: Table, columns: list[str] | None) -> Iterator[pd.DataFrame]:
    ids = (trained.transform.schema.user, trained.transform.schema.item)
    for unit in range(len(table.units)):
        for frame in table.chunks(unit, columns):
            scored = score_frame(trained, frame)
            yield scored.assign(**{str(c): whole_ids(scored[c]) for c in ids if c in scored})


def _best(trained: Trained, pieces: Iterator[pd.DataFrame], top: int, by: str | None) -> pd.DataFrame:
    """The best of every user over all pieces; holds little more than those."""
    held: list[pd.DataFrame] = []
    limit = PENDING
    for piece in pieces:
        held.append(piece)
        if sum(map(len, held)) > limit:
            held = [rank_frame(trained, join(held), top, by).drop(columns="rank")]
            limit = max(PENDING, 2 * len(held[0]))
    return rank_frame(trained, join(held), top, by)
