"""Logs by the settings: the generated one, a data set of the catalogue, or the user's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from lightning.pytorch.utilities import rank_zero_only

from apps.errors import UserError
from apps.recsys import published
from apps.recsys.data_settings import DataConfig
from apps.recsys.generated import generate, generated_schema
from apps.recsys.inference import guess
from apps.recsys.schema import Schema, read_schema
from apps.recsys.splits import Rows, check, split
from apps.recsys.tables import FrameTable, Table, is_table, megabytes, open_table, suffix

FETCH = Path(__file__).parents[2] / "datasets" / "fetch.py"
NAMES = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
"""What the files or folders of a split may be called."""


@dataclass(frozen=True)
class Source:
    """A log that is split."""

    schema: Schema
    parts: dict[str, Rows]
    """train, val and test."""


@dataclass(frozen=True)
class Published:
    """A data set of the catalogue."""

    entry: str
    """Name in `datasets/catalog.yaml`; its folder below the root has that name."""
    read: Callable[[Path], published.Log]
    """From that folder."""


CATALOGUE = {
    "census-income": Published("census-income-kdd", published.census_income),
    "kuairand-pure": Published("kuairand-pure", published.kuairand),
    "movielens-1m": Published("movielens-1m", published.movielens),
    "ali-ccp": Published("ali-ccp", published.ali_ccp),
    **{
        f"aliexpress-{place}": Published(f"aliexpress-{place}", published.aliexpress)
        for place in ("nl", "es", "fr", "us")
    },
}


def load_source(config: DataConfig, schema: Schema | None = None) -> Source:
    """The configured log, split.

    Args:
        config: which log, and how it is split.
        schema: instead of the configured one (that of a checkpoint).

    Raises:
        UserError: there is nothing to read, it cannot be read, or the schema does not fit it.
    """
    if config.source == "generated":
        log = published.Log(FrameTable(generate(config.rows, config.seed), "generated"), generated_schema())
    elif config.source in CATALOGUE:
        one = CATALOGUE[config.source]
        log = one.read(_folder(config, one.entry))
    else:
        log = _own(config, schema)
    schema = schema or (read_schema(config.schema) if config.schema is not None else log.schema)
    for table in log.files.values() if log.files else [log.table]:
        table.expect(schema.columns())
    held = {name: _held(table, config) for name, table in log.files.items()}
    if held and config.split in ("auto", "files"):
        parts = _by_files(held, schema, config)
    elif config.split == "files":
        raise UserError(f"data.split=files: {config.source} has no train and test files; split otherwise")
    else:
        table = _joined(held, config) if held else _held(log.table, config)
        parts = _cut(table, schema, log, config)
    return Source(schema, parts)


def from_frame(frame: pd.DataFrame, config: DataConfig, schema: Schema | None = None) -> Source:
    """A log in memory, split as the settings say.

    Args:
        frame: all rows.
        config: split.
        schema: what the columns mean; None: that of the settings, or guessed.

    Raises:
        UserError: the schema does not fit the frame.
    """
    table = FrameTable(frame)
    if schema is None:
        schema = read_schema(config.schema) if config.schema is not None else _guessed(frame)
    table.expect(schema.columns())
    return Source(schema, _cut(table, schema, published.Log(table, schema), config))


def _cut(table: Table, schema: Schema, log: published.Log, config: DataConfig) -> dict[str, Rows]:
    """Parts of one table."""
    how = config.split
    if how == "auto" and log.rule is not None:
        return check({name: Rows(table, log.rule, i) for i, name in enumerate(NAMES)}, how)
    if how == "auto":
        how = "random" if schema.time is None else "time"
    return split(table, how, config.shares, config.split_seed, schema.time, schema.user)


def _by_files(tables: dict[str, Table], schema: Schema, config: DataConfig) -> dict[str, Rows]:
    """Parts from tables of their own; validation rows come from those for training where there are none."""
    parts = {name: Rows(table) for name, table in tables.items()}
    if "val" not in parts:
        share = config.shares[1] / (config.shares[0] + config.shares[1])
        how = "random" if schema.time is None else "time"
        seed, shares = config.split_seed, (1 - share, share)
        parts |= split(tables["train"], how, shares, seed, schema.time, schema.user, ("train", "val"))
    return check({name: parts[name] for name in NAMES}, "files")


def _held(table: Table, config: DataConfig) -> Table:
    """The table in memory, unless it is to be streamed."""
    if isinstance(table, FrameTable):
        return table
    stream = config.streaming == "always" or (config.streaming == "auto" and megabytes(table) > config.memory_mb)
    return table if stream else table.load()


def _joined(tables: dict[str, Table], config: DataConfig) -> Table:
    """Tables of equal columns as one."""
    if any(not isinstance(table, FrameTable) for table in tables.values()):
        raise UserError(f"data.split={config.split}: {config.source} is streamed from files per part; use split=files")
    return FrameTable([frame for table in tables.values() for frame in table.frames], config.source)


def _own(config: DataConfig, schema: Schema | None) -> published.Log:
    """The user's file or folder."""
    path = Path(config.source)
    if not path.exists():
        known = ", ".join(["generated", *CATALOGUE])
        raise UserError(f"data.source={config.source}: no such file or folder, and none of {known}")
    files = _named(path)
    tables = {name: open_table(file) for name, file in files.items()}
    table = None if tables else open_table(path)
    if schema is None and config.schema is None:
        schema = _guessed(tables.get("train") or table)
    return published.Log(table, schema, files=tables)


def _guessed(data: pd.DataFrame | Table) -> Schema:
    """What the columns seem to mean; printed, as it is to be looked at."""
    found = guess(data)
    if rank_zero_only.rank == 0:
        lines = found.lines()
        print("\n  ".join(["no data.schema, guessed from the first rows:", *lines]), flush=True)
    return found.schema


def _named(path: Path) -> dict[str, Path]:
    """Files or folders called train, val and test, if there are the first and the last."""
    if not path.is_dir():
        return {}
    found: dict[str, Path] = {}
    for name, spellings in NAMES.items():
        for one in sorted(path.iterdir()):
            stem = one.name if one.is_dir() else one.name[: one.name.lower().find(suffix(one))]
            if stem.lower() in spellings and (one.is_dir() or is_table(one)):
                found[name] = one
    return found if {"train", "test"} <= set(found) else {}


def _folder(config: DataConfig, entry: str) -> Path:
    """Where a data set of the catalogue is; downloaded if it is not there."""
    folder = Path(config.root) / entry
    if folder.is_dir():
        return folder
    done = subprocess.run([sys.executable, str(FETCH), entry, "--root", config.root], stderr=subprocess.PIPE, text=True)
    if done.returncode or not folder.is_dir():
        lines = done.stderr.strip().splitlines()
        why = lines[-1].removeprefix("error: ") if lines else "the download failed"
        raise UserError(f"data.source={config.source}: {why}; put its files into {folder}, or give another --data.root")
    return folder
