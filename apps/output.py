"""Figures for people (a table) and for programs (JSON), by the same flat names."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moecore.files import write_atomic


def show(title: str, figures: Mapping[str, Any]) -> None:
    """Print name and value, one per line."""
    width = max((len(name) for name in figures), default=0)
    print(f"\n{title}")
    for name, value in figures.items():
        print(f"  {name:<{width}}  {format_value(value)}")
    sys.stdout.flush()


def show_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of equal columns."""
    if not rows:
        return
    columns = list(rows[0])
    cells = [[format_value(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    print(f"\n{title}")
    for line in (columns, *cells):
        print(
            "  "
            + "  ".join(
                f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )
    sys.stdout.flush()


def format_value(value: Any) -> str:
    """Whole numbers in full, others to four digits."""
    if isinstance(value, float):
        if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
            return f"{int(value):,}"
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def short(value: float) -> str:
    """Three digits and a letter: 12.3 k, 4.56 M, 7.89 G."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {suffix}"
    return f"{value:.3g}"


def write_json(path: str | Path | None, figures: Any) -> None:
    """Write figures as JSON, if a path is given; NaN becomes null."""
    if path is not None:
        write_atomic(path, json.dumps(_finite(figures), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as .csv or .json, by the ending of the path."""
    path = Path(path)
    if path.suffix == ".json":
        write_json(path, list(rows))
        return path
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_atomic(path, text.getvalue())
