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
    assert verify.routing_agreement(model, proto).by_layer["1"] < 0.5


class Twice(nn.Module):
    """A mixture that is called twice: for every row, and for the row before it."""

    def __init__(self, gap: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.moe = moecore.MoE.build(D, num_experts=4, top_k=1, hidden=32, activation="relu")
        weight = torch.zeros(4, D)
        weight[0, 0], weight[1, 0], weight[1, 1] = 1.0, 1.0, gap
        with torch.no_grad():
            self.moe.router.score.weight.copy_(weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.moe(x), self.moe(x.roll(1, 0))


def tied(gap: float) -> Exportable:
    """Tokens whose first two experts differ by `gap` in the rows 3 and 5, and by much elsewhere."""
    x = torch.randn(8, 2, D).abs() + 0.1
    x[..., 1] = torch.where(torch.arange(8)[:, None] % 2 == 0, 1e6, -1e6)
    x[3, :, 1] = x[5, 1, 1] = 1.0
    return Exportable(Twice(gap).eval(), ("x",), ("y", "z"), (x[:2],), samples_of(("x",), (x,)))


def test_rows_between_two_experts_that_score_alike_are_left_out_and_counted(tmp_path):
    model = tied(1e-6)
    path = tmp_path / "m.onnx"
    deliver(model, "onnx", path)
    proto = onnx.load(path)
    gate = next(one for one in proto.graph.initializer if one.name.endswith("score.weight"))
    other = onnx.numpy_helper.to_array(gate).copy()
    other[1, 1] *= -1
    gate.CopyFrom(onnx.numpy_helper.from_array(other, gate.name))
    found = verify.routing_agreement(model, proto)
    assert found.by_layer["moe"] < 1
    assert found.tied[0].tolist() == [3, 4, 5, 6]  # of the second call those after


def test_calls_of_one_layer_count_together(model, tmp_path):
    """The second call's routing is broken; the layer's share says so."""
    model = tied(0.5)
    path = tmp_path / "m.onnx"
    deliver(model, "onnx", path)
    assert verify.routing_agreement(model, onnx.load(path)).by_layer == {"moe": 1.0}
    broken = onnx.load(path)
    layers = json.loads(next(one.value for one in broken.metadata_props if one.key == "moecore.routing"))
    layers[0]["expert"] = layers[1]["expert"]
    next(one for one in broken.metadata_props if one.key == "moecore.routing").value = json.dumps(layers)
    assert verify.routing_agreement(model, broken).by_layer["moe"] < 1


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
