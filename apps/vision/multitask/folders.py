"""Folders of images with a folder of labels per task, in the layouts of `apps.vision.multitask.layouts`."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from apps.errors import UserError
from apps.vision.multitask.layouts import Labels, Layout, layout_of
from apps.vision.multitask.tasks import SceneSpec, TaskSpec
from apps.vision.settings import DataConfig
from apps.vision.sources import Unreadable, decode, open_image

IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")
LABEL_SUFFIXES = (".png", ".npy", ".mat", ".jpg")
"""The last is for normals alone: what else would survive JPEG?"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels, as all published results use them."""
SPLIT_SEED = 17
"""Of what is taken from the training images for validation: the same for all runs."""


@dataclass(frozen=True)
class Item:
    """One image: its name within the data set, its file, and the files of labels that there are."""

    name: str
    image: Path
    labels: Mapping[str, Path]
    context: Path | None = None
    """Map of classes that says where some labels hold."""


def folder_spec(config: DataConfig) -> SceneSpec:
    """All tasks of the data set that its folder has labels for, at the size asked for or published.

    Raises:
        UserError: there is no such folder, or none with labels in it.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder")
    layout = layout_of(config.dataset, root)
    tasks = tuple(task for task in layout.tasks if _folders(root, layout.labels[task.name]))
    if not tasks:
        wanted = ", ".join(f"{_top(layout.labels[task.name])}/" for task in layout.tasks)
        raise UserError(f"data.root={root}: no folder of labels; {config.dataset} has {wanted}")
    height, width = config.image_size or layout.height, config.image_width or layout.width
    return SceneSpec(height, width, tasks, MEAN, STD)


def require_folders(config: DataConfig, names: Sequence[str]) -> None:
    """Refuse tasks of which the folder has no labels.

    Raises:
        UserError: it lacks one.
    """
    root = Path(config.root)
    layout = layout_of(config.dataset, root)
    for name in names:
        if not _folders(root, layout.labels[name]):
            folder = f"no folder {_top(layout.labels[name])}/ with labels of task {name}"
            raise UserError(f"data.root={root}: {folder}; add it, or name other tasks in tasks.names")


def _top(labels: Labels) -> str:
    """The folder right under the root in which a task's labels are."""
    return labels.files[0].split("/")[0]


def _folders(root: Path, labels: Labels) -> bool:
    return (root / _top(labels)).is_dir()


def find_items(config: DataConfig, split: str) -> list[Item]:
    """The images of a split, in the order of their list or, where there is none, of their names.

    What the data calls val is tested on; a share of its training images, always the same, is for validation.

    Args:
        config: dataset, root, val_fraction.
        split: train, val or test.

    Raises:
        UserError: a list or an image is missing, or an image has no label of any task.
    """
    root = Path(config.root)
    layout = layout_of(config.dataset, root)
    names = _listed(root, layout, "val" if split == "test" else "train", config.test_fraction)
    if split != "test":
        if len(names) < 2:
            raise UserError(f"data.root={root}: {len(names)} training image(s); one more is needed for validation")
        held, rest = _cut(names, config.val_fraction)
        names = held if split == "val" else rest
    return [_find(root, layout, name) for name in names]


def _cut(names: list[str], share: float) -> tuple[list[str], list[str]]:
    """(a share of the names, always the same, at least one; the rest, at least one), in order."""
    count = max(1, min(round(share * len(names)), len(names) - 1))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return tuple([names[i] for i in part.sort().values.tolist()] for part in (order[:count], order[count:]))


def _listed(root: Path, layout: Layout, split: str, test_fraction: float) -> list[str]:
    """Names of the images that the data set counts to a split."""
    if layout.own and not (root / layout.lists.format(split="train")).is_file():
        files = sorted(path for path in (root / "images").rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) < 3:
            raise UserError(f"data.root={root}: {len(files)} image(s) in images/; three are needed to train and test")
        names = [file.relative_to(root / "images").with_suffix("").as_posix() for file in files]
        held, rest = _cut(names, test_fraction)
        return held if split == "val" else rest
    if layout.lists is None:
        before, after = layout.image.split("{}")
        files = sorted((root / before / split).rglob(f"*{after}.*"))
        names = [file.relative_to(root / before).as_posix().removesuffix(f"{after}{file.suffix}") for file in files]
        where = f"{before}{split}/, which are to be called <city>/<name>{after}.png"
    else:
        where = layout.lists.format(split=split)
        if not (root / where).is_file():
            raise UserError(f"data.root={root}: no file {where}, which names the images of a split, one a line")
        lines = (root / where).read_text(encoding="utf-8-sig").split()
        names = [line.removesuffix(Path(line).suffix) if line.endswith(IMAGE_SUFFIXES) else line for line in lines]
    if not names:
        raise UserError(f"data.root={root}: no images in {where}")
    return names


def _find(root: Path, layout: Layout, name: str) -> Item:
    image = _existing(root, (layout.image,), name, IMAGE_SUFFIXES)
    if image is None:
        raise UserError(f"{root / layout.image.format(name)}.jpg: no such image; add it, or take it off its list")
    found = {task: _existing(root, labels.files, name, LABEL_SUFFIXES) for task, labels in layout.labels.items()}
    labels = {task: file for task, file in found.items() if file is not None}
    if not labels:
        raise UserError(f"{image}: no label of any task; add one, or take the image off its list")
    maps = [task.only[0] for task in layout.labels.values() if task.only is not None]
    return Item(name, image, labels, _existing(root, maps, name, LABEL_SUFFIXES))


def _existing(root: Path, files: Sequence[str], name: str, suffixes: Sequence[str]) -> Path | None:
    paths = (root / f"{file.format(name)}{suffix}" for file in files for suffix in suffixes)
    return next((path for path in paths if path.is_file()), None)


class FolderImages:
    """One split, read from its files as batches ask for it.

    Args:
        items: the images; those without a label of the spec's tasks are left out.
        spec: tasks and size.
        config: dataset, and what to do about unreadable files.
    """

    def __init__(self, items: Sequence[Item], spec: SceneSpec, config: DataConfig) -> None:
        items = [item for item in items if any(name in item.labels for name in spec.names)]
        self.items, self.spec, self.config = items, spec, config
        self.layout = layout_of(config.dataset, Path(config.root))
        self.names = [str(item.image) for item in items]
        known = [[name in item.labels for name in spec.names] for item in items]
        self.known: Bool[Tensor, "N T"] = torch.tensor(known, dtype=torch.bool).reshape(len(items), len(spec.names))
        """Whether there is a label file."""
        self.unreadable = torch.zeros(len(items), dtype=torch.bool).share_memory_()
        """Images found to be so until now; loader processes note theirs here."""

    def read(self, indices: Sequence[int]) -> tuple[UInt8[Tensor, "B 3 H W"], dict[str, Tensor]]:
        """Images and labels, brought to the spec's size; without those that are skipped."""
        read = [pair for pair in map(self._read, indices) if pair is not None]
        if not read:
            remedy = "take those out that cannot, or raise data.batch_size"
            raise UserError(f"{self.names[indices[0]]}: nothing of a whole batch can be read; {remedy}")
        labels = {name: torch.stack([label[name] for _, label in read]) for name in self.spec.names}
        return torch.stack([image for image, _ in read]), labels

    def _read(self, index: int) -> tuple[UInt8[Tensor, "3 H W"], dict[str, Tensor]] | None:
        try:
            return read_item(self.items[index], self.layout, self.spec)
        except Unreadable as error:
            if self.config.on_error == "raise":
                raise UserError(f"{error}; mend it, or --data.on_error skip") from error
            self.unreadable[index] = True
            return None


def read_item(item: Item, layout: Layout, spec: SceneSpec) -> tuple[UInt8[Tensor, "3 H W"], dict[str, Tensor]]:
    """One image with its labels at the spec's size.

    A change of size changes the focal length alike: depth and normals keep their values.

    Raises:
        Unreadable: a file is damaged.
        UserError: a label does not fit its image or its task.
    """
    try:
        pixels = decode(item.image, 3)
    except Unreadable as error:
        raise Unreadable(f"{item.image}: unreadable image ({error})") from error
    place = Placement.of(tuple(pixels.shape[1:]), spec, layout.pad)
    labels = {}
    for task in spec.tasks:
        array = _read_label(item, layout, task, tuple(pixels.shape[1:]))
        labels[task.name] = _unknown(task, spec) if array is None else place.label(array, task)
    return place.image(pixels, spec.mean), labels


def _read_label(item: Item, layout: Layout, task: TaskSpec, size: tuple[int, int]) -> ndarray | None:
    """The label at the size of its file; None: all unknown."""
    file, labels = item.labels.get(task.name), layout.labels[task.name]
    if file is None:
        return None
    try:
        array = labels.read(_load(file, labels.key))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise Unreadable(f"{file}: not a label of {task.name} ({error})") from error
    if array is None:
        return None
    if array.ndim != (3 if task.name == "normals" else 2):
        shape, wanted = " x ".join(map(str, array.shape)), "three numbers" if task.name == "normals" else "one number"
        raise UserError(f"{file}: is {shape}; a label of {task.name} has {wanted} for each pixel")
    _require_size(file, array, item, size)
    if task.classes and array.max() >= len(task.classes):
        raise UserError(
            f"{file}: class {array.max()} of {task.name}, counted from 0, where there are {len(task.classes)}; mend it"
        )
    if labels.only is not None and item.context is not None:
        classes = _load(item.context, None)
        _require_size(item.context, classes, item, size)
        array = np.where(np.isin(classes, labels.only[1])[..., None], array, np.float32(0))
    return array


def _require_size(file: Path, array: ndarray, item: Item, size: tuple[int, int]) -> None:
    if array.shape[:2] != size:
        (height, width), (h, w) = array.shape[:2], size
        raise UserError(f"{file}: {height} x {width} pixels, its image {item.image} {h} x {w}; they must be equal")


def _unknown(task: TaskSpec, spec: SceneSpec) -> Tensor:
    """A label that says nothing."""
    shape = (3, spec.height, spec.width) if task.name == "normals" else (spec.height, spec.width)
    return torch.full(shape, task.kind.unknown, dtype=torch.int64 if task.classes else torch.float32)


def _load(file: Path, key: str | None) -> Any:
    """What a label file holds: an array, or for structures of MATLAB a dictionary."""
    if file.suffix == ".npy":
        try:
            return np.load(file, allow_pickle=False).squeeze()
        except (OSError, EOFError, ValueError) as error:
            raise Unreadable(f"{file}: unreadable label (damaged, or holds objects instead of numbers)") from error
    if file.suffix == ".mat":
        return _load_mat(file, key)
    try:
        with open_image(file) as image:
            plain = image.mode in ("1", "L", "P", "I", "I;16", "I;16B")
            return np.asarray(image if plain else image.convert("RGB"))
    except (Unreadable, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(f"{file}: unreadable label ({error})") from error


def _load_mat(file: Path, key: str | None) -> Any:
    """The variable of a MATLAB file with a name, or the only one."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(file, simplify_cells=True)
    except NotImplementedError as error:
        raise Unreadable(f"{file}: version 7.3 of MATLAB's format; save it as version 7 or as .npy") from error
    except (MatReadError, OSError, ValueError, TypeError, IndexError, zlib.error) as error:
        raise Unreadable(f"{file}: unreadable label ({error})") from error
    names = [name for name in content if not name.startswith("__")]
    name = key if key in names else names[0] if len(names) == 1 else None
    if name is None:
        raise Unreadable(f"{file}: variables {', '.join(names) or 'none'}; one named {key} is needed")
    return content[name]


@dataclass(frozen=True)
class Placement:
    """Where an image comes to lie within the size that the model sees: all of it, or padded around its middle."""

    height: int
    """Of the image within."""
    width: int
    top: int
    left: int
    full: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], spec: SceneSpec, pad: bool) -> Placement:
        """Of an image of (height, width)."""
        full = spec.height, spec.width
        if not pad:
            return cls(*full, 0, 0, full)
        scale = min(1.0, full[0] / size[0], full[1] / size[1])
        height, width = (max(1, round(scale * side)) for side in size)
        return cls(height, width, (full[0] - height) // 2, (full[1] - width) // 2, full)

    def image(self, pixels: UInt8[Tensor, "3 h w"], fill: Sequence[float]) -> UInt8[Tensor, "3 H W"]:
        """The image in its place; a colour, in [0, 1], around it."""
        colour = torch.tensor(fill).mul(255).round().to(torch.uint8)
        out = colour[:, None, None].repeat(1, *self.full)
        out[:, self._rows, self._columns] = v2.functional.resize(pixels, [self.height, self.width], antialias=True)
        return out

    def label(self, array: Shaped[ndarray, "h w *C"], task: TaskSpec) -> Tensor:
        """The label in its place, unknown around it.

        The nearest pixel's value; where edges become smaller, what covers any edge stays one, or lines would vanish.
        """
        if task.name == "edges" and array.shape[0] >= self.height and array.shape[1] >= self.width:
            given = torch.from_numpy(array)[None]
            values = torch.nn.functional.adaptive_max_pool2d(given, (self.height, self.width))[0]
        else:
            rows, columns = (
                (2 * np.arange(new) + 1) * old // (2 * new)
                for new, old in zip((self.height, self.width), array.shape, strict=False)
            )
            values = torch.from_numpy(array[rows[:, None], columns])
            values = values.permute(2, 0, 1) if values.ndim == 3 else values
        out = torch.full((*values.shape[:-2], *self.full), task.kind.unknown, dtype=values.dtype)
        out[..., self._rows, self._columns] = values
        return out

    @property
    def _rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def _columns(self) -> slice:
        return slice(self.left, self.left + self.width)
