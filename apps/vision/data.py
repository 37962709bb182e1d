"""Batches of images for training, validation and testing."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from apps.errors import UserError
from apps.loading import ResumableBatches, ResumableLoader, as_is, derive_seed
from apps.progress import track
from apps.vision import augment
from apps.vision.models.vimoe import ImageSpec
from apps.vision.settings import DataConfig
from apps.vision.sources import Table, Unreadable, decode, load_tables, open_image

Batch = tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]
MEMORY = 2 * 2**30
"""Bytes of decoded images that are held in memory."""


class Images(Dataset):
    """One split. Hands out whole batches: float images in [0, 1] of one size, and labels.

    Args:
        table: the images.
        spec: channels, size and classes to give.
        config: what to do about unreadable images.
        native: images are used at their own size (no resizing) and held in memory if they fit.
        train: augment.
        seed: of the augmentation.
    """

    def __init__(
        self, table: Table, spec: ImageSpec, config: DataConfig, native: bool, train: bool = False, seed: int = 0
    ) -> None:
        self.config, self.spec, self.native, self.train, self.seed = config, spec, native, train, seed
        self.skipped = 0
        number = {name: i for i, name in enumerate(spec.classes)}
        unknown = sorted(set(table.classes) - set(number))
        if unknown:
            raise UserError(
                f"class {unknown[0]!r} ({table.names[table.classes.index(unknown[0])]}): not known to the model"
            )
        self.table = table
        self.labels = torch.tensor([number[name] for name in table.classes], dtype=torch.long)
        self.pixels: UInt8[Tensor, "N C H W"] | None = None
        needed = len(table) * spec.channels * spec.image_size**2
        if native and config.cache == "auto" and needed <= MEMORY:
            self._hold()
        self.each = augment.per_image(config, spec.image_size, resize=not native) if train else None
        self.centre = augment.for_evaluation(spec.image_size)

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
        """One decoded image, of the spec's size if native; None for one that is skipped."""
        try:
            image = decode(self.table.items[index], self.spec.channels)
        except Unreadable as error:
            if self.config.on_error == "raise":
                raise UserError(
                    f"{self.table.names[index]}: unreadable image ({error}); mend it, or --data.on_error skip"
                ) from error
            self.skipped += 1
            return None
        size = self.spec.image_size
        if self.native and image.shape[1:] != (size, size):
            image = v2.functional.resize(image, [size, size], antialias=True)
        return image

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
        if self.native:
            padding = self.config.crop_padding
            padding = round(self.spec.image_size / 8) if padding is None else padding
            flip = self.config.dataset != "digits" if self.config.flip is None else self.config.flip
            images = augment.shift_and_flip(images, padding, flip, torch.Generator().manual_seed(seed))
            images = images if self.each is None else torch.stack([self.each(image) for image in images])
        return images.float().div_(255), labels

    def plain(self, indices: list[int]) -> Batch:
        """These images as they are evaluated, without augmentation."""
        images, labels = self._fetch(indices, self.centre)
        return images.float().div_(255), labels

    def _fetch(
        self, indices: list[int], resize: v2.Transform | None
    ) -> tuple[UInt8[Tensor, "B C H W"], Int[Tensor, " B"]]:
        if self.pixels is not None:
            return self.pixels[indices], self.labels[indices]
        read = [(self._read(i), i) for i in indices]
        read = [(image, i) for image, i in read if image is not None]
        if not read:
            raise UserError(f"{self.table.names[indices[0]]}: no image of a whole batch can be read")
        images = [image for image, _ in read]
        if not self.native:
            images = [resize(image) for image in images]
        return torch.stack(images), self.labels[[i for _, i in read]]


class VisionData(LightningDataModule):
    """Splits, loaders and the `ImageSpec` of a data set.

    Args:
        config: what to load.
        seed: of shuffling and augmentation.
        spec: of a trained model, whose channels, size and classes the data must then fit.
    """

    def __init__(self, config: DataConfig, seed: int = 0, spec: ImageSpec | None = None) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        tables = _split(load_tables(config), config)
        probe = _probe(tables["train"], config)
        self.native = probe["native"]
        self.spec = spec or ImageSpec(
            probe["channels"],
            config.image_size or probe["size"],
            tuple(sorted(set(tables["train"].classes), key=_natural)),
            (0.5,) * probe["channels"],
            (0.5,) * probe["channels"],
        )
        if spec is not None:
            self.native = self.native and spec.image_size == probe["size"]
        self._tables = tables
        self._sets: dict[str, Images] = {}
        if spec is None:
            self.spec = _with_statistics(self.spec, self.images("train"))
            for images in self._sets.values():
                images.spec = self.spec

    def images(self, split: str) -> Images:
        """The data set of a split."""
        if split not in self._sets:
            table = self._tables[split]
            self._sets[split] = Images(table, self.spec, self.config, self.native, split == "train", self.seed)
        return self._sets[split]

    @property
    def skipped(self) -> int:
        """Unreadable images left out so far."""
        return sum(images.skipped for images in self._sets.values())

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches that continue where training stands."""
        images = self.images("train")
        return ResumableLoader(images, batch_sampler=self._batches(), collate_fn=as_is, **self._workers(images))

    def _batches(self) -> ResumableBatches:
        trainer = self.trainer
        batches = ResumableBatches(
            len(self.images("train")),
            self.config.batch_size,
            self.seed,
            position=lambda: trainer.fit_loop.epoch_loop.batch_progress.total.ready,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        batches.limit = _limit(trainer.limit_train_batches, len(batches))
        return batches

    def training_steps(self) -> int:
        """Optimiser steps of the whole training.

        Lightning's own estimate would create the training iterator before the position to resume at is known.
        """
        trainer = self.trainer
        per_epoch = -(-len(self._batches()) // trainer.accumulate_grad_batches)
        steps = per_epoch * trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else trainer.max_steps
        return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)

    def val_dataloader(self) -> DataLoader:
        """Validation images in order."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader:
        """Test images in order."""
        return self._in_order("test")

    def _in_order(self, split: str) -> DataLoader:
        images = self.images(split)
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        own = list(range(rank, len(images), world))
        size = max(self.config.batch_size, 128)
        batches = [[(0, i) for i in own[start : start + size]] for start in range(0, len(own), size)]
        return DataLoader(images, batch_sampler=batches, collate_fn=as_is, **self._workers(images))

    def _workers(self, images: Images) -> dict[str, Any]:
        workers = self.config.num_workers
        if workers is None:
            workers = 0 if images.pixels is not None else min(8, max(1, len(os.sched_getaffinity(0)) - 1))
        pin = torch.cuda.is_available()
        return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin}


def _limit(limit: int | float | None, batches: int) -> int:
    """Lightning's `limit_train_batches` as a number of batches."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _natural(name: str) -> tuple[bool, int, str]:
    """Numbers in order of value, before words."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def _probe(table: Table, config: DataConfig, count: int = 256) -> dict[str, Any]:
    """Channels, side, and whether images are small squares of one size, from the headers of some."""
    step = max(1, len(table) // count)
    headers = []
    for item in table.items[::step]:
        try:
            headers.append(open_image(item))
        except Unreadable:
            continue  # reported when it is read
    sizes = {image.size for image in headers}
    channels = 1 if headers and all(image.mode in ("L", "1", "I;16") for image in headers) else 3
    size = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    small = size[0] == size[1] and size[0] <= 64
    native = small and config.image_size in (None, size[0])
    return {"channels": channels, "size": size[0] if native else 224, "native": native}


def _with_statistics(spec: ImageSpec, images: Images, count: int = 2000) -> ImageSpec:
    """The spec with mean and deviation of (up to `count` of) the training images' pixels."""
    indices = list(range(0, len(images), max(1, len(images) // count)))
    pixels = torch.cat([images.plain(indices[i : i + 64])[0] for i in range(0, len(indices), 64)])  # [N, C, H, W]
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp(min=1e-3)
    return ImageSpec(spec.channels, spec.image_size, spec.classes, tuple(mean.tolist()), tuple(std.tolist()))


def _split(tables: dict[str, Table], config: DataConfig) -> dict[str, Table]:
    """Cut validation and test from the training images where the data has none, each class in proportion.

    Independent of the run's seed: all runs are measured on the same images.
    """
    tables = dict(tables)
    for name, share in (("test", config.test_fraction), ("val", config.val_fraction)):
        if name not in tables:
            tables["train"], tables[name] = _stratified(tables["train"], share)
    return tables


def _stratified(table: Table, share: float) -> tuple[Table, Table]:
    """(the rest, a share of every class), always the same."""
    counts = Counter(table.classes)
    rare = min(counts, key=counts.__getitem__)
    if counts[rare] < 3:
        raise UserError(f"class {rare!r}: {counts[rare]} image(s); at least 3 are needed to train, validate and test")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(17)).tolist()
    wanted = {name: max(1, round(share * count)) for name, count in counts.items()}
    held: list[int] = []
    for i in order:
        if wanted[table.classes[i]] > 0:
            wanted[table.classes[i]] -= 1
            held.append(i)
    chosen = set(held)
    return table.take([i for i in range(len(table)) if i not in chosen]), table.take(sorted(held))
