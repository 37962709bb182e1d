"""Batches of images for training, validation and testing."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from apps.errors import UserError
from apps.loading import derive_seed
from apps.progress import track
from apps.vision import augment
from apps.vision.loaders import BatchLoaders
from apps.vision.models.vimoe import ImageSpec
from apps.vision.settings import DataConfig
from apps.vision.sources import GREY, Table, Unreadable, decode, load_tables, open_image

Batch = tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]
MEMORY = 2 * 2**30
"""Bytes of decoded images that are held in memory."""


class Images(Dataset):
    """One split. Hands out whole batches: float images in [0, 1] of one size, and labels.

    Args:
        table: the images.
        spec: channels, size and classes to give.
        config: what to do about unreadable images.
        train: augment.
        seed: of the augmentation.
    """

    def __init__(self, table: Table, spec: ImageSpec, config: DataConfig, train: bool = False, seed: int = 0) -> None:
        self.config, self.spec, self.train, self.seed = config, spec, train, seed
        number = {name: i for i, name in enumerate(spec.classes)}
        self.table = table
        self.labels = torch.tensor([number[name] for name in table.classes], dtype=torch.long)
        self.unreadable = torch.zeros(len(table), dtype=torch.bool)
        """Images found to be so until now."""
        self.each = augment.per_image(config, spec.image_size, resize=not spec.whole) if train else None
        self.to_size = augment.for_evaluation(spec)
        self.pixels: UInt8[Tensor, "N C H W"] | None = None
        needed = len(table) * spec.channels * spec.image_size**2
        if spec.whole and config.cache == "auto" and needed <= MEMORY:
            self._hold()
        else:
            self.unreadable.share_memory_()  # loader processes note theirs here

    def _hold(self) -> None:
        """Decode everything once; unreadable images leave the set or end the run."""
        size = self.spec.image_size
        pixels = torch.empty(len(self.table), self.spec.channels, size, size, dtype=torch.uint8)
        kept = []
        for i in track(range(len(self.table)), "reading images", show=len(self.table) >= 5000):
            image = self._read(i)
            if image is not None:
                pixels[len(kept)] = image
                kept.append(i)
        if len(kept) < len(self.table):
            self.table, self.labels = self.table.take(kept), self.labels[kept]
        self.pixels = pixels[: len(kept)]

    def _read(self, index: int) -> UInt8[Tensor, "C H W"] | None:
        """One decoded image, of the spec's size if used whole; None for one that is skipped."""
        try:
            image = decode(self.table.items[index], self.spec.channels)
        except Unreadable as error:
            if self.config.on_error == "raise":
                raise UserError(
                    f"{self.table.names[index]}: unreadable image ({error}); mend it, or --data.on_error skip"
                ) from error
            self.unreadable[index] = True
            return None
        return self.to_size(image) if self.spec.whole else image

    def readable(self) -> Images:
        """Those not found unreadable until now: what an evaluation that skipped the others has numbered."""
        if self.pixels is not None or not self.unreadable.any():
            return self
        kept = torch.nonzero(~self.unreadable).flatten()
        images = copy.copy(self)
        images.table, images.labels = self.table.take(kept.tolist()), self.labels[kept]
        images.unreadable = torch.zeros(len(kept), dtype=torch.bool)
        return images

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        """A batch from its (epoch, index) pairs."""
        indices = [index for _, index in keys]
        if not self.train:
            return self.plain(indices)
        seed = derive_seed(self.seed, *keys[0])
        torch.manual_seed(seed)  # what torchvision's transforms draw from; the training step seeds itself anew
        images, labels = self._fetch(indices, self.each)
        if self.spec.whole:
            padding = self.config.crop_padding
            padding = round(self.spec.image_size / 8) if padding is None else padding
            flip = self.config.dataset != "digits" if self.config.flip is None else self.config.flip
            images = augment.shift_and_flip(images, padding, flip, torch.Generator().manual_seed(seed))
            images = images if self.each is None else torch.stack([self.each(image) for image in images])
        return images.float().div_(255), labels

    def plain(self, indices: list[int]) -> Batch:
        """These images as they are evaluated, without augmentation."""
        images, labels = self._fetch(indices, self.to_size)
        return images.float().div_(255), labels

    def _fetch(
        self, indices: list[int], resize: v2.Transform | None
    ) -> tuple[UInt8[Tensor, "B C H W"], Int[Tensor, " B"]]:
        if self.pixels is not None:
            return self.pixels[indices], self.labels[indices]
        read = [(self._read(i), i) for i in indices]
        read = [(image, i) for image, i in read if image is not None]
        if not read:
            remedy = "take those out that cannot, or raise data.batch_size"
            raise UserError(f"{self.table.names[indices[0]]}: no image of a whole batch can be read; {remedy}")
        images = [image for image, _ in read]
        if not self.spec.whole:
            images = [resize(image) for image in images]
        return torch.stack(images), self.labels[[i for _, i in read]]


class VisionData(BatchLoaders):
    """Splits, loaders and the `ImageSpec` of a data set.

    Args:
        config: what to load.
        seed: of shuffling and augmentation.
        spec: of a trained model, whose channels, size and classes the data must then fit.
    """

    least_evaluated = 128

    def __init__(self, config: DataConfig, seed: int = 0, spec: ImageSpec | None = None) -> None:
        super().__init__(config, seed)
        self._tables = _split(load_tables(config), config)
        self._sets: dict[str, Images] = {}
        if spec is not None:
            self.spec = spec
            _refuse_unknown_classes(self._tables, spec)
            return
        self.spec = _probe(self._tables["train"], config)
        _refuse_unknown_classes(self._tables, self.spec)
        self.spec = _with_statistics(self.spec, self.images("train"))
        for images in self._sets.values():
            images.spec = self.spec

    def images(self, split: str) -> Images:
        """The data set of a split."""
        if split not in self._sets:
            table = self._tables[split]
            self._sets[split] = Images(table, self.spec, self.config, split == "train", self.seed)
        return self._sets[split]

    def in_memory(self, split: str) -> bool:
        """Whether the images of a split are held decoded."""
        return self.images(split).pixels is not None

    @property
    def skipped(self) -> int:
        """Unreadable images left out so far."""
        return sum(int(images.unreadable.sum()) for images in self._sets.values())


def _natural(name: str) -> tuple[bool, int, str]:
    """Numbers in order of value, before words."""
    number = int(name) if name.isdecimal() else None
    return (number is None, number or 0, name)


def _refuse_unknown_classes(tables: dict[str, Table], spec: ImageSpec) -> None:
    """Before anything is trained: every split may only have classes that the model knows."""
    for table in tables.values():
        unknown = sorted(set(table.classes) - set(spec.classes))
        if unknown:
            name = table.names[table.classes.index(unknown[0])]
            raise UserError(f"class {unknown[0]!r} ({name}): not among the classes of the training images")


def _probe(table: Table, config: DataConfig, count: int = 256) -> ImageSpec:
    """Channels, size and classes; images are used whole if some of them, by their headers, are small equal squares."""
    modes, sizes = set(), set()
    for item in table.items[:: max(1, len(table) // count)]:
        try:
            with open_image(item) as image:
                modes.add(image.mode)
                sizes.add(image.size)
        except Unreadable:
            continue  # reported when it is read
    channels = 1 if modes and modes <= set(GREY) else 3
    width, height = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    whole = width == height <= 64 and config.image_size in (None, width)
    size = width if whole else config.image_size or 224
    classes = tuple(sorted(set(table.classes), key=_natural))
    return ImageSpec(channels, size, classes, (0.5,) * channels, (0.5,) * channels, whole)


def _with_statistics(spec: ImageSpec, images: Images, count: int = 2000) -> ImageSpec:
    """The spec with mean and deviation of (up to `count` of) the training images' pixels."""
    indices = list(range(0, len(images), max(1, len(images) // count)))
    pixels = torch.cat([images.plain(indices[i : i + 64])[0] for i in range(0, len(indices), 64)])  # [N, C, H, W]
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp(min=1e-3)
    return dataclasses.replace(spec, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _split(tables: dict[str, Table], config: DataConfig) -> dict[str, Table]:
    """Cut validation and test from the training images where the data has none, each class in proportion.

    Independent of the run's seed: all runs are measured on the same images.
    """
    tables = dict(tables)
    missing = [name for name in ("test", "val") if name not in tables]
    counts = Counter(tables["train"].classes)
    rare = min(counts, key=counts.__getitem__)
    if counts[rare] <= len(missing):
        raise UserError(
            f"class {rare!r}: {counts[rare]} training image(s); at least {len(missing) + 1} are needed where the data "
            f"has no {' or '.join(missing)} images of its own"
        )
    shares = {"test": config.test_fraction, "val": config.val_fraction}
    for later, name in zip(reversed(range(len(missing))), missing, strict=True):
        tables["train"], tables[name] = _stratified(tables["train"], shares[name], leave=1 + later)
    return tables


def _stratified(table: Table, share: float, leave: int) -> tuple[Table, Table]:
    """(the rest, a share of every class), always the same; at least one of a class is taken and `leave` are left."""
    counts = Counter(table.classes)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(17)).tolist()
    wanted = {name: max(1, min(round(share * count), count - leave)) for name, count in counts.items()}
    held: list[int] = []
    for i in order:
        if wanted[table.classes[i]] > 0:
            wanted[table.classes[i]] -= 1
            held.append(i)
    chosen = set(held)
    return table.take([i for i in range(len(table)) if i not in chosen]), table.take(sorted(held))
