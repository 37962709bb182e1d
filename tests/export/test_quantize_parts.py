"""Quantised products against integer arithmetic in numpy; what is stored, folded, observed; graphs rewritten."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.errors import ExportError
from export.measure import session_of
from export.quantize import quantize
from export.quantize.graph import replace_nodes
from export.quantize.products import prepare
from export.quantize.ranges import ENOUGH, observe
from export.trace import trace
from moecore.experts import MLPBank
from moecore.layer import MoE
from moecore.routing import Router
from moecore.scores import LinearScore
from moecore.selection import TopK
from moecore.weighting import WEIGHTINGS

IN, OUT = 96, 40


def traced(model: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    return trace(model.eval(), example, ["x"], ["y"], ({0: torch.export.Dim("batch", min=1)},))


def rows(count: int, seed: int = 0) -> np.ndarray:
    return (1 + np.random.default_rng(seed).normal(size=(count, IN))).astype(np.float32)


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(proto, full_check=True)
    return session_of(proto).run(None, {"x": x})[0]


def arrays(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}


def of_type(proto: onnx.ModelProto, dtype: type, least: int = 64) -> list[np.ndarray]:
    return [array for array in arrays(proto).values() if array.dtype == dtype and array.size >= least]


def integer_product(x: np.ndarray, linear: nn.Linear, low: float, high: float, offset: bool) -> np.ndarray:
    """By hand, exactly: unsigned codes of x, signed ones of weights, sums of integers, one scale per output."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float64(np.float32((high - low) / 255))
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255) - zero  # [B, in]
    weight = linear.weight.detach().numpy().astype(np.float64)  # [out, in]
    scales = np.abs(weight).max(1) / 127  # [out]
    y = codes @ np.rint(weight / scales[:, None]).T
    bias = linear.bias.detach().numpy().astype(np.float64)
    return (y + np.rint(bias / (scale * scales))) * scale * scales if offset else y * scale * scales + bias


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT)


def test_static_products_are_integer_products_in_the_calibrated_range(linear):
    proto = traced(linear, torch.randn(2, IN))
    known = [rows(20, seed) for seed in (1, 2)]
    made = quantize(proto, "int8", [{"x": x} for x in known])
    low, high = min(x.min() for x in known), max(x.max() for x in known)
    x = rows(50)
    x[0] *= 10  # beyond the range: ends count
    assert np.abs(x).max() > 2 * high
    expected = integer_product(x, linear, low, high, offset=True)
    close = np.abs(run(made, x) - expected) / np.abs(expected).max()
    assert (close > 1e-5).mean() < 0.02  # a code that lies halfway may round either way
    assert close.max() < 2e-3


def test_dynamic_products_are_integer_products_in_the_range_of_the_call(linear):
    made = quantize(traced(linear, torch.randn(2, IN)), "int8-dynamic")
    for x in (rows(50), 7 * rows(3)):
        expected = integer_product(x, linear, x.min(), x.max(), offset=False)
        close = np.abs(run(made, x) - expected) / np.abs(expected).max()
        assert (close > 1e-5).mean() < 0.02
        assert close.max() < 2e-3


def test_four_bit_products_are_float_products_by_weights_in_blocks(linear):
    made = quantize(traced(linear, torch.randn(2, IN)), "int4")
    (codes,), (scales,) = of_type(made, np.uint8), of_type(made, np.float32)
    assert (codes.shape, scales.shape) == ((OUT, 3, 16), (OUT, 3))
    codes = np.stack([codes & 15, codes >> 4], -1).reshape(OUT, 3, 32).astype(np.float64) - 8
    weight = (codes * scales.reshape(OUT, 3, 1)).reshape(OUT, IN)
    known = linear.weight.detach().numpy()
    steps = np.abs(weight - known).reshape(OUT, 3, 32) / np.abs(scales.reshape(OUT, 3, 1))
    assert steps.max() <= 1 + 1e-3  # one where the end opposite to the largest is cut
    assert (steps <= 0.5 + 1e-3).mean() > 0.95
    x = rows(9)
    np.testing.assert_allclose(run(made, x), x @ weight.T + linear.bias.detach().numpy(), rtol=1e-4, atol=1e-4)


SILENT = """
import sys, onnx
from export.quantize import KINDS, quantize
for kind in KINDS:
    quantize(onnx.load(sys.argv[1]), kind, [{"x": __import__("numpy").ones((1, 96), "float32")}])
"""


def test_nothing_is_printed_nor_logged(linear, tmp_path):
    onnx.save(traced(linear, torch.randn(2, IN)), tmp_path / "opaque.onnx")
    command = [sys.executable, "-W", "error", "-c", SILENT, str(tmp_path / "opaque.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


class Concatenated(nn.Module):
    """One product by weights that are put together when it runs, as several experts and gates are."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(IN, IN)) for _ in range(3))
        self.offset = nn.Parameter(torch.randn(3, IN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, torch.cat(list(self.parts)), self.offset.flatten())


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_weights_put_together_in_the_graph_are_quantised(kind):
    torch.manual_seed(1)
    model = Concatenated()
    proto = traced(model, torch.randn(2, IN))
    made = quantize(proto, kind, [{"x": rows(20)}])
    assert sum(one.size for one in of_type(made, np.int8, 1000)) == 3 * IN * IN
    assert not of_type(made, np.float32, 1000)
    x, y = rows(20, 3), model(torch.from_numpy(rows(20, 3))).detach().numpy()
    assert 1e-4 < np.abs(run(made, x) - y).max() / np.abs(y).max() < 0.02


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(200, 32)
        self.map = nn.Linear(32, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def test_rows_of_tables_are_looked_up_as_codes():
    torch.manual_seed(2)
    model = Looked()
    ids = torch.randint(0, 200, (2, 7))
    made = quantize(traced(model, ids), "int8-dynamic")
    table = model.table.weight.detach().numpy()
    (codes,) = of_type(made, np.int8)
    assert codes.shape == (200, 32)
    assert {node.op_type for node in made.graph.node} == {"Gather", "Cast", "Mul"}
    found = run(made, ids.numpy())
    assert np.all(np.abs(found - table[ids]) <= np.abs(table).max(0) / 254 + 1e-6)
    assert np.abs(found - table[ids]).max() > 1e-4


def test_patch_embeddings_are_stored_in_eight_bits_and_run_in_float(linear):
    torch.manual_seed(3)
    model = nn.Conv2d(3, 32, 8, stride=8)
    made = quantize(traced(model, torch.randn(2, 3, 16, 16)), "int8", [{"x": np.zeros((1, 3, 16, 16), np.float32)}])
    (codes,) = of_type(made, np.int8)
    weight = model.weight.detach().numpy()
    scale = np.abs(weight).max((1, 2, 3), keepdims=True) / 127
    np.testing.assert_array_equal(codes, np.rint(weight / scale))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(codes * scale))
        expected = model(x).numpy()
    np.testing.assert_allclose(run(made, x.numpy()), expected, rtol=1e-4, atol=1e-5)


def test_other_convolutions_run_in_integers_where_ranges_are_known(tmp_path):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, stride=2))
    x = np.random.default_rng(0).normal(size=(4, 16, 12, 12)).astype(np.float32)
    expected = model(torch.from_numpy(x)).detach().numpy()
    proto = traced(model, torch.randn(2, 16, 12, 12))
    made = quantize(proto, "int8", [{"x": x}])
    assert sum(node.op_type == "QuantizeLinear" for node in made.graph.node) == 4  # before and after each
    error = np.sqrt(np.square(run(made, x) - expected).mean() / np.square(expected).mean())
    assert 1e-3 < error < 2e-2
    stored = quantize(proto, "int8-dynamic")
    assert np.abs(run(stored, x) - expected).max() < np.abs(run(made, x) - expected).max()


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x[:, None, None], self.weight)


def test_batched_products_are_stored_in_eight_bits_by_output():
    torch.manual_seed(5)
    model = Batched()
    made = quantize(traced(model, torch.randn(2, 32)), "int8-dynamic")
    assert [one.shape for one in of_type(made, np.int8)] == [(4, 32, 48)]
    weight = model.weight.detach().numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 127
    x = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    expected = np.einsum("bi,eio->beo", x, np.rint(weight / scale) * scale)[:, :, None]
    np.testing.assert_allclose(run(made, x), expected, rtol=1e-4, atol=1e-4)


def test_narrow_matrices_and_those_of_gates_stay_as_they_are():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.ModuleList([nn.Linear(IN, IN)])
            self.mlp = nn.ModuleDict({"gate": nn.Linear(IN, IN), "head": nn.Linear(IN, 15)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp["head"](self.mlp["gate"](x) * self.gates[0](x).sigmoid())

    made = quantize(traced(Gated(), torch.randn(2, IN)), "int8", [{"x": rows(5)}])
    assert [one.shape for one in of_type(made, np.int8, IN * 15)] == [(IN, IN)]
    assert sorted(one.size for one in of_type(made, np.float32, IN * 15)) == [IN * 15, IN * IN]


def sorted_by_sign(count: int) -> tuple[MoE, np.ndarray]:
    """A mixture of three; the last expert gets the tokens whose first feature is below zero, `count` of them."""
    torch.manual_seed(6)
    score = LinearScore(16, 3)
    with torch.no_grad():
        score.weight.copy_(torch.eye(3, 16) * torch.tensor([[0.0], [9.0], [0.0]]))
        score.weight[2, 0], score.weight[0, 0] = -9.0, 9.0
    router = Router(score, TopK(3, 1), WEIGHTINGS["softmax"](16, 3, 1))
    x = np.random.default_rng(0).normal(size=(300, 1, 16)).astype(np.float32)
    x[..., 0], x[..., 1] = np.abs(x[..., 0]) + 1, -1
    x[:count, :, 0] *= -3
    return MoE(router, MLPBank(3, 16, 16, "relu")).eval(), x


@pytest.mark.parametrize("count", [0, 5, ENOUGH])
def test_an_expert_with_few_tokens_takes_the_ranges_of_its_layer(count):
    moe, x = sorted_by_sign(count)
    prepared, products = prepare(traced(moe, torch.randn(2, 1, 16)))
    ranges = observe(prepared, products, [{"x": x[:150]}, {"x": x[150:]}])
    inputs = [ranges[one.x] for one in products if one.part.endswith("up")]
    assert len(inputs) == 3
    first, second, third = ((float(one.least), float(one.largest)) for one in inputs)
    every = (float(x.min()), float(x.max()))
    assert first == pytest.approx((x[count:].min(), x[count:].max()))
    assert second == pytest.approx(every)  # never chosen
    own = (x[:count].min(), x[:count].max()) if count == ENOUGH else every
    assert third == pytest.approx(own)


def test_calibration_data_that_gives_infinity_is_refused():
    with pytest.raises(ExportError, match=r"values that are not finite on calibration data"):
        quantize(traced(nn.Linear(IN, OUT), torch.randn(2, IN)), "int8", [{"x": np.full((2, IN), np.inf, np.float32)}])


def graph(nodes: Sequence[onnx.NodeProto]) -> onnx.GraphProto:
    values = [numpy_helper.from_array(np.float32([value]), name) for name, value in (("two", 2), ("unused", 0))]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    return helper.make_graph(list(nodes), "g", [x], [y], values)


def test_nodes_are_put_in_order_and_what_nobody_reads_goes():
    last, first = helper.make_node("Add", ["a", "two"], ["y"]), helper.make_node("Mul", ["x", "two"], ["a"])
    made = graph([last, helper.make_node("Neg", ["a"], ["nobody"]), first])
    replace_nodes(made, list(made.node))
    assert [node.op_type for node in made.node] == ["Mul", "Add"]
    assert [one.name for one in made.initializer] == ["two"]


def test_what_branches_read_from_outside_stays():
    sides = [
        helper.make_graph([helper.make_node(kind, ["a", "two"], ["out"])], kind, [], [onnx.ValueInfoProto(name="out")])
        for kind in ("Add", "Mul")
    ]
    choose = helper.make_node("If", ["yes"], ["y"], then_branch=sides[0], else_branch=sides[1])
    made = graph([choose, helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Cast", ["x"], ["yes"], to=9)])
    replace_nodes(made, list(made.node))
    assert [node.op_type for node in made.node][-1] == "If"
    assert len(made.node) == 3
    assert [one.name for one in made.initializer] == ["two"]
