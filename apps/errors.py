"""Errors that end a command with one line and exit code 2."""

from __future__ import annotations

from moecore.errors import ConfigError


class UserError(Exception):
    """What the user can mend: bad data, a missing file, a full disk. The message is one line that says how."""


__all__ = ["ConfigError", "UserError"]
