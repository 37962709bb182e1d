"""Every router that settings can name exports, gives PyTorch's numbers, and is refused where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import moecore
from export.compare import Comparison, compare
from export.decisions import largest
from export.exportable import Exportable, samples_of
from export.onnx import ExportError, export_onnx
from export.verify import TOLERANCE, in_onnxruntime
from moecore.config import ScoreName, SelectionName, WeightName

D, N = 16, 6


def model(**options: object) -> nn.Module:
    """Two transformer layers whose FFNs are MoE."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 2, 32, dropout=0.0, activation="gelu", batch_first=True), 2
    )
    moecore.replace_ffn(encoder, "all", moecore.MoEConfig(**{"num_experts": 4, "top_k": 2, **options}), init="random")
    for layer in encoder.modules():
        if isinstance(layer, moecore.MoE):
            for name, parameter in layer.router.named_parameters():
                if parameter.dim() > 1 and "cell" not in name:
                    nn.init.normal_(parameter)  # decisions that rounding does not change
    return encoder.eval()


def compared(model: nn.Module, path: Path, batches: list[torch.Tensor]) -> Comparison:
    """A file beside its model."""
    samples = samples_of(("input",), *((batch,) for batch in batches))
    exportable = Exportable(model, ("input",), ("output",), (batches[0],), samples, decide=largest())
    return compare(exportable, in_onnxruntime(path))


TASKED = {"per_task", "task_conditioned"}
CASES = [{"score": name} for name in get_args(ScoreName) if name not in TASKED]
CASES += [{"select": name} for name in get_args(SelectionName)]
CASES += [{"weight": name} for name in get_args(WeightName)]
CASES += [
    {"shared_hidden": 8, "top_k": 1},
    {"shared_hidden": 8, "shared_gate": True},
    {"glu": True},
    {"unit": "sequence"},
    {"unit": 3, "pool": "flatten"},
    {"controller": "loss_free"},
    {"select": "threshold", "weight": "relu", "controller": "sparsity"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_file_gives_the_models_numbers_for_any_batch(tmp_path, options):
    moe = model(**options)
    path = export_onnx(moe, torch.randn(2, N, D), tmp_path / "model.onnx")
    batches = [torch.randn(batch, N, D) for batch in (1, 2, 7)]
    comparison = compared(moe, path, batches)
    assert comparison.decisions.share == 1.0
    assert comparison.max_relative_error < 1e-5
    assert comparison.rows == 10


@pytest.mark.parametrize("score", sorted(TASKED))
def test_a_task_is_fixed_by_the_context_of_the_export(tmp_path, score):
    moe, x = model(score=score, score_options={"num_tasks": 3}), torch.randn(2, N, D)
    outputs = []
    for task in (0, 2):
        with moecore.routing_context(task=task):
            path = export_onnx(moe, x, tmp_path / f"{task}.onnx")
            assert compared(moe, path, [x]).max_relative_error < 1e-5
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {"input": x.numpy()})[0])
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_names_and_metadata_are_in_the_file(tmp_path):
    path = export_onnx(
        model(), torch.randn(2, N, D), tmp_path / "sub" / "m.onnx", "tokens", "features", {"classes": ["a", "b"]}
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,), (taken,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:]) == ("tokens", [N, D])
    assert isinstance(given.shape[0], str)  # any batch
    assert taken.name == "features"
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["classes"] == '["a", "b"]'
    layers = json.loads(metadata["moecore.routing"])
    assert [one["layer"] for one in layers] == ["layers.0.linear1", "layers.1.linear1"]
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_routing_by_the_whole_batch_is_refused_and_no_file_is_left(tmp_path):
    moe = model(select="expert_choice", select_options={"eval_sees_batch": True})
    with pytest.raises(ExportError, match=r"^layers\.0\.linear1\.router\.select: eval_sees_batch=True: "):
        export_onnx(moe, torch.randn(2, N, D), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Unexportable(nn.Module):
    """Branches on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x - 1


def test_a_model_without_an_onnx_form_is_one_line(tmp_path):
    with pytest.raises(ExportError, match=r"^this model has no ONNX form \(.*\)$"):
        export_onnx(Unexportable(), torch.randn(2, N, D), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_of_other_weights_does_not_pass(tmp_path):
    moe, x = model(), torch.randn(3, N, D)
    path = export_onnx(moe, x, tmp_path / "m.onnx")
    with torch.no_grad():
        moe.layers[1].linear1.experts.down.mul_(1.5)
    assert compared(moe, path, [x]).max_relative_error > TOLERANCE


def test_nan_in_is_nan_out_in_both(tmp_path):
    moe, x = model(), torch.randn(3, N, D)
    path = export_onnx(moe, x, tmp_path / "m.onnx")
    x[0, 0, 0] = float("nan")
    found = compared(moe, path, [x])
    assert found.max_error < 1e-5  # NaN in both counts as equal
    x[0, 0, 0] = 0.0
    assert compared(moe, path, [x]).max_relative_error < 1e-5


def test_outputs_may_have_the_name_of_something_inside(tmp_path):
    """The exporter calls the mean of the model `mean`."""

    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean = x.mean(1)
            return mean.abs(), mean.exp()

    path = export_onnx(Halves(), torch.randn(2, N), tmp_path / "m.onnx", "x", ["mean", "exp"])
    onnx.checker.check_model(onnx.load(path), full_check=True)
    x = torch.randn(3, N)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ours = dict(zip(("mean", "exp"), session.run(["mean", "exp"], {"x": x.numpy()}), strict=True))
    for name, expected in zip(("mean", "exp"), Halves()(x), strict=True):
        assert np.allclose(ours[name], expected.numpy(), atol=1e-6)
    with pytest.raises(ExportError, match=r"^output_names: x is an input; give another name$"):
        export_onnx(Halves(), torch.randn(2, N), tmp_path / "m.onnx", "x", ["x", "exp"])
