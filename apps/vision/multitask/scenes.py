"""Generated scenes with labels for five tasks: solids of several kinds on the floor of a room, ray cast.

A scene is a function of its seed and number alone. Colours and textures are drawn alike for every surface, so that only
shape tells the kinds apart, only perspective and shading the distance.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from apps.progress import track
from apps.vision.multitask.rendering import (
    FIRST_SOLID,
    SHAPES,
    Hits,
    Light,
    Material,
    Room,
    Scene,
    Solid,
    camera_rays,
    cast,
    radiance,
    surface_normals,
)
from apps.vision.multitask.tasks import UNKNOWN, SceneSpec, TaskSpec
from moecore.errors import require

KINDS = tuple(SHAPES)
TEXTURES = ("plain", "checker", "stripes", "dots", "noise")
SCENE_TASKS: tuple[TaskSpec, ...] = (
    TaskSpec("semseg", ("floor", "wall", *KINDS)),
    TaskSpec("depth"),
    TaskSpec("normals"),
    TaskSpec("edges"),
    TaskSpec("classification", KINDS),
)
"""Tasks that scenes have labels for; classification asks for the kind of the nearest of the solids that are seen."""
FIELD_OF_VIEW = 60
"""Of the longer side of an image, in degrees."""
LEAST_SHARE = 0.004
"""Of an image's pixels, that a solid must cover to count as seen."""
CLEARLY = 1.05
"""Ratio of depths by which the nearest kind of solid is nearer than the next."""
LEAST_JUMP = 0.1
"""Metres by which depth must leave the tangent planes on both sides to make an edge within one smooth surface."""
MEAN, STD = (0.51, 0.51, 0.51), (0.18, 0.18, 0.18)
"""Of the pixels of 1000 scenes, per channel."""


def focal_length(height: int, width: int) -> float:
    """Focal length in pixels of images of a size; the optical axis meets the image in its middle."""
    return max(height, width) / (2 * math.tan(math.radians(FIELD_OF_VIEW / 2)))


def scene_spec(height: int, width: int) -> SceneSpec:
    """What a model must know of scenes of a size."""
    return SceneSpec(height, width, SCENE_TASKS, MEAN, STD)


def make_scenes(
    count: int, seed: int, height: int, width: int, first: int = 0, progress: bool = True
) -> tuple[UInt8[Tensor, "N 3 H W"], dict[str, Tensor]]:
    """Images and labels of scenes `first` to `first + count - 1`; see `make_scene`.

    Args:
        count: scenes.
        seed: scenes of one seed differ by their numbers: give splits disjoint ranges.
        height, width: pixels.
        first: number of the first one.
        progress: show a bar on a terminal.
    """
    require(count >= 1, "count", count, "must be at least 1")
    numbers = track(range(first, first + count), "making scenes", show=progress)
    made = [make_scene(seed, number, height, width) for number in numbers]
    labels = {task.name: torch.stack([label[task.name] for _, label in made]) for task in SCENE_TASKS}
    return torch.stack([image for image, _ in made]), labels


def make_scene(seed: int, index: int, height: int, width: int) -> tuple[UInt8[Tensor, "3 H W"], dict[str, Tensor]]:
    """An image and its labels in the conventions of `tasks`, without the batch's dimension.

    What is in a scene, and where, does not depend on the size of its image. Images are averages over 2 x 2 rays per
    pixel; labels belong to the pixels' centres.

    Args:
        seed: of all scenes; not negative.
        index: number of the scene; not negative.
        height, width: pixels, at least 4.

    Raises:
        ConfigError: an argument is too small.
    """
    for name, value, least in (("seed", seed, 0), ("index", index, 0), ("height", height, 4), ("width", width, 4)):
        require(value >= least, name, value, f"must be at least {least}")
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
    scene = draw_scene(generator)
    image = _develop(radiance(scene, height, width, focal_length(height, width)), generator)
    return torch.from_numpy(image), label_scene(scene, height, width)


def label_scene(scene: Scene, height: int, width: int) -> dict[str, Tensor]:
    """Labels of all tasks, at the centres of the pixels of an image of a size."""
    rays = camera_rays(height, width, focal_length(height, width))
    directions = scene.camera @ rays
    hits = cast(scene, scene.eye, directions)
    points = scene.eye[:, None] + hits.depth * directions
    normals = (scene.camera.T @ surface_normals(scene, hits, points)).reshape(3, height, width)
    depth = hits.depth.reshape(height, width)
    classes = np.array([0, 1, *(FIRST_SOLID + KINDS.index(solid.kind) for solid in scene.solids)])
    surfaces = (hits.body * 16 + hits.face).reshape(height, width)
    return {
        "semseg": torch.from_numpy(classes[hits.body].reshape(height, width)),
        "depth": torch.from_numpy(depth),
        "normals": torch.from_numpy(normals),
        "edges": torch.from_numpy(_edges(surfaces, depth, normals, rays.reshape(3, height, width))),
        "classification": torch.tensor(_nearest_kind(scene, hits)),
    }


def _nearest_kind(scene: Scene, hits: Hits) -> int:
    """Class of the solid whose visible part comes nearest, of those large enough to be seen; UNKNOWN without any."""
    distances = _distances(scene, hits)
    return KINDS.index(min(distances, key=distances.__getitem__)) if distances else UNKNOWN


def _distances(scene: Scene, hits: Hits) -> dict[str, float]:
    """Least depth of what is seen of each kind of solid."""
    distances: dict[str, float] = {}
    for number, solid in enumerate(scene.solids, FIRST_SOLID):
        depths = hits.depth[hits.body == number]
        if depths.size >= max(1, LEAST_SHARE * hits.body.size):
            distances[solid.kind] = min(distances.get(solid.kind, math.inf), float(depths.min()))
    return distances


def _edges(
    surfaces: Int[np.ndarray, "H W"],
    depth: Float[np.ndarray, "H W"],
    normals: Float[np.ndarray, "3 H W"],
    rays: Float[np.ndarray, "3 H W"],
) -> Float[np.ndarray, "H W"]:
    """1 where a pixel borders on another smooth surface, or on a farther part of its own, that is behind it.

    Of the two pixels at a border the nearer one is marked: a line one pixel wide, that belongs to what occludes.
    """
    edges = np.zeros(depth.shape, np.float32)
    for axis in (0, 1):
        a, b = (slice(None, -1), slice(None)), (slice(1, None), slice(None))
        if axis == 1:
            a, b = a[::-1], b[::-1]
        border = (surfaces[a] != surfaces[b]) | _jump(depth, normals, rays, a, b)
        nearer = depth[a] <= depth[b]
        edges[a][border & nearer] = 1
        edges[b][border & ~nearer] = 1
    return edges


def _jump(
    depth: Float[np.ndarray, "H W"],
    normals: Float[np.ndarray, "3 H W"],
    rays: Float[np.ndarray, "3 H W"],
    a: tuple[slice, slice],
    b: tuple[slice, slice],
) -> Bool[np.ndarray, "h w"]:
    """Whether neither of two neighbours lies near the other's tangent plane."""
    off = np.full(depth[a].shape, np.inf, np.float32)
    for here, there in ((a, b), (b, a)):
        normal = normals[:, *here]
        slope = (normal * rays[:, *there]).sum(0)
        plane = depth[here] * (normal * rays[:, *here]).sum(0) / np.where(np.abs(slope) < 1e-6, 1e-6, slope)
        off = np.minimum(off, np.abs(plane - depth[there]))
    return off > LEAST_JUMP


def _develop(light: Float[np.ndarray, "3 H W"], generator: np.random.Generator) -> UInt8[np.ndarray, "3 H W"]:
    """A photograph: exposure, a film's shoulder, gamma and noise of a strength of the picture's own."""
    exposure = math.exp(generator.uniform(0.1, 0.8))
    noise = generator.uniform(0.004, 0.02) * generator.standard_normal(light.shape, dtype=np.float32)
    picture = (1 - np.exp(-exposure * light)) ** np.float32(1 / 2.2)
    return (255 * np.clip(picture + noise, 0, 1) + 0.5).astype(np.uint8)


def draw_scene(generator: np.random.Generator) -> Scene:
    """A room, what is in it, its lights, and the camera: above the world's origin, looking along y.

    Drawn again where no kind of solid is clearly the nearest, as judged from few rays, whatever the image's size.
    """
    rays = camera_rays(24, 36, focal_length(24, 36))
    while True:
        scene = _draw(generator)
        first, *others = sorted(_distances(scene, cast(scene, scene.eye, scene.camera @ rays)).values()) or [math.inf]
        if first < math.inf and all(first * CLEARLY < other for other in others):
            return scene


def _draw(generator: np.random.Generator) -> Scene:
    height = generator.uniform(1.1, 2.2)
    look = generator.uniform(2.6, 4.6)  # where the optical axis meets the floor
    tilt = math.atan2(height, look)
    eye = np.float32([0, 0, height])
    room = _draw_room(generator)
    close = height / math.tan(tilt + math.radians(20))  # the lower border of a picture of 3 : 2
    return Scene(
        room,
        _draw_solids(generator, room, close),
        _draw_lights(generator, room),
        np.float32(generator.uniform(0.25, 0.5)) * _tint(generator),
        eye,
        _camera(tilt, generator.normal(0, math.radians(2))),
    )


def _camera(tilt: float, roll: float) -> Float[np.ndarray, "3 3"]:
    """Columns right, up, backwards of a camera that looks down by `tilt`, turned by `roll` about its axis."""
    level = np.array([[1, 0, 0], [0, math.sin(tilt), -math.cos(tilt)], [0, math.cos(tilt), math.sin(tilt)]])
    return (level @ _turn(roll)).astype(np.float32)


def _turn(angle: float) -> Float[np.ndarray, "3 3"]:
    """Rotation about z."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)


def _draw_room(generator: np.random.Generator) -> Room:
    """Four walls turned at random; those before the camera are farther than those beside and behind it."""
    angle = generator.uniform(0, math.pi / 2)
    normals, offsets = [(0.0, 0.0, -1.0)], [0.0]
    for k in range(4):
        x, y = math.cos(angle + k * math.pi / 2), math.sin(angle + k * math.pi / 2)
        normals.append((x, y, 0.0))
        offsets.append(generator.uniform(3.5, 6.5) if y > 0.4 else generator.uniform(1.8, 4.5))
    return Room(np.float32(normals), np.float32(offsets), _draw_material(generator), _draw_material(generator))


def _draw_material(generator: np.random.Generator) -> Material:
    """Alike for every kind of surface."""
    hue, saturation, value = generator.random(), generator.uniform(0.05, 0.7), generator.uniform(0.5, 0.95)
    other = (hue + generator.normal(0, 0.12)) % 1, generator.uniform(0.05, 0.7), value * generator.uniform(0.45, 0.8)
    colours = np.array([colorsys.hsv_to_rgb(hue, saturation, value), colorsys.hsv_to_rgb(*other)]) ** 2.2
    if generator.random() < 0.5:
        colours = colours[::-1]
    texture = TEXTURES[generator.integers(len(TEXTURES))]
    axes = np.eye(3) if texture == "checker" else np.linalg.qr(generator.standard_normal((3, 3)))[0]
    return Material(
        texture,
        colours.T.astype(np.float32),
        generator.uniform(0.16, 0.6),
        axes.astype(np.float32),
        generator.random(3, dtype=np.float32),
        generator.uniform(-0.6, 0.6, (5, 3)).astype(np.float32),
        generator.uniform(0, 0.35),
    )


def _tint(generator: np.random.Generator) -> Float[np.ndarray, " 3"]:
    """A light's colour: between cold and warm."""
    warmth = generator.uniform(-0.12, 0.12)
    return np.float32([1 + warmth, 1, 1 - warmth])


def _draw_lights(generator: np.random.Generator, room: Room) -> tuple[Light, ...]:
    """One or two lights high up within the room, the second weaker."""
    lights = []
    for strength in (1.1, 0.5)[: generator.integers(1, 3)]:
        place = np.array([generator.uniform(-3, 3), generator.uniform(-1, 4), generator.uniform(2.8, 4.5)])
        for normal, offset in zip(room.normals[1:], room.offsets[1:], strict=True):
            place -= max(0.0, normal @ place - (offset - 0.5)) * normal
        colour = np.float32(strength * generator.uniform(0.8, 1.2)) * _tint(generator)
        lights.append(Light(place.astype(np.float32), colour))
    return tuple(lights)


def _draw_solids(generator: np.random.Generator, room: Room, close: float) -> tuple[Solid, ...]:
    """Solids that stand or lie on the floor or on one another, without touching otherwise.

    Args:
        generator: to draw from.
        room: that they must fit in.
        close: distance in metres, along the floor, from which on it is seen.
    """
    solids: list[Solid] = []
    taken: list[tuple[float, float, float]] = []  # discs on the floor: x, y, radius
    tops: list[tuple[float, float, float, float]] = []  # flat ones that are free: x, y, height, radius
    for _ in range(generator.integers(4, 10)):
        kind = KINDS[generator.integers(len(KINDS))]
        scale = _draw_scale(generator, kind)
        rotation = _pose(generator, kind, scale)
        radius, below, above = _extents(kind, rotation, scale)
        if tops and generator.random() < 0.35:
            x, y, height, room_on_top = tops.pop()
            shrink = min(1.0, room_on_top / radius)
            scale, below, above = scale * shrink, below * shrink, above * shrink
        else:
            place = _free_place(generator, room, taken, close, radius)
            if place is None:
                continue
            (x, y), height = place, 0.0
            taken.append((x, y, radius))
            if kind in ("box", "cylinder") and abs(rotation[2, 2]) > 0.99:  # upright
                tops.append((x, y, below + above, float(scale[:2].min())))
        centre = np.float32([x, y, height + below])
        solids.append(Solid(kind, centre, rotation, scale, _draw_material(generator)))
    return tuple(solids)


def _free_place(
    generator: np.random.Generator, room: Room, taken: list[tuple[float, float, float]], close: float, radius: float
) -> tuple[float, float] | None:
    """A place on the floor, in view, for a disc that meets neither a wall nor others; None if none was found."""
    for _ in range(20):
        y = close * math.exp(generator.uniform(0, 1) * math.log(6.0 / close)) + radius / 2
        x = generator.uniform(-0.5, 0.5) * y
        walls = room.offsets[1:] - room.normals[1:, :2] @ np.array([x, y], np.float32)
        if walls.min() > radius and all(math.hypot(x - a, y - b) > radius + other for a, b, other in taken):
            return x, y
    return None


def _draw_scale(generator: np.random.Generator, kind: str) -> Float[np.ndarray, " 3"]:
    """Half extents in metres; balls and rings keep their form."""
    if kind in ("sphere", "torus"):
        return np.full(3, generator.uniform(0.2, 0.42 if kind == "sphere" else 0.36), np.float32)
    wide, deep, high = generator.uniform(0.18, 0.42, 3)
    return np.float32([wide, deep if kind == "box" else wide, high])


def _pose(generator: np.random.Generator, kind: str, scale: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "3 3"]:
    """Rotation that turns one of the faces that a shape rests on downwards, and the shape about the vertical."""
    rests = SHAPES[kind].rests
    down = rests[:, generator.integers(rests.shape[1])] / scale
    x, _, z = down / np.linalg.norm(down)
    upright = np.array([[-z, 0, x], [0, 1, 0], [-x, 0, -z]])  # takes `down` to -z
    return (_turn(generator.uniform(0, 2 * math.pi)) @ upright).astype(np.float32)


def _extents(
    kind: str, rotation: Float[np.ndarray, "3 3"], scale: Float[np.ndarray, " 3"]
) -> tuple[float, float, float]:
    """(radius about the vertical axis, height below the centre, height above it) of a turned shape."""
    x, y, z = rotation @ (SHAPES[kind].hull * scale[:, None])
    ball = float(SHAPES[kind].rounding * scale[0])
    return float(np.hypot(x, y).max()) + ball, ball - float(z.min()), ball + float(z.max())
