"""Moirai-MoE as a module of tensors alone: the model's own distributions, whole paths by a host, and a file."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from apps.timeseries.models.base import Windows
from apps.timeseries.models.distributions import PARAMETERS, Mixture
from apps.timeseries.models.moirai_export import NextPatches
from apps.timeseries.models.moirai_moe import MoiraiMoE
from apps.timeseries.models.moirai_tokens import make_grid
from apps.timeseries.models.spec import SeriesSpec
from export.compare import compare
from export.deliver import traced
from export.exportable import Exportable, samples_of
from export.lowering import lower
from export.verify import in_onnxruntime, refuse_inexact
from tests.apps.timeseries.models import moirai_cases

NAMES = {"futr": ("holiday", "price"), "hist": ("load",), "stat": ("size", "age")}


def spec_of(length: int, horizon: int, *kinds: str) -> SeriesSpec:
    return SeriesSpec(length, horizon, 1, **{kind: NAMES[kind] for kind in kinds})


def windows_of(spec: SeriesSpec, batch: int = 3) -> Windows:
    given = moirai_cases.windows(spec.context, spec.horizon, len(spec.futr), len(spec.hist), batch)
    given.past[0, 2:5] = given.past[1, :6] = torch.nan
    return dataclasses.replace(given, stat=torch.randn(batch, 2).double() if spec.stat else None)


def by_the_model(model: MoiraiMoE, windows: Windows) -> Tensor:
    """Distributions of the horizon as training has them."""
    grid = make_grid(windows, model.config.patch_size, ahead=model.config.known_ahead)
    steps = grid.length - 1
    hidden = model.encoder(grid.tokens.select(grid.tokens.clock < steps))[:, grid.context - 1 : steps]
    return model.head(hidden).bounded.flatten(1, 2)[:, : windows.future.shape[1]]


SPECS = [
    spec_of(20, 12),
    spec_of(22, 3),
    spec_of(3, 9),
    spec_of(18, 10, "futr"),
    spec_of(20, 8, "hist", "stat"),
    spec_of(21, 10, "futr", "hist", "stat"),
]


@torch.no_grad()
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_distributions_are_the_model_s(spec, ahead):
    model = moirai_cases.model(known_ahead=ahead)
    module, windows = NextPatches(model, spec), windows_of(spec)
    bounded, mean, std = module(*module.given(windows))
    torch.testing.assert_close(bounded, by_the_model(model, windows))
    scale = make_grid(windows, 4).scale
    torch.testing.assert_close((mean, std), (scale.mean, scale.std))


@torch.no_grad()
def test_later_patches_change_nothing():
    spec = SPECS[-1]
    module, windows = NextPatches(moirai_cases.model(), spec), windows_of(spec)
    whole = module(*module.given(windows))[0]
    for known in (0, 4, 8):
        future = windows.future.clone()
        future[:, known:] = torch.nan
        part = module(*module.given(dataclasses.replace(windows, future=future)))[0]
        torch.testing.assert_close(part[:, : known + 4], whole[:, : known + 4])
    assert not torch.allclose(
        part[:, 8:], module(*module.given(dataclasses.replace(windows, future=-future)))[0][:, 8:]
    )


@torch.no_grad()
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[-1]], ids=str)
def test_a_host_that_fills_in_patches_gets_the_model_s_paths(spec, monkeypatch):
    """Draws taken for the location of the first component, so that both are the same."""
    place = 4 + PARAMETERS.index("loc")
    monkeypatch.setattr(
        Mixture, "sample", lambda self, shape=(): self.bounded[..., place].expand(*shape, *self.raw.shape[:-1])
    )
    model, windows = moirai_cases.model(), windows_of(spec)
    module, future = NextPatches(model, spec), torch.full_like(windows.future, math.nan)
    for start in range(0, spec.horizon, 4):
        bounded, mean, std = module(*module.given(dataclasses.replace(windows, future=future)))
        future[:, start : start + 4] = bounded[:, start : start + 4, place] * std + mean
    torch.testing.assert_close(future, model.sample(windows, spec.horizon, 1)[:, 0])


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[-1]], ids=str)
def test_as_onnx(untyped, spec):
    pytest.importorskip("onnxruntime")
    module = NextPatches(moirai_cases.model().float(), spec).eval()
    batches = [tuple(t.float() for t in module.given(windows_of(spec, batch))) for batch in (3, 2)]
    batch = {0: torch.export.Dim("batch", min=1)}
    covariates = (tuple(batch for _ in module.covariates),) if module.covariates else ()
    one = Exportable(
        module,
        module.inputs,
        ("parameters", "location", "deviation"),
        batches[1],
        samples_of(module.inputs, *batches, tuple(t[:1] for t in batches[0])),
        dynamic_shapes=(batch, batch, *covariates),
    )
    found = compare(one, in_onnxruntime(lower(traced(one), "sparse")))
    refuse_inexact(found)
    assert found.rows == 6
