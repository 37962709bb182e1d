"""M³ViT's backbone without reference numbers; those are in tests/parity."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moecore
from apps.errors import ConfigError, UserError
from apps.vision.models.m3vit import Gate, block_outputs, m3vit_backbone, m3vit_moe
from apps.vision.models.m3vit_weights import load_published, to_published

D, TASKS, EXPERTS, TOP_K, G = 24, 3, 5, 2, 7
SIZE = (32, 48)
GATES = get_args(Gate)
every_gate = pytest.mark.parametrize("gate", GATES)
gates_by_task = pytest.mark.parametrize("gate", ["multi", "task_conditioned"])


def config(gate: str, **options) -> moecore.MoEConfig:
    return m3vit_moe(gate, TASKS, EXPERTS, TOP_K, task_width=G, **options)


def backbone(gate: str = "multi", **options) -> nn.Module:
    """Gates far from even, so that tasks and tokens differ in their experts."""
    model = m3vit_backbone(config(gate, **options), SIZE, embed_dim=D, depth=4, num_heads=3)
    for layer in moe_layers(model):
        nn.init.normal_(layer.router.score.weight)
    return model


def moe_layers(model: nn.Module) -> list[moecore.MoE]:
    return [module for module in model.modules() if isinstance(module, moecore.MoE)]


def run(model: nn.Module, images: Tensor, task: int | Tensor) -> Tensor:
    with moecore.routing_context(task=task):
        return model(images)


@every_gate
def test_odd_blocks_carry_moe(gate):
    model = backbone(gate)
    assert [isinstance(block.mlp, moecore.MoE) for block in model.blocks] == [False, True, False, True]
    assert all(layer.experts.hidden == 4 * D // TOP_K for layer in moe_layers(model))


@pytest.mark.parametrize(("top_k", "millions"), [(4, 43.4), (2, 71.8)])
def test_the_small_model_has_its_published_size(top_k, millions):
    """The paper's command line (4 of 16 experts as wide as the token) and its settings files (2 of 16, twice that)."""
    model = m3vit_backbone(m3vit_moe(top_k=top_k))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert moe_layers(model)[0].experts.hidden == 4 * 384 // top_k


@every_gate
def test_all_blocks_and_the_last(gate):
    model, images = backbone(gate).eval(), torch.randn(2, 3, *SIZE)
    with moecore.routing_context(task=1):
        outputs, last = block_outputs(model, images), model(images)
    assert [tuple(output.shape) for output in outputs] == [(2, 1 + 2 * 3, D)] * 4
    assert torch.equal(outputs[-1], last)


def test_the_class_token_comes_first():
    model, images = backbone("shared").eval(), torch.randn(1, 3, *SIZE)
    inputs = []
    model.blocks[0].register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    model(images)
    assert torch.equal(inputs[0][:, 0], model.cls_token[:, 0] + model.pos_embed[:, 0])


def published_layer(x: Tensor, state: dict[str, Tensor], name: str, gate: str, task: int) -> Tensor:
    """A layer written out token by token, from published weights alone: [T, D] -> [T, D]."""
    seen, w_gate = x, f"{name}.gate.{task}.w_gate" if gate == "multi" else f"{name}.gate.w_gate"
    if gate == "task_conditioned":
        fc1, fc2, norm = (
            (state[f"gate_task_represent.{part}.weight"], state[f"gate_task_represent.{part}.bias"])
            for part in ("fc1", "fc2", "norm")
        )
        one_hot = F.one_hot(torch.tensor(task), TASKS).float()
        embedding = F.layer_norm(F.linear(F.gelu(F.linear(one_hot, *fc1)), *fc2), (G,), *norm, eps=1e-6)
        seen = torch.cat([x, embedding.expand(len(x), G)], 1)
    score, expert = (seen @ state[w_gate]).softmax(-1).topk(TOP_K)
    rows = []
    for token, scores, experts in zip(x, score, expert, strict=True):
        row = torch.zeros(D)
        for s, e in zip(scores, experts, strict=True):
            weight, bias = state[f"{name}.experts.htoh4.weight"][e], state[f"{name}.experts.htoh4.bias"][e]
            hidden = F.gelu(weight @ token + bias)
            row += s * (state[f"{name}.experts.h4toh.weight"][e] @ hidden + state[f"{name}.experts.h4toh.bias"][e])
        rows.append(row)
    return torch.stack(rows)


@every_gate
@pytest.mark.parametrize("task", range(TASKS))
@torch.no_grad()
def test_layers_compute_what_published_weights_mean(gate, task):
    model = backbone(gate).eval()
    x, state = torch.randn(9, D), to_published(model)
    for name in ("blocks.1.mlp", "blocks.3.mlp"):
        ours = run(model.get_submodule(name), x, task)
        torch.testing.assert_close(ours, published_layer(x, state, name, gate, task), rtol=0, atol=1e-5)


@every_gate
def test_published_weights_round_trip(gate):
    model, other = backbone(gate).eval(), backbone(gate).eval()
    images = torch.randn(2, 3, *SIZE)
    assert not torch.allclose(run(model, images, 1), run(other, images, 1))
    load_published(other, to_published(model))
    for task in range(TASKS):
        assert torch.equal(run(model, images, task), run(other, images, task))
    ours, theirs = other.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_published_names_and_shapes():
    shapes = {gate: {name: tuple(v.shape) for name, v in to_published(backbone(gate)).items()} for gate in GATES}
    hidden = 4 * D // TOP_K
    experts = {
        "experts.htoh4.weight": (EXPERTS, hidden, D),
        "experts.htoh4.bias": (EXPERTS, hidden),
        "experts.h4toh.weight": (EXPERTS, D, hidden),
        "experts.h4toh.bias": (EXPERTS, D),
    }
    routers = {
        "multi": {f"gate.{task}.w_gate": (D, EXPERTS) for task in range(TASKS)},
        "task_conditioned": {"gate.w_gate": (D + G, EXPERTS)},
        "shared": {"gate.w_gate": (D, EXPERTS)},
    }
    for gate in GATES:
        prefix = "blocks.3.mlp."
        layer = {n.removeprefix(prefix): s for n, s in shapes[gate].items() if n.startswith(prefix)}
        assert layer == {**experts, **routers[gate]}
    embedding = {name for name in shapes["task_conditioned"] if name.startswith("gate_task_represent.")}
    assert embedding == {f"gate_task_represent.{m}.{p}" for m in ("fc1", "fc2", "norm") for p in ("weight", "bias")}


def test_copies_do_not_follow_the_model():
    model = backbone()
    state = to_published(model)
    before = {name: value.clone() for name, value in state.items()}
    load_published(model, {name: value + 1 for name, value in state.items()})
    assert all(value.is_contiguous() and torch.equal(value, before[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.gate.2.w_gate"), "blocks.1.mlp.gate.2.w_gate is missing"),
        (lambda s: [s.pop("pos_embed"), s.pop("cls_token")], "cls_token is missing (and 1 more)"),
        (lambda s: s.update({"norm.weight": torch.ones(D)}), "norm.weight is no weight of this model"),
        (
            lambda s: s.update({"blocks.3.mlp.gate.0.w_gate": torch.ones(EXPERTS, D)}),
            f"blocks.3.mlp.gate.0.w_gate has shape ({EXPERTS}, {D}), where this model takes ({D}, {EXPERTS})",
        ),
        (lambda s: s.update({"blocks.0.norm1.bias": torch.tensor(0.0)}), "blocks.0.norm1.bias has shape ()"),
    ],
)
def test_a_wrong_file_is_one_line_and_changes_nothing(change, message):
    model = backbone()
    state = {name: value + 1 for name, value in to_published(model).items()}
    before = copy.deepcopy(model.state_dict())
    change(state)
    with pytest.raises(UserError) as caught:
        load_published(model, state)
    assert str(caught.value).startswith(f"published weights: {message}")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_gate_are_refused():
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.gate\.w_gate is missing"):
        load_published(backbone("shared"), to_published(backbone("multi")))


def test_weights_without_a_published_name_are_refused():
    model = m3vit_backbone(replace(config("multi"), shared_hidden=8), SIZE, embed_dim=D, depth=2, num_heads=3)
    with pytest.raises(ConfigError, match=r"blocks\.1\.mlp\.shared\.bank\.up.*has no published name"):
        to_published(model)


@gates_by_task
def test_tasks_per_image_equal_tasks_apart(gate):
    model, images = backbone(gate).eval(), torch.randn(4, 3, *SIZE)
    tasks = torch.tensor([2, 0, 1, 0])
    together = run(model, images, tasks)
    apart = torch.stack([run(model, image[None], int(task))[0] for image, task in zip(images, tasks, strict=True)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    assert not torch.allclose(together, run(model, images, 1), atol=1e-3)  # else the tasks made no difference


def test_a_shared_gate_does_not_see_the_task():
    model, images = backbone("shared").eval(), torch.randn(2, 3, *SIZE)
    assert torch.equal(run(model, images, 0), run(model, images, 2))


@pytest.mark.parametrize("tasks", [[0], [2], [0, 1, 2], torch.tensor([2, 1])])
def test_gradient_reaches_the_gates_of_the_tasks_run(tasks):
    model, images = backbone("multi"), torch.randn(2, 3, *SIZE)
    sum(
        run(model, images, task).square().mean() for task in ([tasks] if isinstance(tasks, Tensor) else tasks)
    ).backward()
    for layer in moe_layers(model):
        reached = layer.router.score.weight.grad.abs().amax((1, 2)) > 0
        assert reached.tolist() == [task in list(tasks) for task in range(TASKS)]


def test_one_task_embedding_learns_from_all_layers():
    model, images = backbone("task_conditioned"), torch.randn(2, 3, *SIZE)
    first, second = (layer.router.score for layer in moe_layers(model))
    assert first.embed is second.embed
    run(model, images, 1).square().mean().backward()
    for score in (first, second):
        assert score.weight.grad.abs().amax(0).min() > 0  # token and embedding columns alike
    reached = first.embed.fc1.weight.grad.abs().amax(0) > 0
    assert reached.tolist() == [False, True, False]


@every_gate
def test_the_embedding_survives_a_copy(gate):
    model = copy.deepcopy(backbone(gate))
    embeddings = {id(getattr(layer.router.score, "embed", None)) for layer in moe_layers(model)}
    assert len(embeddings) == 1


@every_gate
def test_balance_losses_add_up_over_layers_and_tasks(gate):
    model, images = backbone(gate), torch.randn(2, 3, *SIZE)
    with moecore.record(model) as recording:
        for task in range(TASKS):
            run(model, images, task)
    assert len(recording) == 2 * TASKS
    expected = 0.0
    for routing in recording:
        importance = routing.assignment.dense(routing.weights).sum(0)
        load = routing.assignment.load().float()
        expected += sum(0.01 * v.var() / (v.mean() ** 2 + 1e-10) for v in (importance, load))
    torch.testing.assert_close(moecore.balance_loss(recording), expected)


@every_gate
def test_noise_is_of_training_alone(gate):
    model, images = backbone(gate, noise_std=5.0), torch.randn(2, 3, *SIZE)
    assert not torch.equal(run(model, images, 1), run(model, images, 1))
    model.eval()
    assert torch.equal(run(model, images, 1), run(model, images, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (32, 40)}, r"img_size=\(32, 40\): height and width must be multiples of patch_size=16"),
        ({"img_size": 8}, r"img_size=8: height and width"),
        ({"num_heads": 5}, "num_heads=5: must divide embed_dim=24"),
        ({"depth": 1}, "depth=1: must be at least 2"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    sizes = {"img_size": SIZE, "embed_dim": D, "depth": 2, "num_heads": 3}
    with pytest.raises(ConfigError, match=message):
        m3vit_backbone(config("multi"), **{**sizes, **options})


def test_an_unknown_gate():
    with pytest.raises(ConfigError, match="gate='oracle': choose one of multi, shared, task_conditioned"):
        m3vit_moe("oracle")


@gates_by_task
def test_a_missing_task_says_what_to_do(gate):
    with pytest.raises(ValueError, match="routing_context"):
        backbone(gate)(torch.randn(1, 3, *SIZE))
