"""Every kind of quantisation runs, is close, is smaller, computes in integers where it says so, and spares routers."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import moecore
from export.errors import ExportError
from export.lowering import lower
from export.measure import session_of
from export.onnx import ROUTING, routing
from export.quantize import KINDS, quantize
from export.trace import IR_VERSION, OPSET, trace
from moecore.layer import MoE

D, N, E = 64, 5, 6
PATCH = 8
ERRORS = {"int8": (2e-3, 4e-2), "int8-dynamic": (2e-3, 4e-2), "int4": (2e-2, 0.3), "fp16": (5e-5, 4e-3)}
SIZES = {"int8": 0.38, "int8-dynamic": 0.36, "int4": 0.28, "fp16": 0.57}
"""Bounds of the file over the float32 file; the nodes are much of one as small as this."""


class Images(nn.Module):
    """A patch embedding, two transformer layers whose FFNs are MoE, a head."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, D, PATCH, stride=PATCH)
        layer = nn.TransformerEncoderLayer(D, 2, 128, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        config = moecore.MoEConfig(**{"num_experts": E, "top_k": 2, **options})
        moecore.replace_ffn(self.encoder, "all", config, init="random")
        self.head = nn.Linear(D, 20)
        for module in self.modules():
            if isinstance(module, MoE):
                nn.init.normal_(module.router.score.weight)  # decisions far from ties

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(images).flatten(2).mT).mean(1))


def traced(model: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    return trace(model.eval(), example, ["x"], ["y"], ({0: torch.export.Dim("batch", min=1)},))


def images(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(batch, 3, 2 * PATCH, 2 * PATCH)).astype(np.float32)}


CALIBRATION = [images(16, seed) for seed in (100, 101)]


@functools.cache
def opaque() -> onnx.ModelProto:
    torch.manual_seed(0)
    return traced(Images(shared_hidden=32, top_k=1), torch.randn(2, 3, 2 * PATCH, 2 * PATCH))


@functools.cache
def quantized(kind: str) -> onnx.ModelProto:
    return quantize(opaque(), kind, CALIBRATION)


class Run:
    """A graph in onnxruntime that gives tensors within by name, besides its output "y"."""

    def __init__(self, proto: onnx.ModelProto, *names: str) -> None:
        shown = onnx.ModelProto()
        shown.CopyFrom(proto)
        shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        self.names, self.session = ["y", *names], session_of(shown)

    def __call__(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.names, self.session.run(self.names, feed), strict=True))


@functools.cache
def running(kind: str) -> Run:
    """The small model in one kind, "float" for none, with what its routers decide."""
    names = [layer[key] for layer in routing(opaque())[ROUTING] for key in ("expert", "weight")]
    return Run(lower(opaque(), "sparse") if kind == "float" else quantized(kind), *names)


def rms_error(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(ours - expected).mean() / np.square(expected).mean()))


def optimized(proto: onnx.ModelProto, folder) -> list[onnx.NodeProto]:
    """Nodes that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(onnx.load(folder / "optimized.onnx").graph.node)


def types_of(proto: onnx.ModelProto) -> dict[str, int]:
    return {one.name: one.data_type for one in proto.graph.initializer}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_any_batch_close_and_smaller(kind):
    proto = quantized(kind)
    onnx.checker.check_model(proto, full_check=True)
    least, largest = ERRORS[kind]
    for batch in (1, 2, 3, 40):  # one image has four tokens, fewer than experts
        ours, expected = (running(name)(images(batch))["y"] for name in (kind, "float"))
        assert ours.dtype == np.float32
        assert rms_error(ours, expected) < largest, batch
    assert rms_error(ours, expected) > least
    assert proto.ByteSize() < SIZES[kind] * lower(opaque(), "sparse").ByteSize()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_versions_and_names_stay(kind):
    proto = quantized(kind)
    versions = {one.domain: one.version for one in proto.opset_import}
    assert versions == {"": OPSET} | ({"com.microsoft": 1} if kind == "int4" else {})
    assert proto.ir_version == IR_VERSION
    given, taken = opaque().graph.input[0], opaque().graph.output[0]
    assert (proto.graph.input[0], proto.graph.output[0]) == (given, taken)
    assert not proto.metadata_props
    names = [node.name for node in proto.graph.node]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_expert_numbers_and_weights_can_be_read_and_agree(kind):
    layers = routing(opaque())[ROUTING]
    assert len(layers) == 2
    ours, expected = running(kind)(images(40)), running("float")(images(40))
    for layer in layers:
        chosen, known = ours[layer["expert"]], expected[layer["expert"]]
        assert chosen.dtype == np.int64
        same = chosen == known
        assert same.mean() > (0.9 if kind == "int4" else 0.97)
        difference = np.abs(ours[layer["weight"]] - expected[layer["weight"]])[same]
        assert np.sqrt(np.square(difference).mean()) < (0.1 if kind == "int4" else 0.02)


def test_weights_of_experts_and_attention_are_integers_and_routers_float():
    proto = quantized("int8")
    types = types_of(proto)
    arrays = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
    experts = [name for name, kind in types.items() if kind == TensorProto.INT8 and arrays[name].shape == (D, 96)]
    assert len(experts) == 2 * E
    assert all(np.abs(arrays[name]).max(0).min() == 127 for name in experts)  # every output channel has its own scale
    routers = [name for name, kind in types.items() if "router" in name and arrays[name].ndim == 2]
    assert len(routers) == 2
    assert all(types[name] == TensorProto.FLOAT for name in routers)
    large = [name for name, kind in types.items() if kind == TensorProto.FLOAT and arrays[name].size >= 1024]
    assert not large


@pytest.mark.parametrize(("kind", "kernels"), [("int8", {"QGemm", "MatMulIntegerToFloat"}), ("int8-dynamic", set())])
def test_onnxruntime_runs_them_as_integers(kind, kernels, tmp_path):
    nodes = optimized(quantized(kind), tmp_path)
    found = [node.op_type for node in nodes]
    integer = [name for name in found if name in kernels | {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}]
    # per layer two for each expert, two of the shared one, attention in and out; the head
    assert len(integer) == 2 * (2 * E + 4) + 1
    assert kernels <= set(integer)
    assert found.count("DequantizeLinear") == 0
    routers = [node.input[1] for node in nodes if node.op_type in ("MatMul", "Gemm") and "router" in node.input[1]]
    assert len(routers) == 2
    convolution = next(node for node in nodes if node.op_type == "Conv")
    assert convolution.input[1] not in {name for node in nodes for name in node.output}  # unfolded when loaded


@functools.cache
def alone(**options: object) -> tuple[MoE, onnx.ModelProto]:
    """An MoE layer that is all of a model."""
    torch.manual_seed(1)
    model = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))])
    config = moecore.MoEConfig(**{"num_experts": E, "top_k": 2, "hidden": D, **options})
    moecore.replace_ffn(model, "all", config, init="random")
    (moe,) = model
    nn.init.normal_(moe.router.score.weight)
    return moe, traced(moe, torch.randn(2, N, D))


def tokens(batch: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, N, D)).astype(np.float32)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_router_beside_quantised_experts_decides_as_in_float(kind):
    """Router, shared expert and experts all read the input itself; only the router must see it unrounded."""
    _, proto = alone(shared_hidden=D)
    x = tokens(300)
    (layer,) = routing(proto)[ROUTING]
    names = layer["expert"], layer["weight"]
    ours = Run(quantize(proto, kind, [{"x": x[:50]}]), *names)({"x": x})
    seen = x.astype(np.float16).astype(np.float32) if kind == "fp16" else x
    expected = Run(lower(proto, "sparse"), *names)({"x": seen})
    assert rms_error(ours["y"], expected["y"]) > 1e-4
    np.testing.assert_array_equal(ours[names[0]], expected[names[0]])
    close = {"rtol": 1e-3, "atol": 1e-6} if kind == "fp16" else {"rtol": 1e-6}
    np.testing.assert_allclose(ours[names[1]], expected[names[1]], **close)


@functools.cache
def divided() -> onnx.ModelProto:
    """By the sign of the first feature a token goes to experts 0 and 1, or to the others."""
    moe, _ = alone(num_experts=4)
    with torch.no_grad():
        moe.router.score.weight.zero_()
        moe.router.score.weight[:2, 0], moe.router.score.weight[2:, 0] = 4.0, -4.0
    return traced(moe, torch.randn(2, N, D))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_expert_without_calibration_tokens_still_works(kind):
    proto, x = divided(), tokens(60)
    x[..., 0] = np.abs(x[..., 0]) + 1
    made = quantize(proto, kind, [{"x": x}])
    x[..., 0] *= -1
    (layer,) = routing(proto)[ROUTING]
    ours = Run(made, layer["expert"])({"x": x})
    assert ours[layer["expert"]].min() == 2
    error = rms_error(ours["y"], Run(lower(proto, "sparse"))({"x": x})["y"])
    assert ERRORS[kind][0] / 10 < error < ERRORS[kind][1]


MIXTURES = [{"glu": True}, {"select": "top_p"}, {"unit": "sequence"}, {"top_k": E}]


@pytest.mark.parametrize("options", MIXTURES, ids=str)
def test_other_kinds_of_mixtures(options):
    _, proto = alone(**options)
    expected = Run(lower(proto, "sparse"))
    for kind in ("int8", "int8-dynamic", "int4"):
        made = quantize(proto, kind, [{"x": tokens(30, 3)}])
        onnx.checker.check_model(made, full_check=True)
        ours = Run(made)
        assert np.isfinite(ours({"x": tokens(1)})["y"]).all()
        error = rms_error(ours({"x": tokens(30)})["y"], expected({"x": tokens(30)})["y"])
        # what gated experts multiply has long tails, which fixed ranges must hold
        assert ERRORS[kind][0] / 2 < error < ERRORS[kind][1] * (2 if "glu" in options else 1), kind


def test_the_traced_graph_is_left_as_it_was():
    before = opaque().SerializeToString()
    for kind in KINDS:
        quantize(opaque(), kind, CALIBRATION)
    assert opaque().SerializeToString() == before


def test_refusals():
    with pytest.raises(ExportError, match=r"^kind='int3': choose one of fp16, int4, int8, int8-dynamic$"):
        quantize(opaque(), "int3")
    with pytest.raises(ExportError, match=r"^calibration=\(\): int8 takes its ranges .*int8-dynamic$"):
        quantize(opaque(), "int8")
    broken = images(3)
    broken["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(ExportError, match=r"values that are not finite on calibration data"):
        quantize(opaque(), "int8", [images(3), broken])
