"""A process that is killed while it writes leaves the file of before."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from moecore.files import atomic_path, write_atomic
from tests.apps.processes import CONTEXT


def write_half(path: Path) -> None:
    """Writes the first half of new content, says so, and waits for its end."""
    with atomic_path(path) as temporary, open(temporary, "wb", buffering=0) as file:
        file.write(b"new" * 1000)
        path.with_suffix(".half").touch()
        time.sleep(600)


def write_for_ever(path: Path) -> None:
    """One whole file after the other."""
    for letter in iter(lambda: b"ab", None):
        for content in (letter[:1], letter[1:]):
            write_atomic(path, content * 200_000)


def kill_when(process, ready) -> None:
    limit = time.monotonic() + 400
    while not ready():
        assert process.is_alive()
        assert time.monotonic() < limit
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("name", ["last.ckpt", "report.html"])
def test_a_killed_write_leaves_the_good_file(tmp_path, name):
    path = tmp_path / name
    path.write_text("good")
    process = CONTEXT.Process(target=write_half, args=(path,))
    process.start()
    kill_when(process, path.with_suffix(".half").exists)
    assert path.read_text() == "good"
    write_atomic(path, "better")  # and what the killed one left is in nobody's way
    assert path.read_text() == "better"


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    path = tmp_path / "last.ckpt"
    for attempt in range(5):
        process = CONTEXT.Process(target=write_for_ever, args=(path,))
        process.start()
        seen = path.stat().st_mtime_ns if path.exists() else 0
        kill_when(process, lambda seen=seen: path.exists() and path.stat().st_mtime_ns > seen)
        content = path.read_bytes()
        assert content in (b"a" * 200_000, b"b" * 200_000), attempt


def test_an_error_while_writing_leaves_nothing_behind(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("good")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("bad")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_rights_that_other_files_get(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert write_atomic(tmp_path / "deep" / "x", b"\x00").stat().st_mode == plain.stat().st_mode
