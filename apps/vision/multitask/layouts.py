"""Where NYUD-v2, PASCAL-Context and Cityscapes keep their labels for several tasks, and how the files become labels.

Readers of label files take what a file holds and give arrays in the conventions of `apps.vision.multitask.tasks`, at
the size of the file; normals as [H, W, 3].

**Normals.** The files hold (x left, y up, z to the camera), so the first component changes its sign. This is read off
published pictures rather than stated anywhere: floors are green (y up), walls on the right red (x left), and what faces
the camera blue. Were it otherwise, all labels would be mirrored alike: neither training nor angles would change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from apps.errors import UserError
from apps.vision.multitask.tasks import TASKS, UNKNOWN, TaskSpec

CITYSCAPES_FOCAL, CITYSCAPES_BASELINE = 2262.52, 0.209313
"""Pixels and metres of the camera that most of Cityscapes was taken with."""
HUMAN = 15
"""PASCAL's class number of people, from 1."""


def numbers_from_one(array: Shaped[ndarray, "H W"]) -> Int[ndarray, "H W"]:
    """Classes 1, 2, ... become 0, 1, ...; 0 is unknown."""
    return array.astype(np.int64) - 1


def numbers_from_zero(array: Shaped[ndarray, "H W"]) -> Int[ndarray, "H W"]:
    """Classes 0, 1, ... as they are; 255 is unknown."""
    numbers = array.astype(np.int64)
    return np.where(numbers == 255, UNKNOWN, numbers)


def city_classes(array: Shaped[ndarray, "H W"]) -> Int[ndarray, "H W"]:
    """Cityscapes' 34 label numbers as the 19 classes that are evaluated; all others are unknown."""
    table = np.full(256, UNKNOWN, dtype=np.int64)
    table[list(_CITY_LABELS)] = np.arange(len(_CITY_LABELS))
    return table[array.astype(np.uint8)]


def yes_or_no(array: Shaped[ndarray, "H W"]) -> Float[ndarray, "H W"]:
    """1 in the upper half of the range, which is [0, 1] or [0, 255]; else 0."""
    return (array > (127 if array.max(initial=0) > 1 else 0.5)).astype(np.float32)


def yes_no_or_unknown(array: Shaped[ndarray, "H W"]) -> Float[ndarray, "H W"]:
    """0, 1, and 255 for unknown."""
    return np.where(array == 255, np.float32(UNKNOWN), (array > 0).astype(np.float32))


def metres(array: Shaped[ndarray, "H W"]) -> Float[ndarray, "H W"]:
    """Depth in metres, or whole millimetres; unknown (0) where not positive and finite."""
    depth = array.astype(np.float32) * np.float32(0.001 if np.issubdtype(array.dtype, np.integer) else 1)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def metres_from_disparity(array: Shaped[ndarray, "H W"]) -> Float[ndarray, "H W"]:
    """Depth from Cityscapes' 16-bit disparities d: focal length times baseline over (d - 1) / 256; 0 is unknown."""
    disparity = (array.astype(np.float32) - 1) / 256
    depth = CITYSCAPES_FOCAL * CITYSCAPES_BASELINE / np.where(disparity > 0, disparity, 1)
    return np.where(disparity > 0, depth, 0).astype(np.float32)


def mirrored_vectors(array: Shaped[ndarray, ...]) -> Float[ndarray, "H W 3"]:
    """Normals as `unit_vectors` reads them, of files that have x to the left."""
    return unit_vectors(array) * np.array([-1, 1, 1], dtype=np.float32)


def unit_vectors(array: Shaped[ndarray, ...]) -> Float[ndarray, "H W 3"]:
    """Normals, of components in [-1, 1] or 8-bit in [0, 255]; what is much shorter than 1 is unknown."""
    array = array if array.shape[-1] == 3 else np.moveaxis(array, 0, -1)
    vectors = array.astype(np.float32) / np.float32(127.5) - 1 if array.dtype == np.uint8 else array.astype(np.float32)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length > 0.5, vectors / np.maximum(length, 0.5), np.float32(0))


def boundaries(array: Shaped[ndarray, "H W"]) -> Float[ndarray, "H W"]:
    """1 where the class differs from that of the pixel below or to the right.

    One pixel wide. The published reader takes both sides of a boundary by a Laplacian and thins the result, which lies
    within a pixel of this.
    """
    edges = np.zeros(array.shape, dtype=np.float32)
    edges[:-1][array[:-1] != array[1:]] = 1
    edges[:, :-1][array[:, :-1] != array[:, 1:]] = 1
    return edges


def human_parts(content: Mapping[str, Any] | ndarray) -> Int[ndarray, "H W"] | None:
    """Six parts of people and the background, from masks of PASCAL-Part's finer ones or from class numbers.

    None, all unknown, where no person's parts are labelled: as published, such images do not count as background.
    """
    if isinstance(content, ndarray):
        numbers = numbers_from_zero(content)
        return numbers if (numbers > 0).any() else None
    numbers = None
    for thing in _each(content["objects"]):
        parts = _each(thing["parts"]) if thing["class_ind"] == HUMAN else []
        if numbers is None and parts:
            numbers = np.zeros(thing["mask"].shape, dtype=np.int64)
        for part in parts:
            numbers[part["mask"].astype(bool)] = _PART_NUMBERS[str(part["part_name"])]
    return numbers


def _each(items: Any) -> list:
    """A MATLAB array of structures as a list: scipy gives a single one without its array."""
    return [items] if isinstance(items, dict) else list(items)


@dataclass(frozen=True)
class Labels:
    """Labels of one task."""

    files: tuple[str, ...]
    """Where a label is, {} being the image's name, without suffix; the first that exists counts."""
    read: Callable[[Any], ndarray | None]
    key: str | None = None
    """Variable of a .mat file that has several."""
    only: tuple[str, tuple[int, ...]] | None = None
    """A map of classes, like one of `files`, and the classes where alone the labels hold, if there is such a map."""


@dataclass(frozen=True)
class Layout:
    """The folders of a data set."""

    image: str
    """Where an image is, {} being its name, without suffix."""
    lists: str | None
    """File of the names of a split, one a line; None: all images in the folder {split}/."""
    tasks: tuple[TaskSpec, ...]
    labels: Mapping[str, Labels]
    height: int
    """Size that images come to unless asked otherwise: as published for M³ViT."""
    width: int
    pad: bool = False
    """Keep proportions: make larger images smaller, then fill up around them; else resize to the size."""
    own: bool = False
    """The user's own, where lists of names may be missing."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in text.split())


def _numbered(groups: Iterable[str]) -> dict[str, int]:
    return {name: number for number, group in enumerate(groups, start=1) for name in group.split()}


_PART_NUMBERS = _numbered(
    (
        "hair head lear lebrow leye mouth nose rear rebrow reye",
        "neck torso",
        "luarm ruarm",
        "lhand llarm rhand rlarm",
        "luleg ruleg",
        "lfoot llleg rfoot rlleg",
    )
)
_PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
_CITY_LABELS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITY = _names(
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck "
    "bus train motorcycle bicycle"
)
_NYU = _names(
    "wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser "
    "pillow mirror floor_mat clothes ceiling books refrigerator television paper towel shower_curtain box whiteboard "
    "person night_stand toilet sink lamp bathtub bag other_structure other_furniture other_prop"
)
_PASCAL = _names(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)
_CONTEXT = "pascal-context/trainval/{}"
# fmt: off
_WITH_NORMALS = (  # classes of PASCAL-Context that NYUD-v2, on which the labelling network was trained, has too
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56, 59,
    61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124, 135,
    141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215,
    216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272,
    273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323, 329,
    330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405,
    407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
)
# fmt: on

NYUD = Layout(
    image="images/{}",
    lists="gt_sets/{split}.txt",
    tasks=(TaskSpec("semseg", _NYU), TaskSpec("depth"), TaskSpec("normals"), TaskSpec("edges")),
    labels={
        "semseg": Labels(("segmentation/{}",), numbers_from_one, "segmentation"),
        "depth": Labels(("depth/{}",), metres, "depth"),
        "normals": Labels(("normals/{}",), mirrored_vectors, "normals"),
        "edges": Labels(("edge/{}",), yes_or_no, "edge"),
    },
    height=480,
    width=640,
)
"""NYUD-v2: 795 images to train on, 654 to test on, as ASTMT (arXiv 1904.08918), MTI-Net (2001.06902), M³ViT and ATRC
(2104.13874) use it; their files differ in type (.png, .npy, .mat), and ATRC's are cut to a smaller size. 40 classes, 0
being unknown; depth in metres; edges 0 or 1, or 0 or 255."""

PASCAL_CONTEXT = Layout(
    image="JPEGImages/{}",
    lists="ImageSets/Context/{split}.txt",
    tasks=(
        TaskSpec("semseg", _PASCAL),
        TaskSpec("parts", _PARTS),
        TaskSpec("saliency"),
        TaskSpec("normals"),
        TaskSpec("edges"),
    ),
    labels={
        "semseg": Labels(("semseg/VOC12/{}", "semseg/pascal-context/{}", "semseg/{}"), numbers_from_zero),
        "parts": Labels(("human_parts/{}",), human_parts, "anno"),
        "saliency": Labels(("sal_distill/{}",), yes_or_no),
        "normals": Labels(("normals_distill/{}",), mirrored_vectors, only=(_CONTEXT, _WITH_NORMALS)),
        "edges": Labels((_CONTEXT, "pascal-context/{}"), boundaries, "LabelMap"),
    },
    height=512,
    width=512,
    pad=True,
)
"""PASCAL-Context: 4,998 images to train on, 5,105 to test on, of at most 500 x 500, with labels put together for ASTMT
(arXiv 1904.08918). Saliency and normals are the outputs of networks; normals hold for classes that NYUD has. Edges lie
between the 459 classes of `LabelMap` in pascal-context/trainval/<name>.mat."""

CITYSCAPES = Layout(
    image="leftImg8bit/{}_leftImg8bit",
    lists=None,
    tasks=(TaskSpec("semseg", _CITY), TaskSpec("depth")),
    labels={
        "semseg": Labels(("gtFine/{}_gtFine_labelIds",), city_classes),
        "depth": Labels(("disparity/{}_disparity",), metres_from_disparity),
    },
    height=128,
    width=256,
)
"""Cityscapes: 2,975 images to train on, 500 to test on (its val), of 1024 x 2048: as its publisher packs it, in
<kind>/<split>/<city>/. 19 classes; metres from disparity."""

LAYOUTS = {"nyud": NYUD, "pascal_context": PASCAL_CONTEXT, "cityscapes": CITYSCAPES}
"""By the names of `data.dataset`."""


OWN = {
    "semseg": numbers_from_zero,
    "parts": numbers_from_zero,
    "saliency": yes_no_or_unknown,
    "depth": metres,
    "normals": unit_vectors,
    "edges": yes_no_or_unknown,
}
"""Readers of labels in one's own folders, which are named by the task."""


def own_layout(root: Path) -> Layout:
    """The layout of one's own data: images/, a folder by the name of each task, and what classes there are.

    Names of classes are lines of `<task>/classes.txt`. Lists of names, train.txt and val.txt, may be missing.

    Raises:
        UserError: if the classes of a task are not named.
    """
    tasks = []
    for name in OWN:
        classes: tuple[str, ...] = ()
        if TASKS[name].channels is None and (root / name).is_dir():
            file = root / name / "classes.txt"
            if not file.is_file():
                raise UserError(f"data.root={root}: no file {name}/classes.txt, with the names of classes 0, 1, ...")
            classes = tuple(line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip())
        tasks.append(TaskSpec(name, classes))
    labels = {name: Labels((f"{name}/{{}}",), read) for name, read in OWN.items()}
    return Layout("images/{}", "{split}.txt", tuple(tasks), labels, 224, 224, own=True)


def layout_of(dataset: str, root: Path) -> Layout:
    """The layout of a data set by its name; of one's own data as its folder has it."""
    return own_layout(root) if dataset == "maps" else LAYOUTS[dataset]
