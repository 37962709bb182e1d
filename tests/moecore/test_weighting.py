"""Each weighting against a formula written out by hand."""

from __future__ import annotations

import pytest
import torch

import moecore
from moecore.routing import Assignment
from moecore.weighting import Weighting

T, D, E, K = 6, 8, 5, 3


def make(name: str, k: int = K, **options):
    return moecore.WEIGHTINGS[name](D, E, k, **options)


def top(scores: torch.Tensor, k: int = K, valid: torch.Tensor | None = None) -> Assignment:
    return Assignment(scores.topk(k, -1).indices, T, E, valid=valid)


def by_hand(name: str, row: torch.Tensor, chosen: list[int]) -> list[float]:
    """Weights of the chosen experts of one token with scores `row`."""
    s = [float(v) for v in row]
    exps = [torch.tensor(v).exp().item() for v in s]
    sig = [1 / (1 + 1 / e) for e in exps]
    if name in ("softmax", "softmax_chosen", "decoupled"):  # renormalised softmax is softmax over the chosen
        return [exps[e] / sum(exps[c] for c in chosen) for e in chosen]
    if name == "sigmoid":
        return [sig[e] / sum(sig[c] for c in chosen) for e in chosen]
    if name == "relu":
        return [max(s[e], 0.0) for e in chosen]
    return [1.0 for _ in chosen]


@pytest.mark.parametrize("name", moecore.WEIGHTINGS)
def test_grid_follows_its_formula(name):
    scores = torch.randn(T, E)
    assignment = top(scores)
    weights = make(name)(scores, assignment, torch.randn(T, D))
    expected = [by_hand(name, row, chosen) for row, chosen in zip(scores, assignment.expert.tolist(), strict=True)]
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("name", moecore.WEIGHTINGS)
def test_empty_slots_get_nothing_and_leave_the_others_whole(name):
    scores = torch.randn(T, E)
    valid = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()
    assignment = top(scores, valid=valid)
    weights = make(name)(scores, assignment, torch.randn(T, D))
    for t in range(T):
        chosen = assignment.expert[t][valid[t]].tolist()
        assert weights[t][valid[t]].tolist() == pytest.approx(by_hand(name, scores[t], chosen), rel=1e-5)
    assert (weights[~valid] == 0).all()


@pytest.mark.parametrize("name", moecore.WEIGHTINGS)
def test_flat_pairs_follow_the_same_formula(name):
    scores = torch.randn(T, E)
    token, expert = torch.tensor([4, 0, 0, 2, 4, 5, 4]), torch.tensor([1, 0, 3, 2, 0, 4, 2])
    valid = torch.tensor([True, True, True, True, True, False, True])
    assignment = Assignment(expert, T, E, token=token, valid=valid)
    weights = make(name)(scores, assignment, torch.randn(T, D))
    for t in range(T):
        mine = (token == t) & valid
        expected = by_hand(name, scores[t], expert[mine].tolist()) if mine.any() else []
        assert weights[mine].tolist() == pytest.approx(expected, rel=1e-5)
    assert weights[5] == 0


def test_a_weighting_without_weights_is_none():
    with pytest.raises(TypeError, match="abstract"):
        Weighting(D, E, K)


@pytest.mark.parametrize("name", ["softmax", "softmax_chosen", "sigmoid", "decoupled"])
def test_shares_sum_to_one(name):
    scores = torch.randn(T, E) * 5
    weights = make(name)(scores, top(scores), torch.randn(T, D))
    torch.testing.assert_close(weights.sum(-1), torch.ones(T))


@pytest.mark.parametrize("name", ["softmax", "decoupled"])
def test_raw_softmax_is_kept_when_asked(name):
    scores = torch.randn(T, E)
    assignment = top(scores)
    weights = make(name, renormalize=False)(scores, assignment, torch.randn(T, D))
    torch.testing.assert_close(weights, scores.softmax(-1).gather(1, assignment.expert))
    assert (weights.sum(-1) < 1).all()


@pytest.mark.parametrize("name", ["softmax", "softmax_chosen", "sigmoid", "decoupled"])
def test_one_slot_keeps_the_raw_gate_and_teaches_the_router(name):
    """Normalised it would be the constant 1, without a gradient."""
    scores = torch.randn(T, E, requires_grad=True)
    assignment = top(scores.detach(), k=1)
    weights = make(name, k=1)(scores, assignment, torch.randn(T, D))
    gate = scores.sigmoid() if name == "sigmoid" else scores.softmax(-1)
    torch.testing.assert_close(weights, gate.gather(1, assignment.expert))
    assert (weights < 1).all()
    weights.sum().backward()
    assert (scores.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", [n for n in moecore.WEIGHTINGS if n != "constant"])
def test_gradient_reaches_the_chosen_scores(name):
    scores = torch.randn(T, E).abs().requires_grad_()
    assignment = top(scores.detach())
    (make(name)(scores, assignment, torch.randn(T, D)) * torch.randn(T, K)).sum().backward()
    assert (scores.grad[assignment.chosen()] != 0).all()


@pytest.mark.parametrize("name", moecore.WEIGHTINGS)
def test_scale_multiplies_everything(name):
    scores, x = torch.randn(T, E), torch.randn(T, D)
    assignment = top(scores)
    torch.testing.assert_close(make(name, scale=2.5)(scores, assignment, x), 2.5 * make(name)(scores, assignment, x))


def test_decoupled_adds_its_own_head_to_softmax():
    scores, x = torch.randn(T, E), torch.randn(T, D)
    assignment = top(scores)
    weighting = make("decoupled")
    softmax = make("softmax")(scores, assignment, x)
    assert torch.equal(weighting(scores, assignment, x), softmax)
    torch.nn.init.normal_(weighting.adapter.weight)
    own = (x @ weighting.adapter.weight.t()).gather(1, assignment.expert)
    torch.testing.assert_close(weighting(scores, assignment, x), softmax + own)


def test_decoupled_head_learns_from_the_start():
    scores, x = torch.randn(T, E), torch.randn(T, D)
    weighting = make("decoupled")
    weighting(scores, top(scores), x).sum().backward()
    assert weighting.adapter.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", moecore.WEIGHTINGS)
def test_activation_gives_probabilities(name):
    scores = torch.randn(T, E)
    probs = moecore.WEIGHTINGS[name].activation(scores)
    gate = {"sigmoid": scores.sigmoid(), "relu": scores.relu()}.get(name, scores.exp())
    torch.testing.assert_close(probs, gate / gate.sum(-1, keepdim=True))
    assert moecore.WEIGHTINGS["relu"].activation(torch.full((1, E), -1.0)).tolist() == [[0.0] * E]


@pytest.mark.parametrize("name", moecore.WEIGHTINGS)
def test_extreme_scores_stay_finite(name):
    scores = torch.tensor([[1e4, -1e4, 0.0, 1e4, -1e4]]).expand(T, E).clone().requires_grad_()
    every = Assignment(torch.arange(E).expand(T, E), T, E, complete=True)
    weights = make(name, k=E)(scores, every, torch.randn(T, D))
    assert weights.isfinite().all()
    if name != "constant":
        weights.sum().backward()
        assert scores.grad.isfinite().all()
