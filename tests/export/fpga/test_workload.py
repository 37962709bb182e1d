"""Workloads: counts against hand-computed ones, and manifests."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.fpga import export_fpga
from export.fpga.workload import (
    Attention,
    Conv,
    Elementwise,
    Experts,
    Linear,
    Matmul,
    Workload,
    from_manifest,
    read_manifest,
    vit,
)
from export.trace import trace

LAYERS = [
    {"op": "linear", "name": "fc", "dims": {"rows": 7, "in": 3, "out": 5}},
    {"op": "matmul", "name": "scores", "dims": {"batch": 2, "rows": 7, "in": 4, "out": 9}},
    {
        "op": "conv2d",
        "name": "stem",
        "dims": {
            "height": 6,
            "width": 8,
            "channels": 4,
            "outputs": 10,
            "groups": 2,
            "kernel_height": 3,
            "kernel_width": 5,
        },
        "parameters": {"stride": [2, 2]},
    },
    {
        "op": "experts",
        "name": "moe",
        "dims": {"tokens": 7, "top_k": 2, "experts": 4, "in": 3, "hidden": 6, "out": 5, "gated": 1},
    },
    {"op": "softmax", "name": "probabilities", "dims": {"rows": 14, "inner": 9}},
    {"op": "gather", "name": "embedding", "dims": {"outer": 1, "inner": 100, "columns": 3, "count": 7}},
    {"op": "table", "name": "gelu", "dims": {"elements": 21, "segments": 64}},
]


def test_published_model_has_the_published_operations():
    """Edge-MoE's network: 2.5 G operations at 197 tokens, that is 1.257 G multiply-adds."""
    workload = vit(
        "m3vit",
        tokens=197,
        width=192,
        heads=3,
        depth=12,
        hidden=768,
        moe_layers=range(1, 12, 2),
        num_experts=16,
        top_k=2,
        expert_hidden=384,
    )
    dense = 197 * (4 * 192 * 192 + 2 * 192 * 768)  # the experts of a token are as wide as the dense layer
    attention = 2 * 197 * 197 * 192
    assert workload.macs == 12 * (dense + attention) + 6 * 197 * 192 * 16 + 196 * 768 * 192
    assert workload.macs == pytest.approx(1.257e9, rel=1e-3)
    assert [type(stage) for stage in workload.stages].count(Experts) == 6
    assert len(workload.shapes) == 10
    assert sorted(i for places in workload.shapes.values() for i in places) == list(range(len(workload.stages)))


def test_linear_and_conv_counts():
    linear = Linear("a", rows=7, inputs=3, outputs=5)
    assert (linear.macs, linear.weights, linear.reads, linear.writes) == (105, 20, 21, 35)
    conv = Conv("c", 6, 8, channels=4, outputs=10, kernel_height=3, kernel_width=5, groups=2, stride=2)
    assert (conv.rows, conv.inputs) == (48, 30)
    assert (conv.macs, conv.weights) == (48 * 30 * 10, 31 * 10)
    assert (conv.reads, conv.writes, conv.line_buffer) == (12 * 16 * 4, 480, 3 * 21 * 4)


def test_experts_count_active_ones_alone():
    few = Experts("m", tokens=1, top_k=2, num_experts=16, inputs=8, hidden=4, outputs=6)
    assert (few.pairs, few.active) == (2, 2)
    assert few.expert_weights == 9 * 4 + 5 * 6
    assert few.weights == 2 * few.expert_weights
    assert few.macs == 2 * (8 * 4 + 4 * 6)
    gated = Experts("m", tokens=9, top_k=2, num_experts=4, inputs=8, hidden=4, outputs=6, gated=True)
    assert (gated.active, gated.expert_weights) == (4, 2 * 9 * 4 + 5 * 6)
    assert (gated.reads, gated.writes) == (18 * 8, (9 + 2 * 9) * 6)


def test_fused_attention_computes_what_its_two_products_do():
    fused = Attention("a", tokens=10, heads=3, width=12)
    scores, values = Matmul("s", 3, 10, 4, 10), Matmul("v", 3, 10, 10, 4)
    assert fused.macs == scores.macs + values.macs
    assert fused.reads + fused.writes < scores.reads + scores.writes + values.reads + values.writes
    assert fused.right == scores.right == values.right


def test_manifest_gives_every_kind_of_stage():
    workload = from_manifest({"layers": LAYERS}, "net")
    assert workload == Workload(
        "net",
        (
            Linear("fc", 7, 3, 5),
            Matmul("scores", 2, 7, 4, 9),
            Conv("stem", 6, 8, 4, 10, 3, 5, groups=2, stride=2),
            Experts("moe", 7, 2, 4, 3, 6, 5, True),
            Elementwise("probabilities", "softmax", 126, 3),
            Elementwise("embedding", "gather", 21),
            Elementwise("gelu", "table", 21),
        ),
    )
    assert {stage.name for stage in workload.stages if stage.kernel == "attention"} == {"scores", "probabilities"}


def test_manifest_file(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"layers": LAYERS}))
    assert read_manifest(path) == {"layers": LAYERS}


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"layers": []}'])
def test_what_is_no_manifest_is_refused(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(ExportError, match=r"no manifest of a bundle|has no layers") as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


def test_missing_manifest_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no manifest"):
        read_manifest(tmp_path / "manifest.json")


def test_layer_without_dimensions_is_refused():
    layer = {"op": "linear", "name": "fc", "dims": {"rows": 1, "in": 2}}
    with pytest.raises(ExportError, match=r"'fc' .* has no 'out'"):
        from_manifest({"layers": [layer]})


class Net(nn.Module):
    """A convolution, a norm, attention and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=4)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).reshape(1, 49, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = (torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).reshape(1, 49, 16)
        return self.head(nn.functional.gelu(x).mean(1))


def test_compiled_model(tmp_path):
    """The manifest of a real bundle: every layer is understood, and multiply-adds agree with the compiler's."""
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    proto = trace(Net().eval(), image, ["input"], ["output"])
    figures = export_fpga(proto, [{"input": image.numpy()}], tmp_path / "bundle")
    workload = from_manifest(read_manifest(tmp_path / "bundle" / "manifest.json"))
    assert workload.macs == figures["multiply_adds"]
    assert workload.macs == 49 * 16 * 192 + 49 * 16 * 48 + 2 * 2 * 49 * 49 * 8 + 160
    (conv,) = workload.of(Conv)
    assert (conv.height, conv.stride, conv.inputs) == (7, 4, 192)
    assert [stage.name for stage in workload.stages if isinstance(stage, Linear)] == ["qkv", "head"]
