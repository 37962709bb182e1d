"""What the columns of a click log mean: features, labels, and who saw what. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from apps.errors import ConfigError, UserError
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

    def __post_init__(self) -> None:
        require(bool(self.features), "features", self.features, "give at least one feature")
        require(bool(self.labels), "labels", self.labels, "give at least one label: a column of 0 and 1")
        self._check_columns()
        for name, spec in self.features.items():
            self._check_feature(f"features.{name}", name, spec)
        for name, spec in self.labels.items():
            good = spec.given is None or (spec.given in self.labels and spec.given != name)
            others = ", ".join(other for other in self.labels if other != name) or "none"
            require(good, f"labels.{name}.given", spec.given, f"names no other label; there is {others}")
            require(self._has_root(name), f"labels.{name}.given", spec.given, "leads back to the label itself")

    def _check_columns(self) -> None:
        both = [name for name in self.features if name in self.labels]
        require(not both, "features", both, "a label may not be a feature too; rename or remove one")
        uses = Counter(self.column(name) for name in (*self.features, *self.labels))
        twice = next((column for column, count in uses.items() if count > 1), None)
        require(twice is None, "column", twice, "is named twice; a column is one feature or one label")

    def _check_feature(self, where: str, name: str, spec: FeatureSpec) -> None:
        tables = [other for other, one in self.features.items() if one.kind != "dense" and one.share is None]
        shares = spec.share is None or (spec.kind != "dense" and spec.share in tables and spec.share != name)
        known = ", ".join(other for other in tables if other != name) or "none"
        require(
            shares, f"{where}.share", spec.share, f"names no other feature with a table of its own; there is {known}"
        )
        if spec.kind == "sequence" and spec.target is not None:
            fits = spec.target in self.named("sparse") and self.table(spec.target) == self.table(name)
            ask = f"must be a sparse feature that shares its table (features.{name}.share)"
            require(fits, f"{where}.target", spec.target, ask)

    def _has_root(self, label: str) -> bool:
        """Whether the conditions of a label end."""
        seen: set[str] = set()
        while (label := self.labels[label].given or "") and label not in seen:
            seen.add(label)
        return not label

    def named(self, kind: str) -> list[str]:
        """Features of a kind, in order."""
        return [name for name, spec in self.features.items() if spec.kind == kind]

    def column(self, name: str) -> str:
        """Column of a feature or label."""
        spec = self.features.get(name) or self.labels[name]
        return spec.column or name

    def table(self, feature: str) -> str:
        """Name of the embedding table of a feature: that of the feature that owns it."""
        return self.features[feature].share or feature

    def columns(self, labels: bool = True) -> list[str]:
        """All columns that are read, each once: features, labels, user, item and time."""
        names = [*self.features, *(self.labels if labels else ())]
        extra = [column for column in (self.user, self.item, self.time) if column is not None]
        return list(dict.fromkeys([*(self.column(name) for name in names), *extra]))

    def plain(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Schema:
        """From plain data.

        Raises:
            ConfigError: it is not a schema, or not one that can work.
        """
        values = _section("schema", values, cls)
        parts = {"features": FeatureSpec, "labels": LabelSpec}
        for part, kind in parts.items():
            entries = values.get(part) or {}
            require(isinstance(entries, Mapping), part, entries, "must map names to settings")
            values[part] = {str(name): _spec(f"{part}.{name}", one, kind) for name, one in entries.items()}
        return cls(**values)

    def yaml(self) -> str:
        """As YAML, for editing; what is as by default is left out."""
        values = {"user": self.user, "item": self.item, "time": self.time}
        short = {key: value for key, value in values.items() if value is not None}
        short["features"] = {name: {"kind": one.kind} | _changes(one) for name, one in self.features.items()}
        short["labels"] = {name: _changes(one) for name, one in self.labels.items()}
        return yaml.dump(short, Dumper=_Short, sort_keys=False, width=110, default_flow_style=None, allow_unicode=True)


def read_schema(path: str | Path) -> Schema:
    """A schema from a YAML file.

    Raises:
        UserError: one line that names the file and what to mend.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Strict)
        return Schema.from_plain(values)
    except FileNotFoundError as error:
        raise UserError(f"data.schema={path}: no such file") from error
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:200]})") from error


def _section(where: str, values: Any, kind: type) -> dict[str, Any]:
    require(isinstance(values, Mapping), where, values, "is a section; give its settings")
    known = [one.name for one in dataclasses.fields(kind)]
    for name in values:
        require(name in known, f"{where}.{name}", values[name], f"is no setting; there is {', '.join(known)}")
    return dict(values)


def _spec(where: str, values: Any, kind: type) -> Any:
    try:
        return kind(**_section(where, values or {}, kind))
    except ConfigError as error:
        field_name = error.field if error.field.startswith(where) else f"{where}.{error.field}"
        raise ConfigError(field_name, error.value, error.remedy) from None
    except TypeError as error:
        raise ConfigError(where, values, f"has a value of a wrong type ({error})") from None


def _changes(spec: FeatureSpec | LabelSpec) -> dict[str, Any]:
    default = type(spec)()
    return {key: value for key, value in vars(spec).items() if key != "kind" and value != getattr(default, key, None)}


class _Strict(yaml.SafeLoader):
    """A loader that does not let a later entry replace an earlier one of the same name."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As usual, once it is clear that no name is there twice."""
        names = Counter(str(key.value) for key, _ in node.value)
        twice = next((name for name, count in names.items() if count > 1), None)
        require(twice is None, "column", twice, "is named twice; a column is one feature or one label")
        return super().construct_mapping(node, deep)


class _Short(yaml.SafeDumper):
    """Writes without references."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always."""
        return True
