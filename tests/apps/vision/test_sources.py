"""Images from folders and archives, in every mode that image files have."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apps.errors import UserError
from apps.vision.settings import DataConfig
from apps.vision.sources import Table, Unreadable, decode, load_tables, open_image

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tables(root: Path) -> dict[str, Table]:
    return load_tables(DataConfig(dataset="folder", root=str(root)))


def counts(root: Path) -> dict[str, dict[str, int]]:
    """Split -> class -> number of images."""
    return {
        split: {name: table.classes.count(name) for name in sorted(set(table.classes))}
        for split, table in tables(root).items()
    }


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(mode, channels):
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    pixels = decode(encoded(Image.fromarray(RAMP).convert(mode), kind), channels)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (channels, 8, 8)
    assert pixels.is_contiguous()
    if mode in ("L", "RGB", "RGBA", "LA"):
        assert torch.equal(pixels, torch.from_numpy(RAMP).expand(channels, 8, 8))


@pytest.mark.parametrize(
    "make", [lambda a: (a, "PNG"), lambda a: (a.astype(">u2"), "TIFF"), lambda a: (a.astype(np.int32), "TIFF")]
)
def test_sixteen_bits_are_scaled_to_eight(make):
    values = (np.arange(64) * 1040).astype(np.uint16).reshape(8, 8)
    array, kind = make(values)
    content = encoded(Image.fromarray(array), kind)
    with open_image(content) as image:
        assert image.mode.startswith("I")
    assert torch.equal(decode(content, 1)[0], torch.from_numpy((values >> 8).astype(np.uint8)))
    assert decode(content, 3).shape == (3, 8, 8)


def test_floating_point_pixels_are_refused_rather_than_guessed():
    with pytest.raises(Unreadable, match="no known range; save them as 8 or 16 bits"):
        decode(encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"), 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_cut_file_is_unreadable_or_whole_and_nothing_else(kind, data):
    content = CONTENTS[kind]
    cut = data.draw(st.integers(0, len(content) - 1))
    try:
        assert decode(content[:cut], 3).shape == (3, 24, 24)
        assert cut > 0.9 * len(content)  # all that is missing is the file's end mark
    except Unreadable as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert "<" not in str(error)  # noqa: PT017


NOISE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
CONTENTS = {
    kind: encoded(Image.fromarray(NOISE), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
}


def test_pixels_in_memory_and_files_are_read_alike(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    expected = torch.from_numpy(RAMP)[None]
    for item in (RAMP, tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        assert torch.equal(decode(item, 1), expected)


def test_a_plain_folder_is_all_training(tmp_path, draw):
    for number, name in enumerate(["cat", "dog"]):
        draw(tmp_path / name, 3 + number, number)
    assert counts(tmp_path) == {"train": {"cat": 3, "dog": 4}}
    train = tables(tmp_path)["train"]
    assert train.names[0] == f"{tmp_path}/cat/0.png"
    assert train.names == sorted(train.names)


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("training", "validation", "test"), ("Train", "Valid", "TEST")]
)
def test_splits_go_by_many_names(tmp_path, draw, names):
    for count, split in enumerate(names, 1):
        draw(tmp_path / split / "cat", count)
        draw(tmp_path / split / "dog", 1)
    assert counts(tmp_path) == {
        "train": {"cat": 1, "dog": 1},
        "val": {"cat": 2, "dog": 1},
        "test": {"cat": 3, "dog": 1},
    }


def test_classes_may_have_folders_of_their_own_and_names_like_splits(tmp_path, draw):
    draw(tmp_path / "train" / "cat" / "persian", 2)
    draw(tmp_path / "train" / "cat" / "siamese", 1)
    draw(tmp_path / "train" / "dog", 1)
    assert counts(tmp_path) == {"train": {"cat": 3, "dog": 1}}
    draw(tmp_path / "flat" / "train", 2)  # no classes below: these are classes
    draw(tmp_path / "flat" / "test", 1)
    assert counts(tmp_path / "flat") == {"train": {"test": 1, "train": 2}}


def test_other_files_are_left_alone(tmp_path, draw):
    for name in ("cat", "dog"):
        draw(tmp_path / name, 2)
        (tmp_path / name / "notes.txt").write_text("x")
        (tmp_path / name / "._0.png").write_text("a resource fork")
    draw(tmp_path / "__MACOSX" / "cat", 1)
    draw(tmp_path, 1)  # an image outside any class
    assert counts(tmp_path) == {"train": {"cat": 2, "dog": 2}}


def pack(root: Path, archive: Path, prefix: str = "") -> Path:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(root.rglob("*")):
                file.write(path, f"{prefix}{path.relative_to(root)}")
    else:
        with tarfile.open(archive, f"w:{archive.suffix[1:].replace('tgz', 'gz').replace('tar', '')}") as file:
            file.add(root, prefix or ".")
    return archive


@pytest.fixture
def images(tmp_path, draw) -> Path:
    """cat and dog, split."""
    root = tmp_path / "images"
    for number, name in enumerate(["cat", "dog"]):
        draw(root / "train" / name, 4, number)
        draw(root / "test" / name, 2, number)
    return root


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("prefix", ["", "deep/er/"])
def test_an_archive_is_its_folder(tmp_path, images, ending, prefix):
    archive = pack(images, tmp_path / f"x.{ending}", prefix)
    assert counts(archive) == {"train": {"cat": 4, "dog": 4}, "test": {"cat": 2, "dog": 2}}
    folder, packed = tables(images)["train"], tables(archive)["train"]
    assert all(torch.equal(decode(a, 3), decode(b, 3)) for a, b in zip(folder.items, packed.items, strict=True))
    assert packed.names[0].startswith(str(archive))
    holder = tmp_path / "holder"
    holder.mkdir()
    shutil.move(archive, holder)  # a folder that holds the archive alone stands for it
    assert counts(holder) == counts(images)


def test_archives_write_nothing_wherever_their_members_point(tmp_path, images):
    archive = tmp_path / "inside" / "x.tar"
    archive.parent.mkdir()
    content = (images / "train" / "cat" / "0.png").read_bytes()
    with tarfile.open(archive, "w") as file:
        for path in ("../../cat/0.png", "../../dog/0.png"):
            member = tarfile.TarInfo(path)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    tables(archive)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("ending", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_damaged_archive_is_one_line(tmp_path, images, ending):
    content = pack(images, tmp_path / f"x.{ending}").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for attempt in range(12):
        damaged = bytearray(content)
        if attempt % 2:
            damaged = damaged[: int(random.integers(1, len(damaged)))]
        else:
            damaged[int(random.integers(10, len(damaged) // 2))] ^= 0x5A
        (tmp_path / f"x.{ending}").write_bytes(damaged)
        try:
            tables(tmp_path / f"x.{ending}")
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"data.root={tmp_path}/x.{ending}: ")  # noqa: PT017
    assert refused >= 6


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda root, draw: None, r"data\.root=.*: no such folder or archive"),
        (
            lambda root, draw: root.mkdir(),
            r"data\.root=.*: no images; expected \[train/ test/\]<class>/<image> with .*",
        ),
        (lambda root, draw: draw(root, 3), r"data\.root=.*: no images; .*"),
        (lambda root, draw: draw(root / "cat", 3), r"data\.root=.*: only the class 'cat'; .* at least two classes"),
        (lambda root, draw: draw(root / "train" / "cat", 3), r"data\.root=.*: only the class 'cat'; .*"),
        (lambda root, draw: [draw(root / "test" / c, 3) for c in "ab"], r"data\.root=.*: no training images; .*"),
        (lambda root, draw: root.write_text("no archive"), r"data\.root=.*: not a readable archive \(.*"),
    ],
)
def test_data_that_is_none_is_one_line(tmp_path, draw, make, line):
    make(tmp_path / "data", draw)
    with pytest.raises(UserError, match=f"(?s)^{line}$"):
        tables(tmp_path / "data")


def test_digits_come_with_scikit_learn():
    table = load_tables(DataConfig())["train"]
    assert len(table) == 1797
    assert set(table.classes) == set("0123456789")
    pixels = decode(table.items[0], 1)
    assert pixels.shape == (1, 8, 8)
    assert pixels.max() == 239  # 15 of 16 levels
