"""Settings of the data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moecore.errors import choice, require

SPLITS = ("auto", "time", "user", "random", "files")


@dataclass
class DataConfig:
    """A log, what its columns mean, and how it is split and read."""

    source: str = "generated"
    """generated (a log whose best possible figures are known), a data set of the catalogue (census-income,
    kuairand-pure, ali-ccp, aliexpress-nl, -es, -fr, -us, movielens-1m), or your file or folder: CSV (comma, semicolon
    or tab; also .gz, .bz2, .xz, .zip) or Parquet."""
    root: str = "data"
    """Folder of the catalogue's data sets; what is missing is downloaded, where that needs no account."""
    schema: str | None = None
    """YAML file that says what the columns mean; null: what comes with the data set, or guessed from your file."""
    split: Literal["auto", "time", "user", "random", "files"] = "auto"
    """time: the earliest rows are for training, the latest for testing; user: all rows of a user are in one part;
    random; files: train, val and test are files or folders of that name; auto: by the catalogue; for your data files
    if there are such, or time if the schema names a column for it, else random."""
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Of the rows (or users) for training, validation and testing."""
    split_seed: int = 2022
    """Seed of the split by user or at random; not of the run: all runs are measured on the same rows."""
    batch_size: int = 1024
    """Rows per training step."""
    eval_batch_size: int = 8192
    """Rows per step of validation and testing."""
    embed_dim: int = 16
    """Width of embeddings where the schema says none; a table of few rows gets no more columns than rows."""
    streaming: Literal["auto", "always", "never"] = "auto"
    """Read rows while training instead of holding all of them in memory; auto: files above `memory_mb` together."""
    memory_mb: int = 200
    """streaming=auto: size of files, in megabytes, up to which they are held in memory, where they take several times
    as much."""
    buffer_rows: int = 131_072
    """streaming: rows held, and shuffled, at a time. Parquet with row groups smaller than that is shuffled best: groups
    come in an order of their own in each epoch."""
    rows: int = 200_000
    """generated: rows of the log."""
    seed: int = 0
    """generated: seed of the log."""

    def __post_init__(self) -> None:
        choice("split", self.split, SPLITS)
        choice("streaming", self.streaming, ("auto", "always", "never"))
        for name in ("batch_size", "eval_batch_size", "embed_dim", "memory_mb", "buffer_rows"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.rows >= 100, "rows", self.rows, "must be at least 100")
        self.shares = tuple(self.shares)
        good = len(self.shares) == 3 and all(share > 0 for share in self.shares)
        require(good, "shares", self.shares, "must be three positive numbers: training, validation, test")
        require(abs(sum(self.shares) - 1) < 1e-6, "shares", self.shares, "must add up to 1")
