"""Sparse gates in exported files: the numbers of PyTorch, and experts that can be skipped where a form has a place."""

from __future__ import annotations

import numpy as np
import pytest

from apps.recsys.model_settings import HoMEConfig, MLPConfig, MMoEConfig, ModelConfig, PLEConfig
from export.compare import compare
from export.deliver import traced
from export.lowering import lower
from export.lowering.node import is_opaque, read_experts
from export.verify import in_onnxruntime, refuse_inexact
from moecore.multigate_bank import StackBank
from tests.apps.recsys.deployed import ready

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("untyped")

NORMED, DEEP = MLPConfig(units=(8,), activation="silu", norm=True), MLPConfig(units=(8, 4))
PLAIN = {"hierarchy": False, "feature_gate": "none", "self_gate": False}
VARIANTS = {
    "one gate sees all": (ModelConfig(name="mmoe", mmoe=MMoEConfig(num_experts=6, top_k=2)), 1),
    "gates see some": (ModelConfig(name="ple", ple=PLEConfig(levels=1, top_k=2, experts=MLPConfig(units=(8,)))), 3),
    "several layers": (ModelConfig(name="mmoe", mmoe=MMoEConfig(num_experts=6, top_k=2, experts=DEEP)), 0),
    "LayerNorm": (ModelConfig(name="home", home=HoMEConfig(top_k=2, experts=NORMED, **PLAIN)), 0),
}
"""Settings, and banks of which only the chosen experts run."""


@pytest.mark.parametrize("name", VARIANTS)
def test_chosen_experts_alone_give_the_same(name, monkeypatch):
    config, skipping = VARIANTS[name]
    trained, one = ready(config, monkeypatch)
    opaque = traced(one)
    found = compare(one, in_onnxruntime(one.finish(lower(opaque, "sparse"))))
    refuse_inexact(found)
    assert found.max_relative_error < 1e-5
    assert sum(map(is_opaque, opaque.graph.node)) == skipping
    banks = [module for module in trained.model.modules() if isinstance(module, StackBank)]
    assert len(banks) >= max(skipping, 1)  # the caller's model stays as it is
    for bank, node in zip(banks, read_experts(opaque), strict=False):
        assert (node.top_k, node.num_experts, node.activation) == (2, bank.num_experts, "relu")
        assert np.array_equal(node.up, bank.weights[0].detach().numpy())
