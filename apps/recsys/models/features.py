"""From encoded rows to what networks read: embeddings of ids, encodings of numbers, pooled sequences.

B rows, S sparse features, N dense ones, K bins, d width of an embedding, D width of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from apps.recsys.batch import MISSING, Batch, DenseInput, InputSpec, SequenceInput, TableSpec
from apps.recsys.models.base import Behaviours, Fields, Slot
from apps.recsys.models.encoders import make_pooling
from moecore.factorized import FactorizedInput


class Tables(nn.Module):
    """Embedding tables; all of one width are one matrix, so that a batch is one lookup per width.

    The row MISSING of a table is learned: a missing value is a value of its own.

    Args:
        tables: names, rows and widths.
        std: of fresh rows.
        sparse: gradients hold the touched rows only (for `apps.recsys.optimizers`).
    """

    def __init__(self, tables: Sequence[TableSpec], std: float = 0.05, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse
        self.place: dict[str, tuple[int, int]] = {}
        """Table -> its width and first row."""
        rows: dict[int, int] = {}
        for table in tables:
            self.place[table.name] = (table.dim, rows.get(table.dim, 0))
            rows[table.dim] = rows.get(table.dim, 0) + table.rows
        self.weights = nn.ParameterDict(
            {str(dim): nn.Parameter(torch.empty(count, dim).normal_(std=std)) for dim, count in rows.items()}
        )

    def look_up(self, dim: int, rows: Int[Tensor, "*lead"]) -> Float[Tensor, "*lead d"]:
        """Rows of the matrix of a width, their table's first row added already."""
        weight = self.weights[str(dim)]
        if self.sparse:
            return F.embedding(rows, weight, sparse=True)
        return weight.index_select(0, rows.flatten()).view(*rows.shape, dim)  # quicker backward than an embedding's


SMALL_ROWS, SMALL_WIDTH = 256, 6
"""Most rows and least width of a table that is worth mapping as a whole instead of what each sample has of it."""
READS = 8
"""Samples that must share a row of these tables, on average."""


class SparseFeatures(nn.Module):
    """Single ids, `[B, S]` -> `[B, sum of widths]`: first those of small tables, ordered by width, then the others."""

    def __init__(self, spec: InputSpec, tables: Tables) -> None:
        super().__init__()
        self.names: list[tuple[str, int]] = []
        self.groups: list[tuple[bool, int]] = []
        """Features that are looked up together: whether their tables are small, and their width."""
        self.rows: list[list[int]] = []
        """Rows of the table of each feature, by group."""
        self.num_small = 0
        keys = [_group(spec.table(one.table)) for one in spec.sparse]
        for group in sorted(set(keys), key=lambda key: (not key[0], key[1])):
            columns = [i for i, key in enumerate(keys) if key == group]
            starts = torch.tensor([tables.place[spec.sparse[i].table][1] for i in columns])
            rows = [spec.table(spec.sparse[i].table).rows for i in columns]
            number = len(self.groups)
            self.groups.append(group)
            self.rows.append(rows)
            self.names += [(spec.sparse[i].name, group[1]) for i in columns]
            self.num_small += len(columns) if group[0] else 0
            self.register_buffer(f"columns_{number}", torch.tensor(columns), persistent=False)
            self.register_buffer(f"starts_{number}", starts, persistent=False)
            if group[0]:  # all rows of the features' tables
                every = torch.cat([start + torch.arange(count) for start, count in zip(starts, rows, strict=True)])
                self.register_buffer(f"rows_{number}", every, persistent=False)
        small = [count for group, rows in zip(self.groups, self.rows, strict=True) if group[0] for count in rows]
        self.total = sum(small)
        before = torch.tensor(small, dtype=torch.long).cumsum(0) - torch.tensor(small, dtype=torch.long)
        self.register_buffer("before", before, persistent=False)

    def forward(self, ids: Int[Tensor, "B S"], tables: Tables, skip_small: bool = False) -> list[Float[Tensor, "B W"]]:
        """Embeddings side by side, a tensor per group."""
        parts = []
        for number, (small, dim) in enumerate(self.groups):
            if not (small and skip_small):
                own = ids.index_select(1, getattr(self, f"columns_{number}"))
                parts.append(tables.look_up(dim, own + getattr(self, f"starts_{number}")).flatten(1))
        return parts

    def worth_factorizing(self, samples: int) -> bool:
        """Whether so many samples share rows of small tables often enough."""
        return self.num_small > 0 and samples * self.num_small >= READS * self.total

    def small(self, ids: Int[Tensor, "B S"], tables: Tables) -> tuple[tuple[Float[Tensor, "_ _"], ...], Tensor]:
        """Small tables of each feature and ids counted through them, as `FactorizedInput` takes them."""
        parts, columns = [], []
        for number, (small, dim) in enumerate(self.groups):
            if small:
                parts += tables.look_up(dim, getattr(self, f"rows_{number}")).split(self.rows[number])
                columns.append(getattr(self, f"columns_{number}"))
        return tuple(parts), ids.index_select(1, torch.cat(columns)) + self.before


def _group(table: TableSpec) -> tuple[bool, int]:
    return table.rows <= SMALL_ROWS and table.dim >= SMALL_WIDTH, table.dim


class Numbers(nn.Module):
    """Standardised numbers, after a logarithm where asked for; a missing one has a learned value."""

    def __init__(self, inputs: Sequence[DenseInput]) -> None:
        super().__init__()
        self.names = [(one.name, 1) for one in inputs]
        self.register_buffer("mean", torch.tensor([one.mean for one in inputs]))
        self.register_buffer("std", torch.tensor([one.std or 1.0 for one in inputs]))
        self.register_buffer("log", torch.tensor([one.encode == "log" for one in inputs]))
        self.missing = nn.Parameter(torch.zeros(len(inputs)))

    def forward(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """NaN where missing."""
        seen = ~x.isnan()
        x = x.nan_to_num()
        x = torch.where(self.log, x.sign() * x.abs().log1p(), x)
        return torch.where(seen, ((x - self.mean) / self.std).clamp(-10, 10), self.missing)


class Piecewise(nn.Module):
    """How much of each bin a number fills: 1 below it, 0 above, linear within (arXiv 2203.05556, equation 1)."""

    def __init__(self, inputs: Sequence[DenseInput]) -> None:
        super().__init__()
        self.names = [(one.name, len(one.edges) - 1) for one in inputs]
        edges = [torch.tensor(one.edges, dtype=torch.float64) for one in inputs]
        self.register_buffer("low", torch.cat([e[:-1] for e in edges]).float())
        self.register_buffer("width", torch.cat([e.diff() for e in edges]).float())
        column = [i for i, (_, bins) in enumerate(self.names) for _ in range(bins)]
        self.register_buffer("column", torch.tensor(column), persistent=False)
        self.missing = nn.Parameter(torch.zeros(len(column)))

    def forward(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B K"]:
        """Of all numbers side by side."""
        x = x.index_select(1, self.column)
        filled = ((x.nan_to_num() - self.low) / self.width).clamp(0, 1)
        return torch.where(x.isnan(), self.missing, filled)


class Bins(nn.Module):
    """An embedding of the bin that a number lies in, another of no number."""

    def __init__(self, inputs: Sequence[DenseInput], std: float = 0.05) -> None:
        super().__init__()
        dims, most = {one.dim for one in inputs}, max(len(one.edges) for one in inputs)
        dim = max(dims)
        self.names = [(one.name, dim) for one in inputs]
        edges = torch.full((len(inputs), most), float("inf"))
        for i, one in enumerate(inputs):
            edges[i, : len(one.edges)] = torch.tensor(one.edges)
        self.register_buffer("edges", edges)
        self.register_buffer("starts", torch.arange(len(inputs)) * (most + 2), persistent=False)
        self.weight = nn.Parameter(torch.empty(len(inputs) * (most + 2), dim).normal_(std=std))

    def forward(self, x: Float[Tensor, "B N"]) -> Float[Tensor, "B W"]:
        """Of all numbers side by side."""
        bins = (x.nan_to_num()[..., None] >= self.edges).sum(-1) + 1  # infinity lies below the edges that are not there
        return F.embedding(torch.where(x.isnan(), 0, bins) + self.starts, self.weight).flatten(1)


KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "numbers": (Numbers, ("standard", "log")),
    "piecewise": (Piecewise, ("piecewise",)),
    "bins": (Bins, ("bins",)),
}
"""Module of dense features, and the encodings it is for."""


class FeatureEncoder(nn.Module):
    """All features of a batch, embedded.

    Args:
        spec: tables and inputs.
        sparse_gradients: see `Tables`.
        hand_on: sequences that `Fields.behaviours` holds value by value; of others only the values that are there are
            computed.
        factorize: small tables are handed on instead of their rows laid out, where a batch shares these often enough.

    Attributes:
        width: D.
        slots: where each feature lies in `Fields.features`.
    """

    def __init__(
        self,
        spec: InputSpec,
        sparse_gradients: bool = False,
        hand_on: Sequence[str] = (),
        factorize: bool = False,
    ) -> None:
        super().__init__()
        self.factorize = factorize
        self.hands_on = frozenset(hand_on)
        self.tables = Tables(spec.tables, sparse=sparse_gradients)
        self.sparse = SparseFeatures(spec, self.tables)
        self.dense = nn.ModuleDict()
        for kind, (module, encodings) in KINDS.items():
            columns = [i for i, one in enumerate(spec.dense) if one.encode in encodings]
            if columns:
                self.dense[kind] = module([spec.dense[i] for i in columns])
                self.register_buffer(f"dense_{kind}", torch.tensor(columns), persistent=False)
        self.sequences = spec.sequences
        self.positions = {one.name: i for i, one in enumerate(spec.sparse)}
        self.pooling = nn.ModuleDict(
            {one.name: make_pooling(one.pooling, self.tables.place[one.table][0]) for one in spec.sequences}
        )
        pooled = [(one.name, self.tables.place[one.table][0]) for one in spec.sequences]
        names = [*self.sparse.names, *(name for part in self.dense.values() for name in part.names), *pooled]
        self.slots = _slots(names)
        self.width = self.slots[-1].stop if self.slots else 0

    def forward(self, batch: Batch) -> Fields:
        """Embed a batch."""
        may = self.factorize and not torch.compiler.is_exporting()
        few = may and self.sparse.worth_factorizing(len(batch))
        parts = self.sparse(batch.sparse, self.tables, skip_small=few)
        for kind, module in self.dense.items():
            parts.append(module(batch.dense.index_select(1, getattr(self, f"dense_{kind}"))))
        behaviours = {}
        for one in self.sequences:
            pooling, rows = self.pooling[one.name], batch.sequences[one.name]
            target = None if one.target is None else self._candidate(batch, one)
            if one.name in self.hands_on or not hasattr(pooling, "packed") or torch.compiler.is_exporting():
                values, mask = self._values(one, rows), rows != MISSING
                parts.append(pooling(values, mask, target))
                behaviours[one.name] = Behaviours(values, mask, target)
            else:
                row, place = (rows != MISSING).nonzero(as_tuple=True)
                parts.append(pooling.packed(self._values(one, rows[row, place]), row, len(rows), target))
        flat = torch.cat(parts, 1) if parts else batch.dense.new_zeros(len(batch), 0)
        return Fields(FactorizedInput(*self.sparse.small(batch.sparse, self.tables), flat) if few else flat, behaviours)

    def _candidate(self, batch: Batch, one: SequenceInput) -> Float[Tensor, "B d"]:
        return self._values(one, batch.sparse[:, self.positions[one.target]])

    def _values(self, one: SequenceInput, rows: Int[Tensor, "*lead"]) -> Float[Tensor, "*lead d"]:
        dim, start = self.tables.place[one.table]
        return self.tables.look_up(dim, rows + start)


def _slots(names: Iterable[tuple[str, int]]) -> list[Slot]:
    slots, start = [], 0
    for name, width in names:
        slots.append(Slot(name, start, start + width))
        start += width
    return slots
