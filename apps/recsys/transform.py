"""From columns to what models take: fitted on the training part only, kept with the weights, the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from apps.errors import UserError
from apps.recsys.batch import Batch, DenseInput, InputSpec, SequenceInput, SparseInput, TableSpec, TaskSpec
from apps.recsys.columns import Lists, Moments, read_label, read_lists, read_numbers
from apps.recsys.schema import FeatureSpec, Schema
from apps.recsys.splits import Rows, user_numbers
from apps.recsys.tables import expect
from apps.recsys.vocabulary import Counter, Ids, Vocabulary, read_ids

BIN_DIM = 8
"""Width of the embedding of a number's bin where the schema says none."""


class Transform:
    """Turns frames into batches.

    Args:
        schema: what the columns mean.
        vocabularies: of each table, by the name of the feature that owns it.
        spec: what a model must know.
        notes: what was odd in training data, a line each.
    """

    def __init__(
        self, schema: Schema, vocabularies: dict[str, Vocabulary], spec: InputSpec, notes: tuple[str, ...] = ()
    ) -> None:
        self.schema, self.vocabularies, self.spec, self.notes = schema, vocabularies, spec, notes

    @classmethod
    def fit(cls, schema: Schema, table: pd.DataFrame | Rows | Iterable[pd.DataFrame], embed_dim: int = 16) -> Transform:
        """Learn vocabularies, moments and priors in one pass.

        Args:
            schema: what the columns mean.
            table: training rows; a frame, a part of a split, or frames one after the other.
            embed_dim: width of embeddings where the schema says none.

        Raises:
            UserError: a column is missing or has no value, a label is neither 0 nor 1, or text stands for a number.
        """
        if isinstance(table, pd.DataFrame):
            table = [table]
        elif isinstance(table, Rows):
            table.table.expect(schema.columns())
            table = table.frames(schema.columns())
        fitting = _Fitting(schema)
        for frame in table:
            fitting.add(frame)
        return fitting.transform(embed_dim)

    def encode(self, frame: pd.DataFrame, labels: bool = True) -> Batch:
        """Encode rows: ids of any type, numbers as text or not; never-seen ids are UNKNOWN.

        Args:
            frame: with the columns of the schema.
            labels: read labels and users too; False: of rows to predict, users only if they are there.

        Raises:
            UserError: a column is missing, or a value cannot be what the schema says.
        """
        schema, spec, count = self.schema, self.spec, len(frame)
        user = [schema.user] if schema.user is not None and labels else []
        names = [*schema.features, *(schema.labels if labels else ())]
        expect("the table", frame.columns, [*(schema.column(name) for name in names), *user])
        sparse = np.empty((len(spec.sparse), count), np.int64)
        for i, one in enumerate(spec.sparse):
            sparse[i] = self.vocabularies[one.table].lookup(read_ids(frame[schema.column(one.name)]))
        dense = np.empty((len(spec.dense), count), np.float32)
        for i, one in enumerate(spec.dense):
            dense[i] = _numbers(schema, one.name, frame)
        sequences = {
            one.name: torch.from_numpy(
                _lists(schema, one.name, frame).padded(self.vocabularies[one.table], one.max_len)
            )
            for one in spec.sequences
        }
        there = schema.user is not None and schema.user in frame
        return Batch(
            torch.from_numpy(np.ascontiguousarray(sparse.T)),
            torch.from_numpy(np.ascontiguousarray(dense.T)),
            sequences,
            torch.from_numpy(_labels(schema, frame).astype(np.float32)) if labels else None,
            torch.from_numpy(user_numbers(frame[schema.user])) if there else None,
        )

    def plain(self) -> dict[str, Any]:
        """As plain data and tensors, for a checkpoint."""
        return {
            "schema": self.schema.plain(),
            "vocabularies": {name: one.plain() for name, one in self.vocabularies.items()},
            "spec": self.spec.plain(),
        }

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Transform:
        """From plain data."""
        vocabularies = {name: Vocabulary.from_plain(one) for name, one in values["vocabularies"].items()}
        return cls(Schema.from_plain(values["schema"]), vocabularies, InputSpec.from_plain(values["spec"]))


def _numbers(schema: Schema, name: str, frame: pd.DataFrame) -> Float[np.ndarray, " n"]:
    return read_numbers(frame[schema.column(name)], f"features.{name}")


def _lists(schema: Schema, name: str, frame: pd.DataFrame) -> Lists:
    return read_lists(frame[schema.column(name)], schema.features[name].separator)


def _labels(schema: Schema, frame: pd.DataFrame) -> Float[np.ndarray, "n T"]:
    return np.stack([read_label(frame[schema.column(name)], name) for name in schema.labels], axis=1)


class _Fitting:
    """What is counted of the training rows."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        owners = [name for name, one in schema.features.items() if one.kind != "dense" and one.share is None]
        self.counters = {name: Counter(schema.features[name].vocabulary == "hash") for name in owners}
        self.seen = dict.fromkeys(schema.features, 0)
        self.longest = dict.fromkeys(schema.named("sequence"), 1)
        self.dense = schema.named("dense")
        self.moments = Moments([schema.features[name].encode == "log" for name in self.dense])
        self.inside, self.positive = np.zeros(len(schema.labels)), np.zeros(len(schema.labels))
        self.impossible = np.zeros(len(schema.labels))
        self.rows = 0

    def add(self, frame: pd.DataFrame) -> None:
        """Count a frame."""
        schema = self.schema
        expect("the table", frame.columns, schema.columns())
        self.rows += len(frame)
        for name in schema.named("sparse"):
            self._count(name, read_ids(frame[schema.column(name)]))
        for name in schema.named("sequence"):
            lists = _lists(schema, name, frame)
            self._count(name, lists.ids)
            self.longest[name] = max(self.longest[name], int(lists.lengths.max(initial=0)))
        if self.dense:
            self.moments.add(np.stack([_numbers(schema, name, frame) for name in self.dense], axis=1))
        labels = _labels(schema, frame)
        position = {name: i for i, name in enumerate(schema.labels)}
        for i, one in enumerate(schema.labels.values()):
            inside = ~np.isnan(labels[:, i])
            if one.given is not None:
                given = labels[:, position[one.given]] == 1
                self.impossible[i] += ((labels[:, i] == 1) & ~given).sum()
                inside &= given
            self.inside[i] += inside.sum()
            self.positive[i] += (labels[inside, i] == 1).sum()

    def _count(self, name: str, ids: Ids) -> None:
        self.seen[name] += len(ids) - int(ids.missing.sum())
        self.counters[self.schema.table(name)].add(ids)

    def transform(self, embed_dim: int) -> Transform:
        """What was learned."""
        if not self.rows:
            raise UserError("data: there is no row to train on")
        for name, count in self.seen.items():
            filled = self.moments.count[self.dense.index(name)] if name in self.dense else count
            if not filled:
                column = self.schema.column(name)
                raise UserError(
                    f"features.{name}: column {column!r} has no value in the {self.rows:,} training rows; fill it, or "
                    "take it out of the schema"
                )
        features = self.schema.features
        vocabularies = {name: one.vocabulary(*_sizes(features[name])) for name, one in self.counters.items()}
        sparse = tuple(SparseInput(name, self.schema.table(name)) for name in self.schema.named("sparse"))
        spec = InputSpec(
            tuple(TableSpec(n, v.rows, _dim(features[n], v.rows, embed_dim)) for n, v in vocabularies.items()),
            sparse,
            tuple(self._dense(i, name, features[name]) for i, name in enumerate(self.dense)),
            tuple(self._sequence(name, features[name]) for name in self.schema.named("sequence")),
            tuple(self._task(i, name) for i, name in enumerate(self.schema.labels)),
        )
        return Transform(self.schema, vocabularies, spec, self._notes())

    def _dense(self, i: int, name: str, one: FeatureSpec) -> DenseInput:
        encode = "piecewise" if one.encode == "auto" else one.encode
        edges: tuple[float, ...] = ()
        if encode in ("bins", "piecewise"):
            found = self.moments.edges(i, one.bins)
            edges = tuple((found[1:-1] if len(found) > 2 else found[1:]) if encode == "bins" else found)
        mean, std = float(self.moments.mean[i]), float(self.moments.std[i])
        return DenseInput(name, encode, mean, std, tuple(map(float, edges)), one.dim or BIN_DIM)

    def _sequence(self, name: str, one: FeatureSpec) -> SequenceInput:
        length = min(one.max_len, self.longest[name])
        return SequenceInput(name, self.schema.table(name), length, one.pooling, one.target)

    def _task(self, i: int, name: str) -> TaskSpec:
        one, least = self.schema.labels[name], 0.5 / max(self.inside[i], 1)
        prior = float(np.clip(self.positive[i] / max(self.inside[i], 1), least, 1 - least))  # its logit is finite
        return TaskSpec(name, one.group, one.given, one.weight, prior)

    def _notes(self) -> tuple[str, ...]:
        notes = []
        for i, (name, one) in enumerate(self.schema.labels.items()):
            inside, positive = int(self.inside[i]), int(self.positive[i])
            if positive in (0, inside):
                only = "no row" if not inside else f"only {int(positive > 0)}"
                notes.append(f"labels.{name}: {only} among the training rows of the task; its AUC is undefined")
            if self.impossible[i]:
                notes.append(
                    f"labels.{name}: 1 in {int(self.impossible[i]):,} training rows where {one.given} is not, though "
                    f"given={one.given}"
                )
        return tuple(notes)


def _sizes(one: FeatureSpec) -> tuple[int, int | None]:
    return one.min_count, one.buckets if one.vocabulary == "hash" else None


def _dim(one: FeatureSpec, rows: int, default: int) -> int:
    """Width of a table; without a wish, no wider than it has rows that can differ from zero."""
    return one.dim or min(default, rows - 1)
