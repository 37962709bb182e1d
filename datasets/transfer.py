"""Download one URL into a partial file and go on where an earlier try stopped."""

from __future__ import annotations

import errno
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""
TRIES = 4
"""Lost connections in a row, with nothing gained, after which a mirror is given up."""
PAUSE = 1.0
"""Seconds to wait after the first of them; doubles each time."""
BLOCK = 1 << 18


class MirrorError(Exception):
    """Why a mirror is of no use."""


class Lost(Exception):
    """The connection broke; what has arrived is kept."""


@dataclass(frozen=True)
class Wanted:
    """What is to arrive."""

    name: str
    """Label of the progress bar."""
    size: int | None
    """Bytes, if known."""
    checked: bool
    """A checksum will tell if the parts of two mirrors do not fit together."""


def transfer(wanted: Wanted, url: str, part: Path) -> None:
    """Requests until the file is whole, each going on where the last one broke off.

    Args:
        wanted: what is to arrive.
        url: http or https.
        part: the partial file; it may hold the first bytes already.

    Raises:
        MirrorError: the server does not have the file or loses the connection again and again.
        OSError: the disk is full or may not be written.
    """
    failures, furthest = 0, file_size(part)
    while True:
        try:
            _request(wanted, url, part)
            return
        except Lost as error:
            failures = 0 if file_size(part) > furthest else failures + 1
            furthest = max(furthest, file_size(part))
            if failures == TRIES:
                raise MirrorError(str(error)) from error
            time.sleep(PAUSE * 2**failures)


def discard(part: Path) -> None:
    """Remove a partial file and what is known of its origin."""
    part.unlink(missing_ok=True)
    _origin(part).unlink(missing_ok=True)


def file_size(path: Path) -> int:
    """Bytes of a file; 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0


def readable(count: int | None) -> str:
    """A number of bytes for people."""
    if count is None:
        return "?"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def one_line(error: object) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _origin(part: Path) -> Path:
    """Where the URL and version (ETag or date) of a partial file are kept."""
    return part.with_name(part.name + ".origin")


def _resume_headers(wanted: Wanted, url: str, part: Path) -> dict[str, str]:
    """Headers that ask for the rest of a partial file, where it is sure to fit or the checksum would tell."""
    have = file_size(part)
    known, _, version = (
        _origin(part).read_text(encoding="utf-8").partition("\n") if _origin(part).exists() else [""] * 3
    )
    if have and known == url and version:
        return {"Range": f"bytes={have}-", "If-Range": version}
    return {"Range": f"bytes={have}-"} if have and wanted.checked else {}


def _request(wanted: Wanted, url: str, part: Path) -> None:
    """One request: append what the server sends to the partial file, or start that over."""
    if wanted.size is not None and file_size(part) >= wanted.size:
        if file_size(part) == wanted.size:
            return
        discard(part)
    request = urllib.request.Request(url, headers={"User-Agent": "moecore", **_resume_headers(wanted, url, part)})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 416:
                raise MirrorError(f"HTTP {error.code} {error.reason}") from error
            whole = error.headers.get("Content-Range") == f"bytes */{file_size(part)}"
        if not whole:
            discard(part)
            raise Lost("the server refuses to resume") from None
        return
    except (OSError, http.client.HTTPException) as error:
        raise MirrorError(f"cannot be reached ({one_line(getattr(error, 'reason', error))})") from error
    with response:
        _save(wanted, url, response, part)


def _save(wanted: Wanted, url: str, response: http.client.HTTPResponse, part: Path) -> None:
    """Append the body, or write it from the start where the server ignores Range or has another version."""
    start = file_size(part) if response.status == 206 else 0
    if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        discard(part)
        raise Lost("the server sent another range than asked for")
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    if wanted.size is not None and total is not None and total != wanted.size:
        raise MirrorError(f"offers {total:,} bytes, expected {wanted.size:,}")
    need, free = (total or wanted.size or 0) - start, shutil.disk_usage(part.parent).free
    if need > free:
        raise OSError(errno.ENOSPC, f"{readable(need)} needed, {readable(free)} free", str(part.parent))
    if not start:
        etag = response.headers.get("ETag", "")
        version = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        _origin(part).write_text(f"{url}\n{version}", encoding="utf-8")
    with (
        open(part, "r+b" if start else "wb") as file,
        tqdm(desc=wanted.name, total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar,
    ):
        file.seek(start)
        while block := _read(response):
            file.write(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and file_size(part) < total:
        raise Lost(f"the connection was lost at {readable(file_size(part))} of {readable(total)}")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise Lost(f"the connection was lost ({one_line(error)})") from error
