"""The serving example finds the classes that PyTorch does, where nothing but onnxruntime and NumPy is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.vision.data import VisionData
from apps.vision.deploy import exportable
from apps.vision.loading import load_trained
from export.deliver import traced
from export.lowering import lower
from export.onnx import save
from tests.apps.serving import serve

pytest.importorskip("onnxruntime")


def test_arrays_of_images_get_their_classes(train, tmp_path, untyped):
    trained = load_trained(train(tmp_path) / "checkpoints" / "last.ckpt")
    images = trained.model.images
    data = VisionData(trained.config.data, 0, spec=images)
    one = exportable(trained, data, calibration=32)
    model = save(lower(traced(one), "sparse"), tmp_path / "m.onnx", one.metadata)
    pixels = np.random.default_rng(0).integers(0, 256, (3, images.image_size, images.image_size), dtype=np.uint8)
    paths = [tmp_path / f"{i}.npy" for i in range(4)]
    for path, image in zip(paths, pixels, strict=False):
        np.save(path, image)
    np.save(paths[3], pixels[2].repeat(2, 0).repeat(2, 1)[..., None])  # twice as large, with a channel
    with torch.no_grad():
        scores = trained.model.eval()(torch.from_numpy(pixels)[:, None].float() / 255).softmax(1)
    lines = [line.split("\t") for line in serve("vision", model, *paths).splitlines()]
    assert [name for name, _, _ in lines] == [str(path) for path in paths]
    assert [kind for _, kind, _ in lines[:3]] == [images.classes[i] for i in scores.argmax(1)]
    np.testing.assert_allclose([float(share) for *_, share in lines[:3]], scores.amax(1), atol=1e-3)
    assert lines[3][1:] == lines[2][1:]
