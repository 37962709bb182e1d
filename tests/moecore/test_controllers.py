"""Balance without a loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moecore
from moecore.routing import Assignment, Routing

D, E, K = 8, 6, 2


def skewed(**options) -> moecore.MoE:
    """A layer whose router prefers the first experts."""
    moe = moecore.MoE.build(D, num_experts=E, top_k=K, hidden=4, score_options={"bias": True}, **options)
    nn.init.normal_(moe.router.score.weight, std=0.3)
    with torch.no_grad():
        moe.router.score.bias.copy_(torch.linspace(1, -1, moe.router.score.bias.numel()))
    return moe


def step(moe: moecore.MoE, x: torch.Tensor) -> Routing:
    with torch.no_grad(), moecore.record(moe) as recording:
        moe(x)
    moecore.update_controllers(recording)
    return recording[0]


def routing_of(load: list[int], controller: nn.Module | None = None) -> Routing:
    """One slot per token, `load[e]` tokens for expert e."""
    expert = torch.repeat_interleave(torch.arange(len(load)), torch.tensor(load))[:, None]
    scores = torch.zeros(expert.shape[0], len(load))
    assignment = Assignment(expert, expert.shape[0], len(load))
    weighting = moecore.WEIGHTINGS["softmax"](D, len(load), 1)
    return Routing(scores, assignment, torch.ones(expert.shape), weighting.activation, controller=controller)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 0.003),
        ({"weight": "sigmoid"}, 0.003),
        ({"select": "top_p", "select_options": {"top_p": 0.6}}, 0.015),
        ({"select": "null_top_k", "select_options": {"num_null": 2}}, 0.003),
        ({"select": "grouped_top_k"}, 0.003),
        ({"select": "threshold", "weight": "relu"}, 0.015),
    ],
    ids=str,
)
def test_loss_free_bias_drives_a_skewed_router_to_even_load(options, rate):
    router = skewed(controller="loss_free", controller_options={"rate": rate}, **options).router
    x, violations = torch.randn(256, D), []
    with torch.no_grad():
        for _ in range(200):
            routing = router(x)
            fractions = routing.fractions()
            violations.append((fractions.max() * fractions.numel() - 1).item())
            moecore.update_controllers([routing])
    assert violations[0] > 0.8
    assert max(violations[-20:]) < 0.15


def test_a_step_moves_every_bias_by_the_rate_against_its_load():
    controller = moecore.LossFreeBias(4, rate=0.5)
    controller.update([routing_of([6, 2, 4, 4])])
    assert controller.bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    controller.update([routing_of([6, 2, 4, 4]), routing_of([0, 12, 2, 2])])  # shares .19 .44 .19 .19
    assert controller.bias.tolist() == [0.0, 0.0, 0.5, 0.5]


def test_bias_changes_who_is_chosen_but_not_how_they_count():
    moe, x = skewed(controller="loss_free"), torch.randn(32, D)
    with torch.no_grad():
        moe.router.balance.bias.copy_(torch.linspace(-1, 1, E))
        routing = moe.router(x)
        adjusted = routing.scores.softmax(-1) + moe.router.balance.bias
        probs = routing.scores.softmax(-1).gather(1, routing.assignment.expert)
    assert torch.equal(routing.assignment.expert, adjusted.topk(K, -1).indices)
    torch.testing.assert_close(routing.weights, probs / probs.sum(-1, keepdim=True))


def test_bias_is_added_to_logits_where_the_selection_reads_logits():
    spaces = {
        name: moecore.MoE.build(D, num_experts=E, top_k=K, select=name, controller="loss_free").router.balance.space
        for name in moecore.SELECTIONS
    }
    assert {name for name, space in spaces.items() if space == "logits"} == {"top_p", "threshold"}
    moe = moecore.MoE.build(D, controller="loss_free", controller_options={"space": "logits"})
    assert moe.router.balance.space == "logits"


def test_bias_is_saved_and_never_trained():
    moe = skewed(controller="loss_free", controller_options={"rate": 0.1})
    step(moe, torch.randn(64, D))
    assert "router.balance.bias" in moe.state_dict()
    assert not any("balance" in name for name, _ in moe.named_parameters())
    other = skewed(controller="loss_free")
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other.router.balance.bias, moe.router.balance.bias)
    assert moe.router.balance.bias.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_stays_float32_in_a_model_cast_to_half_precision(dtype):
    """In bfloat16 a bias of 1 would not move by 0.001."""
    moe = skewed(controller="loss_free", controller_options={"rate": 1e-3})
    moe.router.balance.bias.fill_(1.0)
    before = moe.router.balance.bias.clone()
    moe = moe.to(dtype)
    assert moe.experts.up.dtype == dtype
    assert torch.equal(moe.router.balance.bias, before)
    for _ in range(3):
        step(moe, torch.randn(64, D, dtype=dtype))
    assert moe.router.balance.bias.dtype == moe.state_dict()["router.balance.bias"].dtype == torch.float32
    moved = (moe.router.balance.bias - before).abs()
    assert 0.0029 < moved.max().item() < 0.0031
    assert moe.double().router.balance.bias.dtype == torch.float64
    assert moe.to(dtype).router.balance.bias.dtype == torch.float32
    assert moe.to("meta").router.balance.bias.device.type == "meta"


def test_sparsity_coefficient_survives_half_precision():
    """In float16 it would start at 0 and stay there."""
    controller = moecore.SparsityController(4, 1).half()
    controller.update([routing_of([1, 1, 1, 1])])
    assert controller.coefficient.item() == pytest.approx(1e-8)
    assert controller.coefficient.dtype == torch.float32


def test_sparsity_controller_multiplies_while_too_many_are_active():
    controller = moecore.SparsityController(4, 1, start=1.0, rate=2.0)
    controller.update([routing_of([8, 0, 0, 0])])  # exactly a quarter
    assert controller.coefficient.item() == 1.0
    every = Assignment(torch.arange(4).expand(3, 4), 3, 4, complete=True)
    weighting = moecore.WEIGHTINGS["relu"](D, 4, 1)
    dense = Routing(torch.ones(3, 4), every, torch.ones(3, 4), weighting.activation)
    controller.update([dense])
    assert controller.coefficient.item() == 2.0
    none = Routing(
        torch.ones(3, 4),
        Assignment(every.expert, 3, 4, valid=torch.zeros(3, 4, dtype=torch.bool)),
        torch.zeros(3, 4),
        weighting.activation,
    )
    controller.update([none])
    controller.update([none])
    assert controller.coefficient.item() == 0.5
    assert torch.equal(controller.adjust(dense.scores, weighting.activation), dense.scores)


def test_sparsity_controller_reaches_its_target_share_in_training():
    """ReMoE in small: an L1 loss whose coefficient is steered brings E active experts down to K."""
    moe = moecore.MoE.build(
        D,
        num_experts=8,
        top_k=2,
        hidden=16,
        score_options={"bias": True},
        select="threshold",
        weight="relu",
        controller="sparsity",
        controller_options={"start": 1e-2, "rate": 1.05},
        aux_loss={"l1": 1.0},
    )
    nn.init.normal_(moe.router.score.weight, std=0.5)
    nn.init.constant_(moe.router.score.bias, 1.0)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.05)
    x = torch.randn(128, D)
    target = 3 * x.roll(1, -1).tanh()
    active = []
    for _ in range(250):
        with moecore.record(moe) as recording:
            loss = (moe(x) - target).square().mean() + moecore.balance_loss(recording)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moecore.update_controllers(recording)
        active.append(recording[0].assignment.load().sum().item() / 128)
    assert active[0] > 5
    assert sum(active[-50:]) / 50 == pytest.approx(2, abs=0.4)


def test_sparsity_needs_a_threshold():
    with pytest.raises(moecore.ConfigError, match=r"^controller='sparsity': needs select=threshold"):
        moecore.MoE.build(D, controller="sparsity")


def test_update_controllers_steps_every_controller_once():
    """Calls of one layer, and layers that share a router, count together."""
    shared = moecore.LossFreeBias(4, rate=1.0)
    other = moecore.LossFreeBias(2, rate=1.0)
    moecore.update_controllers(
        [
            routing_of([4, 0, 0, 0], shared),
            routing_of([3, 1], other),
            routing_of([1, 1, 1, 1]),
            routing_of([0, 2, 1, 1], shared),
        ]
    )
    assert shared.bias.tolist() == [-1.0, 0.0, 1.0, 1.0]
    assert other.bias.tolist() == [-1.0, 1.0]


def test_update_controllers_ignores_calls_without_tokens():
    moe = skewed(controller="loss_free")
    step(moe, torch.randn(0, D))
    assert moe.router.balance.bias.tolist() == [0.0] * E
    moecore.update_controllers([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controller": "loss_free", "controller_options": {"rate": 0.0}}, r"controller_options\.rate=0.0: must be "),
        ({"controller": "loss_free", "controller_options": {"space": "x"}}, r"controller_options\.space='x': choose"),
        (
            {"controller": "sparsity", "select": "threshold", "controller_options": {"rate": 1.0}},
            r"controller_options\.rate=1.0: must exceed 1",
        ),
        ({"controller": "loss_free", "controller_options": {"speed": 1}}, r"controller_options=\{'speed': 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(moecore.ConfigError, match=f"^{message}"):
        moecore.MoE.build(D, **options)
