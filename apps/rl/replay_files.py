"""The two memory-mapped files of a replay, their description, and who may write to them."""

from __future__ import annotations

import errno
import json
import os
import weakref
from dataclasses import asdict
from pathlib import Path

import numpy as np

from apps.errors import UserError
from apps.rl.spaces import EnvSpec
from moecore.files import write_atomic

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

CHUNK = 1 << 22
"""Bytes of disk space claimed at a time."""


def entry_type(action_dim: int) -> np.dtype:
    """What is stored of an entry beside its frame. An entry is written once and never changed.

    So action, reward and ends are those of the step that led to the frame, not of the one that follows it.
    """
    fields = [
        ("position", np.int64),  # in the ring, counted from 1 since its beginning; 0: being written, or never was
        ("episode", np.int64),  # episodes begun in this ring so far
        ("step", np.int32),  # steps since the episode's beginning
        ("task", np.int32),
        ("reward", np.float32),
        ("terminated", np.bool_),
        ("ended", np.bool_),  # terminated or truncated
        ("action", np.float32, (action_dim,)),
    ]
    return np.dtype(fields, align=True)


class ReplayFiles:
    """Frames and entries of all rings, one ring after the other.

    Args:
        folder: holds the files; created if missing.
        spec: of the environment.
        capacity: entries that may be sampled, of all rings.
        slack: further entries per ring.
        num_envs: rings.
    """

    def __init__(self, folder: Path, spec: EnvSpec, capacity: int, slack: int, num_envs: int) -> None:
        self.folder, self.capacity = Path(folder), capacity
        rows = num_envs * (capacity // num_envs + slack)
        layout = {
            "frames.bin": (spec.dtype, (rows, *spec.frame)),
            "entries.bin": (entry_type(spec.action_dim), (rows,)),
        }
        sizes = {name: dtype.itemsize * int(np.prod(shape)) for name, (dtype, shape) in layout.items()}
        self.nbytes = sum(sizes.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        handles = [_lock(self.folder)]
        self.close = weakref.finalize(self, _close, handles)
        """Let other processes open the folder."""
        sizes_of = {"collect": {"capacity": capacity, "num_envs": num_envs}, "replay": {"slack": slack}}
        meta = {"env": asdict(spec), **sizes_of}
        _describe(self.folder, meta, sizes)
        self._maps = [
            np.memmap(self.folder / name, dtype, "r+", shape=shape) for name, (dtype, shape) in layout.items()
        ]
        self.frames, self.entries = (np.asarray(mapped) for mapped in self._maps)
        handles += [os.open(self.folder / name, os.O_RDWR) for name in layout]
        self._handles = handles
        self._chunk_rows = max(1, CHUNK * rows // self.nbytes)
        self._claimed = np.zeros(-(-rows // self._chunk_rows), bool)

    def claim(self, row: int) -> None:
        """Make sure that the disk has room for a row: a full disk would otherwise end the process without a word.

        Raises:
            UserError: if it has not.
        """
        chunk = row // self._chunk_rows
        if self._claimed[chunk]:
            return
        first, stop = chunk * self._chunk_rows, min((chunk + 1) * self._chunk_rows, len(self.entries))
        for handle, array in zip(self._handles[1:], (self.frames, self.entries), strict=True):
            width = array.strides[0]
            _allocate(handle, first * width, (stop - first) * width, self)
        self._claimed[chunk] = True

    def flush(self) -> None:
        """Everything written is on disk; needed against loss of power only, not against the end of the process."""
        for mapped in self._maps:
            mapped.flush()


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)
    handles.clear()


def _lock(folder: Path) -> int:
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(handle)
        raise UserError(
            f"replay={folder}: another process writes to it: end that one, or take another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
    return handle


def _describe(folder: Path, meta: dict, sizes: dict[str, int]) -> None:
    """Create the files, or check that they are those of `meta`."""
    path = folder / "meta.json"
    if not path.exists():
        for name, size in sizes.items():
            (folder / name).unlink(missing_ok=True)
            with open(folder / name, "wb") as file:
                file.truncate(size)
        write_atomic(path, json.dumps(meta, indent=2) + "\n")
        return
    remedy = "take another folder, or delete this one"
    try:
        held = json.loads(path.read_text())
        pairs = [(f"{group}.{name}", held[group][name], value) for group in meta for name, value in meta[group].items()]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"replay={folder}: meta.json is not that of a replay: {remedy}") from None
    for field, old, new in pairs:
        plain = json.loads(json.dumps(new))  # tuples are lists there
        if old != plain:
            raise UserError(f"{field}={plain!r}: the replay in {folder} was made with {old!r}: {remedy}")
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise UserError(f"replay={folder}: {name} is missing or cut off: {remedy}")


def _allocate(handle: int, offset: int, length: int, files: ReplayFiles) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, offset, length)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
            return
        raise UserError(
            f"collect.capacity={files.capacity}: no room in {files.folder} ({error.strerror}): it takes "
            f"{files.nbytes / 1e9:.3g} GB when full: free disk space, then resume, or start anew with a lower capacity"
        ) from None
