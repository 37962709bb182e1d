"""Names that modules can have: of tasks and groups of tasks, whatever a log calls them."""

from __future__ import annotations

from collections.abc import Sequence

from moecore.errors import require


def safe_names(kind: str, names: Sequence[str]) -> dict[str, str]:
    """Name -> `kind` and the name, without dots, which modules may not have.

    Raises:
        ConfigError: two names would be the same.
    """
    safe = {name: f"{kind}_{name.replace('.', '_')}" for name in names}
    require(len(set(safe.values())) == len(safe), f"data.{kind}s", list(names), "differ in dots only; rename one")
    return safe
