"""From scenes or folders to batches: tasks, splits, labels that are hidden, balanced draws, batches that repeat."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from apps.errors import UserError
from apps.vision.multitask.data import MultiTaskData
from apps.vision.multitask.layouts import LAYOUTS
from apps.vision.multitask.sampling import BalancedBatches, balanced_draws, keep_labels
from apps.vision.multitask.settings import ScenesConfig
from apps.vision.multitask.tasks import TASKS, SceneSpec, TaskSpec
from apps.vision.settings import DataConfig
from tests.apps.vision.multitask.drawn_folders import draw_folder

SCENE_TASKS = ("semseg", "depth", "normals", "edges", "classification")
SIZES = {"num_train": 12, "num_val": 3, "num_test": 4}


def scenes(
    *tasks: str, seed: int = 0, spec: SceneSpec | None = None, kept: str = "all", sizes: dict | None = None, **options
) -> MultiTaskData:
    given = {"image_size": 16, "image_width": 24, "batch_size": 4, "num_workers": 0} | options
    scenes_config = ScenesConfig(**(SIZES | (sizes or {})), labels_per_image=kept)
    return MultiTaskData(DataConfig(dataset="scenes", scenes=scenes_config, **given), tasks, seed, spec)


def folder(dataset: str, root: Path, *tasks: str, spec: SceneSpec | None = None, **options) -> MultiTaskData:
    given = {"image_size": 24, "image_width": 32, "batch_size": 2, "num_workers": 0} | options
    return MultiTaskData(DataConfig(dataset=dataset, root=str(root), **given), tasks, spec=spec)


def at(position: int, rank: int = 0, world: int = 1, limit: int | float | None = None) -> SimpleNamespace:
    """What the data asks a trainer for."""
    ready = SimpleNamespace(total=SimpleNamespace(ready=position))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=ready))
    return SimpleNamespace(fit_loop=loop, global_rank=rank, world_size=world, limit_train_batches=limit)


def epoch(data: MultiTaskData, position: int = 0, **trainer) -> list:
    data.trainer = at(position, **trainer)
    return list(data.train_dataloader())


def equal(a, b) -> bool:
    """Two batches, bit for bit."""
    return torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


def is_known(name: str, label: torch.Tensor) -> torch.Tensor:
    """Which images of a batch have any label of a task."""
    return (label != TASKS[name].unknown).flatten(1).any(1) if label.ndim > 1 else label != TASKS[name].unknown


def test_size_and_tasks_of_scenes():
    spec = MultiTaskData(DataConfig(dataset="scenes")).spec
    assert (spec.height, spec.width, spec.names) == (64, 96, SCENE_TASKS)
    data = scenes("edges", "semseg")
    assert data.spec.names == ("edges", "semseg")
    assert (data.spec.height, data.spec.width) == (16, 24)
    images, labels = data.images("test").plain([0, 2])
    assert images.shape == (2, 3, 16, 24)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert list(labels) == ["edges", "semseg"]
    assert labels["semseg"].shape == (2, 16, 24)
    assert labels["semseg"].dtype == torch.int64


def test_images_are_those_of_the_generator():
    from apps.vision.multitask.scenes import make_scenes

    images, labels = make_scenes(4, 0, 16, 24, first=2 * 10**6, progress=False)
    found = scenes().images("test").plain(range(4))
    assert torch.equal(found[0], images.float() / 255)
    assert all(torch.equal(found[1][name], label) for name, label in labels.items())


def test_splits_share_no_scene_and_the_test_does_not_depend_on_the_others():
    data = scenes()
    splits = {split: data.images(split) for split in ("train", "val", "test")}
    assert [len(images) for images in splits.values()] == [12, 3, 4]
    names = [name for images in splits.values() for name in images.names]
    assert len(set(names)) == 19
    pixels = torch.cat([images.plain(range(len(images)))[0] for images in splits.values()])
    assert (torch.cdist(pixels.flatten(1), pixels.flatten(1)) + torch.eye(19)).min() > 0.1
    fewer = scenes(seed=5, sizes={"num_train": 4, "num_val": 2})
    assert equal(fewer.images("test").plain(range(4)), splits["test"].plain(range(4)))
    assert equal(fewer.images("train").plain(range(4)), splits["train"].plain(range(4)))


@pytest.mark.parametrize("kept", ["one", "half"])
def test_training_images_keep_labels_of_some_tasks(kept):
    data, whole = scenes(kept=kept, sizes={"num_train": 40}), scenes(sizes={"num_train": 40})
    train = data.images("train")
    images, labels = train.plain(range(40))
    found = torch.stack([is_known(name, label) for name, label in labels.items()], 1)
    assert torch.equal(found, train.known)
    full, every = whole.images("train").plain(range(40))
    assert torch.equal(images, full)
    for i, (name, label) in enumerate(labels.items()):
        assert torch.equal(label[found[:, i]], every[name][found[:, i]])
    if kept == "one":
        assert found.sum(1).tolist() == [1] * 40
        assert found.sum(0).tolist() == [8] * 5
    else:
        assert found.any(1).all()
        assert 0.35 < found.float().mean() < 0.65
    assert torch.equal(scenes(kept=kept, seed=9, sizes={"num_train": 40}).images("train").known, found)
    assert all(is_known(name, label).all() for name, label in data.images("val").plain(range(3))[1].items())
    assert data.images("test").known.all()


def test_labels_that_are_kept_do_not_depend_on_the_tasks_that_are_trained():
    every = scenes(kept="half", sizes={"num_train": 40}).images("train")
    two = scenes("edges", "depth", kept="half", sizes={"num_train": 40}).images("train")
    chosen = every.known[:, [3, 1]]
    rows = chosen.any(1).nonzero().flatten()
    assert 0 < len(rows) < 40
    assert two.names == [every.names[i] for i in rows]
    assert torch.equal(two.known, chosen[rows])
    depth = every.plain(rows.tolist())[1]["depth"]
    assert torch.equal(two.plain(range(len(two)))[1]["depth"], depth)


def test_kept_labels():
    assert keep_labels(3, 2, "all", 0).all()
    assert keep_labels(4, 3, "one", 0).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    half = keep_labels(20000, 2, "half", 0)
    patterns = Counter(map(tuple, half.int().tolist()))
    assert patterns.keys() == {(1, 1), (1, 0), (0, 1)}
    assert patterns[1, 1] / 20000 == pytest.approx(1 / 4, abs=0.015)
    assert patterns[1, 0] / 20000 == pytest.approx(3 / 8, abs=0.015)
    assert not torch.equal(half, keep_labels(20000, 2, "half", 1))


def test_augmentation_depends_on_seed_epoch_and_batch_alone():
    train = scenes().images("train")
    keys = [(0, 5), (0, 1), (0, 7)]
    first = train.__getitems__(keys)
    torch.rand(17)  # what else draws numbers does not matter
    assert equal(train.__getitems__(keys), first)
    assert not torch.equal(train.__getitems__([(1, i) for _, i in keys])[0], first[0])
    assert not torch.equal(scenes(seed=1).images("train").__getitems__(keys)[0], first[0])
    assert not torch.equal(first[0], train.plain([5, 1, 7])[0])
    for split in ("val", "test"):
        images = scenes().images(split)
        assert equal(images.__getitems__([(3, 1), (3, 0)]), images.plain([1, 0]))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # pytest has threads
def test_training_goes_on_with_the_very_batches_it_would_have_seen(balanced, workers):
    data = scenes(kept="half", balance_tasks=balanced, num_workers=workers)
    whole = [epoch(data, start) for start in (0, 3)]
    assert [len(batches) for batches in whole] == [3, 3]
    assert not equal(whole[0][0], whole[1][0])
    for position in range(1, 6):
        again = scenes(kept="half", balance_tasks=balanced, num_workers=0)
        rest = epoch(again, position)
        assert len(rest) == 3 - position % 3
        assert all(equal(a, b) for a, b in zip(rest, whole[position // 3][position % 3 :], strict=True))


@pytest.mark.parametrize("balanced", [False, True])
def test_every_process_has_batches_of_its_own(balanced):
    data = scenes(balance_tasks=balanced, batch_size=3)
    ranks = []
    for rank in range(2):
        data.trainer = at(0, rank, 2)
        ranks.append(list(data._batches()))
    assert [len(batches) for batches in ranks] == [2, 2]
    drawn = [index for batches in ranks for batch in batches for _, index in batch]
    assert sorted(drawn) == list(range(12)) or balanced
    data.trainer = at(0, limit=2)
    assert len(list(data._batches())) == 2


SKEWED = torch.tensor([[1, 0, 0]] * 800 + [[0, 1, 0]] * 150 + [[0, 1, 1]] * 30 + [[0, 0, 1]] * 20, dtype=torch.bool)


def test_balanced_draws_see_every_task_equally_often():
    draws = balanced_draws(SKEWED, torch.Generator().manual_seed(0))
    assert len(draws) == 1000
    assert (SKEWED.sum(0) / 1000).tolist() == pytest.approx([0.8, 0.18, 0.05], abs=0.001)
    seen = SKEWED[draws].sum(0)
    assert seen.max() - seen.min() <= 2
    assert seen.sum() > 1000  # those of two tasks count for both
    times = torch.bincount(draws, minlength=1000)
    assert times[:800].max() == 1  # of many images, each at most once
    assert times[980:].min() >= 4  # of few, each about equally often
    assert times[980:].max() - times[980:].min() <= 2
    torch.rand(9)
    assert torch.equal(balanced_draws(SKEWED, torch.Generator().manual_seed(0)), draws)
    assert not torch.equal(balanced_draws(SKEWED, torch.Generator().manual_seed(1)), draws)


def test_draws_where_no_balance_is_possible_and_where_labels_come_together():
    always = torch.tensor([[1, 1, 0], [1, 0, 1]] * 50, dtype=torch.bool)
    seen = always[balanced_draws(always, torch.Generator())].sum(0)
    assert seen.tolist() == [100, 50, 50]
    nested = torch.tensor([[1, 0]] * 90 + [[1, 1]] * 10, dtype=torch.bool)
    seen = nested[balanced_draws(nested, torch.Generator())].sum(0)
    assert seen[0] - seen[1] <= 1
    missing = torch.tensor([[1, 0, 0], [0, 0, 1]] * 8, dtype=torch.bool)
    assert missing[balanced_draws(missing, torch.Generator())].sum(0).tolist() == [8, 0, 8]


def test_balanced_batches_hold_the_draws_of_their_epoch():
    def indices(seed: int, number: int) -> list[int]:
        batches = BalancedBatches(SKEWED, 32, seed, position=lambda: number * 32)
        assert len(batches) == 32
        drawn = list(batches)
        assert {found for batch in drawn for found, _ in batch} == {number}
        return [index for batch in drawn for _, index in batch]

    first = indices(0, 0)
    seen = SKEWED[first].sum(0)
    assert seen.max() - seen.min() <= 2
    assert indices(0, 0) == first
    assert indices(0, 1) != first
    assert indices(1, 0) != first
    shares = torch.stack([SKEWED[first[start : start + 250]].sum(0) for start in range(0, 1000, 250)])
    assert (shares.float() / shares.sum(1, keepdim=True) - 1 / 3).abs().max() < 0.08  # early as well as late


@pytest.mark.parametrize("kept", ["all", "half"])
def test_a_balanced_epoch_of_scenes(kept):
    data = scenes(kept=kept, balance_tasks=True, sizes={"num_train": 40})
    known = Counter()
    for _, labels in epoch(data):
        known.update({name: int(is_known(name, label).sum()) for name, label in labels.items()})
    assert max(known.values()) - min(known.values()) <= (6 if kept == "half" else 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")  # pytest has threads
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dataset", LAYOUTS)
def test_folders_from_end_to_end(tmp_path, dataset, workers):
    draw_folder(dataset, tmp_path)
    data = folder(dataset, tmp_path, num_workers=workers)
    layout = LAYOUTS[dataset]
    assert data.spec.tasks == layout.tasks
    assert data.spec.mean == (0.485, 0.456, 0.406)
    train = epoch(data)
    assert [len(images) for images, _ in train] == [2, 2, 1]
    assert [len(images) for images, _ in data.val_dataloader()] == [1]
    tested = list(data.test_dataloader())
    assert [len(images) for images, _ in tested] == [2, 1]
    for images, labels in train + tested:
        assert images.shape[1:] == (3, 24, 32)
        assert list(labels) == [task.name for task in layout.tasks]
        for task in layout.tasks:
            loss = task.kind.loss(torch.randn(len(images), task.channels, 24, 32), labels[task.name])
            assert loss.isfinite()
    assert equal(tested[0], data.images("test").plain([0, 1]))
    whole = epoch(data, 3)
    assert all(equal(a, b) for a, b in zip(epoch(folder(dataset, tmp_path), 4), whole[1:], strict=True))
    names = [name for split in ("train", "val", "test") for name in data.images(split).names]
    assert len(set(names)) == 9
    assert all(Path(name).is_file() for name in names)


def test_images_without_labels_of_the_tasks_asked_for_are_left_out(tmp_path):
    draw_folder("nyud", tmp_path)
    for name in ("val_0", "val_2"):
        (tmp_path / "depth" / f"{name}.npy").unlink()
    assert len(folder("nyud", tmp_path).images("test")) == 3
    data = folder("nyud", tmp_path, "depth")
    assert [Path(name).stem for name in data.images("test").names] == ["val_1"]
    (tmp_path / "depth" / "val_1.npy").unlink()
    with pytest.raises(UserError, match=r"^tasks\.names=depth: no test image has a label of these$"):
        folder("nyud", tmp_path, "depth").images("test")
    few = scenes("edges", "classification", kept="one", sizes={"num_train": 3})
    with pytest.raises(UserError, match=r"^tasks\.names=edges,classification: no train image has a label of these$"):
        few.images("train")


def test_skipped_files_are_counted(tmp_path):
    draw_folder("nyud", tmp_path)
    (tmp_path / "images" / "val_1.png").write_bytes(b"no image")
    data = folder("nyud", tmp_path, on_error="skip")
    assert sum(len(images) for images, _ in data.test_dataloader()) == 2
    assert data.skipped == 1
    assert scenes().skipped == 0
    with pytest.raises(UserError, match=r"val_1\.png: unreadable image .*; mend it, or --data\.on_error skip$"):
        list(folder("nyud", tmp_path).test_dataloader())


def test_balance_in_folders_counts_label_files(tmp_path):
    draw_folder("cityscapes", tmp_path)
    for file in sorted((tmp_path / "disparity" / "train").rglob("*.png"))[2:]:
        file.unlink()
    data = folder("cityscapes", tmp_path, balance_tasks=True)
    data.trainer = at(0)
    known = data.images("train").known
    assert known.sum(0).tolist() in ([5, 1], [5, 2])
    seen = torch.stack([known[index] for batch in data._batches() for _, index in batch]).sum(0)
    assert seen.tolist() == [5, 4]


@pytest.mark.parametrize(
    ("dataset", "task", "tasks"),
    [
        ("nyud", "parts", "semseg, depth, normals, edges"),
        ("cityscapes", "normals", "semseg, depth"),
        ("pascal_context", "depth", "semseg, parts, saliency, normals, edges"),
        ("scenes", "saliency", ", ".join(SCENE_TASKS)),
    ],
)
def test_tasks_that_a_data_set_has_not_are_one_line(tmp_path, dataset, task, tasks):
    if dataset != "scenes":
        draw_folder(dataset, tmp_path)
    make = scenes if dataset == "scenes" else lambda *names: folder(dataset, tmp_path, *names)
    with pytest.raises(UserError, match=rf"^tasks\.names={task}: {dataset} has {tasks}$"):
        make("semseg", task)


def test_a_task_whose_folder_is_missing_is_one_line(tmp_path):
    draw_folder("nyud", tmp_path)
    (tmp_path / "normals").rename(tmp_path / "normal")
    assert folder("nyud", tmp_path).spec.names == ("semseg", "depth", "edges")
    with pytest.raises(UserError, match=rf"^data\.root={tmp_path}: no folder normals/ with labels of task normals; "):
        folder("nyud", tmp_path, "normals")


def test_data_for_a_trained_model(tmp_path):
    draw_folder("nyud", tmp_path)
    spec = dataclasses.replace(folder("nyud", tmp_path, "edges", "semseg").spec, height=12, width=20)
    data = folder("nyud", tmp_path, spec=spec)
    assert data.spec is spec
    images, labels = data.images("test").plain([0])
    assert images.shape == (1, 3, 12, 20)
    assert list(labels) == ["edges", "semseg"]
    draw_folder("cityscapes", tmp_path / "city")
    with pytest.raises(UserError, match=r"^tasks\.names=edges: cityscapes has semseg, depth$"):
        folder("cityscapes", tmp_path / "city", spec=spec)
    words = r"^data\.dataset=cityscapes: its 19 classes of semseg are not the model's 40; take the data set that"
    with pytest.raises(UserError, match=words):
        folder("cityscapes", tmp_path / "city", spec=dataclasses.replace(spec, tasks=spec.tasks[1:]))
    other = SceneSpec(16, 24, (TaskSpec("semseg", ("a", "b")),))
    with pytest.raises(UserError, match=r"^data\.dataset=scenes: its \d+ classes of semseg are not the model's 2; "):
        scenes(spec=other)


@pytest.mark.parametrize("kept", ["all", "half"])
def test_first_images_are_those_of_the_whole_split(kept):
    few = scenes("semseg", "depth", kept=kept).first_images("train", 5)
    whole = scenes("semseg", "depth", kept=kept).images("train")
    assert 0 < len(few) <= 5 < len(whole)
    indices = list(range(len(few)))
    assert few.names == whole.names[: len(few)]
    assert equal(few.plain(indices), whole.plain(indices))
    assert len(scenes().first_images("train", 10**6)) == SIZES["num_train"]
