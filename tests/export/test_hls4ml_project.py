"""hls4ml projects, compiled with g++: as close to PyTorch as their widths allow, whole, and the same again later."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.errors import ExportError
from export.hls4ml import Settings, simulate, write_hls4ml
from export.hls4ml.project import VENDOR_HEADERS
from export.onnx import trace
from moecore.errors import ConfigError
from moecore.multigate import MultiGate
from moecore.multigate_experts import ExpertStack

needs_hls4ml = pytest.mark.skipif(
    importlib.util.find_spec("hls4ml") is None or shutil.which("g++") is None,
    reason="needs hls4ml (pip install 'moecore[hls4ml]') and g++",
)
D = 16


class MMoE(nn.Module):
    """Experts that all tasks share, a gate and a tower per task."""

    def __init__(self) -> None:
        super().__init__()
        self.level = MultiGate({"all": ExpertStack(4, D, [12, 8])}, {"click": ["all"], "like": ["all"]}, D)
        self.towers = ExpertStack(2, 8, [6, 1], linear=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.towers(self.level.mixtures(x)).squeeze(2)


class Policy(nn.Module):
    """What an agent has behind its encoder, and a value of its own from another input."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(D, 12), nn.LayerNorm(12), nn.Tanh())
        self.head = nn.Sequential(
            nn.Linear(12, 24), nn.ELU(0.5), nn.Linear(24, 16), nn.LeakyReLU(0.1), nn.Linear(16, 3)
        )
        self.value = nn.Linear(5, 2)

    def forward(self, features: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        y = self.trunk(features)
        return self.head(y).tanh(), torch.maximum(self.value(goal).sigmoid() * 3, y[:, :2].relu()) - 1


def trained(model: nn.Module) -> nn.Module:
    """Weights as after training: larger, and gates decided."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4.0 if "gates" in name else 2.0)
    return model.eval()


def correlations(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(got.T, expected.T, strict=True)])


@pytest.fixture(scope="module")
def mmoe(tmp_path_factory):
    """A model, its samples, its bundle and the bundle's figures."""
    torch.manual_seed(0)
    model, x = trained(MMoE()), torch.randn(200, D)
    proto = trace(model, x[:1], ["features"], ["logits"])
    folder = tmp_path_factory.mktemp("hls4ml") / "bundle"
    figures = write_hls4ml(proto, {"features": x.numpy()}, folder, metadata={"title": "Clicks", "tasks": ["c", "l"]})
    return model, x, folder, figures


@needs_hls4ml
def test_a_whole_mmoe_gives_pytorchs_numbers(mmoe):
    model, x, folder, figures = mmoe
    expected = model(x[1::2]).detach().numpy()
    got = np.load(folder / "golden/outputs.logits.npy")
    np.testing.assert_allclose(np.load(folder / "golden/reference.logits.npy"), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.load(folder / "golden/inputs.features.npy"), x[1::2].numpy())
    errors = np.sqrt(((got - expected) ** 2).mean(0)) / expected.std(0)
    assert errors.max() < 0.01
    assert correlations(got, expected).min() > 0.9999
    assert figures["logits_relative_rms_error"] == pytest.approx(errors.max(), rel=1e-3)
    assert figures["logits_correlation"] == pytest.approx(correlations(got, expected).min(), abs=1e-6)
    assert figures["multiply_adds"] == 4 * (D * 12 + 12 * 8) + 2 * D * 4 + 2 * 4 * 8 + 2 * (8 * 6 + 6)
    assert figures["samples"] == 100


@needs_hls4ml
def test_the_bundle_says_what_is_in_it_and_runs_again(mmoe, tmp_path):
    _, x, folder, figures = mmoe
    about = json.loads((folder / "manifest.json").read_text())
    assert about["figures"] == figures
    assert about["tasks"] == ["c", "l"]
    assert [one["size"] for one in (*about["inputs"], *about["outputs"])] == [D, 2]
    assert "embeddings stay on the host" in about["inputs"][0]["note"]
    assert max(about["units"]["logits"]["relative_rms_error"]) == figures["logits_relative_rms_error"]
    assert "towers" in {layer["module"] for layer in about["layers"]}
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    text = "\n".join(one.read_text() for one in (folder / "project").glob("*") if one.is_file())
    assert str(folder.parent) not in text
    assert not (folder / "project" / VENDOR_HEADERS).exists()  # not ours to pass on
    assert not list(folder.rglob("*.so"))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    got = simulate(moved, {"features": x[1::2].numpy()})["logits"]
    np.testing.assert_array_equal(got, np.load(folder / "golden/outputs.logits.npy"))
    np.testing.assert_allclose(np.loadtxt(moved / "project/tb_data/tb_output_predictions.dat"), got, atol=1e-6)


@needs_hls4ml
def test_a_policy_of_several_inputs_and_outputs_and_every_other_layer(tmp_path):
    torch.manual_seed(0)
    model = trained(Policy())
    given = (torch.randn(120, D), torch.randn(120, 5))
    proto = trace(model, tuple(one[:1] for one in given), ["features", "goal"], ["action", "value"])
    samples = {"features": given[0].numpy(), "goal": given[1].numpy()}
    write_hls4ml(proto, samples, tmp_path / "b", Settings(width=18, weight_width=18))
    for name, expected in zip(("action", "value"), model(*(one[1::2] for one in given)), strict=True):
        got, expected = np.load(tmp_path / f"b/golden/outputs.{name}.npy"), expected.detach().numpy()
        assert (np.sqrt(((got - expected) ** 2).mean(0)) / expected.std(0)).max() < 0.02
        assert correlations(got, expected).min() > 0.9995
    assert not [one for one in tmp_path.iterdir() if one.name != "b"]


@needs_hls4ml
def test_what_is_refused_leaves_what_was_there(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/manifest.json").write_text("{}")
    (tmp_path / "b/mine").write_text("kept")
    proto = trace(nn.Sequential(nn.Linear(D, 2), nn.GELU()).eval(), torch.randn(1, D), ["x"], ["y"])
    with pytest.raises(ExportError, match="hls4ml has no GELU"):
        write_hls4ml(proto, {"x": np.zeros((8, D), np.float32)}, tmp_path / "b")
    with pytest.raises(ConfigError, match=r"^calibration=3: give at least four samples"):
        write_hls4ml(proto, {"x": np.zeros((3, D), np.float32)}, tmp_path / "b")
    assert {one.name for one in tmp_path.rglob("*")} == {"b", "manifest.json", "mine"}


def test_without_hls4ml_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "hls4ml", None)
    proto = trace(nn.Linear(D, 2), torch.randn(1, D), ["x"], ["y"])
    with pytest.raises(ExportError, match=r"^hls4ml is not installed \(.*\); pip install 'moecore\[hls4ml\]'$"):
        write_hls4ml(proto, {"x": np.zeros((8, D), np.float32)}, tmp_path / "b")
    assert not list(tmp_path.iterdir())
