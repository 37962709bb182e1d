"""Ray casting of textured solids in a room, all rays of an image at once. NumPy, single precision, metres.

Solids are intersected exactly, in the frame in which they are of unit size; only the torus is sphere traced (Hart 1996,
"Sphere tracing"). Light is Lambert's plus Blinn and Phong's highlights, with cast shadows. Arrays of vectors are
[3, N]: components first, so that every operation runs over long rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

Vector = Float[np.ndarray, " 3"]
Vectors = Float[np.ndarray, "3 N"]
Values = Float[np.ndarray, " N"]
Faces = Int[np.ndarray, " N"]

TINY = 1e-9
"""Stands in for rates of 0 that are divided by."""
TUBE = 0.36
"""Radius of a torus' tube over that of the circle that it follows."""
TRACING_STEPS, NEWTON_STEPS = 24, 6
"""Of a ray towards a torus, to come near and to arrive."""
FLOOR, WALLS, FIRST_SOLID = 0, 1, 2
"""Numbers of the bodies of a scene."""
SHININESS = 5
"""Doublings of the highlights' exponent: 2 to the power of this."""


@dataclass(frozen=True)
class Shape:
    """A solid of unit size about its origin, before it is scaled along its axes."""

    hit: Callable[[Vectors, Vectors], tuple[Values, Faces]]
    """Points and directions of lines -> where each enters (in directions from its point; inf: nowhere), which face."""
    normal: Callable[[Vectors, Faces], Vectors]
    """Points on the surface and their faces -> outward normals of any length."""
    hull: Float[np.ndarray, "3 P"]
    """Points that, each with a ball of radius `rounding` about it, span the convex hull."""
    rests: Float[np.ndarray, "3 R"]
    """Outward normals, of y = 0, of the faces that it may lie on."""
    rounding: float = 0.0


def _dot(a: Float[np.ndarray, "C N"], b: Float[np.ndarray, "C N"]) -> Values:
    return np.einsum("cn,cn->n", a, b)


def _nonzero(rates: Values) -> Values:
    return np.where(np.abs(rates) < TINY, TINY, rates)


def _round(points: Float[np.ndarray, "C N"], directions: Float[np.ndarray, "C N"]) -> tuple[Values, Values]:
    """Where lines enter and leave the unit ball or, of two components, circle; inf and -inf where they pass by."""
    square = np.maximum(_dot(directions, directions), TINY)
    middle = -_dot(points, directions) / square
    nearest = points + middle * directions
    room = 1 - _dot(nearest, nearest)
    half = np.where(room > 0, np.sqrt(np.maximum(room, 0) / square), -np.inf)
    return middle - half, middle + half


def _hit_sphere(points: Vectors, directions: Vectors) -> tuple[Values, Faces]:
    enter, _ = _round(points, directions)
    return enter, np.zeros(enter.shape, np.int64)


def _hit_cylinder(points: Vectors, directions: Vectors) -> tuple[Values, Faces]:
    side, side_leave = _round(points[:2], directions[:2])
    rate = _nonzero(directions[2])
    lids = np.stack([(-1 - points[2]) / rate, (1 - points[2]) / rate])
    lid = lids.min(0)
    enter = np.maximum(side, lid)
    face = np.where(side > lid, 0, np.where(rate < 0, 1, 2))
    return np.where(enter < np.minimum(side_leave, lids.max(0)), enter, np.inf), face


def _hit_cone(points: Vectors, directions: Vectors) -> tuple[Values, Faces]:
    """Apex at z = 1, base of radius 1 at z = -1; of the double cone's two crossings those below the apex count."""
    radius, rate = (1 - points[2]) / 2, -directions[2] / 2  # of the cone, at the line's height
    a = _nonzero(_dot(directions[:2], directions[:2]) - rate * rate)
    b = _dot(points[:2], directions[:2]) - radius * rate
    c = _dot(points[:2], points[:2]) - radius * radius
    root = np.sqrt(np.maximum(b * b - a * c, 0))
    best = np.full(a.shape, np.inf, a.dtype)
    for sign in (-1, 1):
        t = (-b + sign * root) / a
        z = points[2] + t * directions[2]
        best = np.where((b * b > a * c) & (np.abs(z) < 1) & (t < best), t, best)
    base = (-1 - points[2]) / _nonzero(directions[2])
    across = points[:2] + base * directions[:2]
    on_base = (_dot(across, across) < 1) & (base < best)
    return np.where(on_base, base, best), on_base.astype(np.int64)


def _hit_torus(points: Vectors, directions: Vectors) -> tuple[Values, Faces]:
    length = np.sqrt(_dot(directions, directions))
    directions = directions / length
    enter, leave = _round(points / (1 + TUBE), directions / (1 + TUBE))
    met = enter < leave  # the ball about it
    t, leave = np.where(met, enter, 0), np.where(met, leave, 0)
    for _ in range(TRACING_STEPS):
        t = np.minimum(t + _torus_gap(points + t * directions), leave)
    for _ in range(NEWTON_STEPS):
        at = points + t * directions
        t = t + _torus_gap(at) / np.clip(-_dot(_torus_normal(at), directions) / TUBE, 0.1, 1)
    found = met & (np.abs(_torus_gap(points + t * directions)) < 1e-4)
    return np.where(found, t / length, np.inf), np.zeros(t.shape, np.int64)


def _torus_gap(points: Vectors) -> Values:
    """Distance from the surface; negative inside."""
    x, y, z = points
    ring = np.sqrt(x * x + y * y) - 1  # np.hypot takes twice as long
    return np.sqrt(ring * ring + z * z) - TUBE


def _torus_normal(points: Vectors, faces: Faces | None = None) -> Vectors:
    x, y, z = points
    beyond = 1 - 1 / np.maximum(np.sqrt(x * x + y * y), TINY)
    return np.stack([x * beyond, y * beyond, z])


def _cylinder_normal(points: Vectors, faces: Faces) -> Vectors:
    side = faces == 0
    return np.stack([points[0] * side, points[1] * side, (faces == 1) - (faces == 2).astype(points.dtype)])


def _cone_normal(points: Vectors, faces: Faces) -> Vectors:
    side = faces == 0
    return np.stack([points[0] * side, points[1] * side, np.where(side, np.hypot(points[0], points[1]) / 2, -1)])


def _polyhedron(normals: list, vertices: list, rests: list) -> Shape:
    """The points with normal . point <= 1 for every normal."""
    planes = np.array(normals, np.float32)

    def hit(points: Vectors, directions: Vectors) -> tuple[Values, Faces]:
        rate = _nonzero(planes @ directions)  # [F, N]
        t = (1 - planes @ points) / rate
        enter = np.where(rate < 0, t, -np.inf)
        leave = np.where(rate > 0, t, np.inf).min(0)
        enter, face = enter.max(0), enter.argmax(0)
        return np.where(enter < leave, enter, np.inf), face

    return Shape(hit, lambda points, faces: planes.T[:, faces], _columns(vertices), _columns(rests))


def _columns(points: list) -> Float[np.ndarray, "3 P"]:
    return np.array(points, np.float32).T


def _circle(height: float) -> list:
    return [(np.cos(a), np.sin(a), height) for a in np.linspace(0, 2 * np.pi, 48, endpoint=False)]


_DOWN, _SIDE, _APEX = (0, 0, -1), (1, 0, 0), (0, 0, 1)
_CORNERS = [(x, y, z) for z in (-1, 1) for x in (-1, 1) for y in (-1, 1)]
_SIDES, _SLOPES = ([(x, 0, z), (-x, 0, z), (0, x, z), (0, -x, z)] for x, z in ((1, 0), (2, 1)))

SHAPES: dict[str, Shape] = {
    "sphere": Shape(_hit_sphere, lambda points, faces: points, _columns([(0, 0, 0)]), _columns([_DOWN]), 1.0),
    "box": _polyhedron([*_SIDES, _APEX, _DOWN], _CORNERS, [_DOWN]),
    "cylinder": Shape(_hit_cylinder, _cylinder_normal, _columns(_circle(-1) + _circle(1)), _columns([_DOWN, _SIDE])),
    "cone": Shape(_hit_cone, _cone_normal, _columns([*_circle(-1), _APEX]), _columns([_DOWN, (1, 0, 0.5)])),
    "pyramid": _polyhedron([*_SLOPES, _DOWN], [*_CORNERS[:4], _APEX], [_DOWN, _DOWN, _SLOPES[0]]),
    "torus": Shape(_hit_torus, _torus_normal, _columns(_circle(0)), _columns([_DOWN, _SIDE]), TUBE),
}
"""By name. All but the torus are convex."""


@dataclass(frozen=True)
class Material:
    """Two colours in a pattern that fills space, so that it needs no map of the surface."""

    texture: str
    """plain, checker, stripes, dots or noise."""
    colours: Float[np.ndarray, "3 2"]
    """Reflected shares of red, green and blue."""
    period: float
    """Of the pattern, in metres."""
    axes: Float[np.ndarray, "3 3"]
    """Directions in which the pattern repeats, as rows."""
    phase: Vector
    waves: Float[np.ndarray, "K 3"]
    """Of the noise, in cycles per period."""
    gloss: float
    """Strength of highlights."""


@dataclass(frozen=True)
class Solid:
    """A shape with its place, size and material."""

    kind: str
    centre: Vector
    rotation: Float[np.ndarray, "3 3"]
    """From its own frame to the world's."""
    scale: Vector
    """Half of its extents along its own axes, in metres."""
    material: Material

    @cached_property
    def reach(self) -> float:
        """Radius of the ball about the centre that holds it."""
        hull = SHAPES[self.kind].hull * self.scale[:, None]
        return float(np.sqrt(_dot(hull, hull)).max() + SHAPES[self.kind].rounding * self.scale.max())

    def own(self, points: Vectors) -> Vectors:
        """Points of the world in its own frame, still in metres."""
        return self.rotation.T @ (points - self.centre[:, None])


@dataclass(frozen=True)
class Room:
    """A convex room without a ceiling: a floor and upright walls, seen from inside."""

    normals: Float[np.ndarray, "5 3"]
    """Outwards; the floor's first."""
    offsets: Float[np.ndarray, " 5"]
    """The room's points have normals . point < offsets."""
    floor: Material
    walls: Material

    def own(self, points: Vectors) -> Vectors:
        """Points of the world along two walls and the height: the frame of its patterns."""
        return self.normals[[1, 2, 0]] @ points


@dataclass(frozen=True)
class Light:
    """A point of light."""

    position: Vector
    colour: Vector
    """Radiance that it gives a white surface nearby, red, green and blue."""


@dataclass(frozen=True)
class Scene:
    """What is seen, and from where."""

    room: Room
    solids: tuple[Solid, ...]
    lights: tuple[Light, ...]
    ambient: Vector
    eye: Vector
    """Position of the camera."""
    camera: Float[np.ndarray, "3 3"]
    """From the camera's frame (x right, y up, z backwards) to the world's."""


@dataclass(frozen=True)
class Hits:
    """What the rays of an image meet first."""

    depth: Values
    """In lengths of the ray's direction: along the optical axis for the rays of `camera_rays`."""
    body: Faces
    """0 floor, 1 walls, 2 the first solid."""
    face: Faces
    """Smooth face of the body; walls count from 1."""


def camera_rays(height: int, width: int, focal: float, oversampling: int = 1) -> Vectors:
    """Directions [3, N] of the rays through the pixels' centres, in the camera's frame, of length 1 along its axis.

    Args:
        height, width: of the image in pixels; its middle lies on the optical axis.
        focal: focal length in pixels.
        oversampling: rays per pixel and direction, each through the middle of its part of the pixel.
    """
    across = (np.arange(width * oversampling) + 0.5) / oversampling - width / 2
    up = height / 2 - (np.arange(height * oversampling) + 0.5) / oversampling
    y, x = np.meshgrid(up / focal, across / focal, indexing="ij")
    return np.stack([x, y, np.full_like(x, -1)]).reshape(3, -1).astype(np.float32)


def cast(scene: Scene, origin: Vector, directions: Vectors) -> Hits:
    """The first thing that rays from one point meet; from inside the room and outside the solids."""
    rate = scene.room.normals @ directions  # [5, N]
    gap = (scene.room.offsets - scene.room.normals @ origin)[:, None]
    t = np.where(rate > TINY, gap / np.maximum(rate, TINY), np.inf)
    depth, face = t.min(0), t.argmin(0)
    body = np.where(face == 0, FLOOR, WALLS)
    squares = _dot(directions, directions)
    for number, solid in enumerate(scene.solids, FIRST_SOLID):
        rays, near, faces = _meet(solid, origin, directions, squares)
        nearer = near < depth[rays]
        rays = rays[nearer]
        depth[rays], body[rays], face[rays] = near[nearer], number, faces[nearer]
    return Hits(depth, body, face)


def _meet(solid: Solid, origin: Vector, directions: Vectors, squares: Values) -> tuple[Faces, Values, Faces]:
    """(numbers, depths, faces) of the rays that meet a solid."""
    towards = solid.centre - origin
    along = towards @ directions
    near = (along > 0) & (along * along >= squares * (towards @ towards - solid.reach**2))
    rays = np.flatnonzero(near)
    directions = directions.take(rays, 1)
    middle = along[rays] / squares[rays]
    # from the point nearest to the centre single precision does for small and distant solids, too
    points = solid.rotation.T @ (middle * directions - towards[:, None]) / solid.scale[:, None]
    t, face = SHAPES[solid.kind].hit(points, solid.rotation.T @ directions / solid.scale[:, None])
    met = np.isfinite(t)
    return rays[met], (middle + t)[met], face[met]


def _in_shadow(scene: Scene, light: Light, points: Vectors) -> Bool[np.ndarray, " N"]:
    """Whether a solid stands between a light and points. The rays start at the light, so that they share an origin."""
    directions = points - light.position[:, None]
    squares = _dot(directions, directions)
    dark = np.zeros(squares.shape, bool)
    for solid in scene.solids:
        rays, t, _ = _meet(solid, light.position, directions, squares)
        dark[rays[t < 1 - 1e-3]] = True  # short of the point, lest a surface shade itself
    return dark


def surface_normals(scene: Scene, hits: Hits, points: Vectors) -> Vectors:
    """Unit normals [3, N] in the world's frame, towards the viewer, at the points where rays end."""
    normals = (-scene.room.normals.T).take(hits.face, 1, mode="clip")  # those of solids follow
    for number, solid in enumerate(scene.solids, FIRST_SOLID):
        index = np.flatnonzero(hits.body == number)
        scale = solid.scale[:, None]
        own = SHAPES[solid.kind].normal(solid.own(points.take(index, 1)) / scale, hits.face[index]) / scale
        normals[:, index] = solid.rotation @ (own / np.sqrt(_dot(own, own)))
    return normals


def radiance(scene: Scene, height: int, width: int, focal: float, oversampling: int = 2) -> Float[np.ndarray, "3 H W"]:
    """The light that reaches each pixel, averaged over its rays; linear, not limited."""
    directions = scene.camera @ camera_rays(height, width, focal, oversampling)
    hits = cast(scene, scene.eye, directions)
    points = scene.eye[:, None] + hits.depth * directions
    normals = surface_normals(scene, hits, points)
    view = -directions / np.sqrt(_dot(directions, directions))
    slant = np.maximum(_dot(normals, view), 0.1)
    albedo, gloss = _surface(scene, hits, points, hits.depth / (focal * np.sqrt(slant)))
    light = scene.ambient[:, None] * (0.75 + 0.25 * normals[2])  # most of it comes from above
    shine = np.zeros_like(light)
    for lamp in scene.lights:
        diffuse, highlight = _illuminate(scene, lamp, points, normals, view)
        light += lamp.colour[:, None] * diffuse
        shine += lamp.colour[:, None] * (gloss * highlight)
    return (albedo * light + shine).reshape(3, height, oversampling, width, oversampling).mean((2, 4))


def _illuminate(scene: Scene, lamp: Light, points: Vectors, normals: Vectors, view: Vectors) -> tuple[Values, Values]:
    """(diffuse, highlight) of a white surface under one light."""
    way = lamp.position[:, None] - points
    distance = np.sqrt(_dot(way, way))
    way /= distance
    lit = np.where(_in_shadow(scene, lamp, points), 0, np.maximum(_dot(normals, way), 0))
    half = way + view
    highlight = np.maximum(_dot(normals, half), 0) / np.sqrt(_dot(half, half))
    for _ in range(SHININESS):
        highlight *= highlight
    fall = 1 / (1 + distance * distance / 40)  # milder than the inverse square, as walls give light back
    return lit * fall, highlight * (lit > 0) * fall


def _surface(scene: Scene, hits: Hits, points: Vectors, footprint: Values) -> tuple[Vectors, Values]:
    """(colours [3, N], strength of highlights [N]) of the points where rays end."""
    albedo, gloss = np.empty_like(points), np.empty_like(footprint)
    room = scene.room
    bodies = [(room.floor, room.own), (room.walls, room.own), *((solid.material, solid.own) for solid in scene.solids)]
    for number, (material, own) in enumerate(bodies):
        index = np.flatnonzero(hits.body == number)
        share = _pattern(material, own(points.take(index, 1)), footprint[index])
        first, second = material.colours.T
        albedo[:, index] = first[:, None] + (second - first)[:, None] * share
        gloss[index] = material.gloss
    return albedo, gloss


def _pattern(material: Material, points: Vectors, footprint: Values) -> Values:
    """Share of the second colour; it evens out, against moire, as pixels (footprint: width, m) near a period's size."""
    if material.texture == "plain":
        return np.zeros_like(footprint)
    place = (material.axes @ points) / np.float32(material.period) + material.phase[:, None]
    mean = 0.27 if material.texture == "dots" else 0.5
    if material.texture == "checker":
        value = np.floor(place).sum(0) % 2
    elif material.texture == "stripes":
        value = (place[0] % 1 < 0.5).astype(np.float32)
    elif material.texture == "dots":
        offset = place % 1 - 0.5
        value = (_dot(offset, offset) < 0.16).astype(np.float32)
    else:
        value = 0.5 + 0.5 * np.sin(2 * np.sin(2 * np.pi * (material.waves @ place)).sum(0))
    kept = np.clip(1.6 - 2.4 * footprint / material.period, 0, 1)
    return (mean + (value - mean) * kept).astype(np.float32)
