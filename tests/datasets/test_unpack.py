from __future__ import annotations

import errno
import gzip
import hashlib
import io
import shutil
import tarfile
import zipfile

import pytest

FILES = {"set/a.csv": b"1,2\n", "set/sub/b.csv": b"3,4\n"}
REGULAR = tarfile.REGTYPE


def tar(files: dict[str, bytes], mode: str = "w:gz", kinds: dict[str, tuple[bytes, str]] | None = None) -> bytes:
    """A tar; `kinds` gives the type and link target of what is no plain file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (kinds or {}).get(name, (REGULAR, ""))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: dict[str, bytes], attributes: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = attributes << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def serve(tool, server, content: bytes, **fields) -> None:
    tool.add("x", server.add("x", content), **{"file": "x.archive", "unpack": "x", **fields})


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("make", [tar, lambda files: tar(files, "w"), lambda files: tar(files, "w:xz"), zipped])
def test_unpacks_without_the_folder_that_holds_all(tool, server, make):
    content = make({"set/": b"", **FILES} if make is zipped else FILES)
    serve(tool, server, content, sha256=sha256(content), use="--data.root {target}")
    result = tool("x")
    assert result.code == 0
    assert f"{tool.root / 'x'} is complete and verified" in result.out
    assert f"--data.root {tool.root / 'x'}" in result.out
    expected = {"x.archive": content, "x/a.csv": b"1,2\n", "x/sub/b.csv": b"3,4\n"}
    assert tool.files() == expected

    assert "is present and verified" in tool("x").out
    assert len(server.requests) == 1
    assert tool.files() == expected


def test_several_things_at_the_top_stay_there(tool, server):
    serve(tool, server, zipped({"a/1": b"1", "b/2": b"2"}))
    assert tool("x").code == 0
    assert {"x/a/1", "x/b/2"} <= set(tool.files())


def test_gz_becomes_a_file(tool, server):
    serve(tool, server, gzip.compress(b"1,2\n"), file="in/x.csv.gz", unpack="in/x.csv")
    assert tool("x").code == 0
    assert tool.files()["in/x.csv"] == b"1,2\n"


def test_archive_in_the_archive(tool, server):
    content = zipped({"readme": b"", "inner.tar.gz": tar({"a.csv": b"1\n"})})
    serve(tool, server, content, sha256=sha256(content), inner="inner.tar.gz")
    assert tool("x").code == 0
    assert tool.files() == {"x.archive": content, "x/a.csv": b"1\n", "x/readme": b""}


def test_archive_in_the_archive_that_is_missing(tool, server):
    serve(tool, server, zipped({"readme": b""}), inner="inner.tar.gz")
    assert "no 'inner.tar.gz' in the archive" in tool("x").err


def test_folder_is_unpacked_again_without_traffic(tool, server):
    content = tar(FILES)
    serve(tool, server, content, sha256=sha256(content))
    tool("x")
    shutil.rmtree(tool.root / "x")
    assert tool("x").code == 0
    assert "x/a.csv" in tool.files()
    assert len(server.requests) == 1


def test_archive_may_be_deleted(tool, server):
    serve(tool, server, tar(FILES))
    tool("x")
    (tool.root / "x.archive").unlink()
    result = tool("x")
    assert result.code == 0
    assert "was not verified" in result.out
    assert len(server.requests) == 1


def test_damaged_archive_takes_its_folder_with_it(tool, server):
    content = tar(FILES)
    serve(tool, server, content, sha256=sha256(content))
    tool("x")
    (tool.root / "x.archive").write_bytes(b"damaged")
    (tool.root / "x" / "stale").write_bytes(b"")
    assert tool("x").code == 0
    assert tool.files() == {
        "x.archive": content,
        "x.archive.old": b"damaged",
        "x/a.csv": b"1,2\n",
        "x/sub/b.csv": b"3,4\n",
    }


def test_link_within_becomes_a_copy(tool, server):
    files = {"set/a": b"1", "set/sub/soft": b"", "set/hard": b""}
    kinds = {"set/sub/soft": (tarfile.SYMTYPE, "../a"), "set/hard": (tarfile.LNKTYPE, "set/a")}
    serve(tool, server, tar(files, kinds=kinds))
    assert tool("x").code == 0
    for name in ("sub/soft", "hard"):
        assert (tool.root / "x" / name).read_bytes() == b"1"
        assert not (tool.root / "x" / name).is_symlink()


UNSAFE = {
    "up": tar({"good": b"", "../evil": b"!"}),
    "absolute": tar({"good": b"", "/tmp/evil": b"!"}),
    "soft link": tar({"good": b"", "set/link": b""}, kinds={"set/link": (tarfile.SYMTYPE, "../../evil")}),
    "hard link": tar({"good": b"", "set/link": b""}, kinds={"set/link": (tarfile.LNKTYPE, "../evil")}),
    "folder link": tar({"f/a": b"", "link": b""}, kinds={"link": (tarfile.SYMTYPE, "/tmp")}),
    "circle": tar(
        {"good": b"", "one": b"", "two": b""},
        kinds={"one": (tarfile.SYMTYPE, "two"), "two": (tarfile.SYMTYPE, "one")},
    ),
    "pipe": tar({"good": b"", "pipe": b""}, kinds={"pipe": (tarfile.FIFOTYPE, "")}),
    "device": tar({"good": b"", "device": b""}, kinds={"device": (tarfile.CHRTYPE, "")}),
    "zip up": zipped({"good": b"", "../evil": b"!"}),
    "zip absolute": zipped({"good": b"", "/tmp/evil": b"!"}),
    "zip Windows": zipped({"good": b"", "..\\evil": b"!"}),
    "zip drive": zipped({"good": b"", "C:\\evil": b"!"}),
    "zip link": zipped({"link": b"../evil"}, attributes=0o120777),
    "inner": zipped({"inner.tar.gz": tar({"../evil": b"!"})}),
}


@pytest.mark.parametrize("content", UNSAFE.values(), ids=UNSAFE.keys())
def test_refuses_what_leads_out_of_the_folder(tool, server, content):
    inner = "inner.tar.gz" if content is UNSAFE["inner"] else None
    serve(tool, server, content, sha256=sha256(content), unpack="sub/x", inner=inner)
    result = tool("x")
    assert result.code == 2
    assert result.err.startswith("error: x: refused: ")
    assert len(result.err.splitlines()) == 1
    assert tool.files() == {"x.archive": content}
    assert list((tool.root / "sub").iterdir()) == []
    assert not list(tool.folder.rglob("evil"))


def test_refuses_an_encrypted_zip(tool, server):
    content = bytearray(zipped({"a": b"1"}))
    content[6] |= 1  # in the member's own header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and in the directory
    serve(tool, server, bytes(content))
    assert "is encrypted" in tool("x").err


BROKEN = {
    "error page": b"<html>Sorry, try later</html>" * 100,
    "empty": b"",
    "cut tar.gz": tar({"set/a": bytes(range(256)) * 200})[:200],
    "cut gz": gzip.compress(bytes(range(256)) * 200)[:200],
    "damaged zip": zipped({"a": bytes(range(256)) * 200}).replace(bytes(range(9, 20)), bytes(11)),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_archive_is_removed_where_no_checksum_vouches_for_it(tool, server, content):
    serve(tool, server, content)
    result = tool("x")
    assert result.code == 2
    assert "cannot be read" in result.err
    assert "the bad file is removed" in result.err
    assert len(result.err.splitlines()) == 1
    assert tool.files() == {}


def test_disk_that_fills_up_while_unpacking_leaves_nothing_half_done(tool, server, monkeypatch):
    content = tar(FILES)
    serve(tool, server, content, sha256=sha256(content))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        result = tool("x")
    assert result.code == 2
    assert "the disk is full" in result.err
    assert tool.files() == {"x.archive": content}
    assert list(tool.root.iterdir()) == [tool.root / "x.archive"]
    assert tool("x").code == 0
    assert len(server.requests) == 1
