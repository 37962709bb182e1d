"""Each form of a mixture gives the reference's numbers, for every kind of bank, selection, and number of tokens."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

import moecore
from export.errors import ExportError
from export.lowering import LOWERINGS, lower
from export.measure import session_of
from export.trace import trace
from moecore.experts import ConstantBank, ExpertBank, GLUBank, MixedBank, MLPBank, SegmentBank
from moecore.layer import MoE
from moecore.routing import Router
from moecore.scores import LinearScore
from moecore.selection import SELECTIONS
from moecore.weighting import WEIGHTINGS

D, E, F = 32, 4, 32
EXACT = ("sparse", "dense", "loop", "ort_moe")


def layer(bank: ExpertBank, select: str = "top_k", top_k: int = 2, unit: str | int = "token", **options) -> MoE:
    selection = SELECTIONS[select](bank.num_experts, top_k, **options)
    columns = bank.num_experts + selection.num_null
    score = LinearScore(bank.width, columns)
    torch.nn.init.normal_(score.weight)
    weight = WEIGHTINGS["softmax"](bank.width, columns, top_k)
    return MoE(Router(score, selection, weight), bank, unit=unit).eval()


def traced(moe: MoE, shape: tuple[int, ...] = (2, 3)) -> onnx.ModelProto:
    """Opaque, batch and length open."""
    dynamic = ({i: torch.export.Dim(f"d{i}", min=1) for i in range(len(shape))},)
    return trace(moe, torch.randn(*shape, D), ["x"], ["y"], dynamic)


def exported(moe: MoE, form: str) -> onnx.ModelProto:
    return lower(traced(moe), form)


def difference(moe: MoE, proto: onnx.ModelProto, *shapes: tuple[int, ...]) -> float:
    """Largest over all shapes, relative to the largest output."""
    onnx.checker.check_model(proto, full_check=True)
    session, worst = session_of(proto), 0.0
    for shape in shapes:
        x = torch.randn(*shape, D)
        with torch.no_grad():
            expected = moe(x).numpy()
        ours = session.run(None, {"x": x.numpy()})[0]
        worst = max(worst, np.abs(ours - expected).max() / np.abs(expected).max())
    return worst


@pytest.mark.parametrize("select", sorted(SELECTIONS))
def test_every_selection_in_every_exact_form(select):
    torch.manual_seed(1)
    moe = layer(MLPBank(E, D, F, "relu"), select)
    opaque = traced(moe)
    for form in EXACT:
        assert difference(moe, lower(opaque, form), (1, 1), (1, 7), (3, 50)) < 2e-6, form


BANKS = {
    "gelu": MLPBank(E, D, F, "gelu"),
    "gelu_tanh": MLPBank(E, D, F, "gelu_tanh", bias=False),
    "silu": MLPBank(E, D, F, "silu"),
    "relu2": MLPBank(E, D, F, "relu2"),
    "tanh": MLPBank(E, D, F, "tanh"),
    "sigmoid": MLPBank(E, D, F, "sigmoid"),
    "identity": MLPBank(E, D, F, "identity"),
    "swiglu": GLUBank(E, D, F),
    "geglu": GLUBank(E, D, F, "gelu", bias=True),
    "narrow": MLPBank(E, D, F, "relu", out_width=5),
    "single": MLPBank(1, D, F, "relu"),
    "constant": ConstantBank(E, D),
    "mixed": MixedBank([MLPBank(2, D, F, "relu"), ConstantBank(1, D, "copy"), GLUBank(2, D, 8)]),
    "elu": MLPBank(E, D, F, torch.nn.functional.elu),
}
TAKEN = {"gelu_tanh", "silu", "identity", "swiglu", "constant", "mixed", "single", "elu"}
"""What onnxruntime's operator takes; a bank that is no plain FFN leaves PyTorch in its dense form."""


@pytest.mark.parametrize("name", sorted(BANKS))
def test_every_bank_in_every_exact_form_or_refused_in_a_line(name):
    torch.manual_seed(2)
    moe = layer(BANKS[name], top_k=min(2, BANKS[name].num_experts))
    opaque = traced(moe)
    for form in EXACT:
        if form == "ort_moe" and name not in TAKEN:
            with pytest.raises(ExportError, match=r"onnxruntime's operator does not take .*; use sparse$"):
                lower(opaque, form)
        else:
            assert difference(moe, lower(opaque, form), (1, 1), (2, 9)) < 5e-6, form


UNITS = {
    "sequence": ("sequence", MLPBank(E, D, F, "relu")),
    "segment": (4, MLPBank(E, D, F, "relu")),
    "mixed inside": (4, SegmentBank(E, 4, D, F, "relu")),
}


@pytest.mark.parametrize("name", sorted(UNITS))
def test_units_of_several_tokens(name):
    torch.manual_seed(3)
    unit, bank = UNITS[name]
    moe = MoE(layer(MLPBank(E, D, F)).router, bank, unit=unit).eval()
    opaque = trace(moe, torch.randn(2, 8, D), ["x"], ["y"], ({0: torch.export.Dim("batch", min=1)},))
    for form in EXACT:
        assert difference(moe, lower(opaque, form), (1, 8), (5, 8)) < 2e-6, form


@pytest.mark.parametrize("select", ["top_k", "top_p"])
def test_very_many_experts_take_both_ways_of_the_sparse_form(select):
    torch.manual_seed(5)
    moe = layer(MLPBank(64, D, 8), select)
    proto = exported(moe, "sparse")
    assert "If" in {node.op_type for node in proto.graph.node}
    assert difference(moe, proto, (1, 1), (1, 3), (3, 40), (5, 200)) < 2e-6


@pytest.mark.parametrize("select", ["top_k", "top_p"])
def test_static_shapes(select):
    torch.manual_seed(9)
    for experts in (E, 64):
        moe = layer(MLPBank(experts, D, 8, "relu"), select)
        opaque = trace(moe, torch.randn(1, 5, D), ["x"], ["y"])
        for form in EXACT:
            assert difference(moe, lower(opaque, form), (1, 5)) < 2e-6, (experts, form)


def test_tokens_without_any_expert_give_zeros():
    torch.manual_seed(6)
    moe = layer(MLPBank(E, D, F, "relu"), "threshold", threshold=1e6)
    x = np.random.default_rng(0).normal(size=(1, 3, D)).astype(np.float32)
    for form in EXACT:
        assert not session_of(exported(moe, form)).run(None, {"x": x})[0].any(), form


def test_the_sparse_form_multiplies_the_rows_sent_and_no_others():
    """Counted in the graph itself: rows of every first product of an expert."""
    torch.manual_seed(7)
    moe = layer(MLPBank(E, D, F, "relu"))
    proto = exported(moe, "sparse")
    products = [node for node in proto.graph.node if node.op_type == "Gemm" and node.name.startswith("experts_")]
    first = [node.output[0] for node in products[::2]]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in first)
    x = torch.randn(5, 20, D)
    with moecore.record(moe) as routing, torch.no_grad():
        moe(x)
    _, *rows = session_of(proto).run(None, {"x": x.numpy()})
    (record,) = routing
    assert [len(one) for one in rows] == record.assignment.load().tolist()


@pytest.mark.parametrize(("form", "limit"), [("qmoe", 2e-2), ("qmoe4", 0.25)])
def test_quantised_operators_are_close(form, limit):
    torch.manual_seed(8)
    moe = layer(MLPBank(E, D, F, "relu"))
    found = difference(moe, exported(moe, form), (1, 1), (4, 30))
    assert 1e-5 < found < limit


def test_every_registered_bank_and_selection_is_among_the_cases():
    tried = {type(bank) for bank in (*BANKS.values(), *(bank for _, bank in UNITS.values()))}
    assert tried == set(moecore.experts.BANKS.values())  # selections are taken from their registry


def test_soft_mixtures_export_as_they_are():
    torch.manual_seed(10)
    soft = moecore.SoftMoE(MLPBank(E, D, F), slots=2).eval()
    proto = lower(trace(soft, torch.randn(2, 6, D), ["x"], ["y"], ({0: torch.export.Dim("batch", min=1)},)), "sparse")
    assert difference(soft, proto, (1, 6), (5, 6)) < 2e-6


def test_random_forms_are_refused():
    with pytest.raises(ExportError, match=r"^experts='fast': choose one of dense, loop, ort_moe, qmoe, qmoe4, sparse$"):
        lower(exported(layer(MLPBank(E, D, F)), "sparse"), "fast")
    assert set(EXACT) < set(LOWERINGS)
