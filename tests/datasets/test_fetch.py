from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

CONTENT = random.Random(0).randbytes(600_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


def error_line(result) -> str:
    """The error of a run that ended as errors should: code 2 and one line."""
    assert result.code == 2
    lines = result.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def half_done(tool, content: bytes = CONTENT[:HALF]) -> Path:
    tool.root.mkdir(exist_ok=True)
    part = tool.root / "x.bin.part"
    part.write_bytes(content)
    return part


# Downloads


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"md5": MD5}, {"sha256": SHA256, "size": len(CONTENT)}])
def test_downloads_verifies_and_does_nothing_more_the_second_time(tool, server, known):
    tool.add("x", server.add("x", CONTENT), file="sub/x.bin", use="python -m app --root {root}", **known)
    result = tool("x")
    assert result.code == 0
    assert "licence: CC0; cite: Nobody, 2020" in result.out
    assert f"x: {tool.root / 'sub' / 'x.bin'} is complete and verified" in result.out
    assert f"python -m app --root {tool.root}" in result.out
    assert tool.files() == {"sub/x.bin": CONTENT}
    assert server.requests == [("/x", None)]

    again = tool("X")
    assert again.code == 0
    assert "is present and verified" in again.out
    assert len(server.requests) == 1


def test_shows_progress_from_where_it_resumes(tool, server, monkeypatch):
    bars = []
    module = sys.modules["transfer"]

    class Bar(module.tqdm):
        def __init__(self, **kwargs):
            bars.append(self)
            super().__init__(**{**kwargs, "disable": False})

    monkeypatch.setattr(module, "tqdm", Bar)
    tool.add("x", server.add("x", CONTENT), sha256=SHA256)
    half_done(tool)
    result = tool("x")
    assert (bars[0].initial, bars[0].n, bars[0].total) == (HALF, len(CONTENT), len(CONTENT))
    assert "600k/600k" in result.err


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_resumes_a_partial_file(tool, server, size):
    tool.add("x", server.add("x", CONTENT), sha256=SHA256, size=size)
    half_done(tool)
    assert tool("x").code == 0
    assert server.requests == [("/x", f"bytes={HALF}-")]
    assert tool.files() == {"x.bin": CONTENT}


def test_starts_over_where_the_server_ignores_range(tool, server):
    tool.add("x", server.add("x", CONTENT, ranges=False), sha256=SHA256)
    half_done(tool)
    assert tool("x").code == 0
    assert server.requests == [("/x", f"bytes={HALF}-")]
    assert tool.files() == {"x.bin": CONTENT}


def test_starts_over_where_the_partial_file_is_of_something_else(tool, server):
    tool.add("x", server.add("x", CONTENT), sha256=SHA256)
    half_done(tool, b"?" * HALF)
    assert tool("x").code == 0
    assert server.requests == [("/x", f"bytes={HALF}-"), ("/x", None)]
    assert tool.files() == {"x.bin": CONTENT}


@pytest.mark.parametrize("size", [None, len(CONTENT)])
@pytest.mark.parametrize("extra", [b"", b"more"])
def test_partial_file_that_is_whole_or_longer(tool, server, size, extra):
    tool.add("x", server.add("x", CONTENT), sha256=SHA256, size=size)
    half_done(tool, CONTENT + extra)
    assert tool("x").code == 0
    assert tool.files() == {"x.bin": CONTENT}
    bodies = [asked for _, asked in server.requests if asked is None]
    assert len(bodies) == (1 if extra else 0)


def test_goes_on_after_lost_connections(tool, server):
    tool.add("x", server.add("x", CONTENT, drops=[HALF, 1000, 0, 0, 1000]), sha256=SHA256)
    assert tool("x").code == 0
    assert [asked for _, asked in server.requests] == [
        None,
        f"bytes={HALF}-",
        *[f"bytes={HALF + 1000}-"] * 3,
        f"bytes={HALF + 2000}-",
    ]
    assert tool.files() == {"x.bin": CONTENT}


def test_goes_on_where_a_server_fell_silent(tool, server, monkeypatch):
    monkeypatch.setattr(sys.modules["transfer"], "TIMEOUT", 0.3)
    tool.add("x", server.add("x", CONTENT, stall=HALF), sha256=SHA256)
    assert tool("x").code == 0
    assert server.requests[1] == ("/x", f"bytes={HALF}-")
    assert tool.files() == {"x.bin": CONTENT}


def test_gives_up_keeps_the_partial_file_and_goes_on_the_next_time(tool, server):
    tool.add("x", server.add("x", CONTENT, drops=[HALF, *[0] * 4]), sha256=SHA256)
    line = error_line(tool("x"))
    assert "the connection was lost at 300.0 kB of 600.0 kB; 300.0 kB kept, run again to go on" in line
    assert tool("x").code == 0
    assert server.requests[-1] == ("/x", f"bytes={HALF}-")
    assert tool.files() == {"x.bin": CONTENT}


def test_without_a_checksum_resumes_only_what_is_surely_the_same_file(tool, server):
    tool.add("x", server.add("x", CONTENT, headers={"ETag": '"1"'}, drops=[HALF, *[0] * 4]))
    assert tool("x").code == 2
    changed = bytes(reversed(CONTENT))
    server.add("x", changed, headers={"ETag": '"2"'})
    assert tool("x").code == 0
    assert tool.files()["x.bin"] == changed

    shutil.rmtree(tool.root)
    half_done(tool)  # from nobody knows where
    assert tool("x").code == 0
    assert server.requests[-1] == ("/x", None)


def test_without_a_checksum_resumes_the_same_version(tool, server):
    tool.add("x", server.add("x", CONTENT, headers={"ETag": '"1"'}, drops=[HALF]))
    assert tool("x").code == 0
    assert server.requests == [("/x", None), ("/x", f"bytes={HALF}-")]
    assert tool.files()["x.bin"] == CONTENT


def test_server_that_announces_no_length(tool, server):
    tool.add("x", server.add("x", CONTENT, announce=False), sha256=SHA256)
    assert tool("x").code == 0
    assert tool.files() == {"x.bin": CONTENT}


# Mirrors and errors


def test_mirrors_are_tried_in_order(tool, server):
    bad = server.add("bad", CONTENT[::-1])
    tool.add("x", server.url("gone"), bad, server.add("good", CONTENT), server.add("spare", CONTENT), sha256=SHA256)
    assert tool("x").code == 0
    assert [path for path, _ in server.requests] == ["/gone", "/bad", "/good"]
    assert tool.files() == {"x.bin": CONTENT}


def test_mirror_goes_on_with_what_another_has_sent(tool, server):
    broken = server.add("broken", CONTENT, drops=[HALF, *[0] * 4])
    tool.add("x", broken, server.add("good", CONTENT), sha256=SHA256)
    assert tool("x").code == 0
    assert server.requests[-1] == ("/good", f"bytes={HALF}-")
    assert tool.files() == {"x.bin": CONTENT}


@pytest.mark.parametrize(("kind", "digits"), [("sha256", 64), ("md5", 32)])
def test_checksum_that_differs(tool, server, kind, digits):
    tool.add("x", server.add("x", CONTENT), **{kind: "0" * digits})
    line = error_line(tool("x"))
    assert f"{kind} {hashlib.new(kind, CONTENT).hexdigest()}, expected {'0' * digits}; the bad file is removed" in line
    assert tool.files() == {}


def test_size_that_differs_costs_no_download(tool, server):
    tool.add("x", server.add("x", CONTENT), size=5)
    assert "offers 600,000 bytes, expected 5" in error_line(tool("x"))
    assert tool.files() == {}


@pytest.mark.parametrize(("status", "words"), [(404, "HTTP 404 Not Found"), (503, "HTTP 503 Service Unavailable")])
def test_server_without_the_file(tool, server, status, words):
    tool.add("x", server.add("x", b"", status=status))
    line = error_line(tool("x"))
    assert words in line
    assert "or put the file at" in line
    assert tool.files() == {}


def test_no_network(tool):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        tool.add("x", f"http://127.0.0.1:{closed.getsockname()[1]}/x")
        line = error_line(tool("x"))
    assert "cannot be reached" in line
    assert "check the network" in line


@pytest.mark.parametrize(("name", "hint"), [("etth", "did you mean 'etth1'?"), ("qqq", "run without names")])
def test_unknown_name_stops_before_any_traffic(tool, server, name, hint):
    tool.add("etth1", server.add("x", CONTENT))
    line = error_line(tool("etth1", name))
    assert f"name={name!r}: no such data set" in line
    assert hint in line
    assert server.requests == []


def test_one_that_fails_does_not_stop_the_others(tool, server):
    tool.add("x", server.url("gone"))
    tool.add("y", server.add("y", CONTENT), sha256=SHA256)
    assert error_line(tool("x", "y")).startswith("error: x: ")
    assert tool.files() == {"y.bin": CONTENT}


def test_disk_with_too_little_room(tool, server, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    tool.add("x", server.add("x", CONTENT), sha256=SHA256)
    assert "the disk is full (600.0 kB needed, 1.0 kB free); make room and run again" in error_line(tool("x"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_that_fills_up(tool, server):
    tool.add("x", server.add("x", CONTENT), sha256=SHA256)
    tool.root.mkdir()
    (tool.root / "x.bin.part").symlink_to("/dev/full")
    assert "the disk is full (No space left on device); make room" in error_line(tool("x"))


def test_root_that_is_a_file(tool, server):
    tool.add("x", server.add("x", CONTENT))
    tool.root.write_text("")
    assert str(tool.root) in error_line(tool("x"))


# Files for which nobody publishes a checksum


def test_without_a_checksum_keeps_one(tool, server):
    tool.add("x", server.add("x", CONTENT))
    result = tool("x")
    assert f"no checksum is published; kept sha256 {SHA256}" in result.out
    assert f"{tool.root / 'x.bin'} is complete, taken on trust" in result.out
    assert tool.files() == {"x.bin": CONTENT, "x.bin.sha256": f"{SHA256}  x.bin\n".encode()}

    assert "is present and verified" in tool("x").out
    assert len(server.requests) == 1

    (tool.root / "x.bin").write_bytes(b"damaged")
    result = tool("x")
    assert result.code == 0
    assert f"does not verify (sha256 {hashlib.sha256(b'damaged').hexdigest()}" in result.out
    assert tool.files()["x.bin"] == CONTENT
    assert tool.files()["x.bin.old"] == b"damaged"


def test_new_version_is_not_accepted_behind_ones_back(tool, server):
    tool.add("x", server.add("x", CONTENT))
    tool("x")
    (tool.root / "x.bin").unlink()
    server.add("x", b"new")
    assert "delete that to accept a new version" in error_line(tool("x"))
    (tool.root / "x.bin.sha256").unlink()
    assert tool("x").code == 0


# As a process


def test_interrupt_keeps_the_partial_file(tool, server):
    tool.add("x", server.add("x", CONTENT, stall=HALF), sha256=SHA256)
    script = Path(__file__).parents[2] / "datasets" / "fetch.py"
    # A process started in the background inherits that interrupts are ignored, and so would its children.
    heed = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    heed += f"sys.path.insert(0, {str(script.parent)!r}); runpy.run_path({str(script)!r}, run_name='__main__')"
    command = [sys.executable, "-W", "error", "-c", heed, "x", "--root", str(tool.root)]
    process = subprocess.Popen([*command, "--catalog", str(tool.catalog)], stderr=subprocess.PIPE, text=True)
    part = tool.root / "x.bin.part"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size > HALF - 10_000):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"x: interrupted; 300.0 kB kept in {part}; run again to go on"
    assert part.read_bytes() == CONTENT[:HALF]


def test_second_process_waits_for_the_first(tool, server):
    fcntl = pytest.importorskip("fcntl")
    tool.add("x", server.add("x", CONTENT), sha256=SHA256)
    tool.root.mkdir()
    handle = os.open(tool.root, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    results = []
    thread = threading.Thread(target=lambda: results.append(tool("x")))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    assert server.requests == []
    os.close(handle)
    thread.join()
    assert results[0].code == 0
    assert "waiting for another download to end" in results[0].err
