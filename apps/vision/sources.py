"""Where images come from: scikit-learn's digits, CIFAR, a folder or an archive; and reading them."""

from __future__ import annotations

import io
import lzma
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from apps.errors import UserError
from apps.vision.settings import DataConfig

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
Member = tuple[PurePosixPath, "bytes | Path"]
"""Path within the data, and the image itself or where it is."""
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
GREY = ("1", "L", "I;16", "I;16B", "I")
"""Pillow's modes of one channel; the last three hold 16 bits."""


@dataclass
class Table:
    """Images of one split, not yet decoded: names, class names, and how to get each one's bytes or pixels."""

    names: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    items: list[bytes | Path | np.ndarray] = field(default_factory=list)

    def add(self, name: str, label: str, item: bytes | Path | np.ndarray) -> None:
        """Append one image."""
        self.names.append(name)
        self.classes.append(label)
        self.items.append(item)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: list[int]) -> Table:
        """The images with these numbers."""
        return Table(*([column[i] for i in indices] for column in (self.names, self.classes, self.items)))


class Unreadable(Exception):
    """An image that cannot be decoded."""


def open_image(item: bytes | Path | np.ndarray) -> Image.Image:
    """The image, its header read."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow on odd metadata; the pixels are what counts
            return Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise Unreadable(str(error).split(" <")[0]) from error


def decode(item: bytes | Path | np.ndarray, channels: int) -> UInt8[Tensor, "C H W"]:
    """Pixels of one image as uint8 [C, H, W], in grey (1) or RGB (3)."""
    try:
        with open_image(item) as image, warnings.catch_warnings(action="ignore"):
            pixels = np.asarray(_eight_bits(image).convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(str(error).split(" <")[0]) from error
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would cut everything above 255 to white."""
    if image.mode == "F":
        raise Unreadable("floating-point pixels have no known range; save them as 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))


def load_tables(config: DataConfig) -> dict[str, Table]:
    """The splits that the data itself has: "train", perhaps "val" and "test"."""
    if config.dataset == "digits":
        return {"train": _digits()}
    root = Path(config.root or "data")
    if config.dataset != "folder" and not _holds_images(root):
        return _cifar(root, config.dataset)
    if not root.exists():
        raise UserError(f"data.root={root}: no such folder or archive")
    tables = _read(root)
    if not any(len(table) for table in tables.values()):
        raise UserError(
            f"data.root={root}: no images; expected [train/ test/]<class>/<image> with {' '.join(sorted(SUFFIXES))}"
        )
    tables.setdefault("train", Table())
    classes = sorted(set(tables["train"].classes))
    if len(classes) < 2:
        only = f"only the class {classes[0]!r}" if classes else "no training images"
        raise UserError(f"data.root={root}: {only}; a classifier needs images of at least two classes")
    return tables


def _digits() -> Table:
    from sklearn.datasets import load_digits

    digits = load_digits()
    table = Table()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        table.add(f"digits/{i}", str(label), np.round(pixels * (255 / 16)).astype(np.uint8))
    return table


def _cifar(root: Path, dataset: str) -> dict[str, Table]:
    """torchvision's CIFAR, downloaded if need be."""
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    tables = {}
    for split in ("train", "test"):
        try:
            data = cls(str(root), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data.dataset={dataset}: cannot be downloaded ({error}); --data.root may name a folder or archive"
            ) from error
        table = tables[split] = Table()
        for i, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
            table.add(f"{dataset}/{split}/{i}", data.classes[label], pixels)
    return tables


def _holds_images(root: Path) -> bool:
    """Whether the folder or archive has images in class folders (rather than torchvision's own files)."""
    if not root.exists():
        return False
    return (
        _archive(root) is not None
        or any(p.suffix.lower() in SUFFIXES for p in root.glob("*/*"))
        or any(p.suffix.lower() in SUFFIXES for p in root.glob("*/*/*"))
    )


def _archive(root: Path) -> Path | None:
    """The archive that `root` is, or the only one in it where it has no class folders."""
    if root.is_file():
        return root
    found = [p for p in root.iterdir() if p.name.lower().endswith(ARCHIVES) and not _torchvision_file(p)]
    return found[0] if len(found) == 1 and not any(p.is_dir() for p in root.iterdir()) else None


def _torchvision_file(path: Path) -> bool:
    return path.name in ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz")


def _read(root: Path) -> dict[str, Table]:
    archive = _archive(root)
    if archive is None:
        members: Iterator[Member] = ((PurePosixPath(p.relative_to(root)), p) for p in root.rglob("*") if p.is_file())
        label = root
    else:
        members, label = _members(archive), archive
    images = [(path, item) for path, item in members if _is_image(path)]
    images = _without_common_folder(images)
    tables: dict[str, Table] = {}
    for path, item in sorted(images, key=lambda pair: pair[0]):
        parts = path.parts
        split = SPLITS.get(parts[0].lower()) if len(parts) >= 3 else None
        if len(parts) < (3 if split else 2):
            continue  # an image outside any class folder
        tables.setdefault(split or "train", Table()).add(f"{label}/{path}", parts[1 if split else 0], item)
    return tables


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in SUFFIXES and "__MACOSX" not in path.parts and not path.name.startswith("._")


def _members(archive: Path) -> Iterator[Member]:
    """Images of an archive, read into memory in one pass; nothing is written to disk."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                for info in file.infolist():
                    if not info.is_dir() and _is_image(PurePosixPath(info.filename)):
                        yield PurePosixPath(info.filename), file.read(info)
            return
        with tarfile.open(archive) as file:
            for member in file:
                if member.isfile() and _is_image(PurePosixPath(member.name)):
                    yield PurePosixPath(member.name), file.extractfile(member).read()
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise UserError(f"data.root={archive}: not a readable archive ({error})") from error


def _without_common_folder(images: list[Member]) -> list[Member]:
    """Paths relative to the folder that holds the splits or classes, however deep an archive nests it."""
    while images:
        first = {path.parts[0] for path, _ in images}
        depths = {len(path.parts) for path, _ in images}
        name = next(iter(first))
        if len(first) > 1 or min(depths) < 3 or name.lower() in SPLITS:
            return images
        images = [(PurePosixPath(*path.parts[1:]), item) for path, item in images]
    return images
