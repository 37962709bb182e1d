"""What cannot be exported."""

from __future__ import annotations


class ExportError(Exception):
    """A model that cannot take the form asked for; one line that says why and what can."""
