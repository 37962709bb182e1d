"""Augmentation, against what it should do to a picture one can follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from apps.vision import augment
from apps.vision.models.vimoe import ImageSpec
from apps.vision.settings import DataConfig


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(batch: int = 1, channels: int = 1, height: int = 8, width: int = 6) -> torch.Tensor:
    """Every pixel different."""
    return torch.arange(batch * channels * height * width).reshape(batch, channels, height, width).to(torch.uint8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.booleans(), st.integers(0, 2**32), st.integers(1, 3))
def test_each_image_is_a_window_of_the_reflected_one(padding, flip, seed, channels):
    images = picture(2, channels)
    out = augment.shift_and_flip(images, padding, flip, seeded(seed))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    padding = min(padding, 5)
    padded = torch.nn.functional.pad(images, (padding,) * 4, mode="reflect")
    for image, source in zip(out, padded, strict=True):
        windows = [source[:, i : i + 8, j : j + 6] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
        mirrored = [image, image.flip(-1)] if flip else [image]
        assert any(torch.equal(candidate, window) for candidate in mirrored for window in windows)


def test_half_of_the_images_are_mirrored_and_all_shifts_occur():
    images = picture().expand(400, -1, -1, -1)
    flipped = augment.shift_and_flip(images, 0, True, seeded(0))
    share = (flipped == images.flip(-1)).all((1, 2, 3)).float().mean()
    assert 0.4 < share < 0.6
    shifted = augment.shift_and_flip(images, 1, False, seeded(0))
    assert len({tuple(image.flatten().tolist()) for image in shifted}) == 9


def test_nothing_asked_for_is_nothing_done():
    images = picture(3, 3)
    assert torch.equal(augment.shift_and_flip(images, 0, False, seeded(0)), images)
    assert augment.per_image(DataConfig(), 12, resize=False) is None
    assert augment.mixing(DataConfig(mixup=0.0, cutmix=0.0), 10) is None


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"rand_augment": 2}, [v2.RandAugment]),
        ({"random_erasing": 0.5}, [v2.RandomErasing]),
        ({"rand_augment": 1, "random_erasing": 1.0}, [v2.RandAugment, v2.RandomErasing]),
    ],
)
def test_per_image_steps_are_those_asked_for(options, kinds):
    steps = augment.per_image(DataConfig(**options), 12, resize=False)
    assert [type(step) for step in steps.transforms] == kinds
    resized = augment.per_image(DataConfig(**options), 12, resize=True)
    assert [type(step) for step in resized.transforms] == [v2.RandomResizedCrop, v2.RandomHorizontalFlip, *kinds]
    unflipped = augment.per_image(DataConfig(flip=False, **options), 12, resize=True)
    assert v2.RandomHorizontalFlip not in [type(step) for step in unflipped.transforms]


def test_rand_augment_changes_and_erasing_erases():
    image = picture(1, 3, 16, 16)[0]
    erased = augment.per_image(DataConfig(random_erasing=1.0), 16, resize=False)(image)
    assert ((erased == 0).all(0) & ~(image == 0).all(0)).any()
    changed = augment.per_image(DataConfig(rand_augment=3, rand_augment_magnitude=15), 16, resize=False)
    assert any(not torch.equal(changed(image), image) for _ in range(5))


@pytest.mark.parametrize("size", [12, 32, 224])
def test_evaluation_keeps_whole_images_whole_and_cuts_the_centre_of_others(size):
    def spec(whole: bool) -> ImageSpec:
        return ImageSpec(3, size, ("a", "b"), (0.5,) * 3, (0.5,) * 3, whole)

    exact = picture(1, 3, size, size)[0]
    assert torch.equal(augment.for_evaluation(spec(True))(exact), exact)
    wide = torch.zeros(3, 40, 80, dtype=torch.uint8)
    wide[:, :, :20] = wide[:, :, 60:] = 200  # the outer quarters
    squeezed, centre = (augment.for_evaluation(spec(whole))(wide) for whole in (True, False))
    assert squeezed.shape == centre.shape == (3, size, size)
    assert squeezed.float().mean() == pytest.approx(100, abs=12)
    assert centre.float().mean() < 12


@pytest.mark.parametrize(
    "options", [{"mixup": 0.4, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}]
)
def test_mixing_makes_distributions_of_labels(options):
    mix = augment.mixing(DataConfig(**options), 5)
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 5
    mixed = [mix(images, labels) for _ in range(20)]
    for out, target in mixed:
        assert out.shape == images.shape
        assert target.shape == (8, 5)
        assert torch.allclose(target.sum(1), torch.ones(8))
    assert any((target.max(1).values < 0.95).any() for _, target in mixed)


def test_with_both_each_batch_takes_one():
    mix = augment.mixing(DataConfig(mixup=1.0, cutmix=1.0), 2)
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    blended = [bool(((out > 0) & (out < 1)).any()) for out, _ in (mix(images, torch.tensor([0, 1])) for _ in range(60))]
    assert 15 < sum(blended) < 45  # mixup blends pixels, cutmix moves them
