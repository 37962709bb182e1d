"""Every operator compiled from ONNX and simulated, against onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.fpga.calibrate import FloatGraph
from export.fpga.compiler import compile_protos, read_graphs
from export.fpga.lower import RULES
from export.fpga.program import FixedSettings, Program
from export.fpga.simulate import simulate
from moecore.errors import ConfigError

FINE = FixedSettings(weight_width=24, activation_width=24, table_bits=14)
Arrays = dict[str, np.ndarray]


def rand(*shape: int, seed: int = 0, low: float = -3, high: float = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def whole(*shape: int, below: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape)


def proto(nodes: list[onnx.NodeProto], inputs: Arrays, constants: Arrays, outputs: list[str]) -> onnx.ModelProto:
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in inputs.items()
    ]
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    taken = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph(nodes, "graph", given, taken, held)
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("moecore", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


def one(op: str, inputs: Arrays, constants: Arrays | None = None, outputs: int = 1, order: str = "", **attributes: Any):
    """A graph of one node; `order` lists its operands by their one-letter names, `-` for those not given."""
    constants = constants or {}
    names = ["" if letter == "-" else letter for letter in order] or [*inputs, *constants]
    made = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, made, name="node", domain="moecore" if op == "Experts" else "", **attributes)
    return proto([node], inputs, constants, made), inputs


def difference(model: onnx.ModelProto, inputs: Arrays, settings: FixedSettings = FINE) -> tuple[float, Program]:
    """Largest error of any output, relative to its largest value; nothing may overflow."""
    program = compile_protos(model, [inputs], settings)
    found = simulate(program, inputs)
    assert not found.overflows
    expected = FloatGraph(model).run(inputs)
    worst = 0.0
    for name, value in found.outputs.items():
        assert value.shape == expected[name].shape
        scale = np.abs(expected[name].astype(float)).max() or 1.0
        worst = max(worst, float(np.abs(value - expected[name]).max() / scale))
    return worst, program


I64 = np.array
X, V = {"x": rand(2, 5, 6)}, {"x": rand(4, 7)}
IMAGE = {"x": rand(1, 4, 7, 6)}
PAIR = {"a": rand(2, 1, 6), "b": rand(5, 1, seed=1)}
IDS = {"x": rand(3, 4), "i": whole(3, 2, below=4)}
CASES: dict[str, Callable[[], tuple[onnx.ModelProto, Arrays]]] = {
    "Gemm": lambda: one("Gemm", V, {"w": rand(9, 7, seed=1), "b": rand(9, seed=2)}, transB=1, alpha=0.5),
    "Gemm summand": lambda: one("Gemm", V | {"c": rand(4, 9, seed=3)}, {"w": rand(7, 9, seed=1)}, order="xwc"),
    "MatMul constant": lambda: one("MatMul", X, {"w": rand(6, 3, seed=1)}),
    "MatMul constant batch": lambda: one("MatMul", X, {"w": rand(2, 6, 3, seed=1)}),
    "MatMul constant left": lambda: one("MatMul", X, {"w": rand(3, 5, seed=1)}, order="wx"),
    "MatMul": lambda: one("MatMul", {"a": rand(2, 3, 4, 5), "b": rand(3, 5, 2, seed=1)}),
    "MatMul vector": lambda: one("MatMul", {"a": rand(4, 5), "b": rand(5, seed=1)}),
    "Einsum": lambda: one("Einsum", {"a": rand(2, 3, 5), "b": rand(2, 3, seed=1)}, equation="blk,bl->bk"),
    "Einsum turned": lambda: one("Einsum", {"a": rand(3, 4), "b": rand(5, 4, seed=1)}, equation="ij,kj->ki"),
    "Conv": lambda: one(
        "Conv", IMAGE, {"w": rand(6, 2, 3, 2, seed=1), "b": rand(6)}, group=2, pads=[1, 0, 2, 1], strides=[2, 1]
    ),
    "Conv flat": lambda: one("Conv", {"x": rand(1, 4, 9)}, {"w": rand(3, 4, 3, seed=1)}, pads=[2, 0], dilations=[2]),
    "Conv same": lambda: one("Conv", IMAGE, {"w": rand(3, 4, 3, 3, seed=1)}, auto_pad="SAME_UPPER", strides=[2, 2]),
    "BatchNormalization": lambda: one(
        "BatchNormalization", IMAGE, {n: rand(4, seed=i, low=0.5) for i, n in enumerate("smbv")}
    ),
    "Add": lambda: one("Add", PAIR),
    "Sub": lambda: one("Sub", PAIR),
    "Mul": lambda: one("Mul", PAIR),
    "Max": lambda: one("Max", PAIR),
    "Min": lambda: one("Min", PAIR),
    "Add tiny constant": lambda: one("Add", X, {"c": np.float32(1e-12)}),
    "Div": lambda: one("Div", {"a": rand(4, 5), "b": rand(4, 1, seed=1, low=0.5)}),
    "Div constant": lambda: one("Div", X, {"c": np.float32(-255)}),
    "Reciprocal": lambda: one("Reciprocal", {"x": rand(4, 5, low=0.25)}),
    "Pow 2": lambda: one("Pow", X, {"p": np.float32(2)}),
    "Pow 0.5": lambda: one("Pow", {"x": rand(4, 5, low=0)}, {"p": np.float32(0.5)}),
    "Pow 3": lambda: one("Pow", X, {"p": np.float32(3)}),
    "Sqrt": lambda: one("Sqrt", {"x": rand(4, 5, low=0)}),
    "Where": lambda: one("Where", {"c": whole(4, 1, below=2).astype(bool), "a": rand(4, 5), "b": rand(5)}),
    "Clip": lambda: one("Clip", X, {"a": np.float32(-0.7), "b": np.float32(1.3)}),
    "Clip below": lambda: one("Clip", X, {"a": np.float32(-0.7)}),
    "Transpose": lambda: one("Transpose", {"x": rand(2, 3, 4, 5)}, perm=[2, 0, 3, 1]),
    "Expand": lambda: one("Expand", {"x": rand(2, 1, 3)}, {"s": I64([2, 4, 3])}),
    "Tile": lambda: one("Tile", {"x": rand(2, 3)}, {"r": I64([2, 3])}),
    "Slice": lambda: one("Slice", X, {"s": I64([4, 1]), "e": I64([-9, 5]), "a": I64([1, 2]), "t": I64([-2, 2])}),
    "Split": lambda: one("Split", X, {"s": I64([1, 4, 1])}, 3, axis=2),
    "Concat": lambda: one("Concat", {"a": rand(2, 3), "b": 40 * rand(2, 2, seed=1)}, axis=1),
    "Pad": lambda: one("Pad", X, {"p": I64([0, 2, 0, 0, 1, 0]), "v": np.float32(1.5)}),
    "DepthToSpace": lambda: one("DepthToSpace", {"x": rand(1, 12, 2, 3)}, blocksize=2),
    "DepthToSpace CRD": lambda: one("DepthToSpace", {"x": rand(1, 12, 2, 3)}, blocksize=2, mode="CRD"),
    "SpaceToDepth": lambda: one("SpaceToDepth", {"x": rand(1, 2, 4, 6)}, blocksize=2),
    "Gather": lambda: one("Gather", {"i": whole(2, 3, below=9)}, {"t": rand(9, 4)}, order="ti"),
    "Gather even": lambda: one("Gather", X, {"i": I64([5, 3, 1])}, axis=2),
    "Gather uneven": lambda: one("Gather", X, {"i": I64([5, 0, -1])}, axis=2),
    "GatherND": lambda: one("GatherND", {"i": whole(5, 1, below=9)}, {"t": rand(9, 4)}, order="ti"),
    "GatherElements": lambda: one("GatherElements", IDS, axis=1),
    "ScatterElements": lambda: one("ScatterElements", IDS | {"u": rand(3, 2, seed=5)}, axis=1),
    "ScatterElements add": lambda: one("ScatterElements", IDS | {"u": rand(3, 2, seed=5)}, axis=1, reduction="add"),
    "ScatterND": lambda: one("ScatterND", V | {"u": rand(2, 7, seed=5)}, {"i": I64([[3], [0]])}, order="xiu"),
    "LayerNormalization": lambda: one(
        "LayerNormalization", X, {"s": rand(6, seed=1), "b": rand(6, seed=2)}, epsilon=1e-3
    ),
    "LayerNormalization two": lambda: one("LayerNormalization", X, {"s": rand(5, 6, seed=1)}, axis=1),
    "Softmax": lambda: one("Softmax", X),
    "Softmax middle": lambda: one("Softmax", X, axis=1),
    "ReduceSum": lambda: one("ReduceSum", X, {"a": I64([1])}),
    "ReduceMean": lambda: one("ReduceMean", X, {"a": I64([0, 2])}, keepdims=0),
    "ReduceMean all": lambda: one("ReduceMean", X),
    "ReduceMax": lambda: one("ReduceMax", X, {"a": I64([-1])}),
    "ReduceMin": lambda: one("ReduceMin", X, {"a": I64([0])}),
    "ReduceL2": lambda: one("ReduceL2", X, {"a": I64([2])}),
    "GlobalAveragePool": lambda: one("GlobalAveragePool", IMAGE),
    "ArgMax": lambda: one("ArgMax", X, axis=1),
    "ArgMin": lambda: one("ArgMin", X, axis=-1, keepdims=0),
    "TopK": lambda: one("TopK", X, {"k": I64([3])}, 2),
    "CumSum": lambda: one("CumSum", X, {"a": I64(1)}, exclusive=1),
    "Resize nearest": lambda: one(
        "Resize", IMAGE, {"s": np.array([1, 1, 2, 1.5], np.float32)}, order="x-s", nearest_mode="floor"
    ),
    "Resize linear": lambda: one("Resize", IMAGE, {"s": I64([1, 4, 14, 9])}, order="x--s", mode="linear"),
    "Resize corners": lambda: one(
        "Resize",
        IMAGE,
        {"s": I64([1, 4, 3, 11])},
        order="x--s",
        mode="linear",
        coordinate_transformation_mode="align_corners",
    ),
    "Cast to whole": lambda: one("Cast", X, to=TensorProto.INT64),
    "Cast from byte": lambda: one("Cast", {"x": whole(3, 4, below=256).astype(np.uint8)}, to=TensorProto.FLOAT),
    "Cast to bool": lambda: one("Cast", {"x": np.round(rand(3, 4))}, to=TensorProto.BOOL),
    "Elu": lambda: one("Elu", X, alpha=0.7),
    "LeakyRelu": lambda: one("LeakyRelu", X, alpha=0.2),
    "Log": lambda: one("Log", {"x": rand(4, 5, low=1)}),
    "Exp": lambda: one("Exp", {"x": rand(4, 5, low=-9)}),
    "Gelu": lambda: one("Gelu", X),
    "Gelu tanh": lambda: one("Gelu", X, approximate="tanh"),
    **{op: (lambda op=op: one(op, X)) for op in ("Sigmoid", "Tanh", "Erf", "Softplus", "Mish", "Sin", "Cos", "Relu")},
    **{op: (lambda op=op: one(op, X)) for op in ("Abs", "Neg", "Sign", "Floor", "Ceil")},
    **{
        op: (lambda op=op: one(op, {"a": np.round(rand(4, 5)), "b": np.round(rand(5, seed=1))}))
        for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
    },
    **{
        op: (lambda op=op: one(op, {"a": whole(4, 5, below=2).astype(bool), "b": whole(5, below=2).astype(bool)}))
        for op in ("And", "Or", "Xor")
    },
    "Not": lambda: one("Not", {"a": whole(4, 5, below=2).astype(bool)}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_an_operator_gives_onnxruntimes_numbers(case):
    error, _ = difference(*CASES[case]())
    assert error < 2e-5


def test_every_rule_has_a_case_here():
    fused = {"Linear", "RMSNormalization", "Silu", "Experts", "CastLike"}
    assert {case.split()[0] for case in CASES} | fused == set(RULES)


def experts(gated: bool, activation: str, biased: bool) -> tuple[onnx.ModelProto, Arrays]:
    shapes = {"u": (4, 6, 5), "d": (4, 3, 6)} | ({"g": (4, 6, 5)} if gated else {})
    biases = {"p": (4, 6), "q": (4, 3)} | ({"r": (4, 6)} if gated else {}) if biased else {}
    constants = {
        name: rand(*shape, seed=i, low=-1, high=1) for i, (name, shape) in enumerate((shapes | biases).items())
    }
    order = "xew" + "".join(name if name in constants else "-" for name in "udgpqr")
    inputs = {"x": rand(9, 5), "e": whole(9, 2, below=5), "w": rand(9, 2, low=0, high=1, seed=7)}
    return one("Experts", inputs, constants, order=order, activation=activation)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu", "relu2", "tanh", "sigmoid", "identity"])
@pytest.mark.parametrize("gated", [False, True])
def test_experts_of_every_activation(gated, activation):
    error, program = difference(*experts(gated, activation, activation != "silu"))
    assert error < 2e-5
    (layer,) = program.layers
    assert layer.op.dims == {"tokens": 9, "top_k": 2, "experts": 4, "in": 5, "hidden": 6, "out": 3, "gated": int(gated)}
    assert layer.op.macs == 18 * (6 * 5 * (1 + gated) + 6 * 3)


def rms_norm(multiplied: bool) -> tuple[onnx.ModelProto, Arrays]:
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["square"]),
        helper.make_node("ReduceMean", ["square", "last"], ["mean"], keepdims=1),
        helper.make_node("Add", ["mean", "eps"], ["safe"]),
        helper.make_node("Sqrt", ["safe"], ["root"]),
        *([helper.make_node("Reciprocal", ["root"], ["inverse"])] if multiplied else []),
        helper.make_node(*(("Mul", ["x", "inverse"]) if multiplied else ("Div", ["x", "root"])), ["normal"]),
        helper.make_node("Mul", ["normal", "scale"], ["y"]),
    ]
    constants = {"two": np.float32(2), "last": I64([-1]), "eps": np.float32(1e-6), "scale": rand(6, seed=3)}
    return proto(nodes, X, constants, ["y"]), X


@pytest.mark.parametrize("multiplied", [False, True])
def test_rms_norm_spelt_out_becomes_one_layer(multiplied):
    error, program = difference(*rms_norm(multiplied))
    assert error < 2e-5
    assert [layer.op.kind for layer in program.layers] == ["norm"]


def test_linear_with_bias_and_silu_become_one_layer_each():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["b", "product"], ["linear"]),
        helper.make_node("Sigmoid", ["linear"], ["gate"]),
        helper.make_node("Mul", ["linear", "gate"], ["y"]),
    ]
    model = proto(nodes, X, {"w": rand(6, 4, seed=1), "b": rand(4, seed=2)}, ["y"])
    error, program = difference(model, X)
    assert error < 2e-5
    assert [layer.op.kind for layer in program.layers] == ["linear", "table"]


def test_masks_of_infinity_leave_nothing_and_do_not_overflow():
    mask = np.array([[0, 0, -np.inf, 0, -np.inf, -np.inf]], np.float32)
    nodes = [helper.make_node("Add", ["x", "m"], ["masked"]), helper.make_node("Softmax", ["masked"], ["y"])]
    model = proto(nodes, X, {"m": mask}, ["y"])
    error, _ = difference(model, X)
    assert error < 2e-5
    found = simulate(compile_protos(model, [X], FINE), X).outputs["y"]
    assert not found[..., [2, 4, 5]].any()


def test_a_second_choice_is_made_after_minus_infinity_took_the_place_of_the_first():
    nodes = [
        helper.make_node("ArgMax", ["x"], ["first"], axis=1),
        helper.make_node("ScatterElements", ["x", "first", "gone"], ["rest"], axis=1),
        helper.make_node("ArgMax", ["rest"], ["y"], axis=1),
    ]
    model = proto(nodes, V, {"gone": np.full((4, 1), -np.inf, np.float32)}, ["y"])
    found = simulate(compile_protos(model, [V], FINE), V).outputs["y"]
    assert found.ravel().tolist() == np.argsort(-V["x"], 1)[:, 1].tolist()


def test_what_depends_on_no_input_or_tests_for_nan_is_gone():
    nodes = [
        helper.make_node("IsNaN", ["x"], ["odd"]),
        helper.make_node("Where", ["odd", "zero", "x"], ["clean"]),
        helper.make_node("Mul", ["c", "c"], ["squared"]),
        helper.make_node("Reshape", ["clean", "shape"], ["flat"]),
        helper.make_node("Slice", ["flat", "start", "stop"], ["part"]),
        helper.make_node("Add", ["part", "squared"], ["y"]),
    ]
    constants = {"zero": np.float32(0), "c": rand(4), "shape": I64([15, 4]), "start": I64([3]), "stop": I64([9])}
    model = proto(nodes, X, constants, ["y"])
    error, program = difference(model, X)
    assert error < 2e-5
    assert [layer.op.kind for layer in program.layers] == ["binary"]  # the slice is a view


def test_huge_constants_that_are_not_taken_cost_nothing_and_count_when_they_are():
    """As `nan_to_num` leaves them, beside a condition that calibration never saw true."""
    nodes = [helper.make_node("Less", ["x", "low"], ["far"]), helper.make_node("Where", ["far", "huge", "x"], ["y"])]
    model = proto(nodes, X, {"low": np.float32(-3), "huge": np.float32(-3.4e38)}, ["y"])
    error, program = difference(model, X)
    assert error < 1e-6
    far = {"x": X["x"].copy()}
    far["x"][0, 0, :2] = -3.5
    assert simulate(program, far).overflows == {"y": 2}


def test_a_test_for_infinity_that_held_is_refused():
    nodes = [
        helper.make_node("Log", ["x"], ["log"]),
        helper.make_node("IsInf", ["log"], ["none"]),
        helper.make_node("Not", ["none"], ["y"]),
    ]
    inputs = {"x": np.array([[0, 1, 2]], np.float32)}
    with pytest.raises(ExportError, match=r"^none: IsInf held in calibration; fixed point has no NaN or infinity"):
        compile_protos(proto(nodes, inputs, {}, ["y"]), [inputs], FINE)


def test_a_condition_with_a_constant_false_is_false():
    nodes = [
        helper.make_node("IsInf", ["x"], ["infinite"]),
        helper.make_node("Less", ["x", "zero"], ["below"]),
        helper.make_node("And", ["below", "infinite"], ["odd"]),
        helper.make_node("Where", ["odd", "huge", "x"], ["same"]),
        helper.make_node("Abs", ["same"], ["y"]),
    ]
    model = proto(nodes, X, {"zero": np.float32(0), "huge": np.float32(-3.4e38)}, ["y"])
    error, program = difference(model, X)
    assert error < 1e-6
    assert [layer.op.kind for layer in program.layers] == ["unary"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: one("Det", {"x": rand(3, 3)}),
            "^node: Det has no fixed-point form here; export as onnx or onnx-int8$",
        ),
        (lambda: one("Einsum", {"a": rand(3, 3)}, equation="ii->i"), r"^node: Einsum of ii->i has no "),
        (lambda: one("Log", {"x": rand(3, 3, low=-0.5)}), r"^node: Log over \[.*\], which calibration saw, has no "),
        (lambda: one("MatMul", {"x": rand(0, 3)}, {"w": rand(3, 2)}), "^x: a dimension is dynamic; trace the model "),
    ],
)
def test_what_has_no_fixed_point_form_is_one_line(make, message):
    model, inputs = make()
    with pytest.raises(ExportError, match=message):
        compile_protos(model, [inputs], FINE)


def test_too_wide_formats_are_one_line_with_a_remedy():
    model, inputs = CASES["MatMul"]()
    with pytest.raises(
        ExportError, match=r"^node \(MatMul\): needs an accumulator of 6\d bits, .*; choose smaller widths"
    ):
        compile_protos(model, [inputs], FixedSettings(weight_width=32, activation_width=32))


@pytest.mark.parametrize("field", ["weight_width", "activation_width"])
@pytest.mark.parametrize("width", [3, 33])
def test_settings_out_of_range_are_one_line(field, width):
    with pytest.raises(ConfigError, match=f"^{field}={width}: choose 4 to 32 bits"):
        FixedSettings(**{field: width})


def test_calibration_has_to_fit():
    model, _ = CASES["Softmax"]()
    for given, message in (
        ([], "^calibration: no inputs"),
        ([{}], "^calibration: no input 'x'; give x$"),
        ([{"x": rand(2, 5)}], r"^x: calibration has shape \[2, 5\], not \[2, 5, 6\]$"),
        ([{"x": np.full((2, 5, 6), np.nan, np.float32)}], "^x: calibration holds missing or infinite values"),
    ):
        with pytest.raises(ExportError, match=message):
            read_graphs({"": model}, given)


@pytest.mark.parametrize(
    ("weights", "activations", "limit"), [(8, 12, 0.03), (12, 24, 2e-3), (16, 16, 2e-3), (16, 24, 2e-4)]
)
def test_narrow_widths_lose_what_they_must_and_no_more(weights, activations, limit):
    settings = FixedSettings(weights, activations)
    for case in ("Gemm", "MatMul", "Conv", "LayerNormalization", "Softmax", "Gelu", "Div"):
        model, inputs = CASES[case]()
        error, _ = difference(model, inputs, settings)
        assert error < limit, case
