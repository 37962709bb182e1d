"""The record of who works on what, and the router that makes it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moecore
from moecore.routing import Assignment, Scores
from moecore.weighting import WEIGHTINGS

T, D, E, K = 7, 6, 5, 2


def grid() -> Assignment:
    """3 tokens, 4 experts, 2 slots; the second slot of token 1 is empty."""
    return Assignment(
        torch.tensor([[2, 0], [1, 3], [2, 1]]), 3, 4, valid=torch.tensor([[True, True], [True, False], [True, True]])
    )


def flat() -> Assignment:
    """The pairs (0, 2) (0, 0) (1, 1) (2, 2) (2, 1) in another order, with an empty slot (1, 3)."""
    return Assignment(
        torch.tensor([2, 1, 0, 3, 1, 2]),
        3,
        4,
        token=torch.tensor([2, 2, 0, 1, 1, 0]),
        valid=torch.tensor([True, True, True, False, True, True]),
    )


def linear_router(k: int = K, controller: nn.Module | None = None, **options) -> moecore.Router:
    config = moecore.MoEConfig(num_experts=E, top_k=k, **options)
    router = moecore.build_router(config, D)
    router.balance = controller
    nn.init.normal_(router.score.weight)
    return router


@pytest.mark.parametrize("make", [grid, flat])
def test_both_forms_describe_the_same_assignment(make):
    assignment = make()
    weights = torch.full(assignment.expert.shape, 0.5)
    assert assignment.load().tolist() == [1, 2, 2, 0]
    chosen = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]).bool()
    assert torch.equal(assignment.chosen(), chosen)
    assert torch.equal(assignment.dense(weights), chosen * 0.5)
    token, expert, weight = assignment.pairs(weights)
    assert sorted(zip(token.tolist(), expert.tolist(), strict=True)) == [(0, 0), (0, 2), (1, 1), (2, 1), (2, 2)]
    assert weight.tolist() == [0.5] * 5


@pytest.mark.parametrize("make", [grid, flat])
def test_gather_spread_and_total_address_each_pairs_token(make):
    assignment = make()
    table = torch.arange(12.0).view(3, 4)
    for token, expert, value in zip(
        assignment.tokens().flatten(), assignment.expert.flatten(), assignment.gather(table).flatten(), strict=True
    ):
        assert value == table[token, expert]
    per_token = torch.tensor([10.0, 20.0, 30.0])
    spread = assignment.spread(per_token).expand(assignment.expert.shape)
    assert torch.equal(spread, per_token[assignment.tokens()])
    assert assignment.total(torch.ones(assignment.expert.shape)).tolist() == [2.0, 2.0, 2.0]


def test_without_a_mask_every_slot_counts():
    assignment = Assignment(torch.tensor([[0, 1], [1, 1]]), 2, 3)
    assert assignment.load().tolist() == [1, 3, 0]
    assert [len(part) for part in assignment.pairs(torch.rand(2, 2))] == [4, 4, 4]


def test_same_expert_in_two_slots_adds_up():
    assignment = Assignment(torch.tensor([[1, 1]]), 1, 2)
    assert assignment.dense(torch.tensor([[0.25, 0.5]])).tolist() == [[0.0, 0.75]]


def test_complete_grid_is_its_own_matrix():
    every = torch.arange(E).expand(T, E)
    weights = torch.rand(T, E)
    complete = Assignment(every, T, E, complete=True)
    assert torch.equal(complete.dense(weights), Assignment(every, T, E).dense(weights))
    assert complete.chosen().all()
    assert complete.load().tolist() == [T] * E


def test_dense_weights_carry_gradients_of_filled_slots_only():
    assignment = grid()
    weights = torch.rand(3, 2, requires_grad=True)
    assignment.dense(weights).sum().backward()
    assert torch.equal(weights.grad, assignment.valid.float())


def test_fractions_are_shares_of_slots():
    router = linear_router()
    routing = router(torch.randn(T, D))
    counts = torch.tensor([(routing.assignment.expert == e).sum() for e in range(E)])
    torch.testing.assert_close(routing.fractions(), counts / (T * K))


def test_null_experts_share_what_stayed_empty():
    router = linear_router(select="null_top_k", select_options={"num_null": 2})
    routing = router(torch.randn(64, D))
    fractions = routing.fractions()
    filled = routing.assignment.load()
    assert fractions.shape == (E + 2,)
    assert fractions.sum() == pytest.approx(1)
    torch.testing.assert_close(fractions[:E], filled / (64 * K))
    assert fractions[E:].tolist() == pytest.approx([(1 - filled.sum().item() / (64 * K)) / 2] * 2)


def test_probabilities_follow_the_weighting():
    x = torch.randn(T, D)
    router = linear_router(weight="sigmoid")
    routing = router(x)
    gates = (x @ router.score.weight.t()).sigmoid()
    torch.testing.assert_close(routing.probs, gates / gates.sum(-1, keepdim=True))
    assert routing.weights.shape == routing.assignment.expert.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_float32_under_autocast(dtype):
    router = linear_router()
    x = torch.randn(T, D).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.scores, x.float() @ router.score.weight.t())


def test_float64_is_kept():
    router = linear_router()
    x = torch.randn(T, D, dtype=torch.float64)
    routing = router(x)
    assert routing.scores.dtype == routing.weights.dtype == torch.float64
    torch.testing.assert_close(routing.scores, x @ router.score.weight.double().t(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("weight", WEIGHTINGS)
@pytest.mark.parametrize("score", moecore.SCORES)
def test_router_of_a_model_cast_to_bfloat16_still_routes_in_float32(score, weight):
    config = moecore.MoEConfig(num_experts=E, top_k=K, score=score, weight=weight)
    router = moecore.build_router(config, D).to(torch.bfloat16)
    routing = router(torch.randn(T, D, dtype=torch.bfloat16), moecore.Context(task=1))
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    assert routing.scores.isfinite().all()


def test_selection_passes_no_gradient():
    """Only what the weights read is differentiated: selection and its bias see none, nor do unchosen logits."""
    controller = moecore.LossFreeBias(E)
    controller.bias.requires_grad_()
    adjust, seen = controller.adjust, []
    controller.adjust = lambda scores, activation: (seen.append(scores.requires_grad), adjust(scores, activation))[1]
    router = linear_router(controller=controller, weight="softmax_chosen")
    score = nn.Parameter(torch.randn(T, E))
    router.score = FixedScore(score)
    routing = router(torch.randn(T, D))
    routing.weights.square().sum().backward()
    assert seen == [False]
    assert controller.bias.grad is None
    assert torch.equal(score.grad != 0, routing.assignment.chosen())


class FixedScore(nn.Module):
    """Scores from a table, whatever the tokens."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x, context):
        return self.scores


def test_balance_bias_moves_selection_and_leaves_scores_and_weights():
    scores = torch.tensor([[3.0, 2.0, 0.0, 0.0, 1.0]])
    controller = moecore.LossFreeBias(E, space="logits")
    router = linear_router(k=1, controller=controller)
    router.score = FixedScore(scores)
    assert router(torch.zeros(1, D)).assignment.expert.item() == 0
    controller.bias[4] = 10.0
    routing = router(torch.zeros(1, D))
    assert routing.assignment.expert.item() == 4
    assert torch.equal(routing.scores, scores)
    assert routing.weights.item() == pytest.approx(scores.softmax(-1)[0, 4].item())


def test_clean_scores_and_noise_reach_the_record():
    clean, std = torch.randn(T, E), torch.full((T, E), 0.1)
    router = linear_router()
    router.score = FixedScore(Scores(clean + std, clean=clean, noise_std=std))
    routing = router(torch.randn(T, D))
    assert routing.clean is clean
    assert routing.noise_std is std
    assert torch.equal(routing.scores, clean + std)


def test_mask_of_all_tokens_and_mask_per_token():
    router = linear_router()
    x = torch.randn(T, D)
    allowed = torch.tensor([True, False, True, False, True])
    routing = router(x, moecore.Context(allowed=allowed))
    assert allowed[routing.assignment.expert].all()
    assert routing.assignment.load().sum() == T * K
    assert torch.equal(routing.scores, router(x).scores)  # the record keeps what the router thought

    per_token = torch.rand(T, E) > 0.4
    per_token[0] = False
    routing = router(x, moecore.Context(allowed=per_token))
    assert not (routing.assignment.chosen() & ~per_token).any()
    assert torch.equal(routing.assignment.chosen().sum(-1), per_token.sum(-1).clamp(max=K))
    assert routing.weights[0].tolist() == [0.0, 0.0]
    assert routing.weights.isfinite().all()


def test_mask_of_experts_leaves_null_experts_open():
    router = linear_router(select="null_top_k")
    allowed = torch.zeros(E, dtype=torch.bool)
    routing = router(torch.randn(T, D), moecore.Context(allowed=allowed))
    assert routing.assignment.load().sum() == 0
    allowed[3] = True
    routing = router(torch.randn(64, D), moecore.Context(allowed=allowed))
    assert 0 < routing.assignment.load()[3] < 64
    assert routing.assignment.load().sum() == routing.assignment.load()[3]


@pytest.mark.parametrize("weight", ["softmax", "decoupled"])
@pytest.mark.parametrize("select", moecore.SELECTIONS)
def test_published_selections_weigh_raw_probabilities_unless_told(select, weight):
    def renormalize(**options) -> bool:
        config = moecore.MoEConfig(num_experts=4, select=select, weight=weight, weight_options=options)
        return moecore.build_router(config, D).weight.renormalize

    assert renormalize() == (select not in ("top_p", "expert_choice"))
    assert renormalize(renormalize=True)
    assert not renormalize(renormalize=False)


def test_top_p_teaches_the_router_from_tokens_with_one_expert():
    router = linear_router(select="top_p", select_options={"top_p": 0.01})
    score = nn.Parameter(torch.randn(T, E))
    router.score = FixedScore(score)
    routing = router(torch.randn(T, D))
    assert routing.assignment.load().sum() == T
    routing.weights.sum().backward()
    assert (score.grad.abs().sum(-1) > 0).all()


def test_expert_choice_weighs_a_pair_the_same_in_training_and_eval():
    router, x = linear_router(select="expert_choice"), torch.randn(T, D)
    training, evaluation = router.train()(x), router.eval()(x)
    tables = [r.assignment.dense(r.weights) for r in (training, evaluation)]
    both = training.assignment.chosen() & evaluation.assignment.chosen()
    assert both.any()
    torch.testing.assert_close(tables[0][both], tables[1][both], rtol=0, atol=0)


def test_capacity_works_in_training_only():
    router = linear_router(capacity_factor=0.5)
    x = torch.randn(40, D)
    assert router(x).assignment.dropped.sum() >= 40
    routing = router.eval()(x)
    assert routing.assignment.dropped is None
    assert routing.assignment.load().sum() == 40 * K


def test_same_router_same_decisions():
    router = linear_router()
    x = torch.randn(T, D)
    first, second = router(x), copy.deepcopy(router)(x)
    assert torch.equal(first.assignment.expert, second.assignment.expert)
    assert torch.equal(first.weights, second.weights)
