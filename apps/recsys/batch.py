"""What models take: batches of encoded rows, and what is known of their columns.

B rows, S sparse features, N dense features, L values of a sequence, T tasks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

MISSING, UNKNOWN = 0, 1
"""Row numbers in every table: of missing values and of padding, and of values never seen in training."""


@dataclass(frozen=True)
class Batch:
    """Encoded rows."""

    sparse: Int[Tensor, "B S"]
    """Rows of the tables, in the order of `InputSpec.sparse`."""
    dense: Float[Tensor, "B N"]
    """Numbers as they are, NaN where missing, in the order of `InputSpec.dense`."""
    sequences: dict[str, Int[Tensor, "B L"]] = field(default_factory=dict)
    """Rows of the tables, oldest value first, padded with 0 on the right."""
    labels: Float[Tensor, "B T"] | None = None
    """0 or 1; NaN where a row is outside of a task."""
    user: Int[Tensor, " B"] | None = None
    """A number per user, for metrics."""

    def __len__(self) -> int:
        return self.sparse.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        return self._map(lambda t: t.to(device))

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """Some of the rows: a slice, numbers, or a mask."""
        if isinstance(rows, slice):
            return self._map(lambda t: t[rows])
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return self._map(lambda t: t.index_select(0, rows))  # several times as fast as t[rows]

    def _map(self, function) -> Batch:
        def one(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: function(v) for k, v in value.items()}
            return None if value is None else function(value)

        return Batch(**{f.name: one(getattr(self, f.name)) for f in dataclasses.fields(self)})


def concat(batches: list[Batch]) -> Batch:
    """Rows of batches, one after the other."""

    def one(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: torch.cat([value[key] for value in values]) for key in values[0]}
        return None if values[0] is None else torch.cat(values)

    if len(batches) == 1:
        return batches[0]
    return Batch(**{f.name: one([getattr(b, f.name) for b in batches]) for f in dataclasses.fields(Batch)})


@dataclass(frozen=True)
class TableSpec:
    """One embedding table."""

    name: str
    rows: int
    """MISSING and UNKNOWN included."""
    dim: int


@dataclass(frozen=True)
class SparseInput:
    """A column of `Batch.sparse`."""

    name: str
    table: str


@dataclass(frozen=True)
class DenseInput:
    """A column of `Batch.dense`, and what was seen of it in training."""

    name: str
    encode: str
    """log, standard, bins or piecewise."""
    mean: float = 0.0
    std: float = 1.0
    """Of the values (after sign(x) log(1 + |x|) for log)."""
    edges: tuple[float, ...] = ()
    """Quantiles, strictly rising. bins: between bins (at least one; x is in the bin of all edges <= x); piecewise: also
    the least and the largest value (at least two). Values that a share of 1 / bins of the rows has are edges
    themselves."""
    dim: int = 8
    """Width of the embedding of bins."""


@dataclass(frozen=True)
class SequenceInput:
    """An entry of `Batch.sequences`."""

    name: str
    table: str
    max_len: int
    pooling: str
    """mean, sum, target or attention."""
    target: str | None = None
    """Sparse feature that the values are compared with."""


@dataclass(frozen=True)
class TaskSpec:
    """A column of `Batch.labels`."""

    name: str
    group: str
    given: str | None
    weight: float
    prior: float
    """Share of positives among the training rows inside the task; of a conditional task, those where its condition
    holds. Never quite 0 or 1."""


@dataclass(frozen=True)
class InputSpec:
    """All that a model must know of its data; kept with its weights."""

    tables: tuple[TableSpec, ...]
    sparse: tuple[SparseInput, ...]
    dense: tuple[DenseInput, ...]
    sequences: tuple[SequenceInput, ...]
    tasks: tuple[TaskSpec, ...]

    def table(self, name: str) -> TableSpec:
        """The table of that name."""
        return next(table for table in self.tables if table.name == name)

    def plain(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> InputSpec:
        """From plain data."""
        kinds = {
            "tables": TableSpec,
            "sparse": SparseInput,
            "dense": DenseInput,
            "sequences": SequenceInput,
            "tasks": TaskSpec,
        }
        tuples = {"edges"}

        def one(kind: type, row: dict[str, Any]) -> Any:
            return kind(**{k: tuple(v) if k in tuples else v for k, v in row.items()})

        return cls(**{name: tuple(one(kind, row) for row in values[name]) for name, kind in kinds.items()})
