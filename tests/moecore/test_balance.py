"""Balance losses against loops that follow the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import moecore
from moecore.balance import entropy_loss, l1_loss, mutual_information_loss
from moecore.routing import Assignment, Routing

T, D, E, K = 16, 8, 5, 2


def routing_of(scores: torch.Tensor, assignment: Assignment | None = None, weight: str = "softmax", **fields):
    """A routing by top-k of `scores`, or by a given assignment."""
    if assignment is None:
        assignment = Assignment(scores.topk(K, -1).indices, *scores.shape)
    weighting = moecore.WEIGHTINGS[weight](D, scores.shape[1], K)
    weights = weighting(scores, assignment, torch.zeros(scores.shape[0], D))
    return Routing(scores, assignment, weights, weighting.activation, **fields)


def uniform(k: int = K) -> Routing:
    """Every expert equally loaded, every probability 1 / E."""
    expert = torch.stack([(torch.arange(k) + t) % E for t in range(E * 3)])
    return routing_of(torch.zeros(E * 3, E), Assignment(expert, E * 3, E))


def collapsed() -> Routing:
    """Everything goes to expert 2 with certainty."""
    scores = torch.zeros(T, E)
    scores[:, 2] = 100.0
    return routing_of(scores, Assignment(torch.full((T, 1), 2), T, E))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_switch_loss_of_uniform_routing_is_one(k):
    assert moecore.switch_loss(uniform(k)).item() == pytest.approx(1.0)
    assert moecore.switch_loss(uniform(k), normalize=False).item() == pytest.approx(k)


def test_switch_loss_of_collapsed_routing_is_the_number_of_experts():
    assert moecore.switch_loss(collapsed()).item() == pytest.approx(E)


@pytest.mark.parametrize("weight", ["softmax", "sigmoid"])
def test_switch_loss_follows_its_formula(weight):
    routing = routing_of(torch.randn(T, E), weight=weight)
    expected = 0.0
    for e in range(E):
        f = sum(e in row for row in routing.assignment.expert.tolist()) / (T * K)
        p = sum(routing.probs[t, e].item() for t in range(T)) / T
        expected += E * f * p
    assert moecore.switch_loss(routing).item() == pytest.approx(expected, rel=1e-5)


def test_switch_loss_moves_probability_away_from_busy_experts():
    scores = torch.zeros(T, E, requires_grad=True)
    assignment = Assignment(torch.tensor([[2, 3]] * (T // 2) + [[2, 0]] * (T // 2)), T, E)
    moecore.switch_loss(routing_of(scores, assignment)).backward()
    assert (scores.grad[:, 2] > 0).all()
    assert (scores.grad[:, [1, 4]] < 0).all()


def by_hand_cv2(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1) / mean**2


def test_importance_is_the_cv2_of_summed_weights():
    scores = torch.randn(T, E)
    routing = routing_of(scores)
    importance = [0.0] * E
    for experts, weights in zip(routing.assignment.expert.tolist(), routing.weights.tolist(), strict=True):
        for e, w in zip(experts, weights, strict=True):
            importance[e] += w
    assert moecore.importance_cv2(routing).item() == pytest.approx(by_hand_cv2(importance), rel=1e-5)
    assert moecore.importance_cv2(uniform()).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", moecore.LOSSES)
def test_a_single_expert_has_a_finite_loss(name):
    moe = moecore.MoE.build(D, num_experts=1, top_k=1)
    with moecore.record(moe) as recording:
        moe(torch.randn(T, D))
    assert moecore.balance_loss(recording, {name: 1.0}).isfinite()


def test_load_without_noise_is_the_hard_count():
    routing = routing_of(torch.randn(T, E))
    assert moecore.load_cv2(routing).item() == pytest.approx(
        by_hand_cv2([float(n) for n in routing.assignment.load()]), rel=1e-5
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_smooth_load_matches_monte_carlo(k):
    """Draw an expert's own noise anew, keep the others', count how often it is among the best."""
    tokens, draws = 6, 20000
    clean, std = torch.randn(tokens, E), 0.3 + torch.rand(tokens, E)
    noisy = clean + std * torch.randn(tokens, E)
    load = torch.zeros(E)
    for e in range(E):
        others = torch.cat([noisy[:, :e], noisy[:, e + 1 :]], 1)
        bar = others.topk(k, -1).values[:, -1]
        fresh = clean[:, e] + std[:, e] * torch.randn(draws, tokens)
        load[e] = (fresh > bar).float().mean(0).sum()
    assignment = Assignment(noisy.topk(k, -1).indices, tokens, E)
    routing = routing_of(noisy, assignment, clean=clean, noise_std=std)
    assert moecore.load_cv2(routing).item() == pytest.approx(by_hand_cv2(load.tolist()), rel=0.05)


def test_smooth_load_of_all_experts_is_even():
    scores = torch.randn(T, E)
    every = Assignment(torch.arange(E).expand(T, E), T, E, complete=True)
    routing = routing_of(scores, every, clean=scores, noise_std=torch.ones(T, E))
    assert moecore.load_cv2(routing).item() == 0


def test_smooth_load_has_gradients_for_clean_scores_and_noise():
    clean, std = torch.randn(T, E, requires_grad=True), torch.rand(T, E).add(0.1).requires_grad_()
    noisy = clean + std * torch.randn(T, E)
    moecore.load_cv2(routing_of(noisy, clean=clean, noise_std=std)).backward()
    assert clean.grad.abs().sum() > 0
    assert std.grad.abs().sum() > 0


def test_smooth_load_refuses_expert_choice():
    scores = torch.randn(T, E)
    assignment = moecore.SELECTIONS["expert_choice"](E, K)(scores, moecore.Context())
    routing = routing_of(scores, assignment, clean=scores, noise_std=torch.ones(T, E))
    with pytest.raises(ValueError, match=r"load_cv2: needs a token-choice router"):
        moecore.load_cv2(routing)


def test_z_loss_is_the_mean_squared_log_partition():
    scores = torch.randn(T, E)
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in scores.tolist()) / T
    assert moecore.z_loss(routing_of(scores)).item() == pytest.approx(expected, rel=1e-5)


def entropy(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


def test_entropy_is_that_of_each_tokens_distribution():
    routing = routing_of(torch.randn(T, E))
    expected = sum(entropy(row) for row in routing.probs.tolist()) / T
    assert entropy_loss(routing).item() == pytest.approx(expected, rel=1e-5)
    assert entropy_loss(uniform()).item() == pytest.approx(math.log(E))
    assert entropy_loss(collapsed()).item() == pytest.approx(0, abs=1e-6)


def test_mutual_information_rewards_even_use_and_sure_choices():
    routing = routing_of(torch.randn(T, E))
    mean = routing.probs.mean(0).tolist()
    conditional = sum(entropy(row) for row in routing.probs.tolist()) / T
    assert mutual_information_loss(routing).item() == pytest.approx(conditional - entropy(mean), rel=1e-4)
    sure_and_even = routing_of(torch.eye(E) * 100)
    assert mutual_information_loss(sure_and_even).item() == pytest.approx(-math.log(E), rel=1e-4)
    assert mutual_information_loss(uniform()).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information_loss(collapsed()).item() == pytest.approx(0, abs=1e-6)


def test_entropies_have_finite_gradients_at_zero_probability():
    scores = torch.zeros(T, E)
    scores[:, 0] = 1000.0
    scores.requires_grad_()
    (entropy_loss(routing_of(scores)) + mutual_information_loss(routing_of(scores))).backward()
    assert scores.grad.isfinite().all()


def test_l1_weighs_positive_scores_by_load():
    scores = torch.randn(T, E)
    every = torch.arange(E).expand(T, E)
    routing = routing_of(scores, Assignment(every, T, E, valid=scores > 0), weight="relu")
    active = int((scores > 0).sum())
    expected = 0.0
    for e in range(E):
        f = int((scores[:, e] > 0).sum()) / active
        expected += E * f * sum(max(v, 0.0) for v in scores[:, e].tolist()) / T
    assert l1_loss(routing).item() == pytest.approx(expected, rel=1e-5)


def test_l1_is_scaled_by_its_controllers_coefficient():
    scores = torch.randn(T, E)
    controller = moecore.SparsityController(E, K, start=0.25)
    plain, scaled = l1_loss(routing_of(scores)), l1_loss(routing_of(scores, controller=controller))
    torch.testing.assert_close(scaled, 0.25 * plain)
    bias = l1_loss(routing_of(scores, controller=moecore.LossFreeBias(E)))
    torch.testing.assert_close(bias, plain)


def two_layers() -> nn.Sequential:
    return nn.Sequential(
        moecore.MoE.build(D, num_experts=4, top_k=2, aux_loss={"switch": 0.1, "z": 0.01}),
        moecore.MoE.build(D, num_experts=6, top_k=1, aux_loss={"importance_cv2": 0.5}),
        moecore.MoE.build(D, num_experts=3, top_k=1, aux_loss={}),
    )


def test_balance_loss_mixes_each_layers_own_losses():
    model = two_layers()
    with moecore.record(model) as recording:
        model(torch.randn(T, D))
    first, second, third = recording
    expected = 0.1 * moecore.switch_loss(first) + 0.01 * moecore.z_loss(first) + 0.5 * moecore.importance_cv2(second)
    torch.testing.assert_close(moecore.balance_loss(recording), expected)
    same_for_all = sum(2.0 * moecore.z_loss(r) for r in (first, second, third))
    torch.testing.assert_close(moecore.balance_loss(recording, {"z": 2.0}), same_for_all)


@pytest.mark.parametrize("name", moecore.LOSSES)
def test_gradients_reach_the_router_and_nothing_else(name):
    moe = moecore.MoE.build(D, num_experts=4, top_k=2, score="noisy", aux_loss={name: 1.0})
    nn.init.normal_(moe.router.score.weight)
    with moecore.record(moe) as recording:
        moe(torch.randn(T, D))
    moecore.balance_loss(recording).backward()
    assert moe.router.score.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in moe.experts.parameters())


def test_nothing_to_balance_costs_nothing():
    assert moecore.balance_loss([]).item() == 0
    model = two_layers()[2:]
    with moecore.record(model) as recording:
        model(torch.randn(T, D))
    loss = moecore.balance_loss(recording)
    assert loss.item() == 0
    assert not loss.requires_grad


@pytest.mark.parametrize("name", moecore.LOSSES)
def test_a_call_without_tokens_adds_nothing(name):
    moe = moecore.MoE.build(D, num_experts=4, top_k=2)
    with moecore.record(moe) as recording:
        moe(torch.randn(0, D))
    assert moecore.balance_loss(recording, {name: 1.0}).item() == 0


def test_unknown_loss_is_refused():
    with pytest.raises(moecore.ConfigError, match=r"^aux_loss='swich': choose one of entropy, "):
        moecore.balance_loss([uniform()], {"swich": 1.0})
    with pytest.raises(moecore.ConfigError, match=r"^aux_loss='swich': choose one of entropy, "):
        moecore.MoEConfig(aux_loss={"swich": 1.0})
    with pytest.raises(moecore.ConfigError, match=r"^aux_loss\.switch=-0.1: must not be negative"):
        moecore.MoEConfig(aux_loss={"switch": -0.1})
    assert moecore.MoEConfig(aux_loss={"entropy": -0.1}).aux_loss == {"entropy": -0.1}  # to keep decisions open


def test_task_information_is_minus_the_mutual_information_of_task_and_expert():
    """By hand: probabilities of two tasks over three experts, in two layers."""
    tables = {"a": [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]], "b": [[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]}
    routings = [
        routing_of(torch.tensor(probs).log().expand(4, 3), name=layer)
        for layer, rows in tables.items()
        for probs in rows
    ]

    def h(probs):
        return -(torch.tensor(probs) * torch.tensor(probs).log()).sum()

    expected = [h([0.7, 0.2, 0.1]) - h([0.4, 0.2, 0.4]), 0.0]
    assert float(moecore.task_information_loss(routings)) == pytest.approx(float(sum(expected) / 2), abs=1e-6)
    assert float(moecore.task_information_loss([])) == 0.0
