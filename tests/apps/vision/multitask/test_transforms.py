"""Random changes of images and labels, against geometry: where points are, how surfaces are turned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from apps.vision.multitask.transforms import Views, augment, draw_views, jitter, view_images, view_labels
from apps.vision.settings import DataConfig

HEIGHT, WIDTH, FOCAL = 96, 128, 110.0
CENTRE = (HEIGHT / 2, WIDTH / 2)


def views(zoom: float = 1.0, top: float = 0.0, left: float = 0.0, mirrored: bool = False, count: int = 1) -> Views:
    values = [torch.full((count,), value) for value in (zoom, top, left)]
    return Views(*values, torch.full((count,), mirrored))


def rays(centre: tuple[float, float]) -> Tensor:
    """Directions of the pixels of a camera with x right, y up, z backwards; depth 1. [3, H, W]"""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    return torch.stack([(x - centre[1]) / FOCAL, (centre[0] - y) / FOCAL, -torch.ones_like(x)]).double()


def scene() -> dict[str, Tensor]:
    """A floor, a slanted wall and a ball: depth, normals, and which is seen. A batch of one."""
    directions = rays(CENTRE)
    depths, normals = [], []
    for normal, offset in (((0.0, 1.0, 0.0), -1.2), ((-0.6, 0.1, 0.79), -3.5)):  # n . P = offset
        normal = F.normalize(torch.tensor(normal).double(), dim=0)[:, None, None]
        depth = offset / (normal * directions).sum(0)
        depths.append(torch.where(depth > 0, depth, torch.inf))
        normals.append(normal.expand(3, HEIGHT, WIDTH))
    middle, radius = torch.tensor([0.3, -0.2, -2.6]).double()[:, None, None], 0.9
    a, b = (directions**2).sum(0), (directions * middle).sum(0)
    inside = b**2 - a * ((middle**2).sum(0) - radius**2)
    depth = torch.where(inside > 0, (b - inside.clamp(min=0).sqrt()) / a, torch.inf)
    depths.append(depth)
    normals.append((torch.where(inside > 0, depth, 0) * directions - middle) / radius)
    depth, which = torch.stack(depths).min(0)
    normal = torch.stack(normals).gather(0, which.expand(1, 3, HEIGHT, WIDTH))[0]
    return {"depth": depth[None].float(), "normals": F.normalize(normal, dim=0)[None].float(), "semseg": which[None]}


def differences(depth: Tensor, which: Tensor, centre: tuple[float, float], lag: int) -> tuple[Tensor, Tensor]:
    """Normals [3, h, w] of the back-projected depth, and where all five points lie on one surface."""
    points = depth.double() * rays(centre)
    middle = (slice(lag, HEIGHT - lag), slice(lag, WIDTH - lag))
    right, left = points[:, middle[0], 2 * lag :], points[:, middle[0], : WIDTH - 2 * lag]
    below, above = points[:, 2 * lag :, middle[1]], points[:, : HEIGHT - 2 * lag, middle[1]]
    normals = F.normalize(torch.linalg.cross(right - left, above - below, dim=0), dim=0)
    here = which[middle]
    same = (which[middle[0], 2 * lag :] == here) & (which[middle[0], : WIDTH - 2 * lag] == here)
    return normals, same & (which[2 * lag :, middle[1]] == here) & (which[: HEIGHT - 2 * lag, middle[1]] == here)


def degrees(a: Tensor, b: Tensor) -> Tensor:
    return torch.rad2deg(2 * torch.asin(((a - b).norm(dim=0) / 2).clamp(max=1)))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    ("zoom", "top", "left", "lag"),
    [
        (1.0, 0.0, 0.0, 1),
        (1.5, 24.0, 32.0, 3),  # the middle
        (1.5, 0.0, 64.0, 3),
        (2.0, 96.0, 0.0, 2),
        (2.0, 13.0, 101.0, 2),
        (1.25, 20.3, 5.7, 5),
    ],
)
def test_seen_depth_has_the_seen_normals(zoom, top, left, lag, mirrored):
    """The principal point moves with the part cut out; `lag` pixels apart, the nearest ones are spaced evenly."""
    view = views(zoom, top, left, mirrored)
    original = scene()
    seen = view_labels(original, view)
    column = zoom * CENTRE[1] - left
    centre = (zoom * CENTRE[0] - top, WIDTH - column if mirrored else column)
    measured, smooth = differences(seen["depth"][0], seen["semseg"][0], centre, lag)
    inner = seen["normals"][0, :, lag : HEIGHT - lag, lag : WIDTH - lag]
    assert smooth.float().mean() > 0.5
    assert (inner.norm(dim=0) - 1).abs().max() < 1e-5
    off = degrees(measured, inner)[smooth]
    assert off.median() < 0.2
    assert off.quantile(0.95) < 2  # near the rim of the ball differences are coarse
    if zoom >= 1.5:  # what leaving the normals as they were would give
        nothing = view_labels({"normals": original["normals"] * torch.tensor([1, 1, 1 / zoom]).view(3, 1, 1)}, view)
        wrong = nothing["normals"][0, :, lag : HEIGHT - lag, lag : WIDTH - lag]
        assert degrees(measured, wrong)[smooth].median() > 5
    if mirrored:
        flipped = inner * torch.tensor([-1, 1, 1]).view(3, 1, 1)
        assert degrees(measured, flipped)[smooth].quantile(0.9) > 20


def test_a_point_is_seen_where_the_same_camera_would_see_it():
    """The seen pixel's ray meets the moved point: (X, Y, Z / s) of the point seen before."""
    zoom, top, left = 1.6, 20.0, 44.0
    original = scene()
    points = original["depth"][0].double() * rays(CENTRE)
    moved = points * torch.tensor([1, 1, 1 / zoom]).double().view(3, 1, 1)
    centre = zoom * CENTRE[0] - top, zoom * CENTRE[1] - left
    seen = view_labels({"depth": original["depth"]}, views(zoom, top, left))["depth"][0]
    at = [[30, 50], [10, 100], [80, 7], [60, 64]]
    for row, column in at:
        source = int((row + 0.5 + top) / zoom), int((column + 0.5 + left) / zoom)
        x, y, z = moved[:, *source].tolist()
        assert seen[row, column].item() == pytest.approx(-z, rel=1e-6)
        assert centre[1] + FOCAL * x / -z == pytest.approx(column + 0.5, abs=zoom / 2 + 1e-6)
        assert centre[0] - FOCAL * y / -z == pytest.approx(row + 0.5, abs=zoom / 2 + 1e-6)


def test_mirroring_is_exact_and_twice_is_nothing():
    labels = scene() | {"edges": (torch.rand(1, HEIGHT, WIDTH) < 0.1).float(), "classification": torch.tensor([3])}
    image = torch.rand(1, 3, HEIGHT, WIDTH)
    view = views(mirrored=True)
    seen = view_labels(labels, view)
    for name in ("depth", "semseg", "edges"):
        assert torch.equal(seen[name], labels[name].flip(-1))
    signs = torch.tensor([-1, 1, 1]).view(3, 1, 1)
    torch.testing.assert_close(seen["normals"], labels["normals"].flip(-1) * signs)
    assert seen["classification"].tolist() == [3]
    torch.testing.assert_close(view_images(image, view), image.flip(-1), rtol=0, atol=1e-5)
    for name, label in view_labels(seen, view).items():
        torch.testing.assert_close(label, labels[name])


def test_nearest_against_one_pixel_after_the_other():
    zoom, top, left = torch.tensor([1.0, 1.37]), torch.tensor([0.0, 1.9]), torch.tensor([0.0, 2.6])
    view = Views(zoom, top, left, torch.tensor([True, True]))
    label = torch.arange(2 * 7 * 9).reshape(2, 7, 9)
    seen = view_labels({"semseg": label}, view)["semseg"]
    for b in range(2):
        for row in range(7):
            for column in range(9):
                y = int((row + 0.5 + top[b]) / zoom[b])
                x = int((9 - 1 - column + 0.5 + left[b]) / zoom[b])
                assert seen[b, row, column] == label[b, y, x]


def test_images_are_interpolated_at_the_same_places():
    """An image linear in place: what is seen is the line at the pixels' centres."""
    zoom, top, left = 1.7, 30.0, 11.0
    column = (torch.arange(WIDTH) + 0.5).expand(1, 1, HEIGHT, WIDTH)
    row = (torch.arange(HEIGHT) + 0.5)[:, None].expand(1, 1, HEIGHT, WIDTH)
    seen = view_images(torch.cat([column, row], 1) / WIDTH, views(zoom, top, left)) * WIDTH
    inner = (slice(2, -2), slice(2, -2))
    torch.testing.assert_close(seen[0, 0][inner], ((column + left) / zoom)[0, 0][inner], rtol=0, atol=1e-3)
    torch.testing.assert_close(seen[0, 1][inner], ((row + top) / zoom)[0, 0][inner], rtol=0, atol=1e-3)


def test_images_and_classes_stay_in_step():
    blocks = torch.randint(0, 8, (16, 6, 8)).repeat_interleave(16, 1).repeat_interleave(16, 2)  # [16, 96, 128]
    images = (blocks / 7)[:, None].expand(-1, 3, -1, -1)
    view = draw_views(16, (HEIGHT, WIDTH), (1.0, 2.0), True, torch.Generator().manual_seed(0))
    seen = view_labels({"semseg": blocks}, view)["semseg"]
    off = (view_images(images, view)[:, 0] * 7 - seen).abs()
    assert (off < 0.01).float().mean() > 0.85  # all but a pixel along the borders of blocks
    assert off.median() < 1e-4


def test_thin_edges_stay_whole():
    edges = torch.zeros(3, HEIGHT, WIDTH)
    edges[0, 40] = 1
    edges[1, :, 70] = 1
    edges[2, torch.arange(HEIGHT), torch.arange(HEIGHT)] = 1
    for zoom in (1.0, 1.01, 1.3, 1.99, 3.0):
        top, left = (zoom - 1) * 40.0, (zoom - 1) * 60.0
        seen = view_labels({"edges": edges}, views(zoom, top, left, count=3))["edges"]
        assert seen[0].amax(0).all()
        assert seen[1].amax(1).all()
        across = (seen[2] > 0).nonzero()
        rows = across[:, 0].unique()
        assert torch.equal(rows, torch.arange(int(rows.min()), int(rows.max()) + 1))


def test_what_is_unknown_stays_unknown():
    shape = (4, 32, 48)
    generator = torch.Generator().manual_seed(3)
    unknown = {
        "semseg": torch.full(shape, -1),
        "parts": torch.full(shape, -1),
        "saliency": -torch.ones(shape),
        "edges": -torch.ones(shape),
        "depth": torch.zeros(shape),
        "normals": torch.zeros(4, 3, 32, 48),
        "classification": torch.full((4,), -1),
    }
    _, seen = augment(torch.rand(4, 3, 32, 48), unknown, DataConfig(), generator)
    for name, label in seen.items():
        assert torch.equal(label, unknown[name])
        assert label.dtype == unknown[name].dtype


def test_views_are_within_their_ranges_and_of_each_image():
    drawn = draw_views(4000, (64, 96), (1.2, 1.8), True, torch.Generator().manual_seed(1))
    assert drawn.zoom.min() >= 1.2
    assert drawn.zoom.max() <= 1.8
    assert drawn.zoom.mean() == pytest.approx(1.5, abs=0.02)
    assert drawn.mirrored.float().mean() == pytest.approx(0.5, abs=0.03)
    for rows, side in ((drawn.rows(64), 64), (drawn.columns(96), 96)):
        assert rows.min() > 0
        assert rows.max() < side
    share = drawn.top / ((drawn.zoom - 1) * 64)
    assert share.mean() == pytest.approx(0.5, abs=0.02)
    assert torch.corrcoef(torch.stack([drawn.top, drawn.left]))[0, 1].abs() < 0.5
    assert not draw_views(100, (64, 96), (1.0, 2.0), False, torch.Generator().manual_seed(1)).mirrored.any()


def test_each_image_is_changed_by_its_own_view_alone():
    labels = {name: label.expand(5, *label.shape[1:]) for name, label in scene().items()}
    images = torch.rand(1, 3, HEIGHT, WIDTH).expand(5, -1, -1, -1)
    drawn = draw_views(5, (HEIGHT, WIDTH), (1.0, 1.5), True, torch.Generator().manual_seed(2))
    seen, picture = view_labels(labels, drawn), view_images(images, drawn)
    for i in range(5):
        own = Views(*(value[i : i + 1] for value in (drawn.zoom, drawn.top, drawn.left, drawn.mirrored)))
        single = view_labels({name: label[i : i + 1] for name, label in labels.items()}, own)
        assert all(torch.equal(single[name][0], seen[name][i]) for name in labels)
        torch.testing.assert_close(view_images(images[i : i + 1], own)[0], picture[i])
    assert not torch.equal(seen["depth"][0], seen["depth"][1])


def test_jitter_is_torchvisions_with_factors_for_each_image():
    images = torch.rand(40, 3, 8, 8)
    factors = 0.7 + 0.6 * torch.rand(3, 40, 1, 1, 1, generator=torch.Generator().manual_seed(6))
    expected = []
    for image, brightness, contrast, saturation in zip(images, *factors.flatten(1).tolist(), strict=True):
        bright = v2.functional.adjust_brightness(image, brightness)
        expected.append(v2.functional.adjust_saturation(v2.functional.adjust_contrast(bright, contrast), saturation))
    seen = jitter(images, 0.3, torch.Generator().manual_seed(6))
    torch.testing.assert_close(seen, torch.stack(expected), rtol=0, atol=5e-4)  # its shares of colours sum to .9999
    assert (seen - images).abs().amax((1, 2, 3)).min() > 0.01
    torch.testing.assert_close(jitter(images, 0.0, torch.Generator()), images)
    strong = jitter(images, 0.9, torch.Generator().manual_seed(5))
    assert 0 <= strong.min() <= strong.max() <= 1


def test_nothing_asked_for_is_nothing_done():
    config = DataConfig(zoom=(1.0, 1.0), jitter=0.0, flip=False)
    images, labels = torch.rand(2, 3, 33, 47), {"depth": torch.rand(2, 33, 47), "semseg": torch.arange(2 * 33 * 47)}
    labels["semseg"] = labels["semseg"].reshape(2, 33, 47)
    seen, changed = augment(images, labels, config, torch.Generator())
    torch.testing.assert_close(seen, images, rtol=0, atol=1e-5)
    assert all(torch.equal(changed[name], labels[name]) for name in labels)


def test_the_generator_alone_decides():
    labels = {name: label.expand(3, *label.shape[1:]) for name, label in scene().items()}
    images = torch.rand(3, 3, HEIGHT, WIDTH)
    runs = [augment(images, labels, DataConfig(), torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in labels)


@pytest.mark.parametrize(("mirrored", "zoom"), [(True, 1.0), (False, 1.4), (True, 1.4)])
def test_generated_scenes_keep_their_geometry(mirrored, zoom):
    """Normals of the floor and the walls of a scene, from its own depth, after it was changed."""
    from apps.vision.multitask.scenes import focal_length, make_scenes

    _, labels = make_scenes(2, 0, HEIGHT, WIDTH, progress=False)
    view = views(zoom, 20.0 * (zoom > 1), 45.0 * (zoom > 1), mirrored, count=2)
    seen = view_labels({name: labels[name] for name in ("depth", "normals", "semseg")}, view)
    column = zoom * CENTRE[1] - view.left[0].item()
    centre = zoom * CENTRE[0] - view.top[0].item(), WIDTH - column if mirrored else column
    scale = focal_length(HEIGHT, WIDTH) / FOCAL  # stretches the frame of `rays` to the scenes' camera
    lag = 7 if zoom > 1 else 1
    for i in range(2):
        measured, smooth = differences(seen["depth"][i], seen["semseg"][i], centre, lag)
        measured = F.normalize(measured * torch.tensor([scale, scale, 1]).view(3, 1, 1), dim=0)
        smooth &= seen["semseg"][i][lag:-lag, lag:-lag] < 2
        off = degrees(measured, seen["normals"][i][:, lag:-lag, lag:-lag])[smooth]
        assert off.median() < 0.6
        assert off.quantile(0.8) < 2  # corners between walls lie within
