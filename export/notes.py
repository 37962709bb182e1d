"""What was measured of exported files, kept beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.errors import ExportError
from moecore.files import write_atomic

NOTES = "export.json"
"""File beside exported ones that keeps what was measured of each."""


MARKS = ("manifest.json", "edge_moe.json")
"""Files that folders written by an export hold."""


def require_replaceable(path: Path) -> None:
    """Refuse to put a folder in the place of anything but an earlier export or an empty folder.

    Raises:
        ExportError: names the path.
    """
    if not path.exists():
        return
    ours = path.is_dir() and (any((path / mark).is_file() for mark in MARKS) or not any(path.iterdir()))
    if not ours:
        raise ExportError(f"output={path}: is there, and no folder that an export wrote; give another name")


def note(path: Path, figures: Mapping[str, Any]) -> None:
    """Keep what was measured of a file or folder.

    Args:
        path: of the file or folder.
        figures: plain data; in place of those of an earlier file of the name.

    Raises:
        ExportError: if the notes are no JSON.
    """
    notes = path.with_name(NOTES)
    try:
        known = json.loads(notes.read_text()) if notes.exists() else {}
    except json.JSONDecodeError as error:
        raise ExportError(f"{notes}: is damaged ({error}); delete it") from error
    write_atomic(notes, json.dumps(known | {path.name: dict(figures)}, indent=1))
