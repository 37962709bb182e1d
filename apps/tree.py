"""Settings as trees of plain data, and back: one way for flags, files, checkpoints and search."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from apps.errors import ConfigError, UserError


def build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A settings dataclass, with the dataclasses inside it, from nested values.

    Args:
        cls: the dataclass.
        values: field -> value; further keys are left alone (see `refuse_unknown`).
        prefix: dotted name of the whole, for errors.

    Raises:
        ConfigError: from the dataclass's own checks, naming the whole dotted field.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(prefix.rstrip("."), values, "is a section; give its settings")
    hints = typing.get_type_hints(cls)
    parts = {}
    for field in dataclasses.fields(cls):
        kind, value = hints[field.name], values[field.name]
        if dataclasses.is_dataclass(kind):
            value = build(kind, value, f"{prefix}{field.name}.")
        elif typing.get_origin(kind) is tuple:
            value = tuple(value)
        parts[field.name] = value
    try:
        return cls(**parts)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error.field}", error.value, error.remedy) from None


def plain(config: object) -> dict[str, Any]:
    """Settings as plain data: dictionaries, lists, strings, numbers."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def restore(cls: type, values: Mapping[str, Any]) -> Any:
    """Settings kept by an earlier version: fields it did not know get their defaults, those gone are an error."""
    defaults = plain(cls())
    return build(cls, _merged(defaults, values, ""))


def _merged(defaults: dict[str, Any], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    unknown = sorted(set(values) - set(defaults))
    if unknown:
        raise UserError(f"{prefix}{unknown[0]}: the checkpoint has this setting, this version does not know it")
    merged = dict(defaults)
    for name, value in values.items():
        nested = isinstance(value, Mapping) and isinstance(defaults[name], dict) and not is_value(name)
        merged[name] = _merged(defaults[name], value, f"{prefix}{name}.") if nested else value
    return merged


def is_value(name: str) -> bool:
    """Whether a dictionary by this name is a value as a whole rather than a section of settings."""
    return name.endswith(("_options", "aux_loss", "corpora", "kwargs", "weights"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not is_value(name):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def changed(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy of the settings with dotted names replaced; all checks run again."""
    tree = dataclasses.asdict(config)
    for name, value in values.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node[part]
        node[leaf] = value
    return build(type(config), tree)
