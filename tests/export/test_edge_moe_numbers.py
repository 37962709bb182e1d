"""The accelerator's arithmetic: fixed-point types, the table of GELU, queues, and rescaling that changes no meaning."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from export.edge_moe import export_edge_moe
from export.edge_moe.arithmetic import FixedPoint, Floats, relu_minus_gelu
from export.edge_moe.fixed import LINEAR, PIXEL, Fixed
from export.edge_moe.layout import accelerator_tensors, specs
from export.edge_moe.ranges import clip_upper_ends
from export.edge_moe.rescale import rescaled
from export.edge_moe.schedule import queue_tokens
from export.errors import ExportError
from tests.export import edge_moe_files as files
from tests.export.edge_moe_models import MEAN, STD, TASKS, make_model, of


def test_assignment_truncates_downwards_and_wraps_around():
    small = Fixed(4, 2)  # -2, -1.75, ..., 1.75
    values = np.array([0.3, -0.3, 1.75, 1.99, 2.0, 2.3, -2.0, -2.01, 5.5])
    kept, outside = small.assign(values)
    assert kept.tolist() == [0.25, -0.5, 1.75, 1.75, -2.0, -1.75, -2.0, 1.75, 1.5]
    assert outside == 4
    assert PIXEL.assign(np.array([255 / 256, 0.999, 1.0]))[0].tolist() == [255 / 256, 255 / 256, 0.0]


def test_types_know_their_ends():
    assert (LINEAR.step, LINEAR.limit, LINEAR.lowest, LINEAR.name) == (2**-14, 2.0, -2.0, "ap_fixed<16,2>")
    assert (PIXEL.lowest, PIXEL.limit, PIXEL.name) == (0.0, 1.0, "ap_ufixed<8,0>")
    assert LINEAR.holds(-2.0, 1.9999)
    assert not LINEAR.holds(-2.0001, 0)
    assert not LINEAR.holds(0, 2.0)
    assert [int(LINEAR.excess(x)) for x in (2.0, 2.1, 4.0, 4.1, 1.0, 0.9)] == [0, 1, 1, 2, -1, -1]
    assert LINEAR.headroom_bits(-0.5, 0.25) == 2.0
    assert LINEAR.headroom_bits(0.0, 0.0) is None


def test_a_linear_map_is_that_of_integers():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(0, 4, (5, 768)), rng.normal(0, 0.3, (7, 768)), rng.normal(0, 2, 7)
    fixed = FixedPoint({"w": weight, "b": bias}, {"w": LINEAR, "b": Fixed(16, 5)})
    kept = fixed.activation("x", x)
    ours = fixed.activation("y", kept @ fixed.weight("w").T + fixed.weight("b"))
    codes = [np.floor(values * 2.0**bits).astype(np.int64) for values, bits in ((x, 22), (weight, 14), (bias, 11))]
    exact = codes[0] @ codes[1].T + (codes[2] << 25)  # 36 binary places
    assert np.array_equal(ours * 2**22, exact >> 14)
    assert not fixed.wrapped


def test_what_wraps_is_counted_by_name():
    fixed = FixedPoint({"w": np.array([1.0, 2.5, -2.5])}, {"w": LINEAR})
    assert fixed.weight("w").tolist() == [1.0, -1.5, 1.5]
    fixed.activation("y", np.array([511.0, 512.0]))
    fixed.activation("y", np.array([-513.0, 0.0]))
    assert fixed.wrapped == {"w": 2, "y": 2}


def test_gelu_is_within_half_a_step_of_the_tables_slope():
    fixed, x = FixedPoint({}, {}), np.linspace(-12, 12, 9999)
    exact = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    error = np.abs(fixed.gelu(x) - exact)
    assert error.max() < 0.5 / 32 + 2**-20  # the difference has a slope of at most 1/2, at 0
    assert error[np.abs(x) > 8].max() < 1e-12
    assert fixed.gelu(np.array([1.0, -1.0])).tolist() == pytest.approx([0.8413447, -0.1586553], abs=1e-6)
    assert relu_minus_gelu(1.0) == pytest.approx(0.15865525)


def test_ranges_grow_and_keep_nan():
    floats = Floats({})
    floats.activation("x", np.array([1.0, 2.0]))
    floats.activation("x", np.array([-3.0, 0.0]))
    assert floats.ranges == {"x": (-3.0, 2.0)}
    floats.activation("x", np.array([np.nan, 0.0]))
    floats.activation("x", np.array([1.0]))
    assert np.isnan(floats.ranges["x"]).all()


def test_queues_by_hand():
    probs = np.zeros((4, 16))
    probs[0, [3, 1]] = 0.5, 0.25
    probs[1, [1, 15]] = 0.75, 0.125
    probs[2, [2, 3, 4]] = 0.5, 0.25, 0.25  # equal: the lower number
    probs[3, [3, 15]] = 0.25, 0.25
    queues, gap = queue_tokens(probs)
    assert queues.order == [1, 2, 3, 15]
    assert queues.token.tolist() == [0, 1, 2, 0, 2, 3, 1, 3]
    assert queues.score.tolist() == [0.25, 0.75, 0.5, 0.5, 0.25, 0.25, 0.125, 0.25]
    assert queues.offset.tolist() == [0, 0, 2, 3, 6, *[6] * 11, 8]
    assert gap.tolist() == [0.25, 0.125, 0.0, 0.25]


def test_a_weight_on_the_upper_end_becomes_the_largest_value():
    tensors, clipped = clip_upper_ends(
        {"w": np.float32([2.0, -2.0, 1.0]), "v": np.float32([1.0])}, dict.fromkeys("wv", LINEAR)
    )
    assert tensors["w"].tolist() == [2 - 2**-14, -2.0, 1.0]
    assert clipped == {"w": 1}


def out_of_range_model() -> torch.nn.Module:
    """Weights too large for their types wherever a factor can be moved."""
    model = make_model()
    with torch.no_grad():
        query, key, value = model.blocks[0].attn.qkv.weight.view(3, 192, 192)
        query[5] *= 3 / query[5].abs().max()
        model.blocks[0].attn.qkv.bias[192 + 5] = 9.0
        key[6] *= 5 / key[6].abs().max()
        value[7] *= 2.5 / value[7].abs().max()
        model.blocks[2].norm1.weight[3] = 40.0
        model.blocks[2].attn.qkv.weight[:, 3] *= 0.02
        model.blocks[3].mlp.experts.up[9, :, 11] *= 4 / model.blocks[3].mlp.experts.up[9, :, 11].abs().max()
        model.blocks[4].norm2.bias[1] = -17.0
        model.blocks[4].mlp.fc1.weight[:, 1] *= 0.05
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, 128, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_rescaling_moves_factors_that_mean_nothing(images, tmp_path):
    model = out_of_range_model()
    model.patch_embed.proj.weight *= 0.3 / model.patch_embed.proj.weight.abs().max()  # 0.3 / 0.2 lies beyond 0.5
    with pytest.raises(ExportError, match=r"more outside.* rescale"):
        export_edge_moe(of(model), images, tmp_path / "out")
    export_edge_moe(of(model), images, tmp_path / "out", rescale=True)
    report = json.loads((tmp_path / "out" / "edge_moe.json").read_text())
    assert report["output_scale"] == 0.25
    assert report["rescaled_channels"] == {
        "l0_query, l0_key": 2,
        "l0_value, l0_attn_proj": 1,
        "l2_norm1, l2_qkv": 1,
        "l3_norm2, l3_htoh4_weight, l3_w_gate_T_task0, l3_w_gate_T_task1": 1,
        "l4_norm2, l4_fc1_weight": 1,
    }
    for task in range(len(TASKS)):
        expected = of(model).outputs(images, task)[0] * 0.25
        ours = files.run(tmp_path / "out", task)["l11"]
        assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(each["headroom_bits"] is None or each["headroom_bits"] >= 0 for each in report["tensors"].values())


def test_rescaling_changes_nothing_that_fits():
    formats = {name: spec.fixed for name, spec in specs(2).items()}
    tensors = accelerator_tensors(of(make_model()).weights, MEAN, STD, 2)
    change = rescaled(tensors, formats, 2)
    assert (change.moved, change.output_exponent) == ({}, 0)
    assert all(np.array_equal(value, tensors[name]) for name, value in change.tensors.items())


def test_what_no_rescaling_reaches_is_refused(images, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.blocks[3].norm2.weight[4] = 30.0
        model.blocks[3].mlp.experts.up[0, 0, 4] = 1.5  # both sides full
    with pytest.raises(ExportError, match=r"l3_norm2_weight: .* 2\^-1 times it would fit; no rescaling"):
        export_edge_moe(of(model), images, tmp_path / "out", rescale=True)
    fc1 = dataclasses.replace(of(make_model()))
    fc1.weights["blocks.4.mlp.fc1.bias"][3] = 20.0
    with pytest.raises(ExportError, match=r"l4_fc1_bias: .* no rescaling"):
        export_edge_moe(fc1, images, tmp_path / "out", rescale=True)


def test_a_folder_from_before_is_replaced_as_a_whole(images, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "edge_moe.json").write_text("{}")
    (folder / "stale.bin").write_text("old")
    export_edge_moe(of(make_model()), images, folder)
    assert not (folder / "stale.bin").exists()
    assert (folder / "l0_qkv_weight.float32.bin").stat().st_size == 576 * 192 * 4
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
