"""Moirai-MoE's file: the distribution of every point, and what there is no form for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from apps.timeseries.models.base import Windows
from apps.timeseries.models.moirai_tokens import make_grid
from export.exportable import in_torch
from export.measure import session_of

pytestmark = pytest.mark.usefixtures("exporting")


def test_moirai_gives_the_distribution_of_every_point(ts, trained_runs, tmp_path, read_json):
    run = trained_runs(run__name="moirai_moe", model__name="moirai_moe")
    done = ts("export", "--ckpt_path", run, "--output", tmp_path / "m.onnx", "--json", tmp_path / "f.json")
    assert (done.code, done.err) == (0, "")
    figures = read_json(tmp_path / "f.json")
    assert figures["max_relative_error"] < 1e-4
    assert figures["nll_export"] == pytest.approx(figures["nll_torch"], abs=1e-4)
    assert figures["routing_agreement"] == 1
    session = session_of(tmp_path / "m.onnx")
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["parameters"])[0] == "df"
    context = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    unknown = np.full((3, 6), np.nan, np.float32)
    parameters, location, _ = session.run(None, {"context": context, "future": unknown})
    assert parameters.shape == (3, 6, 12)
    np.testing.assert_allclose(parameters[..., :4].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(location[:, 0], context.mean(1), rtol=1e-4, atol=1e-5)


def test_the_figure_of_a_file_is_the_likelihood_that_training_sees(ready):
    """Each point of the horizon given the patches before its own."""
    one = ready("moirai_moe")[""]
    model, found = one.module.model, []
    with torch.no_grad():
        for sample in one.samples:
            windows = Windows(*sample.tensors)
            grid = make_grid(windows, model.config.patch_size, ahead=model.config.known_ahead)
            steps = grid.length - 1
            hidden = model.encoder(grid.tokens.select(grid.tokens.clock < steps))[:, :steps]
            likelihood = model.head(hidden).log_prob(grid.target.values[:, 1:])  # [B, patches, P]
            found.append(likelihood[:, grid.context - 1 :].flatten(1)[:, : windows.future.shape[1]])
    outputs = [np.concatenate(parts) for parts in zip(*map(in_torch(one.module), one.samples), strict=True)]
    assert one.score.of(outputs) == pytest.approx(-float(torch.cat(found).mean()), rel=1e-5)
    assert one.score.of([output[:7] for output in outputs]) == pytest.approx(
        -float(torch.cat(found)[:7].mean()), rel=1e-5
    )
