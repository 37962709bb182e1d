"""Small data sets in the folders and files of NYUD-v2, PASCAL-Context and Cityscapes, and what their labels mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

Truth = dict[str, dict[str, np.ndarray]]
"""By name of the image: the image itself and the labels of each task, as `tasks` wants them, normals [H, W, 3]."""
SPLITS = {"train": 6, "val": 3}
CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def draw_folder(dataset: str, root: Path, size: tuple[int, int] = (24, 32), kind: str = "png") -> Truth:
    """A data set of 6 and 3 images; labels as .png, .npy or .mat where it may have them so."""
    draw = {"nyud": draw_nyud, "pascal_context": draw_pascal, "cityscapes": draw_cityscapes}[dataset]
    truth: Truth = {}
    for split, count in SPLITS.items():
        names = [f"{split}_{i}" for i in range(count)]
        truth |= draw(root, split, names, size, kind)
    return truth


def draw_nyud(root: Path, split: str, names: Sequence[str], size: tuple[int, int], kind: str) -> Truth:
    """images/, segmentation/, depth/, normals/, edge/, gt_sets/."""
    _list(root / "gt_sets" / f"{split}.txt", names)
    truth = {}
    for name in names:
        rng = _rng(name)
        labels = {
            "image": _picture(rng, size),
            "semseg": rng.integers(-1, 40, size),
            "depth": np.where(rng.random(size) < 0.2, 0, rng.uniform(0.5, 9, size)).astype(np.float32),
            "normals": _normals(rng, size),
            "edges": (rng.random(size) < 0.1).astype(np.float32),
        }
        save(root / "images" / name, labels["image"], "png")
        save(root / "segmentation" / name, (labels["semseg"] + 1).astype(np.uint8), kind, "segmentation")
        save(root / "depth" / name, labels["depth"], "mat" if kind == "mat" else "npy", "depth")
        save_normals(root / "normals" / name, labels["normals"], kind)
        save(root / "edge" / name, (labels["edges"] * (255 if kind == "png" else 1)).astype(np.uint8), kind, "edge")
        truth[name] = labels
    return truth


def draw_pascal(root: Path, split: str, names: Sequence[str], size: tuple[int, int], kind: str) -> Truth:
    """JPEGImages/, semseg/, human_parts/, sal_distill/, normals_distill/, pascal-context/, ImageSets/.

    The map of contexts has two classes, wall and ground, of which the first alone has normals. Every other image shows
    people. Images are .png: JPEG would change them.
    """
    _list(root / "ImageSets" / "Context" / f"{split}.txt", names)
    truth = {}
    for i, name in enumerate(names):
        rng = _rng(name)
        wall = np.zeros(size, dtype=bool)
        wall[: rng.integers(4, size[0] - 4)] = True
        edges = np.zeros(size, dtype=np.float32)
        edges[wall.sum(0)[0] - 1] = 1
        labels = {
            "image": _picture(rng, size),
            "semseg": rng.integers(-1, 21, size),
            "parts": rng.integers(0, 7, size) if i % 2 == 0 else np.full(size, -1),
            "saliency": (rng.random(size) < 0.3).astype(np.float32),
            "normals": np.where(wall[..., None], _normals(rng, size), 0).astype(np.float32),
            "edges": edges,
        }
        folder = "VOC12" if i % 3 else "pascal-context"
        save(root / "JPEGImages" / name, labels["image"], "png")
        void = np.where(labels["semseg"] < 0, 255, labels["semseg"]).astype(np.uint8)
        save(root / "semseg" / folder / name, void, kind)
        save_parts(root / "human_parts" / f"{name}.mat", labels["parts"])
        save(root / "sal_distill" / name, (labels["saliency"] * 255).astype(np.uint8), kind)
        everywhere = np.where(wall[..., None], labels["normals"], _normals(rng, size))
        save_normals(root / "normals_distill" / name, everywhere, kind)
        context = np.where(wall, 440, 189).astype(np.uint16)
        save(root / "pascal-context" / "trainval" / name, context, "mat", "LabelMap")
        truth[name] = labels
    return truth


def draw_cityscapes(root: Path, split: str, names: Sequence[str], size: tuple[int, int], kind: str) -> Truth:
    """leftImg8bit/, gtFine/, disparity/, each with <split>/<city>/."""
    truth = {}
    for i, name in enumerate(names):
        rng = _rng(name)
        stem = f"{split}/{('aachen', 'bonn')[i % 2]}/{name}"
        ids = rng.integers(0, 34, size)
        disparity = np.where(rng.random(size) < 0.2, 0, rng.integers(1, 30000, size)).astype(np.uint16)
        known = disparity > 1
        metres = 0.209313 * 2262.52 / ((np.where(known, disparity, 2).astype(np.float64) - 1) / 256)
        labels = {
            "image": _picture(rng, size),
            "semseg": np.array([CITY_IDS.index(n) if n in CITY_IDS else -1 for n in ids.flat]).reshape(size),
            "depth": np.where(known, metres, 0).astype(np.float32),
        }
        save(root / "leftImg8bit" / f"{stem}_leftImg8bit", labels["image"], "png")
        save(root / "gtFine" / f"{stem}_gtFine_labelIds", ids.astype(np.uint8), kind)
        save(root / "disparity" / f"{stem}_disparity", disparity, kind)
        truth[stem] = labels
    return truth


def save(stem: Path, array: np.ndarray, kind: str, key: str = "label") -> Path:
    """Write an array to stem.<kind>."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.parent / f"{stem.name}.{kind}"
    if kind == "png":
        Image.fromarray(array).save(path)
    elif kind == "npy":
        np.save(path, array)
    else:
        savemat(path, {key: array})
    return path


def save_normals(stem: Path, normals: np.ndarray, kind: str) -> None:
    """As published: x left, y up, z to the camera; 8 bits in a .png."""
    stored = normals * np.array([-1, 1, 1], dtype=np.float32)
    save(stem, np.round((stored + 1) * 127.5).astype(np.uint8) if kind == "png" else stored, kind)


PART_NAMES = ("hair", "torso", "ruarm", "lhand", "luleg", "rfoot")


def save_parts(path: Path, numbers: np.ndarray) -> None:
    """PASCAL-Part's structures: a cat, and a person unless all is unknown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = np.ones(numbers.shape, dtype=np.uint8)
    things = [("cat", 8, everything, _structures([("head", everything)], ("part_name", "mask")))]
    if (numbers >= 0).any():
        masks = [(name, (numbers == i).astype(np.uint8)) for i, name in enumerate(PART_NAMES, start=1)]
        person = (numbers > 0).astype(np.uint8)
        things.append(("person", 15, person, _structures(masks, ("part_name", "mask"))))
    objects = _structures(things, ("class", "class_ind", "mask", "parts"))
    savemat(path, {"anno": {"imname": path.stem, "objects": objects}})


def _structures(rows: Sequence[tuple], fields: tuple[str, ...]) -> np.ndarray:
    """An array of MATLAB structures."""
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        array[0, i] = row
    return array


def _list(path: Path, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def _normals(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Unit vectors that face the camera; a fifth unknown."""
    vectors = rng.standard_normal((*size, 3))
    vectors[..., 2] = np.abs(vectors[..., 2])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(rng.random((*size, 1)) < 0.2, 0, vectors).astype(np.float32)
