"""Batches of images with labels of several tasks, for training, validation and testing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from apps.errors import UserError
from apps.loading import ResumableBatches, derive_seed
from apps.vision.loaders import BatchLoaders
from apps.vision.multitask.folders import FolderImages, find_items, folder_spec, require_folders
from apps.vision.multitask.layouts import layout_of
from apps.vision.multitask.sampling import BalancedBatches, keep_labels
from apps.vision.multitask.tasks import SceneSpec, TaskSpec
from apps.vision.multitask.transforms import augment
from apps.vision.settings import DataConfig

Batch = tuple[Float[Tensor, "B C H W"], dict[str, Tensor]]
"""Images in [0, 1], and labels in the conventions of `apps.vision.multitask.tasks`."""
SCENE_SIZE = 64, 96
"""Height and width of generated scenes unless asked otherwise."""
FIRST_SCENE = {"train": 0, "val": 10**6, "test": 2 * 10**6}
"""Numbers of scenes: splits share none, and the test images do not depend on how many are trained on."""


@dataclass(frozen=True)
class HeldImages:
    """One split in memory."""

    images: UInt8[Tensor, "N 3 H W"]
    labels: dict[str, Tensor]
    names: list[str]
    known: Bool[Tensor, "N T"]
    """Which image has labels of which task."""

    def read(self, indices: Sequence[int]) -> tuple[UInt8[Tensor, "B 3 H W"], dict[str, Tensor]]:
        """Images and labels."""
        return self.images[indices], {name: label[indices] for name, label in self.labels.items()}

    def only_known(self, tasks: Sequence[TaskSpec]) -> HeldImages:
        """With labels of these tasks alone, those of others and those not known hidden; images without any are gone."""
        labels = {task.name: self.labels[task.name] for task in tasks}
        if self.known.all():
            return replace(self, labels=labels)
        used = torch.nonzero(self.known.any(1)).flatten()
        known = self.known[used]
        labels = {task.name: _hide(labels[task.name][used], known[:, i], task) for i, task in enumerate(tasks)}
        return HeldImages(self.images[used], labels, [self.names[i] for i in used.tolist()], known)


class MultiTaskImages(Dataset):
    """One split. Hands out whole batches: float images in [0, 1], and a dictionary of labels.

    Args:
        source: where images and labels come from.
        config: how training images are augmented.
        train: augment.
        seed: of the augmentation.
    """

    def __init__(self, source: HeldImages | FolderImages, config: DataConfig, train: bool, seed: int) -> None:
        self.source, self.config, self.train, self.seed = source, config, train, seed

    @property
    def names(self) -> list[str]:
        """What to call each image by: its file, or its number among the generated ones."""
        return self.source.names

    @property
    def known(self) -> Bool[Tensor, "N T"]:
        """Which image has labels of which task, in the order of the spec."""
        return self.source.known

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        """A batch from its (epoch, index) pairs."""
        images, labels = self.plain([index for _, index in keys])
        if not self.train:
            return images, labels
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *keys[0]))
        return augment(images, labels, self.config, generator)

    def plain(self, indices: Sequence[int]) -> Batch:
        """These images as they are evaluated, without augmentation."""
        images, labels = self.source.read(list(indices))
        return images.float().div_(255), labels


class MultiTaskData(BatchLoaders):
    """Splits, loaders and the `SceneSpec` of a data set with labels of several tasks.

    Args:
        config: what to load.
        tasks: which tasks, in which order; none: all that the data set has labels for.
        seed: of shuffling and augmentation.
        spec: of a trained model: its tasks and size are taken, and the data must have such labels.

    Raises:
        UserError: the data lacks a task, or has other classes than the model.
    """

    def __init__(
        self, config: DataConfig, tasks: Sequence[str] = (), seed: int = 0, spec: SceneSpec | None = None
    ) -> None:
        super().__init__(config, seed)
        whole = _whole_spec(config)
        names = tuple(tasks) if spec is None else spec.names
        _require_tasks(config, whole, names)
        self._all = whole.tasks
        self.spec = replace(whole, tasks=tuple(map(whole.task, names or whole.names))) if spec is None else spec
        if spec is not None:
            _require_classes(config, whole, spec)
        self._sets: dict[str, MultiTaskImages] = {}

    def images(self, split: str) -> MultiTaskImages:
        """The data set of a split, made or found when first asked for."""
        if split not in self._sets:
            if self.config.dataset == "scenes":
                source = self._scenes(split, getattr(self.config.scenes, f"num_{split}"))
            else:
                source = FolderImages(find_items(self.config, split), self.spec, self.config)
            if not source.names:
                raise UserError(f"tasks.names={','.join(self.spec.names)}: no {split} image has a label of these")
            _require_labels(source, self.spec, split)
            self._sets[split] = MultiTaskImages(source, self.config, split == "train", self.seed)
        return self._sets[split]

    def first_images(self, split: str, count: int) -> MultiTaskImages:
        """The data set of a split with its first images at least; generated ones are then not made all."""
        if self.config.dataset != "scenes" or split in self._sets:
            return self.images(split)
        count = min(count, getattr(self.config.scenes, f"num_{split}"))
        return MultiTaskImages(self._scenes(split, count), self.config, split == "train", self.seed)

    def _scenes(self, split: str, count: int) -> HeldImages:
        """Generated images; in training they keep some labels only, if so asked, whichever tasks are trained."""
        from apps.vision.multitask.scenes import make_scenes

        config, spec = self.config.scenes, self.spec
        first = FIRST_SCENE[split]
        images, labels = make_scenes(count, config.seed, spec.height, spec.width, first)
        names = [f"scenes/{first + i}" for i in range(count)]
        how = config.labels_per_image if split == "train" else "all"
        known = keep_labels(getattr(config, f"num_{split}"), len(self._all), how, config.seed)[:count]
        held = HeldImages(images, labels, names, known[:, [self._all.index(task) for task in spec.tasks]])
        return held.only_known(spec.tasks)

    @property
    def skipped(self) -> int:
        """Unreadable images left out so far."""
        sources = [images.source for images in self._sets.values()]
        return sum(int(source.unreadable.sum()) for source in sources if isinstance(source, FolderImages))

    def in_memory(self, split: str) -> bool:
        """Whether the images of a split are held decoded."""
        return isinstance(self.images(split).source, HeldImages)

    def sampler(self, **options: Any) -> ResumableBatches:
        """The order of training images, with `data.balance_tasks` one in which all tasks are seen equally often."""
        if self.config.balance_tasks:
            return BalancedBatches(self.images("train").known, **options)
        return super().sampler(**options)


def _require_labels(source: HeldImages | FolderImages, spec: SceneSpec, split: str) -> None:
    """Refuse tasks that no image of a split has labels of: they would be trained on nothing, or measured as nan."""
    for name, any_known in zip(spec.names, source.known.any(0).tolist(), strict=True):
        if not any_known:
            others = ",".join(other for other in spec.names if other != name)
            raise UserError(f"tasks.names={','.join(spec.names)}: no {split} image has a label of {name}; try {others}")


def _hide(label: Tensor, known: Bool[Tensor, " N"], task: TaskSpec) -> Tensor:
    """The labels, unknown for images that do not keep them."""
    return torch.where(known.reshape(-1, *[1] * (label.ndim - 1)), label, label.new_tensor(task.kind.unknown))


def _whole_spec(config: DataConfig) -> SceneSpec:
    """All tasks that the data has labels for, at the size asked for or its own."""
    if config.dataset != "scenes":
        return folder_spec(config)
    from apps.vision.multitask.scenes import scene_spec

    return scene_spec(config.image_size or SCENE_SIZE[0], config.image_width or SCENE_SIZE[1])


def _require_tasks(config: DataConfig, whole: SceneSpec, names: Sequence[str]) -> None:
    """Refuse tasks that the data set has not, or whose labels are missing."""
    every = whole.names
    if config.dataset != "scenes":
        every = tuple(task.name for task in layout_of(config.dataset, Path(config.root)).tasks)
    for name in names:
        if name not in every:
            raise UserError(f"tasks.names={name}: {config.dataset} has {', '.join(every)}")
    if config.dataset != "scenes":
        require_folders(config, names)


def _require_classes(config: DataConfig, whole: SceneSpec, spec: SceneSpec) -> None:
    """Refuse data whose classes are not the model's."""
    for task in spec.tasks:
        classes = whole.task(task.name).classes
        if classes != task.classes:
            have, want = len(classes), len(task.classes)
            raise UserError(
                f"data.dataset={config.dataset}: its {have} classes of {task.name} are not the model's {want}; "
                "take the data set that the model was trained on"
            )
