"""M³ViT with its decoders: passes of tasks, weights to start from, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import moecore
from apps.errors import ConfigError, UserError
from apps.vision.models.m3vit import M3ViT, m3vit_backbone, m3vit_moe
from apps.vision.models.m3vit_weights import to_published
from apps.vision.models.vimoe import dense_twin
from apps.vision.multitask.settings import M3ViTConfig
from apps.vision.multitask.tasks import SceneSpec, TaskSpec
from apps.vision.settings import ModelConfig

SPEC = SceneSpec(
    32,
    48,
    (
        TaskSpec("semseg", ("floor", "wall", "box")),
        TaskSpec("depth"),
        TaskSpec("normals"),
        TaskSpec("edges"),
        TaskSpec("classification", ("box", "cone")),
    ),
)
SHAPES = {
    "semseg": (2, 3, 32, 48),
    "depth": (2, 1, 32, 48),
    "normals": (2, 3, 32, 48),
    "edges": (2, 1, 32, 48),
    "classification": (2, 2),
}
MOE = moecore.MoEConfig(
    6, 2, score="per_task", weight_options={"renormalize": False}, aux_loss={"importance_cv2": 0.01, "load_cv2": 0.01}
)


def config(decoder: str = "light", share_prefix: bool = True, **changes) -> ModelConfig:
    own = M3ViTConfig(decoder=decoder, decoder_width=16, share_prefix=share_prefix)
    given = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "moe_layers": "every-2", "moe": MOE}
    return ModelConfig(name="m3vit", m3vit=own, **given | changes)


def model(*args, spec: SceneSpec = SPEC, seed: int = 0, **changes) -> M3ViT:
    """Gates far from even, so that tasks and tokens differ in their experts."""
    torch.manual_seed(seed)
    made = M3ViT(config(*args, **changes), spec).eval()
    for module in made.modules():
        if isinstance(module, moecore.MoE):
            nn.init.normal_(module.router.score.weight)
    return made


@pytest.mark.parametrize("decoder", ["light", "upsample", "task_expert"])
def test_every_task_has_its_prediction(decoder):
    predictions = model(decoder)(torch.rand(2, 3, 32, 48))
    assert {name: tuple(value.shape) for name, value in predictions.items()} == SHAPES


@pytest.mark.parametrize("decoder", ["light", "task_expert"])
@pytest.mark.parametrize("score", ["per_task", "task_conditioned"])
@pytest.mark.parametrize("layers", ["every-2", "last-1", "all", "1"])
@torch.no_grad()
def test_a_shared_prefix_changes_nothing(decoder, score, layers):
    shared = model(decoder, moe_layers=layers, moe=dataclasses.replace(MOE, score=score))
    images = torch.rand(2, 3, 32, 48)
    anew = M3ViT(config(decoder, False, moe_layers=layers, moe=dataclasses.replace(MOE, score=score)), SPEC).eval()
    anew.load_state_dict(shared.state_dict())
    ours, theirs = shared(images), anew(images)
    for task in SPEC.names:
        assert torch.equal(ours[task], theirs[task])
    costs = [moecore.count_cost(each, images).macs for each in (shared, anew)]
    assert costs[0] < costs[1]


@torch.no_grad()
def test_the_prefix_ends_before_the_first_gated_ffn():
    """Blocks 1 and 3 of four are gated: what five tasks share is one block and a half, and the patches."""
    made, images = model(), torch.rand(1, 3, 32, 48)
    calls = dict.fromkeys(("patch_embed", *(f"{part}{i}" for i in range(4) for part in ("attn", "mlp"))), 0)

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    made.backbone.patch_embed.register_forward_hook(count("patch_embed"))
    for i, block in enumerate(made.backbone.blocks):
        block.attn.register_forward_hook(count(f"attn{i}"))
        block.mlp.register_forward_hook(count(f"mlp{i}"))
    made(images)
    once = {"patch_embed", "attn0", "mlp0", "attn1"}
    assert calls == {name: 1 if name in once else 5 for name in calls}


@torch.no_grad()
def test_one_task_runs_one_gate_and_one_head():
    made, images = model(), torch.rand(1, 3, 32, 48)
    heads = []
    for name, head in made.decoder.heads.items():
        head.register_forward_hook(lambda *_, name=name: heads.append(name))
    with moecore.record(made) as recording:
        alone = made(images, ["depth"])
    assert heads == ["depth"]
    assert [routing.task for routing in recording] == [1, 1]
    assert torch.equal(alone["depth"], made(images)["depth"])


@torch.no_grad()
def test_tasks_are_routed_by_their_own_gates():
    made = model()
    with moecore.record(made) as recording:
        made(torch.rand(2, 3, 32, 48))
    assert [routing.task for routing in recording] == [task for task in range(5) for _ in range(2)]
    first = [routing.assignment.chosen() for routing in recording if routing.name.endswith("blocks.1.mlp")]
    assert all(not torch.equal(first[i], first[j]) for i in range(5) for j in range(i))


@pytest.mark.parametrize("changes", [{"moe_layers": "none"}, {"moe": dataclasses.replace(MOE, score="linear")}])
@torch.no_grad()
def test_without_gates_of_tasks_the_backbone_runs_once(changes):
    made = model(**changes) if "moe" in changes else M3ViT(config(**changes), SPEC).eval()
    passes = []
    made.backbone.blocks[0].register_forward_hook(lambda *_: passes.append(0))
    assert set(made(torch.rand(1, 3, 32, 48))) == set(SPEC.names)
    assert len(passes) == 1
    assert not made.task_aware


def test_the_dense_twin_costs_a_task_the_same():
    one = dataclasses.replace(SPEC, tasks=SPEC.tasks[:1])
    images = torch.rand(1, 3, 32, 48)
    moe = moecore.count_cost(M3ViT(config(), one).eval(), images).macs
    dense = moecore.count_cost(M3ViT(dense_twin(config()), one).eval(), images).macs
    gates = 2 * 24 * 6 * 24  # layers, tokens, experts, width
    assert moe - dense == gates


def test_published_weights_start_the_backbone(tmp_path):
    spec = dataclasses.replace(SPEC, tasks=SPEC.tasks[:2])
    published = m3vit_backbone(m3vit_moe("multi", 2, 6, 2), (32, 48), 16, 24, 4, 3)
    state = {f"module.backbone.{name}": value for name, value in to_published(published).items()}
    torch.save({"state_dict": state | {"module.decoders.depth.weight": torch.ones(1)}}, tmp_path / "published.pth")
    made = M3ViT(
        config(
            pretrained=str(tmp_path / "published.pth"),
            backbone="vit_tiny_patch16_224",
            patch_size=16,
            num_heads=3,
            moe=dataclasses.replace(MOE, activation="gelu", bias=True),
        ),
        spec,
    ).eval()
    images = torch.rand(2, 3, 32, 48)
    for task in range(2):
        with moecore.routing_context(task=task), torch.no_grad():
            theirs = published.eval()((images - made.mean) / made.std)[:, 1:]
            ours = made._own(*made._shared(images))[-1]
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_weights_of_a_plain_vit_start_dense_parts_and_experts(tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    plain = VisionTransformer((32, 48), 16, 3, 10, "token", 24, 4, 2)
    torch.save(plain.state_dict(), tmp_path / "vit.pth")
    made = M3ViT(config(pretrained=str(tmp_path / "vit.pth"), backbone="vit_tiny_patch16_224", patch_size=16), SPEC)
    assert torch.equal(made.backbone.blocks[0].mlp.fc1.weight, plain.blocks[0].mlp.fc1.weight)
    assert torch.equal(made.backbone.blocks[1].attn.qkv.weight, plain.blocks[1].attn.qkv.weight)
    up = made.backbone.blocks[1].mlp.experts.up.flatten(0, 1)
    rows = plain.blocks[1].mlp.fc1.weight
    assert all((row == rows).all(1).any() for row in up)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"patch_size": 7}, "model.patch_size=7: must divide the image size 32 x 48"),
        (
            {"moe": dataclasses.replace(MOE, score_options={"num_tasks": 3})},
            "model.moe.score_options.num_tasks=3: there are 5 tasks; leave it out",
        ),
        ({"backbone": "swin_tiny_patch4_window7_224"}, "model.backbone='swin_tiny_patch4_window7_224':"),
    ],
)
def test_errors_name_the_setting(changes, line):
    with pytest.raises(ConfigError) as error:
        M3ViT(config(**changes), SPEC)
    assert str(error.value).startswith(line)


def test_a_task_the_model_does_not_have():
    with pytest.raises(UserError, match=r"^task=parts: this model has semseg, depth, normals, edges, classification$"):
        model()(torch.rand(1, 3, 32, 48), ["parts"])
