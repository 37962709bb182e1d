"""Backbones by name, weights of plain ViTs, and what ViMoE puts into them."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import moecore
from apps.errors import ConfigError, UserError
from apps.vision.models.backbones import SMALL, ConvStem, fitting_patch, make_backbone
from apps.vision.models.vimoe import ImageSpec, ViMoE, dense_twin
from apps.vision.settings import ModelConfig
from moecore import MoEConfig

SPEC = ImageSpec(3, 16, ("cat", "dog", "owl"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
PLAIN = {"backbone": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
"""A timm ViT that is tiny indeed."""


def backbone(channels: int = 3, size: int = 16, classes: int = 3, **options: object) -> VisionTransformer:
    return make_backbone(ModelConfig(**PLAIN | options), channels, size, classes).eval()


def vimoe(**options: object) -> ViMoE:
    moe = options.pop("moe", MoEConfig(num_experts=4, top_k=2))
    return ViMoE(ModelConfig(**PLAIN | {"moe": moe, "moe_layers": "all"} | options), SPEC).eval()


@given(st.integers(4, 600))
def test_a_patch_size_always_fits(size):
    patch = fitting_patch(size)
    assert size % patch == 0
    assert size // patch >= 2


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (16, 4), (28, 4), (32, 4), (64, 8), (96, 8), (224, 16)])
def test_patches_suit_the_image(size, patch):
    assert fitting_patch(size) == patch


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 27), (3, 32)])
def test_backbones_of_ours_take_small_images(name, channels, size):
    model = make_backbone(ModelConfig(backbone=name, depth=1), channels, size, 5).eval()
    assert model(torch.rand(2, channels, size, size)).shape == (2, 5)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_the_stem_makes_as_many_tokens_as_patches_would(patch):
    stem = ConvStem(32, patch, 3, 24)
    assert stem(torch.rand(2, 3, 32, 32)).shape == (2, (32 // patch) ** 2, 24)
    assert (stem.num_patches, stem.grid_size) == ((32 // patch) ** 2, (32 // patch,) * 2)


@pytest.mark.parametrize(("stem", "patch", "kind"), [("auto", 4, ConvStem), ("conv", 4, ConvStem), ("patch", 4, None)])
def test_stems_are_those_asked_for(stem, patch, kind):
    model = make_backbone(ModelConfig(stem=stem, patch_size=patch, depth=1), 3, 16, 2)
    assert isinstance(model.patch_embed, ConvStem) == (kind is ConvStem)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_medium_patch16_reg4_gap_256", "vit_base_patch16_clip_224"],
)
def test_vits_of_timm_carry_moe_layers(name):
    model = vimoe(backbone=name)
    assert model.moe_layers == ["backbone.blocks.0.mlp", "backbone.blocks.1.mlp"] or model.moe_layers == [
        "blocks.0.mlp",
        "blocks.1.mlp",
    ]
    assert model(model.example_input(2)).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"backbone": "vit_nano"}, r"model\.backbone='vit_nano': no such model in timm; near: .*"),
        ({"backbone": "resnet18"}, r"model\.backbone='resnet18': is no vision transformer that takes an image size"),
        ({"num_heads": 3}, r"model\.(num_heads=3|backbone='vit_tiny_patch16_224'): .*"),
        ({"num_heads": 0}, r"model\.num_heads=0: must be positive, .*"),
        ({"depth": -1}, r"model\.depth=-1: must be positive, .*"),
        ({"embed_dim": 0}, r"model\.embed_dim=0: must be positive, .*"),
        ({"mlp_ratio": 0.0}, r"model\.mlp_ratio=0\.0: must be positive, .*"),
        ({"drop_rate": 1.0}, r"model\.drop_rate=1\.0: must lie in \[0, 1\)"),
        ({"backbone": "vit_micro", "patch_size": 5}, r"model\.patch_size=5: must divide the image size 16"),
        ({"backbone": "vit_micro", "num_heads": 3}, r"model\.num_heads=3: must divide embed_dim=16"),
        ({"backbone": "vit_micro", "stem": "conv", "patch_size": 1}, r"model\.patch_size=1: must be 2, 4, 8, .*"),
        ({"moe_layers": "last-3"}, r"model\.moe_layers='last-3': use all, none, .*"),
        ({"moe_layers": "2"}, r"model\.moe_layers='2': the model has layers 0 to 1"),
        ({"share_router": True, "experts_schedule": "ascending"}, r"model\.experts_schedule=\[.*\]: .*equal counts"),
        ({"moe": MoEConfig(activation="gelo")}, r"model\.moe\.activation='gelo': choose one of gelu, .*"),
        ({"moe": MoEConfig(shared_hidden=999)}, r"model\.moe\.shared_hidden=999: .*"),
        ({"moe": MoEConfig(score="per_task")}, r"model\.moe\.score='per_task': needs the task of every image, .*"),
        ({"moe": MoEConfig(select_options={"k": 1})}, r"model\.moe\.select_options=.*: TopK says: .*"),
        (
            {"moe": MoEConfig(select="grouped_top_k", select_options={"num_groups": 3})},
            r"model\.moe\.select_options\.num_groups=3: must divide num_experts=8",
        ),
    ],
)
def test_models_that_cannot_be_are_one_line_that_names_the_setting(options, line):
    with pytest.raises(ConfigError) as refused:
        vimoe(**options)
    assert re.fullmatch(line, str(refused.value))


def test_images_are_normalised_inside_the_model():
    model = vimoe()
    x = model.example_input(2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SPEC.mean, SPEC.std))
    assert torch.equal(model(x), model.backbone((x - mean) / std))


@pytest.mark.parametrize("hidden", [64, None])
def test_upcycled_models_start_as_the_dense_one(hidden):
    torch.manual_seed(3)
    dense = vimoe(moe_layers="none")
    torch.manual_seed(3)
    moe = vimoe(moe=MoEConfig(num_experts=4, top_k=2, hidden=hidden))
    x = dense.example_input(3)
    assert torch.allclose(moe(x), dense(x), atol=1e-5) == (hidden == 64)  # whole copies of the FFN, or halves
    assert not torch.allclose(vimoe(moe_init="random")(x), dense(x), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "experts"),
    [
        ({}, [4, 4]),
        ({"moe_layers": "1"}, [4]),
        ({"moe_layers": "none"}, []),
        ({"experts_schedule": "ascending"}, [2, 4]),
        ({"experts_schedule": "descending"}, [4, 2]),
    ],
)
def test_moe_layers_are_where_and_as_large_as_asked(options, experts):
    layers = [module for module in vimoe(**options).modules() if isinstance(module, moecore.MoE)]
    assert [layer.experts.num_experts for layer in layers] == experts


def test_a_shared_router_is_one():
    first, second = (m for m in vimoe(share_router=True).modules() if isinstance(m, moecore.MoE))
    assert first.router is second.router


def test_the_dense_twin_costs_what_the_moe_model_uses():
    model = vimoe()
    twin = ViMoE(dense_twin(model.config), SPEC).eval()
    costs = [moecore.count_cost(m, m.example_input()) for m in (model, twin)]
    router = 2 * 5 * 16 * 4  # layers x tokens x width x experts
    assert costs[0].macs - costs[1].macs == router
    assert costs[0].total_params > costs[1].total_params


def test_an_image_spec_survives_plain_data():
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(SPEC).items()}
    assert ImageSpec.from_dict(plain) == SPEC
    assert ImageSpec.from_dict({k: v for k, v in plain.items() if k != "whole"}) == SPEC  # as kept by earlier versions
    assert ImageSpec.from_dict(asdict(replace(SPEC, whole=False))).whole is False


@pytest.fixture
def plain_vit() -> VisionTransformer:
    """As somebody else would make and save it: other classes, other image size."""
    torch.manual_seed(7)
    options = {name: value for name, value in PLAIN.items() if name != "backbone"}
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **options).eval()


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}])
def test_weights_of_a_plain_vit_load_from_a_file(tmp_path, plain_vit, ending, wrap):
    file = tmp_path / f"vit.{ending}"
    if ending == "pth":
        torch.save(wrap(plain_vit.state_dict()), file)
    else:
        save_file(plain_vit.state_dict(), file)
    model = backbone(size=32, pretrained=str(file))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.forward_features(x), plain_vit.forward_features(x))
    assert model.head.weight.shape == (3, 16)  # another classifier is left as it was
    smaller = backbone(size=16, pretrained=str(file))
    assert torch.equal(smaller.blocks[0].mlp.fc1.weight, plain_vit.blocks[0].mlp.fc1.weight)
    assert smaller.pos_embed.shape == (1, 5, 16)
    grey = backbone(channels=1, size=32, pretrained=str(file))
    luminance = torch.rand(2, 1, 32, 32)
    same = grey.patch_embed(luminance), plain_vit.patch_embed(luminance.expand(-1, 3, -1, -1))
    assert torch.allclose(*same, atol=1e-5)


def test_same_classes_take_the_classifier_too(tmp_path, plain_vit):
    torch.save(plain_vit.state_dict(), tmp_path / "vit.pth")
    model = backbone(size=32, classes=7, pretrained=str(tmp_path / "vit.pth"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), plain_vit(x))


def test_upcycled_from_a_plain_vit_step_zero_is_that_vit(tmp_path, plain_vit, cli, tiny, draw):
    """The whole way: a file, settings, a trained MoE model whose first weights were copies."""
    torch.save(plain_vit.state_dict(), tmp_path / "vit.pth")
    config = ModelConfig(
        **PLAIN,
        pretrained=str(tmp_path / "vit.pth"),
        moe_layers="all",
        moe=MoEConfig(num_experts=4, top_k=2, hidden=64),
    )
    model = ViMoE(config, replace(SPEC, image_size=32, classes=tuple("abcdefg"))).eval()
    x = model.example_input(2)
    assert torch.allclose(model(x), plain_vit((x - model.mean) / model.std), atol=1e-5)


def write_pickle(path, state):
    torch.save({"state_dict": state, "optimizer": torch.nn.Linear(1, 1)}, path)


@pytest.mark.parametrize(
    ("name", "write", "line"),
    [
        ("none.pth", lambda path, state: None, r".*none\.pth: no such file \(`timm` downloads .*"),
        ("x.pth", lambda path, state: path.write_bytes(b"text"), r".*x\.pth: not a checkpoint, or damaged"),
        ("x.safetensors", lambda path, state: path.write_bytes(b"text"), r".*x\.safetensors: not a safetensors file.*"),
        ("x.pth", write_pickle, r".*x\.pth: refused, it holds pickled objects .*"),
        ("x.pth", lambda path, state: torch.save([1, 2], path), r".*x\.pth: holds no state_dict"),
        ("x.pth", lambda path, state: torch.save({"a": 1}, path), r".*x\.pth: holds no state_dict"),
        ("x.pth", lambda path, state: torch.save({"a": torch.zeros(1)}, path), r".*x\.pth: of another architecture .*"),
        (
            "x.pth",
            lambda path, state: torch.save({k: v for k, v in state.items() if "blocks.1" not in k}, path),
            r".*of another architecture than vit_tiny_patch16_224 \(\d+ tensors missing .*, first blocks\.1\..*\)",
        ),
        (
            "x.safetensors",
            lambda path, state: save_file({k: v[..., :4].contiguous() for k, v in state.items()}, path),
            r".*of another architecture than .*",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_line(tmp_path, plain_vit, name, write, line):
    write(tmp_path / name, plain_vit.state_dict())
    with pytest.raises(UserError) as refused:
        backbone(size=32, pretrained=str(tmp_path / name))
    assert re.fullmatch(line, str(refused.value))
