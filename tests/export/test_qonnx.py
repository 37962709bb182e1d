"""Quantised graphs: what is quantised and how finely, the same numbers as qonnx and hls4ml give, refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import moecore
from export.errors import ExportError
from export.lowering import lower
from export.onnx import trace
from export.qonnx import Settings, write_qonnx
from export.qonnx.emit import DOMAIN, Range, weight_scales
from export.qonnx.prepare import prepare
from export.qonnx.routers import find_routers
from export.qonnx.run import limits, run
from moecore.errors import ConfigError
from moecore.multigate import MultiGate
from moecore.multigate_experts import ExpertStack

D, N = 16, 5
needs_qonnx = pytest.mark.skipif(
    importlib.util.find_spec("qonnx") is None, reason="needs qonnx (pip install 'moecore[hls4ml]')"
)


def transformer() -> nn.Module:
    """Two layers, their FFNs MoE."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    moecore.replace_ffn(model, "all", moecore.MoEConfig(num_experts=4, top_k=2), init="random")
    for one in model.modules():
        if isinstance(one, moecore.MoE):
            nn.init.normal_(next(one.router.parameters()))
    return model.eval()


class MMoE(nn.Module):
    """Experts with BatchNorm, two gates, towers: first layers of experts and gates are one product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.level = MultiGate({"all": ExpertStack(3, D, [12, 8], norm=True)}, {"a": ["all"], "b": ["all"]}, D)
        self.towers = ExpertStack(2, 8, [6, 1], linear=True)
        for norm in self.level.experts["all"].norms:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.towers(self.level.mixtures(x)).squeeze(2)


def policy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


SHAPES = {"transformer": (N, D), "mmoe": (D,), "policy": (D,)}
MODELS = {"transformer": transformer, "mmoe": lambda: MMoE().eval(), "policy": policy}


@pytest.fixture(scope="module")
def traced():
    """Name -> graph, and samples."""
    random = np.random.default_rng(0)
    made = {}
    for name, build in MODELS.items():
        proto = trace(build(), torch.randn(1, *SHAPES[name]), ["x"], ["y"])
        made[name] = proto, {"x": random.uniform(-2, 2, (128, *SHAPES[name])).astype(np.float32)}
    return made


def written(traced, name, path, **settings):
    """The file, and its figures."""
    proto, samples = traced[name]
    figures = write_qonnx(proto, samples, path, Settings(**settings))
    return onnx.load(path), figures


def producers(proto):
    return {name: node for node in proto.graph.node for name in node.output}


def constants(proto):
    return {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}


# One quantiser


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "expected"),
    [
        (8, True, False, (-128, 127)),
        (8, True, True, (-127, 127)),
        (4, False, False, (0, 15)),
        (4, False, True, (0, 14)),
    ],
)
def test_codes_lie_in_their_range(bits, signed, narrow, expected):
    assert limits(bits, signed, narrow) == expected


def test_scales_reach_the_largest_value():
    assert Range(-2.0, 1.0).scale(8) == 2.0 / 127
    assert Range(0.0, 1.0).scale(8) == 1.0 / 255
    assert Range(0.0, 0.0).scale(8) > 0
    weight = np.array([[1.0, -8.0], [-4.0, 2.0]])  # [in, out]
    assert weight_scales(weight, 4, 1).tolist() == [4 / 7, 8 / 7]


def test_a_quantiser_rounds_to_even_saturates_and_gives_numbers_back():
    values = [np.float32(0.5), np.float32(0), np.float32(3)]
    names = ["scale", "zero", "bits"]
    node = helper.make_node("Quant", ["x", *names], ["y"], domain=DOMAIN, signed=1, narrow=0, rounding_mode="ROUND")
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 6]) for name in "xy"]
    given = [numpy_helper.from_array(one, name) for one, name in zip(values, names, strict=True)]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], given)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    x = np.array([[0.2, 0.25, 0.75, 9.0, -9.0, -0.6]], np.float32)
    ((got,),) = run(proto, {"x": x})
    assert got.tolist() == [[0.0, 0.0, 1.0, 1.5, -2.0, -0.5]]


# The form that is quantised


@pytest.mark.parametrize("name", MODELS)
def test_the_prepared_graph_gives_the_same(traced, name):
    proto, samples = traced[name]
    proto = lower(proto, "dense")
    made = prepare(proto)
    a, b = (np.stack([y for (y,) in run(one, samples)]) for one in (proto, made))
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(a).max())
    assert "Gemm" not in {node.op_type for node in made.graph.node}
    # Of the experts' two norms, one follows its product.
    assert sum(node.op_type == "BatchNormalization" for node in made.graph.node) == (name == "mmoe")
    found = constants(made)
    weights = [found[node.input[1]] for node in made.graph.node if node.op_type == "MatMul" and node.input[1] in found]
    assert weights
    assert all(one.ndim == 2 for one in weights)


def test_routers_and_gates_are_found_attention_is_not(traced):
    made = prepare(lower(traced["transformer"][0], "dense"))
    modules = {node.output[0]: [one.value for one in node.metadata_props] for node in made.graph.node}
    routers = find_routers(made)
    assert sorted(modules[name][0] for name in routers) == [
        f"layers.{i}.{kind}" for i in range(2) for kind in sorted({modules[n][0].split(".", 2)[2] for n in routers})
    ]
    assert all("router" in modules[name][0] for name in routers)
    made = prepare(lower(traced["mmoe"][0], "dense"))
    (gate,) = find_routers(made)
    assert constants(made)[producers(made)[gate].input[1]].shape == (D, 6)  # apart from the experts' first layer


# Whole files


@pytest.mark.parametrize("name", MODELS)
def test_everything_products_read_is_quantised_routers_finely(traced, name, tmp_path):
    made, figures = written(traced, name, tmp_path / "m.onnx", weight_bits=6, activation_bits=7, router_bits=12)
    by, values = producers(made), constants(made)
    routers = json.loads(next(one.value for one in made.metadata_props if one.key == "routers"))
    products = [node for node in made.graph.node if node.op_type == "MatMul"]
    assert len(products) == figures["products"]
    assert len(routers) == figures["router_products"]
    for node in products:
        for place, given in enumerate(node.input):
            quant = by[given]
            assert (quant.op_type, quant.domain) == ("Quant", DOMAIN)
            weight = quant.input[0] in values
            assert weight == (place == 1) or not weight
            bits = 12 if node.output[0] in routers else 6 if weight else 7
            assert values[quant.input[3]] == bits
            assert values[quant.input[2]] == 0
            options = {one.name: helper.get_attribute_value(one) for one in quant.attribute}
            assert options["rounding_mode"] == b"ROUND"
            assert options["narrow"] == weight
            if weight:
                scale, one = values[quant.input[1]], values[quant.input[0]]
                assert scale.shape == (1, one.shape[1])
                np.testing.assert_allclose(np.abs(one / scale).max(0), 2 ** (bits - 1) - 1, rtol=1e-5)
    known = {one.name: one for one in (*made.graph.value_info, *made.graph.output)}
    for node in made.graph.node:
        for output in filter(None, node.output):
            assert all(axis.dim_value > 0 for axis in known[output].type.tensor_type.shape.dim)


@pytest.mark.parametrize("name", MODELS)
def test_errors_fall_with_bits(traced, name, tmp_path):
    found = {}
    for bits in (4, 8, 14):
        _, found[bits] = written(traced, name, tmp_path / "m.onnx", weight_bits=bits, activation_bits=bits, margin=1.7)
    errors = [one["relative_rms_error"] for one in found.values()]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[1] < 0.08
    assert errors[2] < 2e-3
    assert found[14]["decision_agreement"] > 0.98
    if name == "transformer":
        assert found[14]["routing_agreement"] > 0.99 > found[4]["routing_agreement"]
    else:
        assert "routing_agreement" not in found[8]


def test_figures_are_those_of_samples_that_set_no_range(traced, tmp_path):
    made, figures = written(traced, "policy", tmp_path / "m.onnx")
    proto, samples = traced["policy"]
    unseen = {"x": samples["x"][1::2]}
    a, b = (np.concatenate([y for (y,) in run(one, unseen)]) for one in (made, lower(proto, "dense")))
    error = np.sqrt(((a - b) ** 2).mean() / (b - b.mean(0)).var())
    assert figures["relative_rms_error"] == pytest.approx(error, rel=1e-2)
    assert figures["decision_agreement"] == (a.argmax(1) == b.argmax(1)).mean()
    assert figures["samples"] == 64
    assert figures["file_bytes"] == (tmp_path / "m.onnx").stat().st_size


@pytest.mark.parametrize("name", MODELS)
def test_qdq_runs_in_onnxruntime_as_it_is_and_leaves_routers_alone(traced, name, tmp_path):
    made, figures = written(traced, name, tmp_path / "m.onnx", dialect="qdq")
    _, other = written(traced, name, tmp_path / "q.onnx")
    onnx.checker.check_model(made, full_check=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = traced[name][1]["x"]
    ((expected,), *_) = run(made, {"x": x})
    np.testing.assert_array_equal(session.run(None, {"x": x[:1]})[0], expected)
    assert figures["relative_rms_error"] == pytest.approx(other["relative_rms_error"], rel=0.2)
    by, values = producers(made), constants(made)
    routers = json.loads(next(one.value for one in made.metadata_props if one.key == "routers"))
    for node in made.graph.node:
        if node.op_type == "MatMul":
            kinds = {by[one].op_type for one in node.input if one in by}
            assert ("DequantizeLinear" in kinds) == (node.output[0] not in routers)
    codes = [one for key, one in values.items() if key.endswith("/codes")]
    assert len(codes) == sum(one.endswith("/weight/q8") for one in by)
    assert {one.dtype for one in codes} == {np.dtype(np.int8)}
    assert max(np.abs(one.astype(int)).max() for one in codes) == 127


@needs_qonnx
@pytest.mark.parametrize("name", MODELS)
def test_qonnx_gives_the_same(traced, name, tmp_path):
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    made, _ = written(traced, name, tmp_path / "m.onnx")
    x = traced[name][1]["x"]
    wrapped = ModelWrapper(str(tmp_path / "m.onnx"))
    for row, (ours,) in zip(x[:2], run(made, {"x": x[:2]}), strict=True):
        theirs = execute_onnx(wrapped, {"x": row[None]})["y"]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@needs_qonnx
@pytest.mark.skipif(
    importlib.util.find_spec("hls4ml") is None or shutil.which("g++") is None, reason="needs hls4ml and g++"
)
@pytest.mark.filterwarnings("ignore")
def test_hls4ml_reads_the_file_of_an_mlp_policy(traced, tmp_path):
    import hls4ml
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    made, _ = written(traced, "policy", tmp_path / "m.onnx", per_channel=False)
    x = traced["policy"][1]["x"]
    wrapped = cleanup_model(ModelWrapper(str(tmp_path / "m.onnx")))
    config = hls4ml.utils.config_from_onnx_model(
        wrapped, granularity="name", default_precision="fixed<48,12>", backend="Vitis"
    )
    project = hls4ml.converters.convert_from_onnx_model(
        wrapped, output_dir=str(tmp_path / "project"), backend="Vitis", hls_config=config, io_type="io_parallel"
    )
    project.compile()
    ours = np.concatenate([y for (y,) in run(made, {"x": x})])
    # Rounding of a step between codes may fall the other way: hls4ml divides by steps in fixed point.
    assert np.sqrt(((project.predict(x) - ours) ** 2).mean()) < 0.01 * ours.std()


class Odd(nn.Module):
    """Linear layers that must not be parted, absorbed or taken for what they are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.tied = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.tied.weight = self.linear.weight
        self.norm = nn.BatchNorm1d(N)
        nn.init.normal_(self.norm.running_mean)
        self.register_buffer("mixing", torch.randn(3, N))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))  # [1, N, D], normalised over N
        first, second = self.tied(x).split([2, N - 2], 1)  # rows, not units
        a, b = self.linear(y).chunk(2, 2)
        return self.mixing @ (y + torch.cat([second, first], 1) + torch.cat([b, a.relu() + 0.5], 2))


@pytest.mark.parametrize("dialect", ["qonnx", "qdq"])
def test_odd_linear_layers_stay_what_they_are(tmp_path, dialect):
    x = {"x": np.random.default_rng(0).uniform(-1, 1, (128, N, D)).astype(np.float32)}
    model = Odd().eval()
    proto = trace(model, torch.randn(1, N, D), ["x"], ["y"])
    made = prepare(lower(proto, "dense"))
    got = np.concatenate([y for (y,) in run(made, x)])
    np.testing.assert_allclose(got, model(torch.from_numpy(x["x"])).detach(), rtol=0, atol=1e-5)
    figures = write_qonnx(proto, x, tmp_path / "m.onnx", Settings(dialect))
    assert figures["relative_rms_error"] < 0.05
    scales = [one.size for name, one in constants(onnx.load(tmp_path / "m.onnx")).items() if name.endswith("/scale")]
    assert 3 in scales  # the matrix on the left has a step per row


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dialect": "onnx"}, "^dialect='onnx': choose one of qdq, qonnx"),
        ({"weight_bits": 1}, "^weight_bits=1: must lie between 2 and 16"),
        ({"dialect": "qdq", "activation_bits": 4}, "^activation_bits=4: qdq has 8 bits only"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**settings)


def test_what_cannot_be_quantised_is_refused_and_leaves_no_file(tmp_path):
    x = {"x": np.ones((8, D), np.float32)}
    for model, batch, message in (
        (nn.Linear(D, 2), 2, r"^input x: shape \[2, 16\] is not that of one sample; trace with a batch of 1$"),
        (nn.ReLU(), 1, r"^nothing to quantise: the graph has no product"),
    ):
        proto = trace(model, torch.randn(batch, D), ["x"], ["y"])
        with pytest.raises(ExportError, match=message):
            write_qonnx(proto, x, tmp_path / "m.onnx")
    proto = trace(nn.Linear(D, 2), torch.randn(1, D), ["x"], ["y"])
    with pytest.raises(ConfigError, match=r"^calibration=2: give at least four samples"):
        write_qonnx(proto, {"x": x["x"][:2]}, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
