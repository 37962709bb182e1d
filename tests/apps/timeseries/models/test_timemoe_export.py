"""Time-MoE as modules of tensors alone: equal to the model, and exported."""

from __future__ import annotations

import pytest
import torch

from apps.timeseries.model_settings import TimeMoEConfig
from apps.timeseries.models.base import instance_scale
from apps.timeseries.models.timemoe import TimeMoE
from apps.timeseries.models.timemoe_export import FixedStep
from export.exportable import samples_of
from export.onnx import export_onnx
from export.verify import in_onnxruntime

HORIZONS = (1, 4, 8)


def tiny(normalize: str, layers: int = 1) -> TimeMoE:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": layers, "num_heads": 4, "num_kv_heads": 2}
    model = TimeMoE(TimeMoEConfig(**sizes, num_experts=3, horizons=HORIZONS, normalize=normalize))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model.eval()


@pytest.fixture(params=["none", "instance"])
def model(request) -> TimeMoE:
    return tiny(request.param, layers=2)


def contexts() -> torch.Tensor:
    x = 5 + 2 * torch.randn(3, 20)
    x[1, :8], x[2, 10:13] = torch.nan, torch.nan
    return x


@torch.no_grad()
def roll_out(step, model: TimeMoE, context: torch.Tensor, horizon: int) -> torch.Tensor:
    """What a host does with the cached step, whatever runs it."""
    scale = instance_scale(context) if model.config.normalize == "instance" else None
    points, (keys, values) = context if scale is None else scale.normalize(context), model.step_module(True).empty(3)
    offsets = dict(zip(HORIZONS, (0, 1, 5), strict=True))
    parts: list[torch.Tensor] = []
    while (left := horizon - sum(part.shape[1] for part in parts)) > 0:
        said, keys, values = step(points, keys, values)
        size = max(p for p in HORIZONS if p <= left)
        points = said[:, offsets[size] : offsets[size] + size]
        parts.append(points)
    out = torch.cat(parts, 1)
    return out if scale is None else scale.restore(out)


@torch.no_grad()
def test_context_pass_is_the_forecast(model):
    context = contexts()
    torch.testing.assert_close(model.step_module()(context), model.forecast(context, 8), rtol=1e-5, atol=1e-5)


def test_cached_steps_are_the_forecast(model):
    context = torch.randn(3, 20)
    ours = roll_out(model.step_module(cached=True), model, context, 22)
    torch.testing.assert_close(ours, model.forecast(context, 22), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_steps_in_buffers_are_the_cached_steps(model):
    """Rows at positions of their own; what lies behind a position is not looked at."""
    cached, fixed = model.step_module(cached=True), FixedStep(model, capacity=9).eval()
    points = torch.randn(3, 10)
    for at in ([0, 4, 9], [9, 9, 1]):
        keys, values = torch.full((2, 3, 2, 2, 9, 4), 1e3)
        expected = []
        for row, length in enumerate(at):
            caches = cached.empty(1)
            if length:
                _, *caches = cached(points[row : row + 1, :length], *caches)
            keys[row, :, :, :length], values[row, :, :, :length] = (cache[:, 0] for cache in caches)
            said, *caches = cached(points[row : row + 1, length : length + 1], *caches)
            expected.append((said[0], *(cache[:, 0, :, -1:] for cache in caches)))
        now = points.gather(1, torch.tensor(at)[:, None])
        found = fixed(now, keys, values, torch.tensor(at))
        for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-5, atol=1e-5)


def test_context_pass_as_onnx(untyped, tmp_path):
    model = tiny("instance")
    module = model.step_module()
    path = export_onnx(module, torch.randn(2, 20), tmp_path / "pass.onnx", "context", "forecast")
    run = in_onnxruntime(path)
    for context in (contexts(), torch.randn(1, 20)):
        (sample,) = samples_of(("context",), (context,))
        torch.testing.assert_close(torch.from_numpy(run(sample)[0]), module(context), rtol=1e-4, atol=1e-4)


def test_cached_step_as_onnx(untyped, tmp_path):
    """One file takes the context with an empty cache, and blocks of any size after it."""
    model = tiny("none")
    module = model.step_module(cached=True)
    cache = torch.randn(1, 3, 2, 6, 4)
    rows, new, past = (torch.export.Dim(name, min=low, max=4096) for name, low in (("B", 1), ("n", 1), ("M", 0)))
    names = ("points", "keys", "values")
    path = export_onnx(
        module,
        (torch.randn(3, 5), cache, cache.clone()),
        tmp_path / "step.onnx",
        names,
        ("predictions", "keys_out", "values_out"),
        dynamic_shapes=({0: rows, 1: new}, {1: rows, 3: past}, {1: rows, 3: past}),
    )
    run = in_onnxruntime(path)
    context = torch.randn(3, 20)
    ours = roll_out(lambda *given: map(torch.from_numpy, run(*samples_of(names, given))), model, context, 22)
    torch.testing.assert_close(ours, model.forecast(context, 22), rtol=1e-4, atol=1e-5)
