"""Unpack archives that are not trusted: nothing lands outside the folder, no link is made, all appears or nothing."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path, PureWindowsPath
from typing import IO

BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    NotImplementedError,
)
"""What reading a damaged archive raises."""


class ArchiveError(Exception):
    """An archive that is damaged, or holds what it should not."""


def is_within(path: str) -> bool:
    """Whether a relative path stays in the folder it starts from, on any system."""
    parsed = PureWindowsPath(path)  # knows both separators, and drives
    return not parsed.anchor and ".." not in parsed.parts


def unpack(archive: Path, target: Path, inner: str | None = None) -> None:
    """Unpack a tar, zip or gz, told by content; `target` is replaced when all of it is unpacked.

    Args:
        archive: the file; a .gz that holds no tar becomes the file `target`, anything else a folder.
        target: where its content goes, without the folder that holds all of it, if there is one.
        inner: name of an archive within the archive to unpack as well, in the place where it is.

    Raises:
        ArchiveError: it is damaged, lacks `inner`, or holds what would land outside. `target` is as before.
    """
    work, old = (target.with_name(f".{target.name}.{what}") for what in ("unpacking", "old"))
    _remove(work)
    work.mkdir(parents=True)
    try:
        content = _extract(archive, work, target.name)
        if inner:
            _extract_inner(work, inner)
        items = list(content.iterdir()) if content.is_dir() else []
        if len(items) == 1 and items[0].is_dir():
            content = items[0]
        _remove(old)
        if target.exists():
            os.replace(target, old)
        os.replace(content, target)
        _remove(old)
    except BROKEN as error:
        raise ArchiveError(f"{archive} cannot be read ({' '.join(str(error).split())})") from error
    finally:
        _remove(work)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _extract(archive: Path, folder: Path, name: str) -> Path:
    """What came out of the archive: the folder, or for a bare .gz the file `name` in it."""
    if not archive.stat().st_size:
        raise EOFError("it is empty")
    if tarfile.is_tarfile(archive):
        _untar(archive, folder)
        return folder
    if zipfile.is_zipfile(archive):
        _unzip(archive, folder)
        return folder
    with gzip.open(archive) as source:
        _write(source, folder / name)
    return folder / name


def _extract_inner(folder: Path, name: str) -> None:
    archive = next(folder.rglob(name), None)
    if archive is None:
        raise ArchiveError(f"no {name!r} in the archive")
    _extract(archive, archive.parent, archive.stem)
    archive.unlink()


def _untar(archive: Path, folder: Path) -> None:
    """Members as plain files and folders; a link becomes a copy of what it names within the archive."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = _place(folder, member.name)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            try:
                source = tar.extractfile(member)
            except (KeyError, RecursionError):  # a link to nothing in the archive, or in a circle
                source = None
            if source is None:
                what = f"a link to {member.linkname!r}" if member.linkname else "no file and no folder"
                raise ArchiveError(f"refused: {member.name!r} in the archive is {what}")
            with source:
                _write(source, path)


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            path = _place(folder, member.filename)
            if member.external_attr >> 28 == 0o12:  # S_IFLNK in the upper half, as Unix zips write it
                raise ArchiveError(f"refused: {member.filename!r} in the archive is a link")
            if member.flag_bits & 1:
                raise ArchiveError(f"refused: {member.filename!r} in the archive is encrypted")
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
            else:
                with file.open(member) as source:
                    _write(source, path)


def _place(folder: Path, name: str) -> Path:
    if not is_within(name):
        raise ArchiveError(f"refused: {name!r} in the archive leads out of its folder")
    return folder.joinpath(*PureWindowsPath(name).parts)


def _write(source: IO[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 18)
