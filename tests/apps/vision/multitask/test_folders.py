"""Label files of the three layouts become labels: against what was drawn, and by hand where the format matters."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from apps.errors import UserError
from apps.vision.multitask import layouts
from apps.vision.multitask.folders import FolderImages, find_items, folder_spec, require_folders
from apps.vision.multitask.layouts import LAYOUTS
from apps.vision.multitask.tasks import SceneSpec
from apps.vision.settings import DataConfig
from tests.apps.vision.multitask import drawn_folders as drawn

DATASETS = tuple(LAYOUTS)


def settings(dataset: str, root: Path, **options: object) -> DataConfig:
    return DataConfig(**{"dataset": dataset, "root": str(root), "image_size": 24, "image_width": 32} | options)


def read(config: DataConfig, split: str = "train", spec: SceneSpec | None = None) -> tuple[list[str], tuple]:
    """Names within the data set, and all images and labels of a split."""
    items = find_items(config, split)
    images = FolderImages(items, spec or folder_spec(config), config)
    return [item.name for item in items], images.read(range(len(images.names)))


def degrees(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.rad2deg(2 * torch.asin(((a - b).norm(dim=1) / 2).clamp(max=1)))


@pytest.mark.parametrize("kind", ["png", "npy", "mat"])
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_labels_are_those_that_were_drawn(tmp_path, dataset, kind, split):
    truth = drawn.draw_folder(dataset, tmp_path, kind=kind)
    names, (images, labels) = read(settings(dataset, tmp_path), split)
    assert len(names) == {"train": 5, "val": 1, "test": 3}[split]
    assert list(labels) == [task.name for task in LAYOUTS[dataset].tasks]
    for i, name in enumerate(names):
        expected = truth[name]
        assert torch.equal(images[i].permute(1, 2, 0), torch.from_numpy(expected["image"]))
        for task, label in labels.items():
            target = torch.from_numpy(expected[task])
            if task == "normals":
                target = target.permute(2, 0, 1)
                assert torch.equal(label[i].abs().sum(0) > 0, target.abs().sum(0) > 0)
                assert degrees(label[i][None], target[None]).max() < (0.8 if kind == "png" else 0.01)
            else:
                assert label[i].dtype == (torch.int64 if task in ("semseg", "parts") else torch.float32)
                torch.testing.assert_close(label[i], target.to(label.dtype), rtol=1e-6, atol=0)


def test_splits_are_disjoint_and_always_the_same(tmp_path):
    drawn.draw_folder("nyud", tmp_path)
    config = settings("nyud", tmp_path, val_fraction=0.4)
    found = {split: [item.name for item in find_items(config, split)] for split in ("train", "val", "test")}
    assert [len(names) for names in found.values()] == [4, 2, 3]
    assert sorted(found["train"] + found["val"]) == [f"train_{i}" for i in range(6)]
    assert found["test"] == ["val_0", "val_1", "val_2"]
    assert found["train"] == sorted(found["train"])
    assert [item.name for item in find_items(config, "val")] == found["val"]


def test_normals_in_eight_bits_are_left_up_and_to_the_camera():
    pixels = np.array([[[255, 128, 128], [128, 255, 128], [128, 128, 255], [128, 128, 128]]], dtype=np.uint8)
    expected = [[[-1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]]
    np.testing.assert_allclose(layouts.mirrored_vectors(pixels), expected, atol=0.006)
    floats = np.array([[[-2.0, 0, 0], [0, np.nan, 1]]])
    np.testing.assert_array_equal(layouts.mirrored_vectors(floats), [[[1, 0, 0], [0, 0, 0]]])
    np.testing.assert_array_equal(layouts.mirrored_vectors(np.moveaxis(floats, -1, 0)), [[[1, 0, 0], [0, 0, 0]]])


def test_depth_by_hand():
    disparity = np.array([[0, 1, 257, 5121]], dtype=np.uint16)
    expected = [[0, 0, 0.209313 * 2262.52, 0.209313 * 2262.52 / 20]]
    np.testing.assert_allclose(layouts.metres_from_disparity(disparity), expected, rtol=1e-6)
    np.testing.assert_array_equal(layouts.metres(np.array([[-1.0, np.nan, np.inf, 2.5]])), [[0, 0, 0, 2.5]])
    np.testing.assert_array_equal(layouts.metres(np.array([[0, 1250]], dtype=np.uint16)), np.float32([[0, 1.25]]))


def test_classes_by_hand():
    ids = np.array([[0, 7, 8, 9, 26, 33, 255]], dtype=np.uint8)
    numbers = layouts.city_classes(ids)[0].tolist()
    assert numbers == [-1, 0, 1, -1, 13, 18, -1]
    classes = layouts.CITYSCAPES.tasks[0].classes
    assert [classes[i] for i in numbers if i >= 0] == ["road", "sidewalk", "car", "bicycle"]
    assert layouts.numbers_from_one(np.array([[0, 1, 40]], dtype=np.uint8)).tolist() == [[-1, 0, 39]]
    assert layouts.numbers_from_zero(np.array([[0, 20, 255]], dtype=np.uint8)).tolist() == [[0, 20, -1]]
    assert [len(layout.tasks[0].classes) for layout in LAYOUTS.values()] == [40, 21, 19]
    assert layouts.NYUD.tasks[0].classes[39] == "other prop"
    assert layouts.PASCAL_CONTEXT.tasks[0].classes[15] == "person"


def test_boundaries_are_one_pixel_wide():
    classes = np.array([[5, 5, 9], [5, 9, 9], [2, 2, 2]])
    assert layouts.boundaries(classes).tolist() == [[0, 1, 0], [1, 1, 1], [0, 0, 0]]


def test_parts_of_several_people_and_of_none():
    mask = np.array([[1, 0], [0, 0]])
    person = {"class_ind": 15, "mask": mask, "parts": {"part_name": "leye", "mask": mask}}
    other = {"class_ind": 15, "mask": 1 - mask, "parts": [{"part_name": "rlleg", "mask": np.array([[0, 0], [0, 1]])}]}
    dog = {"class_ind": 12, "mask": mask, "parts": [{"part_name": "tail", "mask": mask}]}
    bare = {"class_ind": 15, "mask": mask, "parts": np.array([])}
    assert layouts.human_parts({"objects": [dog, person, other]}).tolist() == [[1, 0], [0, 6]]
    assert layouts.human_parts({"objects": person}).tolist() == [[1, 0], [0, 0]]
    assert layouts.human_parts({"objects": [dog, bare]}) is None
    assert layouts.human_parts(np.array([[0, 255]], dtype=np.uint8)) is None
    assert layouts.human_parts(np.array([[0, 255, 6]], dtype=np.uint8)).tolist() == [[0, -1, 6]]


def test_images_are_padded_in_proportion_around_their_middle(tmp_path):
    """PASCAL: 24 x 32 within 40 x 40 stays as it is; within 16 x 24 it becomes 16 x 21."""
    truth = drawn.draw_folder("pascal_context", tmp_path)
    names, (images, labels) = read(settings("pascal_context", tmp_path, image_size=40, image_width=40))
    inner = (slice(None), slice(8, 32), slice(4, 36))
    outer = torch.ones(40, 40, dtype=torch.bool)
    outer[inner[1:]] = False
    for i, name in enumerate(names):
        assert torch.equal(images[i][inner].permute(1, 2, 0), torch.from_numpy(truth[name]["image"]))
        assert images[i][:, outer].unique(dim=1).flatten().tolist() == [124, 116, 104]  # ImageNet's mean
        assert torch.equal(labels["semseg"][i][inner[1:]], torch.from_numpy(truth[name]["semseg"]))
        assert (labels["edges"][i][outer] == -1).all()
        assert (labels["semseg"][i][outer] == -1).all()
        assert (labels["normals"][i][:, outer] == 0).all()
    _, (images, labels) = read(settings("pascal_context", tmp_path, image_size=16, image_width=24))
    known = (labels["saliency"] >= 0).nonzero()
    assert (known[:, 1].min(), known[:, 1].max(), known[:, 2].min(), known[:, 2].max()) == (0, 15, 1, 21)
    assert (images[:, :, :, 0] == torch.tensor([124, 116, 104])[:, None]).all()


def test_resizing_takes_the_nearest_label_and_loses_no_edge(tmp_path):
    truth = drawn.draw_folder("nyud", tmp_path)
    names, (images, labels) = read(settings("nyud", tmp_path, image_size=12, image_width=48))
    assert images.shape == (5, 3, 12, 48)
    for i, name in enumerate(names):
        for row in range(12):
            for column in range(48):
                at = int((row + 0.5) * 24 / 12), int((column + 0.5) * 32 / 48)
                assert labels["semseg"][i, row, column] == truth[name]["semseg"][at]
                assert labels["depth"][i, row, column] == truth[name]["depth"][at]
    config = settings("nyud", tmp_path, image_size=8, image_width=8)
    names, (_, labels) = read(config)
    blocks = torch.stack([torch.from_numpy(truth[name]["edges"]) for name in names]).reshape(-1, 8, 3, 8, 4)
    assert torch.equal(labels["edges"], blocks.amax((2, 4)))


def test_published_sizes_unless_asked_otherwise(tmp_path):
    sizes = {}
    for dataset in DATASETS:
        drawn.draw_folder(dataset, tmp_path / dataset)
        spec = folder_spec(DataConfig(dataset=dataset, root=str(tmp_path / dataset)))
        sizes[dataset] = (spec.height, spec.width)
    assert sizes == {"nyud": (480, 640), "pascal_context": (512, 512), "cityscapes": (128, 256)}


def test_a_missing_label_is_unknown(tmp_path):
    drawn.draw_folder("nyud", tmp_path)
    for folder, suffix in (("segmentation", "png"), ("depth", "npy"), ("normals", "png")):
        (tmp_path / folder / f"val_1.{suffix}").unlink()
    config = settings("nyud", tmp_path)
    images = FolderImages(find_items(config, "test"), folder_spec(config), config)
    assert images.known.tolist() == [[True] * 4, [False, False, False, True], [True] * 4]
    _, labels = images.read([1, 2])
    assert [(labels[task][0] == value).all().item() for task, value in (("semseg", -1), ("depth", 0))] == [True, True]
    assert (labels["normals"][0] == 0).all()
    assert (labels["edges"][0] >= 0).all()
    assert (labels["semseg"][1] >= 0).any()
    spec = SceneSpec(24, 32, LAYOUTS["nyud"].tasks[:2])
    kept = FolderImages(find_items(config, "test"), spec, config)  # of which val_1 has no label
    assert [Path(name).stem for name in kept.names] == ["val_0", "val_2"]


def test_normals_without_a_map_of_contexts_hold_everywhere(tmp_path):
    drawn.draw_folder("pascal_context", tmp_path)
    (tmp_path / "pascal-context" / "trainval" / "val_0.mat").unlink()
    _, (_, labels) = read(settings("pascal_context", tmp_path), "test")
    known = (labels["normals"].abs().sum(1) > 0).float().mean((1, 2))
    assert known[0] > 0.75
    assert known[1] < 0.7
    assert (labels["edges"][0] == -1).all()


def test_a_label_of_another_size_is_one_line(tmp_path):
    drawn.draw_folder("nyud", tmp_path)
    bad = drawn.save(tmp_path / "segmentation" / "val_1", np.ones((24, 30), np.uint8), "png")
    line = f"{bad}: 24 x 30 pixels, its image {tmp_path}/images/val_1.png 24 x 32; they must be equal"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        read(settings("nyud", tmp_path), "test")


def test_a_class_that_there_is_not_is_one_line(tmp_path):
    drawn.draw_folder("nyud", tmp_path)
    bad = drawn.save(tmp_path / "segmentation" / "val_1", np.full((24, 32), 41, np.uint8), "png")
    with pytest.raises(UserError, match=rf"^{bad}: class 40 of semseg, counted from 0, where there are 40; mend it$"):
        read(settings("nyud", tmp_path), "test")


@pytest.mark.parametrize("name", ["images/val_1.png", "segmentation/val_1.png", "depth/val_1.npy", "edge/val_1.mat"])
def test_a_damaged_file_is_named_or_skipped(tmp_path, name):
    drawn.draw_folder("nyud", tmp_path, kind="mat" if name.endswith("mat") else "png")
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(
        UserError, match=rf"^{file}: unreadable (image|label) \(.*\); mend it, or --data\.on_error skip$"
    ):
        read(settings("nyud", tmp_path), "test")
    config = settings("nyud", tmp_path, on_error="skip")
    images = FolderImages(find_items(config, "test"), folder_spec(config), config)
    assert len(images.read([0, 1, 2])[0]) == 2
    assert images.unreadable.tolist() == [False, True, False]
    with pytest.raises(
        UserError,
        match=r"val_1\.png: nothing of a whole batch can be read; take those out that cannot, or raise data\.batch",
    ):
        images.read([1])


def test_a_file_with_several_variables_needs_the_one_named(tmp_path):
    drawn.draw_folder("nyud", tmp_path, kind="mat")
    file = tmp_path / "depth" / "val_0.mat"
    depth = np.full((24, 32), 3.0, np.float32)
    savemat(file, {"depth": depth, "other": 0 * depth})
    _, (_, labels) = read(settings("nyud", tmp_path), "test")
    assert (labels["depth"][0] == 3).all()
    savemat(file, {"a": depth, "other": depth})
    with pytest.raises(UserError, match=rf"^{file}: variables a, other; one named depth is needed; mend it"):
        read(settings("nyud", tmp_path), "test")


@pytest.mark.parametrize("content", [np.zeros((24, 32), np.float32), np.zeros((24, 32, 2), np.float32)])
def test_what_is_no_label_is_one_line(tmp_path, content):
    drawn.draw_folder("nyud", tmp_path, kind="npy")
    bad = drawn.save(tmp_path / "normals" / "val_0", content, "npy")
    with pytest.raises(UserError, match=rf"^{bad}: not a label of normals \([^\n]*\); mend it"):
        read(settings("nyud", tmp_path), "test")


def test_jpeg_normals_are_read(tmp_path):
    drawn.draw_folder("nyud", tmp_path)
    (tmp_path / "normals" / "val_0.png").unlink()
    facing = np.full((24, 32, 3), (128, 128, 255), np.uint8)
    Image.fromarray(facing).save(tmp_path / "normals" / "val_0.jpg")
    _, (_, labels) = read(settings("nyud", tmp_path), "test")
    assert (labels["normals"][0, 2] > 0.999).all()


def remove(root: Path, *paths: str) -> None:
    for path in paths:
        shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def test_missing_folders(tmp_path):
    drawn.draw_folder("nyud", tmp_path)
    remove(tmp_path, "normals", "edge")
    config = settings("nyud", tmp_path)
    assert folder_spec(config).names == ("semseg", "depth")
    require_folders(config, ["depth"])
    line = "no folder normals/ with labels of task normals; add it, or name other tasks in tasks.names"
    with pytest.raises(UserError, match=f"^data.root={tmp_path}: {line}$"):
        require_folders(config, ["semseg", "normals"])
    remove(tmp_path, "segmentation", "depth")
    folders = "segmentation/, depth/, normals/, edge/"
    with pytest.raises(UserError, match=f"^data.root={tmp_path}: no folder of labels; nyud has {folders}$"):
        folder_spec(config)
    with pytest.raises(UserError, match=r"^data\.root=nowhere: no such folder$"):
        folder_spec(settings("nyud", Path("nowhere")))


def test_missing_lists_and_images(tmp_path):
    drawn.draw_folder("nyud", tmp_path)
    config = settings("nyud", tmp_path)
    remove(tmp_path, "images/val_2.png")
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/images/val_2\.jpg: no such image; add it, or take it off its list"
    ):
        find_items(config, "test")
    (tmp_path / "gt_sets" / "val.txt").write_text("\n")
    with pytest.raises(UserError, match=rf"^data\.root={tmp_path}: no images in gt_sets/val\.txt$"):
        find_items(config, "test")
    (tmp_path / "gt_sets" / "train.txt").write_text("train_1\n")
    with pytest.raises(UserError, match=rf"^data\.root={tmp_path}: 1 training image\(s\); one more is needed"):
        find_items(config, "train")
    remove(tmp_path, "gt_sets")
    with pytest.raises(UserError, match=rf"^data\.root={tmp_path}: no file gt_sets/train\.txt, which names the images"):
        find_items(config, "val")
    (tmp_path / "gtFine").mkdir()
    with pytest.raises(
        UserError, match=rf"^data\.root={tmp_path}: no images in leftImg8bit/train/, which are to be called "
    ):
        find_items(settings("cityscapes", tmp_path), "train")


def test_an_image_without_any_label_is_named(tmp_path):
    drawn.draw_folder("cityscapes", tmp_path)
    stem = "val/bonn/val_1"
    remove(tmp_path, f"gtFine/{stem}_gtFine_labelIds.png", f"disparity/{stem}_disparity.png")
    image = tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png"
    with pytest.raises(UserError, match=rf"^{image}: no label of any task; add one, or take the image off its list$"):
        find_items(settings("cityscapes", tmp_path), "test")


def draw_own(root: Path, count: int = 8) -> dict[str, np.ndarray]:
    """One's own folder as the documentation has it; labels of the first image, as written."""
    rng = np.random.default_rng(0)
    written: dict[str, np.ndarray] = {}
    for task in ("images", "semseg", "depth", "normals", "edges"):
        (root / task).mkdir(parents=True)
    (root / "semseg" / "classes.txt").write_text("sky\nearth\nsea\n")
    for i in range(count):
        normals = rng.normal(size=(24, 32, 3))
        labels = {
            "semseg": rng.choice([0, 1, 2, 255], (24, 32)).astype(np.uint8),
            "depth": rng.uniform(1, 5, (24, 32)).astype(np.float32),
            "normals": (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32),
            "edges": rng.choice([0, 1, 255], (24, 32)).astype(np.uint8),
        }
        Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(labels["semseg"]).save(root / "semseg" / f"{i}.png")
        Image.fromarray(labels["edges"]).save(root / "edges" / f"{i}.png")
        for task in ("depth", "normals"):
            np.save(root / task / f"{i}.npy", labels[task])
        written = written or labels
    return written


def test_ones_own_maps_are_read_in_the_conventions_of_the_labels(tmp_path):
    written = draw_own(tmp_path)
    spec = folder_spec(settings("maps", tmp_path))
    assert spec.names == ("semseg", "depth", "normals", "edges")
    assert spec.task("semseg").classes == ("sky", "earth", "sea")
    config = settings("maps", tmp_path)
    splits = {split: [item.name for item in find_items(config, split)] for split in ("train", "val", "test")}
    assert sorted(name for names in splits.values() for name in names) == [str(i) for i in range(8)]
    (split,) = (split for split, names in splits.items() if "0" in names)
    source = FolderImages(find_items(config, split), spec, config)
    _, labels = source.read([splits[split].index("0")])
    unknown = {name: written[name].astype(np.int64) for name in ("semseg", "edges")}
    for name, label in unknown.items():
        np.testing.assert_array_equal(labels[name][0], np.where(label == 255, -1, label))
    np.testing.assert_array_equal(labels["depth"][0], written["depth"])
    np.testing.assert_allclose(labels["normals"][0], written["normals"].transpose(2, 0, 1), atol=1e-6)
    (tmp_path / "train.txt").write_text("\n".join(f"{i}.png" for i in range(6)))
    (tmp_path / "val.txt").write_text("\ufeff6\n7\n", encoding="utf-8")
    assert [item.name for item in find_items(config, "test")] == ["6", "7"]
    (tmp_path / "semseg" / "classes.txt").unlink()
    with pytest.raises(UserError, match=rf"^data\.root={tmp_path}: no file semseg/classes\.txt"):
        folder_spec(config)


def test_a_label_in_colours_is_one_line(tmp_path):
    drawn.draw_folder("nyud", tmp_path)
    for file in (tmp_path / "segmentation").iterdir():
        Image.fromarray(np.zeros((24, 32, 3), dtype=np.uint8)).save(file)
    with pytest.raises(UserError, match=r"is 24 x 32 x 3; a label of semseg has one number for each pixel$"):
        read(settings("nyud", tmp_path), "test")
