"""The accelerator's folder: files by name, shape and meaning; what is refused; what rescaling may do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moecore
from apps.vision.models.m3vit_weights import to_published
from export.edge_moe import ACCELERATOR, Backbone, export_edge_moe, moe_settings, require_settings
from export.edge_moe import check as checks
from export.edge_moe.layout import accelerator_tensors, fold_pixels
from export.errors import ExportError
from moecore.errors import ConfigError
from tests.export import edge_moe_files as files
from tests.export.edge_moe_models import MEAN, SIZE, STD, TASKS, make_model, of


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model()


@pytest.fixture(scope="module")
def backbone(model) -> Backbone:
    return of(model)


@pytest.fixture(scope="module")
def images() -> Tensor:
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images[0, :, :16, :32] = torch.tensor([0, 255]).repeat(16).to(torch.uint8)  # both ends
    return images


@pytest.fixture(scope="module")
def figures_and_folder(backbone, images, tmp_path_factory) -> tuple[dict[str, float], Path]:
    folder = tmp_path_factory.mktemp("edge") / "edge-moe"
    return export_edge_moe(backbone, images, folder, "depth"), folder


@pytest.fixture(scope="module")
def folder(figures_and_folder) -> Path:
    return figures_and_folder[1]


@pytest.fixture(scope="module")
def meant(folder) -> list[dict[str, Tensor]]:
    """What the files mean, by task."""
    return [files.run(folder, task) for task in range(len(TASKS))]


def test_all_files_are_there_in_their_sizes_and_no_others(folder):
    sizes = {f"{name}.float32.bin": 4 * int(np.prod(shape)) for name, shape in files.shapes(len(TASKS)).items()}
    assert {file.name: file.stat().st_size for file in folder.glob("*.bin")} == sizes
    assert len(sizes) == 12 * 8 + 6 * 4 + 6 * 4 + 6 * 2 + 5
    assert sorted(file.name for file in folder.iterdir() if file.suffix != ".bin") == [
        "README.md",
        "edge_moe.json",
        "golden",
        "onboard",
    ]


@torch.no_grad()
def test_the_files_alone_give_the_models_last_tokens(meant, folder, model, backbone, images):
    expected = [backbone.outputs(images[:1], task)[0].double() for task in range(len(TASKS))]
    for ours, theirs in zip(meant, expected, strict=True):
        assert (ours["l11"] - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 0.1  # so the gates of the task were read
    golden = files.read(folder, "l11_x_post_moe", (129, 192))
    torch.testing.assert_close(golden, expected[1], rtol=0, atol=1e-4)  # depth was asked for


def test_the_figures_tell_of_the_comparison(figures_and_folder):
    figures, folder = figures_and_folder
    assert figures["runs_compared"] + figures["runs_near_ties"] == 4
    assert 0 < figures["max_relative_error"] < 1e-5
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    assert (figures["files"], figures["folder_bytes"]) == (len(sizes), sum(sizes))
    for task in TASKS:
        assert 0 < figures[f"fixed_point_mse/{task}"] < 0.1
        assert 0.9 < figures[f"fixed_point_routing_agreement/{task}"] <= 1


def test_the_image_is_bytes_over_256(folder, images):
    image = files.read(folder, "image", (3, *SIZE))
    assert torch.equal(image, images[0].double() / 256)
    assert image.max() == 255 / 256


def test_tensors_are_the_published_weights_in_the_kernels_layout(folder, model):
    state = {name: value.double() for name, value in model.state_dict().items()}
    positions = files.read(folder, "pos_embed", (129, 192))
    torch.testing.assert_close(positions[0], (state["cls_token"] + state["pos_embed"])[0, 0], rtol=0, atol=1e-7)
    assert torch.equal(positions[1:], state["pos_embed"][0, 1:])
    for name, own in (
        ("l4_qkv_weight", "blocks.4.attn.qkv.weight"),
        ("l4_fc2_weight", "blocks.4.mlp.fc2.weight"),
        ("l11_htoh4_weight", "blocks.11.mlp.experts.up"),
        ("l11_h4toh_bias", "blocks.11.mlp.experts.down_bias"),
    ):
        assert torch.equal(files.read(folder, name, state[own].shape), state[own])
    for task in range(2):
        gate = files.read(folder, f"l7_w_gate_T_task{task}", (16, 192))
        assert torch.equal(gate, state["blocks.7.mlp.router.score.weight"][task])


def test_mean_std_and_the_kernels_pixels_are_folded_by_hand():
    weight, bias = np.zeros((1, 3, 1, 1)), np.array([0.5])
    weight[0, :, 0, 0] = 1.0, 2.0, 4.0
    folded, offset = fold_pixels(weight, bias, np.array([0.5, 0.25, 0.1]), np.array([0.5, 0.25, 0.2]))
    np.testing.assert_allclose(folded[0, :, 0, 0], np.array([2.0, 8.0, 20.0]) * 256 / 255)
    np.testing.assert_allclose(offset, 0.5 - (1.0 + 2.0 + 2.0))
    pixel = np.array([10, 200, 255])
    seen = (pixel / 255 - [0.5, 0.25, 0.1]) / [0.5, 0.25, 0.2] @ weight[0, :, 0, 0] + 0.5
    np.testing.assert_allclose((pixel / 256) @ folded[0, :, 0, 0] + offset[0], seen)


def test_stacks_hold_the_same_layer_by_layer(folder):
    shapes = {file.stem: np.load(file, mmap_mode="r").shape for file in (folder / "onboard").glob("*.npy")}
    expected = {name: (12, *shape) for name, shape in files.LAYER.items()}
    expected |= {name: (6, *shape) for name, shape in files.DENSE.items()}
    expected |= {f"moe_{name}": (6, *shape) for name, shape in files.MOE.items()}
    expected |= {"moe_w_gate_per_task": (2, 6, 16, 192), "pos_embed": (129, 192)}
    assert shapes == expected | {"patch_embed_weight": (192, 3, 16, 16), "patch_embed_bias": (192,)}
    gates = np.load(folder / "onboard" / "moe_w_gate_per_task.npy")
    assert gates.dtype == np.float32
    assert np.array_equal(gates[1, 2], files.read(folder, "l5_w_gate_T_task1", (16, 192)))
    experts = np.load(folder / "onboard" / "moe_h4toh_weight.npy", mmap_mode="r")
    assert np.array_equal(experts[5], files.read(folder, "l11_h4toh_weight", (16, 192, 384)))
    assert np.array_equal(np.load(folder / "onboard" / "fc1_bias.npy")[5], files.read(folder, "l10_fc1_bias", (768,)))


@pytest.mark.parametrize("task", range(2))
def test_golden_activations_and_queues_of_every_layer(folder, meant, task):
    golden, report = folder / "golden" / f"task{task}", json.loads((folder / "edge_moe.json").read_text())
    for layer in range(12):
        name = f"l{layer}_x_post_{'moe' if layer % 2 else 'mlp'}"
        torch.testing.assert_close(files.read(golden, name, (129, 192)), meant[task][f"l{layer}"], rtol=0, atol=1e-4)
    for layer in range(1, 12, 2):
        combine = meant[task][f"l{layer}_combine"]  # [T, E]
        tokens = np.fromfile(golden / f"l{layer}_queue_token.int32.bin", "<i4")
        scores = np.fromfile(golden / f"l{layer}_queue_score.float32.bin", "<f4")
        offset = np.fromfile(golden / f"l{layer}_queue_offset.int32.bin", "<i4")
        for expert in range(16):
            queue = torch.nonzero(combine[:, expert]).flatten()
            entries = slice(offset[expert], offset[expert + 1])
            assert tokens[entries].tolist() == queue.tolist()
            np.testing.assert_allclose(scores[entries], combine[queue, expert], atol=1e-5)
        told, counts = report["queues"][TASKS[task]][f"l{layer}"], (combine > 0).sum(0)
        assert told == {"order": torch.nonzero(counts).flatten().tolist(), "tokens": counts.tolist()}


def test_the_report_tells_types_ranges_and_headroom(folder):
    report = json.loads((folder / "edge_moe.json").read_text())
    types = {name: report["tensors"][name]["type"] for name in report["tensors"]}
    assert types["patch_embed_weight"] == "ap_fixed<16,0>"
    assert types["l3_qkv_weight"] == types["l3_w_gate_T_task0"] == types["l3_h4toh_weight"] == "ap_fixed<16,2>"
    assert types["l3_qkv_bias"] == types["l3_attn_proj_bias"] == "ap_fixed<16,7>"
    assert types["l3_htoh4_bias"] == types["l2_fc1_bias"] == types["l3_norm1_weight"] == "ap_fixed<16,5>"
    assert {each["type"] for each in report["activations"].values()} == {"ap_fixed<32,10>"}
    told = report["tensors"]["l2_fc1_bias"]
    value = files.read(folder, "l2_fc1_bias", (768,))
    assert told["file"] == "l2_fc1_bias.float32.bin"
    assert (told["min"], told["max"]) == (value.min(), value.max())
    assert told["headroom_bits"] == pytest.approx(4 - float(value.abs().max().log2()))
    assert report["golden_task"] == "depth"
    assert set(report["fixed_point"]["semseg"]["mse"]) >= {"x_post_patch_embed", "l0_x_post_mlp", "l11_x_post_moe"}


def test_a_gate_that_all_tasks_share_is_the_table_of_each():
    model = make_model("shared")
    tensors = accelerator_tensors(to_published(model), MEAN, STD, 3)
    gate = model.blocks[9].mlp.router.score.weight.detach().numpy()
    assert all(np.array_equal(tensors[f"l9_w_gate_T_task{task}"], gate) for task in range(3))


DIFFERING = {"image_size": (3, 224, 224), "class_token": False, "attention_scale": 0.25, "norm_eps": 1e-5}
DIFFERING |= {"moe_layers": (10, 11), "top_k": 1, "final_norm": True, "qkv_bias": False, "expert_hidden": 768}
DIFFERING |= {"shared_expert": True, "activation": "gelu_tanh", "heads": 6, "width": 384, "layers": 6, "experts": 8}


@pytest.mark.parametrize("name", DIFFERING)
def test_what_differs_from_what_is_compiled_in_is_refused(name, backbone, images, tmp_path):
    settings = ACCELERATOR | {name: DIFFERING[name]}
    with pytest.raises(ExportError) as caught:
        export_edge_moe(dataclasses.replace(backbone, settings=settings), images, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"{name}={DIFFERING[name]}: the accelerator takes {ACCELERATOR[name]}")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def fits(**options: object) -> str | None:
    """What is refused of a layer with these settings; None if nothing."""
    given = {"num_experts": 16, "top_k": 2, "hidden": 384, "weight_options": {"renormalize": False}}
    try:
        require_settings(moe_settings(moecore.MoE.build(192, **{**given, **options})))
    except ExportError as error:
        return str(error).split("=")[0]
    return None


@pytest.mark.parametrize(
    ("refused", "options"),
    [
        (None, {}),
        (None, {"score": "per_task", "score_options": {"num_tasks": 3}}),
        (None, {"score": "noisy"}),
        ("gate", {"score": "task_conditioned", "score_options": {"num_tasks": 3}}),
        ("gate", {"score_options": {"bias": True}}),
        ("gate", {"score_options": {"temperature": 0.5}}),
        ("experts", {"num_experts": 8}),
        ("top_k", {"top_k": 4}),
        ("selection", {"select": "expert_choice"}),
        ("selection", {"select": "top_p"}),
        ("weighting", {"weight_options": {}}),
        ("weighting", {"weight_options": {"renormalize": False, "scale": 2.0}}),
        ("weighting", {"weight": "sigmoid", "weight_options": {}}),
        ("selection_bias", {"controller": "loss_free"}),
        ("shared_expert", {"shared_hidden": 64}),
        ("gated_experts", {"glu": True, "activation": "gelu", "bias": True}),
        ("expert_activation", {"activation": "relu"}),
        ("expert_bias", {"bias": False}),
        ("expert_hidden", {"hidden": 192}),
        ("routed_unit", {"unit": "sequence"}),
    ],
)
def test_mixtures_that_the_accelerator_cannot_compute_are_refused(refused, options):
    assert fits(**options) == refused


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("blocks.2.attn.qkv.bias", None, "is missing"),
        ("blocks.2.attn.qkv.bias", torch.zeros(192), "has shape (192,); the accelerator takes (576,)"),
        ("blocks.2.ls1.gamma", torch.ones(192), "has no place"),
        ("norm.weight", torch.ones(192), "has no place"),
        ("blocks.1.mlp.gate.2.w_gate", torch.ones(192, 16), "has no place"),
    ],
)
def test_weights_must_be_those_of_the_accelerator(backbone, name, change, says):
    weights = {**backbone.weights, name: change}
    if change is None:
        del weights[name]
    with pytest.raises(ExportError, match="^" + name.replace(".", r"\.")) as caught:
        accelerator_tensors(weights, MEAN, STD, 2)
    assert says in str(caught.value)


def changed(backbone: Backbone, name: str, change: Callable[[Tensor], Tensor]) -> Backbone:
    return dataclasses.replace(backbone, weights={**backbone.weights, name: change(backbone.weights[name])})


def peak(value: float) -> Callable[[Tensor], Tensor]:
    """One entry set."""

    def change(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight.view(-1)[7] = value
        return weight

    return change


@pytest.mark.parametrize(
    ("published", "value", "tensor", "fixed", "scale"),
    [
        ("blocks.3.norm2.weight", 21.3, "l3_norm2_weight", "ap_fixed<16,5> holds [-16, 16)", "2^-1"),
        ("blocks.0.attn.qkv.bias", -300.0, "l0_qkv_bias", "ap_fixed<16,7> holds [-64, 64)", "2^-3"),
        ("blocks.5.mlp.experts.htoh4.weight", 2.01, "l5_htoh4_weight", "ap_fixed<16,2> holds [-2, 2)", "2^-1"),
        ("blocks.5.mlp.gate.1.w_gate", -8.5, "l5_w_gate_T_task1", "ap_fixed<16,2> holds [-2, 2)", "2^-3"),
        ("patch_embed.proj.weight", 0.5, "patch_embed_weight", "ap_fixed<16,0> holds [-0.5, 0.5)", "2^-3"),
        ("blocks.8.mlp.fc1.bias", 16.5, "l8_fc1_bias", "ap_fixed<16,5> holds [-16, 16)", "2^-1"),
    ],
)
def test_a_weight_outside_its_type_is_refused(backbone, images, tmp_path, published, value, tensor, fixed, scale):
    with pytest.raises(ExportError) as caught:
        export_edge_moe(changed(backbone, published, peak(value)), images, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"{tensor}: ")
    assert fixed in message
    assert f"{scale} times it would fit" in message
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_not_finite_is_refused(backbone, images, tmp_path):
    for value in (float("nan"), float("inf")):
        broken = changed(backbone, "blocks.8.mlp.fc1.bias", peak(value))
        with pytest.raises(ExportError, match="l8_fc1_bias: has values that are not finite"):
            export_edge_moe(broken, images, tmp_path / "out", rescale=True)


def test_an_activation_outside_its_type_is_refused(images, tmp_path):
    model = make_model()
    model.blocks[2].norm1.weight.data.mul_(8)
    model.blocks[2].attn.qkv.weight.data.mul_(10)
    with pytest.raises(ExportError, match=r"^l2_attn_scores: ranges over .* ap_fixed<32,10> holds \[-512, 512\)"):
        export_edge_moe(of(model), images[:1], tmp_path / "out")


def test_outputs_that_are_not_the_models_are_refused(backbone, images, tmp_path):
    wrong = dataclasses.replace(backbone, outputs=lambda images, task: backbone.outputs(images, 1 - task))
    with pytest.raises(ExportError, match="differs from the model's output"):
        export_edge_moe(wrong, images[:1], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_the_testbench_would_fail_is_refused(backbone, images, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MSE_LIMIT", 1e-12)
    with pytest.raises(ExportError, match=r"l11_x_post_moe: mean squared error .* from x_post_patch_embed on"):
        export_edge_moe(backbone, images[:1], tmp_path / "out")


def test_images_and_tasks_are_checked(backbone, images, tmp_path):
    for wrong in (images.float(), images[:, :, :64], images[0], images[:0]):
        with pytest.raises(ConfigError, match="uint8"):
            export_edge_moe(backbone, wrong, tmp_path / "out")
    with pytest.raises(ConfigError, match="task='edges': this model has semseg, depth"):
        export_edge_moe(backbone, images, tmp_path / "out", "edges")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="no folder that an export wrote"):
        export_edge_moe(backbone, images, tmp_path)
