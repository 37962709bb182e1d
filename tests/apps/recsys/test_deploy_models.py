"""Every family of ranking models as one ONNX graph from raw rows: the numbers of PyTorch."""

from __future__ import annotations

import pytest

from apps.recsys.model_settings import ModelConfig
from apps.recsys.models.build import FAMILIES
from export.compare import compare
from export.deliver import traced
from export.lowering import lower
from export.verify import in_onnxruntime, refuse_inexact
from tests.apps.recsys.deployed import ready

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("untyped")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_same_from_raw_rows(name, monkeypatch):
    one = ready(ModelConfig(name=name), monkeypatch)[1]
    found = compare(one, in_onnxruntime(one.finish(lower(traced(one), "sparse"))))
    refuse_inexact(found)
    assert found.max_relative_error < 1e-5
    assert found.decisions.count > 100
    assert {len(tensor) for tensor in one.single().tensors} == {1}
