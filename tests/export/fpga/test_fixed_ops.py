"""Integer semantics against loops over Python integers, and against what they approximate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.fpga.formats import Fixed, Requantise
from export.fpga.lower.functions import CURVES, segments, tabulate
from export.fpga.ops import OPS
from export.fpga.ops.base import nest, view
from export.fpga.ops.experts import Experts
from export.fpga.ops.pointwise import Divide, Table, integer_root, interpolate
from export.fpga.ops.products import Conv2d, Linear, exact_matmul
from export.fpga.ops.rows import Norm, TopK
from tests.export.fpga.random_layers import random_program

NONE = Requantise(0, 64)


@pytest.mark.parametrize("bits", [(8, 8), (24, 16), (24, 24), (31, 30)])
def test_products_are_exact_far_beyond_float64(bits):
    rng = np.random.default_rng(0)
    a = rng.choice([-(2 ** (bits[0] - 1)), 2 ** (bits[0] - 1) - 1, 12345 % 2 ** (bits[0] - 1)], (2, 3, 7))
    b = rng.choice([-(2 ** (bits[1] - 1)), 2 ** (bits[1] - 1) - 1, 77], (2, 7, 4))
    expected = a.astype(object) @ b.astype(object)
    assert (exact_matmul(a, b).astype(object) == expected).all()


def test_a_linear_layer_by_hand():
    op = Linear(1, 2, 2, 2, 2, 20, 1, Requantise(2, 5))
    codes, overflow = op.run(np.array([3, -2]), np.array([5, 1, -30, 8]), np.array([1, 4]))
    # 3*5 - 2*1 + 2*1 = 15 -> 3.75 -> 4; 3*-30 - 2*8 + 2*4 = -98 -> -24.5 -> -24, saturated to -16
    assert (codes[0].tolist(), overflow) == ([[4, -16]], 1)


@pytest.mark.parametrize(
    ("groups", "stride", "dilation", "before"),
    [(1, (1, 1), (1, 1), (0, 0)), (2, (2, 1), (1, 2), (1, 2)), (4, (1, 2), (2, 1), (2, 0))],
)
def test_convolution_is_torchs(groups, stride, dilation, before):
    rng = np.random.default_rng(1)
    x, weight, bias = (
        rng.integers(-90, 90, (4, 7, 8)),
        rng.integers(-50, 50, (8, 4 // groups, 3, 2)),
        rng.integers(-9, 9, 8),
    )
    given = [torch.from_numpy(each).double() for each in (x[None], weight, bias)]
    expected = torch.nn.functional.conv2d(*given, stride, before, dilation, groups)[0]
    to = Requantise(0, 40)
    op = Conv2d(4, 7, 8, 8, groups, (3, 2), stride, dilation, before, *expected.shape[1:], 4, 40, 0, to)
    codes, _ = op.run(x, weight, bias)
    assert (codes[0] == expected.numpy()).all()


def test_roots_are_exact_floors():
    values = np.array(
        [0, 1, 2, 3, 4, 2**52, 2**60 - 1, 2**61 + 12345, 2**62 - 1, (2**31 - 1) ** 2, (2**31 - 1) ** 2 - 1]
    )
    root = integer_root(values).astype(object)
    assert ((root**2 <= values.astype(object)) & ((root + 1) ** 2 > values.astype(object))).all()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("scale", [1, 300, 2**18])
def test_norms_are_as_good_as_their_inputs(centred, scale):
    """Of tiny rows too, whose variance is a few units: nothing but the rounding of inputs is lost."""
    rng = np.random.default_rng(2)
    x = np.round(rng.normal(0, 4 * scale, (6, 50))).astype(np.int64)
    x[0, 0] += 1
    guard = (60 - 6) // 2 - 24
    op = Norm(6, 50, centred, guard, 0, 20, 0, 60, Requantise(20, 30))
    codes, _ = op.run(x, np.full(50, 1 << 20), np.zeros(50, np.int64))
    values = x - x.mean(1, keepdims=True) if centred else x.astype(float)
    expected = values / np.sqrt((values**2).mean(1, keepdims=True))
    assert np.abs(codes[0] / 2**20 - expected).max() < (0.02 if scale == 1 else 3e-4 if scale == 300 else 4e-6)


@pytest.mark.parametrize("name", sorted(CURVES))
@pytest.mark.parametrize("integer", [3, 7])
def test_tables_follow_their_functions_over_the_whole_format(name, integer):
    form, result = Fixed(24, integer), Fixed(24, integer + 1)
    curve = CURVES[name]
    if not np.isfinite(curve.reach[0]):
        pytest.skip("of any range; tested as part of a graph")
    made = tabulate(curve, form, result, 11, False)
    x = np.linspace(form.low, form.high, 40001).astype(np.int64)
    op = Table(len(x), made.low, made.shift, made.count, made.relu_shift, 64, made.rule)
    codes, _ = op.run(x, made.codes)
    values = form.decode(x)
    assert np.abs(result.decode(codes[0]) - curve.of(values)).max() < 6e-5
    assert made.count <= 2**11


def test_a_table_between_its_entries_is_a_line_and_clamped_outside():
    table = np.array([0, 10, 40])
    found = interpolate(np.array([-9, 0, 1, 2, 4, 6, 8, 100]), table, 0, 2)
    assert found.tolist() == [0, 0, 10, 20, 40, 100, 160, 160]  # four times the entries


def test_segments_put_zero_on_a_knot():
    low, shift, count = segments(-6.5, 6.5, Fixed(24, 6), 8)
    assert low % (1 << shift) == 0
    assert count <= 256
    assert low <= -6.5 * 2**18
    assert low + (count << shift) >= 6.5 * 2**18


def test_division_by_zero_saturates_and_counts():
    op = Divide((1, 1, 1, 1, 4), (0, 0, 0, 0, 1), (0, 0, 0, 0, 1), 0, 0, 40, Requantise(0, 8))
    codes, overflow = op.run(np.array([5, -5, 7, -7]), np.array([0, 0, 2, -2]))
    assert (codes[0].ravel().tolist(), overflow) == ([127, -128, 4, 4], 2)


def test_of_equal_values_the_first_is_chosen():
    values, index = TopK(2, 4, 3).run(np.array([[1, 7, 7, 7], [0, 0, 0, 0]]))[0]
    assert index.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert values.tolist() == [[7, 7, 7], [0, 0, 0]]


def test_experts_slot_by_slot():
    rng = np.random.default_rng(3)
    tokens, top_k, count, inner, hidden, outputs = 7, 2, 4, 5, 6, 3
    x, weight = rng.integers(-50, 50, (tokens, inner)), rng.integers(-8, 9, (tokens, top_k))
    expert = np.array([[0, 2], [2, 2], [4, 0], [4, 4], [2, 0], [3, 4], [0, 3]])  # expert 1 has none, 4 marks none
    up, gate = (rng.integers(-9, 9, (count, hidden, inner)) for _ in range(2))
    down = rng.integers(-9, 9, (count, outputs, hidden))
    biases = [rng.integers(-20, 20, (count, size)) for size in (hidden, hidden, outputs)]
    to = Requantise(0, 50)
    op = Experts(
        tokens,
        top_k,
        count,
        inner,
        hidden,
        outputs,
        True,
        "relu",
        (1, 0, 2),
        0,
        0,
        1,
        -1,
        2,
        2,
        (60,) * 3,
        60,
        *[to] * 6,
    )
    (y, queue, lengths), _ = op.run(x, expert, weight, up, gate, down, *biases, np.zeros(2, np.int64))
    expected = np.zeros((tokens, outputs), np.int64)
    for t in range(tokens):
        for k in range(top_k):
            e = expert[t, k]
            if e < count:
                h = np.maximum(gate[e] @ x[t] + biases[1][e], 0) * (up[e] @ x[t] + 2 * biases[0][e])
                expected[t] += weight[t, k] * (down[e] @ h + 4 * biases[2][e])
    assert (y == expected).all()
    assert lengths.tolist() == [4, 0, 4, 2]
    assert queue.tolist() == [0, 2, 4, 6, 0, 1, 1, 4, 5, 6, -1, -1, -1, -1]


def test_loops_over_neighbours_merge():
    sizes, strides = nest((2, 3, 4, 5), (60, 20, 5, 1))
    assert (sizes, strides) == ((1, 1, 1, 1, 120), (0, 0, 0, 0, 1))
    assert nest((2, 3, 2, 3, 2, 3), (0, 1, 0, 3, 0, 9)) is None
    x = np.arange(24)
    assert (view(x, (3, 2), (1, 3), 4) == x[4:10].reshape(2, 3).T).all()


def test_every_kind_of_layer_survives_as_plain_data():
    program, _ = random_program(5, 1)
    assert {layer.op.kind for layer in program.layers} == set(OPS)
    for layer in program.layers:
        plain = {
            name: list(value) if isinstance(value, tuple) else value for name, value in layer.op.parameters().items()
        }
        assert OPS[layer.op.kind].load(plain) == layer.op
