"""The comparison itself, on a file whose outputs are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from export.onnx import export_onnx
from export.verify import TOLERANCE, Comparison, compare_onnx


@pytest.fixture
def exported(tmp_path):
    """A classifier that scales its input, and its file."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).eval()
    return model, export_onnx(model, torch.randn(2, 4), tmp_path / "m.onnx")


def test_equal_models_agree_whatever_the_batches(exported):
    model, path = exported
    found = compare_onnx(model, path, [torch.randn(batch, 4) for batch in (1, 5, 2)])
    assert found.passed
    assert (found.inputs, found.decision_agreement) == (8, 1.0)
    assert found.file_bytes == path.stat().st_size
    assert found.milliseconds > 0 < found.torch_milliseconds


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_nan_in_any_batch_is_no_pass(exported, batch):
    model, path = exported
    batches = [torch.randn(2, 4) for _ in range(3)]
    batches[batch][1, 2] = float("nan")
    assert not compare_onnx(model, path, batches).passed


def test_errors_are_relative_to_the_largest_output_and_decisions_are_counted(exported):
    model, path = exported
    x = torch.eye(4)
    before = model(x)
    with torch.no_grad():
        model.bias[0] += 10.0
    found = compare_onnx(model, path, [x])
    assert found.max_error == pytest.approx(10.0, rel=1e-5)
    assert found.max_relative_error == pytest.approx(10.0 / model(x).abs().max().item(), rel=1e-5)
    assert found.decision_agreement == (before.argmax(-1) == 0).float().mean().item()
    assert not found.passed


@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (TOLERANCE, True), (1.01 * TOLERANCE, False)])
def test_the_tolerance_is_the_limit(error, passed):
    assert Comparison(1, error, error, 1.0, 1.0, 1.0, 1).passed == passed
    assert set(Comparison(1, error, error, 1.0, 1.0, 1.0, 1).scalars()) >= {"max_error", "onnx_milliseconds_per_batch"}
