"""What the columns of a click log mean: features, labels, and who saw what. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moecore.errors import choice, require

KINDS = ("sparse", "dense", "sequence")
PROCESSED = ("log", "standard", "bins", "piecewise")


@dataclass
class FeatureSpec:
    """One feature."""

    kind: Literal["sparse", "dense", "sequence"] = "sparse"
    """sparse: an id or category; dense: a number; sequence: a list of ids (tags, or what a user did, oldest first)."""
    column: str | None = None
    """Column of the table; null: the feature's name."""
    dim: int | None = None
    """Width of the embedding; null: the data's default, never more than the table needs."""
    vocabulary: Literal["fit", "hash"] = "fit"
    """fit: a row for every value of the training part that occurs often enough, one for unknown and one for missing
    values; hash: values share `buckets` rows."""
    buckets: int = 100_000
    """Rows of a hashed table."""
    min_count: int = 1
    """Rarer values of the training part are unknown."""
    share: str | None = None
    """Use the table (and vocabulary) of that feature: item ids in a history share those of the item."""
    encode: Literal["auto", "log", "standard", "bins", "piecewise"] = "auto"
    """dense: standardised, after a logarithm, as embeddings of quantile bins, or piecewise linear between quantiles
    (Gorishniy et al. 2022, arXiv 2203.05556); auto: piecewise. Missing values are a value of their own."""
    bins: int = 16
    """dense: quantile bins."""
    max_len: int = 50
    """sequence: the latest values kept."""
    separator: str = ","
    """sequence: between the values of a text column; lists need none."""
    pooling: Literal["mean", "sum", "target", "attention"] = "mean"
    """sequence: mean, sum, target (weighted by what the candidate has in common with each value: DIN), or
    self-attention and mean."""
    target: str | None = None
    """sequence, pooling target: the feature of the candidate (its item id)."""

    def __post_init__(self) -> None:
        choice("kind", self.kind, KINDS)
        require(self.dim is None or self.dim >= 1, "dim", self.dim, "must be at least 1, or null")
        for name in ("buckets", "min_count", "bins", "max_len"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        needs = self.pooling == "target" and self.kind == "sequence"
        require(not needs or self.target is not None, "target", self.target, "pooling=target needs a feature")


@dataclass
class LabelSpec:
    """One task: a column of 0 and 1."""

    column: str | None = None
    """Column of the table; null: the label's name."""
    group: str = "all"
    """Group of related tasks, for models that keep experts per group."""
    given: str | None = None
    """Only rows where that label is 1 can be positive (a conversion, given a click)."""
    weight: float = 1.0
    """Of the task in the loss."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "weight", self.weight, "must be positive")


@dataclass
class Schema:
    """Columns of a log."""

    features: dict[str, FeatureSpec] = field(default_factory=dict)
    """Name -> feature."""
    labels: dict[str, LabelSpec] = field(default_factory=dict)
    """Name -> task, in the order of outputs."""
    user: str | None = None
    """Column that says who saw the row: for metrics by user, and to rank candidates for users."""
    item: str | None = None
    """Column of the candidate."""
    time: str | None = None
    """Column to order rows by."""

    def named(self, kind: str) -> list[str]:
        """Features of a kind, in order."""
        return [name for name, spec in self.features.items() if spec.kind == kind]

    def column(self, name: str) -> str:
        """Column of a feature or label."""
        spec = self.features.get(name) or self.labels[name]
        return spec.column or name
