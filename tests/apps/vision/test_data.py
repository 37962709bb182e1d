"""From tables of images to batches: what is read from the data, splits, bad files, and batches that repeat."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from apps.errors import UserError
from apps.vision.data import VisionData
from apps.vision.models.vimoe import ImageSpec
from apps.vision.settings import DataConfig

CLASSES = ("cat", "dog")


def load(root: Path, spec: ImageSpec | None = None, **options: object) -> VisionData:
    return VisionData(DataConfig(**{"dataset": "folder", "root": str(root), "num_workers": 0} | options), spec=spec)


@pytest.fixture
def folder(tmp_path, draw):
    """Makes a folder of images: keyword arguments as for `draw`, and which splits."""

    def make(name: str = "images", count: int = 8, splits: tuple[str, ...] = ("",), **options: object) -> Path:
        for split in splits:
            for number, label in enumerate(CLASSES):
                draw(tmp_path / name / split / label, count, number, **options)
        return tmp_path / name

    return make


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def everything(loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize(
    ("options", "channels", "size", "whole"),
    [
        ({"mode": "L"}, 1, 12, True),
        ({"mode": "1"}, 1, 12, True),
        ({"mode": "RGB"}, 3, 12, True),
        ({"mode": "P"}, 3, 12, True),
        ({"mode": "RGBA"}, 3, 12, True),
        ({"size": (64, 64)}, 3, 64, True),
        ({"size": (65, 65)}, 3, 224, False),
        ({"size": (20, 12)}, 3, 224, False),
        ({"sizes": [(12, 12), (16, 16)]}, 3, 224, False),
    ],
)
def test_channels_size_and_classes_are_read_from_the_images(folder, options, channels, size, whole):
    spec = load(folder(**options)).spec
    assert (spec.channels, spec.image_size, spec.whole, spec.classes) == (channels, size, whole, CLASSES)
    assert len(spec.mean) == len(spec.std) == channels
    assert all(0 < value < 1 for value in spec.mean + spec.std)


def test_one_colour_image_among_grey_ones_makes_all_rgb(folder, draw):
    root = folder(mode="L")
    draw(root / "dog", 1, mode="RGB")
    assert load(root).spec.channels == 3


def test_a_size_asked_for_resizes(folder):
    data = load(folder(sizes=[(40, 30), (30, 40)]), image_size=16)
    images, _ = everything(data.test_dataloader())
    assert images.shape[1:] == (3, 16, 16)
    assert not data.spec.whole


def test_mean_and_deviation_are_those_of_the_training_pixels(folder):
    root = folder(splits=("train", "val", "test"))
    data = load(root)
    pixels = data.images("train").plain(list(range(16)))[0]
    assert data.spec.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert data.spec.std == pytest.approx(pixels.std((0, 2, 3)).tolist())
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_numbers_as_class_names_are_in_order_of_value(tmp_path, draw):
    for name in ("10", "9", "b", "²", "a"):
        draw(tmp_path / name, 3)
    assert load(tmp_path).spec.classes == ("9", "10", "a", "b", "²")


def test_missing_splits_are_cut_from_training_in_proportion(folder):
    data = load(folder(count=20), val_fraction=0.1, test_fraction=0.2)
    splits = {name: data.images(name) for name in ("train", "val", "test")}
    assert {name: torch.bincount(images.labels).tolist() for name, images in splits.items()} == {
        "train": [14, 14],
        "val": [2, 2],
        "test": [4, 4],
    }
    names = [name for images in splits.values() for name in images.table.names]
    assert len(names) == len(set(names)) == 40
    again = VisionData(data.config, seed=99)  # another seed of training changes nothing
    assert again.images("test").table.names == splits["test"].table.names


def test_splits_of_the_data_are_kept(folder):
    data = load(folder(splits=("train", "val", "test")))
    assert all(f"/{name}/" in path for name in ("train", "val", "test") for path in data.images(name).table.names)
    halved = load(folder("two", splits=("train", "test")))
    assert len(halved.images("test")) == 16
    assert len(halved.images("val")) == 2


@pytest.mark.parametrize(("splits", "fewest"), [(("",), 3), (("train", "test"), 2), (("train", "val", "test"), 1)])
def test_so_few_images_of_a_class_are_enough_and_fewer_are_one_line(folder, splits, fewest):
    data = load(folder("enough", fewest, splits), test_fraction=0.8)
    assert (
        all(torch.bincount(data.images(split).labels).tolist() == [1, 1] for split in ("train", "val")) or fewest == 1
    )
    if fewest > 1:
        with pytest.raises(UserError, match=rf"^class 'cat': {fewest - 1} training image\(s\); at least {fewest} are"):
            load(folder("few", fewest - 1, splits))


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_training_lacks_is_named_before_anything_is_trained(folder, draw, split):
    root = folder(splits=("train", "val", "test"))
    draw(root / split / "zebra", 1)
    with pytest.raises(UserError, match=rf"^class 'zebra' \(.*/{split}/zebra/0\.png\): not among the classes"):
        load(root)


def test_other_data_must_have_classes_of_the_model(folder, tmp_path, draw):
    spec = load(folder()).spec
    assert load(folder("fewer"), spec).spec is spec
    draw(tmp_path / "other" / "cat", 4)
    draw(tmp_path / "other" / "zebra", 4)
    with pytest.raises(UserError, match=r"^class 'zebra'"):
        load(tmp_path / "other", spec)


@pytest.mark.parametrize("size", [(12, 12), (80, 60)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_unreadable_image_is_named(folder, size, split):
    root = folder(splits=("train", "val", "test"), size=size)
    bad = cut(root / split / "dog" / "3.png")

    def read() -> None:
        images = load(root, image_size=None if size == (12, 12) else 16).images(split)
        for i in range(len(images)):
            images.plain([i])

    with pytest.raises(UserError, match=rf"^{bad}: unreadable image \(.*\); mend it, or --data\.on_error skip$"):
        read()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # pytest has threads
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [(12, 12), (80, 60)])
def test_skipped_images_are_counted_once_and_leave_the_others_in_place(folder, size, workers):
    root = folder(splits=("train", "val", "test"), size=size)
    for name in ("2.png", "5.png"):
        cut(root / "test" / "cat" / name)
    data = load(root, on_error="skip", num_workers=workers, image_size=None if size == (12, 12) else 16)
    for _ in range(2):
        images, labels = everything(data.test_dataloader())
        assert labels.tolist() == [0] * 6 + [1] * 8
    assert data.skipped == 2
    readable = data.images("test").readable()
    assert len(readable) == 14
    assert torch.equal(readable.plain(list(range(14)))[0], images)
    assert [Path(name).name for name in readable.table.names[:4]] == ["0.png", "1.png", "3.png", "4.png"]


def test_a_batch_without_a_readable_image_ends_it(folder):
    root = folder(splits=("train", "val", "test"), size=(80, 60))
    for file in (root / "test").glob("*/*"):
        cut(file)
    data = load(root, on_error="skip", image_size=16)
    with pytest.raises(UserError, match=r"cat/0\.png: no image of a whole batch can be read; "):
        everything(data.test_dataloader())


def test_nothing_is_held_if_not_wanted(folder):
    root = folder()
    held, read = load(root), load(root, cache="none")
    assert held.images("test").pixels is not None
    assert read.images("test").pixels is None
    for a, b in zip(everything(held.test_dataloader()), everything(read.test_dataloader()), strict=True):
        assert torch.equal(a, b)


def batch(data: VisionData, epoch: int, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return data.images("train").__getitems__([(epoch, i) for i in indices])


AUGMENTED = {"rand_augment": 2, "random_erasing": 0.5, "crop_padding": 2, "flip": True}


@pytest.mark.parametrize("options", [{"size": (12, 12)}, {"sizes": [(40, 30), (30, 50)]}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_augmentation_depends_on_seed_epoch_and_batch_alone(folder, options, mode):
    data = load(folder(mode=mode, **options), **AUGMENTED, image_size=12)
    images, labels = batch(data, 0, [0, 5, 7])
    assert images.shape == (3, data.spec.channels, 12, 12)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert labels.tolist() == data.images("train").labels[[0, 5, 7]].tolist()
    torch.rand(17)  # what else draws numbers does not matter
    assert torch.equal(batch(data, 0, [0, 5, 7])[0], images)
    assert not torch.equal(batch(data, 1, [0, 5, 7])[0], images)
    data.images("train").seed = 1
    assert not torch.equal(batch(data, 0, [0, 5, 7])[0], images)


def test_without_augmentation_training_sees_the_images_as_they_are(folder):
    data = load(folder(), crop_padding=0, flip=False)
    assert torch.equal(batch(data, 3, [0, 1])[0], data.images("train").plain([0, 1])[0])


def test_validation_and_test_images_are_never_augmented(folder):
    data = load(folder(), **AUGMENTED)
    for split in ("val", "test"):
        images = data.images(split)
        assert torch.equal(images.__getitems__([(0, 0)])[0], images.__getitems__([(1, 0)])[0])


@pytest.mark.parametrize("whole", [True, False])
def test_other_images_come_to_the_size_of_the_model(folder, whole):
    """A model from whole images gets whole images, squeezed; one from crops gets the centre."""
    spec = ImageSpec(3, 14, CLASSES, (0.5,) * 3, (0.5,) * 3, whole)
    root = folder(size=(48, 32))
    images = load(root, spec).images("test")
    pixels = images.plain([0])[0][0]  # [C, H, W]
    assert pixels.shape == (3, 14, 14)
    original = images.__class__(images.table, ImageSpec(3, 48, CLASSES, (0,) * 3, (1,) * 3, True), images.config)
    wide = original.plain([0])[0][0]
    assert pixels.mean() == pytest.approx(wide.mean().item(), abs=0.02)
    assert (images.pixels is not None) == whole


def test_a_copied_data_set_is_the_same_data_set(folder, tmp_path):
    """Order and splits come from names, not from what the file system lists first."""
    root = folder(count=15)
    moved = tmp_path / "elsewhere"
    for file in sorted(root.glob("*/*"), reverse=True):
        (moved / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, moved / file.parent.name)
    first, second = load(root), load(moved)
    for split in ("train", "val", "test"):
        assert torch.equal(first.images(split).plain([0, 1])[0], second.images(split).plain([0, 1])[0])
        assert [Path(a).name for a in first.images(split).table.names] == [
            Path(b).name for b in second.images(split).table.names
        ]
