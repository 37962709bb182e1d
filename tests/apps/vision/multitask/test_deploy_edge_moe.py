"""A model of configs/vision/m3vit_edge_moe.yaml in the accelerator's folder, and models that do not fit it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import moecore
from apps import tree
from apps.cli import make_parser
from apps.errors import UserError
from apps.vision.models.m3vit import M3ViT
from apps.vision.multitask.data import MultiTaskData
from apps.vision.multitask.deploy_edge_moe import backbone_settings, export_edge_moe
from apps.vision.multitask.loading import Trained
from export.edge_moe import ACCELERATOR
from tests.export import edge_moe_files as files

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Fresh weights, as a run that has just begun would have them."""
    torch.manual_seed(0)
    app = importlib.import_module("apps.vision").APP
    flags = ["-c", str(ROOT / "configs/vision/m3vit_edge_moe.yaml")]
    config = tree.build(app.config, make_parser(app, "train").parse_args(flags).as_dict())
    data = MultiTaskData(config.data, config.tasks.names, config.run.seed)
    return Trained(M3ViT(config.model, data.spec), config, Path("run/checkpoints/best.ckpt"), {})


@pytest.fixture(scope="module")
def data(trained) -> MultiTaskData:
    return MultiTaskData(trained.config.data, spec=trained.model.spec)


def arguments(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{"task": None, "calibration": 3, **changes})


@pytest.fixture(scope="module")
def folder(trained, data, tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("edge") / "edge-moe"
    was_training = trained.model.training
    figures = export_edge_moe(trained, data, folder, arguments(task="depth"))
    assert figures["runs_compared"] + figures["runs_near_ties"] == 6
    assert figures["max_relative_error"] < 1e-5
    assert trained.model.training == was_training
    return folder


@torch.no_grad()
def test_the_files_give_the_models_tokens_and_its_decoders_the_models_maps(trained, data, folder):
    model = trained.model.eval()
    images, _ = data.first_images("train", 1).plain([0])
    assert torch.equal(files.read(folder, "image", (3, 128, 256)) * 256, (images[0] * 255).round().double())
    for number, task in enumerate(model.spec.names):
        with moecore.routing_context(task=number):
            expected = model.backbone.forward_features((images - model.mean) / model.std)
        tokens = files.run(folder, number)["l11"].float()
        torch.testing.assert_close(tokens, expected[0], rtol=0, atol=1e-4)
        maps = model.decoder([tokens[None, 1:]], task)
        torch.testing.assert_close(maps, model(images, [task])[task], rtol=0, atol=1e-3)
    golden = files.read(folder, "l11_x_post_moe", (129, 192))
    torch.testing.assert_close(golden.float(), tokens, rtol=0, atol=1e-4)  # of depth, the last task


def test_settings_are_told_by_the_accelerators_names(trained):
    assert backbone_settings(trained.model) == ACCELERATOR


@pytest.mark.parametrize(
    ("where", "attribute", "value", "says"),
    [
        ("blocks.3.mlp.router.weight", "renormalize", True, "weighting=softmax over all experts, renormalised"),
        ("blocks.3.mlp.router.select", "max_slots", 4, "top_k=4: the accelerator takes 2"),
        ("blocks.3.mlp", "unit", "sequence", "routed_unit=sequence: the accelerator takes token"),
        ("blocks.4.norm1", "eps", 1e-5, "norm_eps=1e-05: the accelerator takes 1e-06"),
        ("blocks.4.attn", "scale", 0.1, "attention_scale=0.1: the accelerator takes 0.125"),
        ("blocks.4.mlp", "act", nn.ReLU(), "activation=relu: the accelerator takes gelu"),
        ("blocks.4", "ls1", nn.LayerNorm(192), "blocks.4.ls1.weight: has no place in the accelerator"),
        ("", "norm", nn.LayerNorm(192), "final_norm=True: the accelerator takes False"),
    ],
)
def test_models_that_compute_something_else_are_refused(trained, data, tmp_path, where, attribute, value, says):
    module = trained.model.backbone.get_submodule(where)
    before = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        with pytest.raises(UserError, match=r"^export: ") as caught:
            export_edge_moe(trained, data, tmp_path / "out", arguments(calibration=1))
    finally:
        setattr(module, attribute, before)
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_models_of_other_sizes_or_gates_are_refused(trained, data, tmp_path):
    base = trained.config.model
    vit_micro = dataclasses.replace(base, backbone="vit_micro", patch_size=16, embed_dim=192, num_heads=3)
    conditioned = dataclasses.replace(base, moe=dataclasses.replace(base.moe, score="task_conditioned"))
    for config, says in (
        (vit_micro, "patch_size=ConvStem: the accelerator takes 16"),
        (dataclasses.replace(vit_micro, stem="patch"), "tokens=128: the accelerator takes 129"),
        (dataclasses.replace(base, embed_dim=96), "width=96: the accelerator takes 192"),
        (dataclasses.replace(base, moe_layers="last-6"), r"moe_layers=\(6, 7, 8, 9, 10, 11\)"),
        (conditioned, "gate=TaskConditionedScore: the accelerator takes linear without bias"),
    ):
        other = dataclasses.replace(trained, model=M3ViT(config, trained.model.spec))
        with pytest.raises(UserError, match=f"^export: {says}"):
            export_edge_moe(other, data, tmp_path / "out", arguments())


def test_models_for_one_task_and_decoders_of_several_blocks_are_refused(trained, data, tmp_path):
    model = trained.model
    small = dataclasses.replace(trained, model=model.for_task("depth"))
    with pytest.raises(UserError, match="holds depth alone; give the run of all tasks"):
        export_edge_moe(small, data, tmp_path / "out", arguments())
    config = dataclasses.replace(model.config, m3vit=dataclasses.replace(model.config.m3vit, decoder="task_expert"))
    several = dataclasses.replace(trained, model=M3ViT(config, model.spec, model.backbone))
    with pytest.raises(UserError, match=r"decoder=task_expert: reads blocks .* block 11 alone"):
        export_edge_moe(several, data, tmp_path / "out", arguments())
    with pytest.raises(UserError, match="task=edges: this model has semseg, depth"):
        export_edge_moe(trained, data, tmp_path / "out", arguments(task="edges"))


def test_a_range_that_does_not_fit_is_the_users_error_and_rescaling_may_help(trained, data, tmp_path):
    bias = trained.model.backbone.blocks[6].norm1.bias
    with torch.no_grad():
        bias[0] = 18.0
    try:
        with pytest.raises(UserError, match=r"^export: l6_norm1_bias: .* 2\^-1 times it would fit; rescale"):
            export_edge_moe(trained, data, tmp_path / "out", arguments())
        figures = export_edge_moe(trained, data, tmp_path / "out", arguments(calibration=1), rescale=True)
    finally:
        nn.init.zeros_(bias)
    assert figures["max_relative_error"] < 1e-4
    assert files.read(tmp_path / "out", "l6_norm1_bias", (192,))[0] == 9.0
