"""The one error that a user's settings can cause."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: field, value, what to do."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field}={value!r}: {remedy}")


def require(condition: bool, field: str, value: object, remedy: str) -> None:
    """Raise `ConfigError(field, value, remedy)` unless `condition` holds."""
    if not condition:
        raise ConfigError(field, value, remedy)


def choice(field: str, value: str, options: Iterable[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `options`."""
    options = sorted(options)
    require(value in options, field, value, f"choose one of {', '.join(options)}")
