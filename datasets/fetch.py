"""Download the data sets of catalog.yaml: resume, verify, unpack.

python datasets/fetch.py                              what there is and where it would go
python datasets/fetch.py cifar10 etth1 --root data    get some
"""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

try:
    import tqdm  # noqa: F401 - transfer.py needs it
    import yaml
except ModuleNotFoundError as missing:
    print(f"error: {missing.name} is not installed; pip install pyyaml tqdm", file=sys.stderr)
    sys.exit(2)
from archives import ArchiveError, is_within, unpack
from transfer import MirrorError, Wanted, discard, file_size, one_line, readable, transfer

CATALOG = Path(__file__).with_name("catalog.yaml")


class FetchError(Exception):
    """What ends a download with one line and exit code 2."""


@dataclass(frozen=True)
class Entry:
    """A data set; README.md says what each field means. Paths are relative to the root."""

    name: str
    app: str
    title: str
    urls: tuple[str, ...]
    file: str
    licence: str
    citation: str
    homepage: str
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None
    unpack: str | None = None
    inner: str | None = None
    account: str | None = None
    use: str | None = None

    def __post_init__(self) -> None:
        if not self.urls or any(urlsplit(url).scheme not in ("http", "https") for url in self.urls):
            raise FetchError(f"{self.name}.urls={list(self.urls)}: give at least one, http or https")
        for path in filter(None, (self.file, self.unpack)):
            if not is_within(path) or not Path(path).parts:
                raise FetchError(f"{self.name}: {path!r} is the root or leads out of it; give a path within it")
        for kind, length in (("sha256", 64), ("md5", 32)):
            value = getattr(self, kind)
            if value is not None and not re.fullmatch(f"[0-9a-f]{{{length}}}", str(value)):
                raise FetchError(f"{self.name}.{kind}={value!r}: give {length} lower-case hexadecimal digits, or null")

    @property
    def checksum(self) -> tuple[str, str] | None:
        """Kind and digest of the strongest that is published."""
        return ("sha256", self.sha256) if self.sha256 else ("md5", self.md5) if self.md5 else None


def load_catalog(path: Path = CATALOG) -> dict[str, Entry]:
    """The catalogue, by name.

    Raises:
        FetchError: the file cannot be read, or an entry is not as it should be.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: Entry(name, urls=tuple(fields.pop("urls")), **fields) for name, fields in entries.items()}
    except (OSError, yaml.YAMLError, TypeError, AttributeError, KeyError) as error:
        raise FetchError(f"catalog={path}: not a catalogue that can be read ({one_line(error)})") from error


# Verify


def digest(path: Path, kind: str) -> str:
    """The checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _sidecar(file: Path) -> Path:
    """Where the sha256 of a file without a published checksum is kept, in the format of `sha256sum -c`."""
    return file.with_name(file.name + ".sha256")


def _problem(entry: Entry, file: Path, path: Path) -> str | None:
    """What is wrong with `path`, which is or is to become `file`; None: nothing."""
    if entry.size is not None and path.stat().st_size != entry.size:
        return f"{path.stat().st_size:,} bytes, expected {entry.size:,}"
    sidecar, hint = _sidecar(file), ""
    if entry.checksum:
        kind, expected = entry.checksum
    elif sidecar.exists():
        kind, expected = "sha256", sidecar.read_text(encoding="utf-8").partition(" ")[0].strip()
        hint = f" by {sidecar} (delete that to accept a new version)"
    else:
        return None
    found = digest(path, kind)
    return None if found == expected else f"{kind} {found}, expected {expected}{hint}"


def _remember(entry: Entry, file: Path) -> None:
    """Keep the sha256 of a file for which nobody publishes a checksum."""
    if entry.checksum or _sidecar(file).exists():
        return
    found, temporary = digest(file, "sha256"), _sidecar(file).with_suffix(".sha256.part")
    temporary.write_text(f"{found}  {file.name}\n", encoding="utf-8")
    os.replace(temporary, _sidecar(file))
    print(f"{entry.name}: no checksum is published; kept sha256 {found} in {_sidecar(file)} to verify with from now on")


# Download


def _from_mirror(entry: Entry, url: str, file: Path, part: Path) -> None:
    """The whole, verified file as `part`; one that was resumed and is wrong is tried once more from its start."""
    wanted = Wanted(entry.name, entry.size, checked=entry.checksum is not None)
    resumed = file_size(part) > 0
    transfer(wanted, url, part)
    if resumed and _problem(entry, file, part):
        discard(part)
        transfer(wanted, url, part)
    if wrong := _problem(entry, file, part):
        discard(part)
        raise MirrorError(f"{wrong}; the bad file is removed")


def download(entry: Entry, file: Path) -> None:
    """Get and verify the file of an entry; the first mirror that has it wins.

    Raises:
        FetchError: none has it. What has arrived stays in `<file>.part`.
    """
    part, failures = _part(file), []
    for url in entry.urls:
        try:
            _from_mirror(entry, url, file, part)
            break
        except MirrorError as error:
            failures.append(f"{urlsplit(url).netloc}: {error}")
    else:
        have = file_size(part)
        advice = f"{readable(have)} kept, run again to go on" if have else "check the network and run again"
        raise FetchError(f"{'; '.join(failures)}; {advice}, or put the file at {file} yourself")
    if file.exists():
        os.replace(file, file.with_name(file.name + ".old"))
    os.replace(part, file)
    discard(part)


def _part(file: Path) -> Path:
    return file.with_name(file.name + ".part")


# One data set after the other


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time for each folder, where the system has file locks."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: waiting for another download to end", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def fetch(entry: Entry, root: Path) -> str:
    """Get, verify and unpack one data set, as far as that is not done.

    Returns:
        One line on the outcome.

    Raises:
        FetchError: it cannot be had.
        OSError: the disk is full or may not be written.
    """
    file, target = root / entry.file, root / (entry.unpack or entry.file)
    if entry.account and not target.exists():
        raise FetchError(f"needs an account at {entry.urls[0]}; {entry.account.format(target=target)}")
    with _alone(file.parent):
        if target.exists() and not file.exists():
            return f"{target} is there; its archive is not, so it was not verified (delete it to download it anew)"
        wrong = _problem(entry, file, file) if file.exists() else None
        fresh = bool(wrong) or not file.exists()
        if fresh:
            if wrong:
                print(f"{entry.name}: {file} does not verify ({wrong}); getting it anew, this one is kept as .old")
            print(f"{entry.name}: {entry.title} ({readable(entry.size)})")
            print(f"{entry.name}: licence: {entry.licence}; cite: {entry.citation}")
            download(entry, file)
        verified = bool(entry.checksum) or _sidecar(file).exists()
        _remember(entry, file)
        if target != file and (fresh or not target.exists()):
            print(f"{entry.name}: unpacking into {target}")
            try:
                unpack(file, target, entry.inner)
            except ArchiveError as error:
                if not entry.checksum:  # an error page, as like as not
                    file.unlink()
                    _sidecar(file).unlink()
                    raise FetchError(f"{error}; the bad file is removed, try again later") from error
                raise FetchError(str(error)) from error
        state = "complete" if fresh else "present"
        return f"{target} is {state} and verified" if verified else f"{target} is {state}, taken on trust"


def table(catalog: dict[str, Entry], root: Path) -> str:
    """The catalogue as text."""
    rows = [("name", "app", "size", "licence", "here", "goes to")]
    for entry in catalog.values():
        file, target = root / entry.file, root / (entry.unpack or entry.file)
        here = "yes" if file.exists() or target.exists() else "part" if _part(file).exists() else "-"
        rows.append((entry.name, entry.app, readable(entry.size), entry.licence, here, str(target)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _find(catalog: dict[str, Entry], name: str) -> Entry:
    key = name.lower().replace("_", "-")
    if key in catalog:
        return catalog[key]
    near = difflib.get_close_matches(key, catalog, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "run without names to list them"
    raise FetchError(f"name={name!r}: no such data set; {hint}")


def _reason(error: FetchError | OSError) -> str:
    if isinstance(error, FetchError):
        return str(error)
    if error.errno == errno.ENOSPC:
        return f"the disk is full ({error.strerror}); make room and run again to go on"
    return f"{error.filename}: {error.strerror}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Download data sets; without names, list them.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets to get")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder to put them in (default: data)")
    parser.add_argument("--catalog", type=Path, default=CATALOG, help="another catalogue of the same form")
    args = parser.parse_args(argv)
    try:
        catalog = load_catalog(args.catalog)
        entries = [_find(catalog, name) for name in dict.fromkeys(args.names)]
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not entries:
        print(table(catalog, args.root))
    status = 0
    for entry in entries:
        try:
            print(f"{entry.name}: {fetch(entry, args.root)}")
            if entry.use:
                target = args.root / (entry.unpack or entry.file)
                print(f"{entry.name}: use it: {entry.use.format(root=args.root, target=target)}")
        except (FetchError, OSError) as error:
            print(f"error: {entry.name}: {one_line(_reason(error))}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt:
            part = _part(args.root / entry.file)
            kept = f"{readable(file_size(part))} kept in {part}; " if file_size(part) else ""
            print(f"\n{entry.name}: interrupted; {kept}run again to go on", file=sys.stderr)
            return 130
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # in order with the errors, also in a log
    sys.exit(main())
