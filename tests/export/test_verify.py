"""Delivered files: measured, noted, and refused where they are out of tolerance."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import moecore
from export import onnx as onnx_files
from export import verify
from export.decisions import largest
from export.deliver import deliver
from export.errors import ExportError
from export.exportable import Exportable, Score, samples_of
from export.measure import session_of
from export.notes import NOTES
from export.settings import OnnxSettings

D = 32


@pytest.fixture(scope="module")
def model() -> Exportable:
    """A classifier of sequences with one mixture."""
    torch.manual_seed(0)
    moe = moecore.MoE.build(D, num_experts=4, top_k=2, hidden=64, activation="relu")
    nn.init.normal_(moe.router.score.weight)
    module = nn.Sequential(nn.LayerNorm(D), moe, nn.Flatten(), nn.Linear(5 * D, 3)).eval()
    batches = [torch.randn(40, 5, D) for _ in range(5)]
    with torch.no_grad():
        truth = np.concatenate([module(batch).argmax(1).numpy() for batch in batches])
    return Exportable(
        module,
        ("tokens",),
        ("scores",),
        (torch.randn(2, 5, D),),
        samples_of(("tokens",), *((batch,) for batch in batches)),
        samples_of(("tokens",), *((torch.randn(40, 5, D),) for _ in range(2))),
        {"classes": ["a", "b", "c"]},
        largest(),
        Score("accuracy", lambda outputs: float((outputs[0].argmax(1) == truth).mean())),
    )


def test_weights_beyond_a_files_limit_go_beside_it(model, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    deliver(model, "onnx", path)
    whole = path.stat().st_size
    monkeypatch.setattr(onnx_files, "LARGEST", 1000)
    for _ in range(2):  # the second takes the place of the first
        found = deliver(model, "onnx", path)
        (weights,) = tmp_path.glob("m.onnx.*.data")
        assert path.stat().st_size < weights.stat().st_size
        assert whole * 0.9 < found.measured["file_bytes"] == path.stat().st_size + weights.stat().st_size
    sample = model.single()
    ours = session_of(path).run(None, dict(sample.feed))[0]
    with torch.no_grad():
        assert np.abs(ours - model.module(*sample.tensors).numpy()).max() < 1e-5
    assert {one.name for one in tmp_path.iterdir()} == {NOTES, "m.onnx", weights.name}


@pytest.mark.parametrize("experts", ["sparse", "auto"])
def test_a_file_is_measured_and_noted(model, tmp_path, experts):
    found = deliver(model, "onnx", tmp_path / "m.onnx", OnnxSettings(experts=experts))
    figures = found.scalars()
    assert figures["max_relative_error"] < 1e-5
    assert figures["decision_agreement"] == figures["routing_agreement"] == figures["accuracy_export"] == 1.0
    for form in ("export", "torch", "all_experts", "dense_equal"):
        assert 0 < figures[f"{form}_ms_p50"] <= figures[f"{form}_ms_p99"]
    assert figures["file_bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert figures["peak_memory_mib"] > 0
    noted = json.loads((tmp_path / NOTES).read_text())["m.onnx"]
    assert noted["max_relative_error"] == figures["max_relative_error"]
    assert noted["routing_agreement_by_layer"] == {"1": 1.0}
    metadata = session_of(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["a", "b", "c"]
    assert metadata["experts"] == noted["experts"]
    assert json.loads(metadata["metrics"]) == {"accuracy": 1.0}
    assert metadata["moecore_version"] == moecore.__version__


def test_routing_that_differs_is_seen(model, tmp_path):
    """The gate of the file is another: the agreement is what the two gates share."""
    deliver(model, "onnx", tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    gate = next(one for one in proto.graph.initializer if one.name.endswith("score.weight"))
    gate.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(gate), gate.name))
    assert verify.routing_agreement(model, proto)["1"] < 0.5


def test_what_differs_is_refused_and_the_old_file_stays(model, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    deliver(model, "onnx", path)
    before = path.read_bytes()
    monkeypatch.setattr(verify, "TOLERANCE", 1e-12)
    with pytest.raises(ExportError, match=r"^outputs differ from PyTorch by .* of their range.*; no file was kept$"):
        deliver(model, "onnx", path)
    assert path.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == [NOTES, "m.onnx"]


def test_a_quantised_file_whose_score_drops_is_refused(model, tmp_path):
    settings = OnnxSettings(experts="qmoe4", max_score_change=0.0, min_routing_agreement=0.0)
    with pytest.raises(ExportError, match=r"^accuracy goes from 1 to 0\.\d+, further than onnx\.max_score_change=0"):
        deliver(model, "onnx", tmp_path / "m.onnx", settings)
    assert not list(tmp_path.iterdir())
    found = deliver(model, "onnx", tmp_path / "m.onnx", OnnxSettings(experts="qmoe4", max_score_change=0.5))
    assert found.comparison.max_relative_error > 1e-4
    assert found.routing == {"1": 1.0}
