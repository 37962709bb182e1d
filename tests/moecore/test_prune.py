"""Layers that hold only some of their experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import moecore
from moecore.errors import ConfigError
from moecore.transforms.prune import prune, score_of_task

D, E, K = 12, 6, 2
CONFIGS = {
    "raw": {"weight_options": {"renormalize": False}},
    "renormalised": {},
    "chosen": {"weight": "softmax_chosen"},
    "sigmoid": {"weight": "sigmoid"},
    "grouped": {"select": "grouped_top_k", "select_options": {"num_groups": 2}},
    "shared": {"shared_hidden": 8},
    "glu": {"glu": True},
    "loss_free": {"controller": "loss_free"},
}


def layer(**options) -> moecore.MoE:
    torch.manual_seed(0)
    made = moecore.MoE.build(D, num_experts=E, top_k=K, hidden=16, **options)
    for gate in (p for name, p in made.router.named_parameters() if "score" in name):
        nn.init.normal_(gate)
    return made.eval()


def used(moe: moecore.MoE, x: Tensor, **context) -> tuple[Tensor, moecore.Routing]:
    with moecore.record(moe) as recording, moecore.routing_context(**context):
        y = moe(x)
    return y, recording[0]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_tokens_whose_experts_are_kept_get_the_same(name):
    whole, x = layer(**CONFIGS[name]), torch.randn(64, D)
    y, routing = used(whole, x)
    keep = [0, 1, 3, 4] if name == "grouped" else [1, 2, 4]
    small = prune(whole, keep)
    inside = ~routing.assignment.chosen()[:, [e for e in range(E) if e not in keep]].any(1)
    assert 0 < inside.sum() < 64
    ours, pruned = used(small, x)
    torch.testing.assert_close(ours[inside], y[inside], atol=1e-6, rtol=0)
    assert torch.equal(small.router.select.leaves(pruned.scores), ~inside)
    assert not torch.allclose(ours[~inside], y[~inside], atol=1e-3)


@torch.no_grad()
def test_tokens_that_leave_take_the_best_of_those_kept():
    whole, x, keep = layer(), torch.randn(64, D), [0, 3, 5]
    _, routing = used(whole, x)
    _, pruned = used(prune(whole, keep), x)
    best = routing.scores[:, keep].topk(K).indices
    assert torch.equal(pruned.assignment.expert.sort(1).values, best.sort(1).values)
    assert pruned.assignment.num_experts == 3


@torch.no_grad()
def test_all_experts_kept_is_the_whole_layer_and_the_layer_stays_as_it_was():
    whole, x = layer(), torch.randn(16, D)
    before = copy.deepcopy(whole.state_dict())
    y = whole(x)
    assert torch.equal(prune(whole, range(E))(x), y)
    prune(whole, [0, 1])
    assert all(torch.equal(before[name], value) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("executor", ["sorted", "dense", "grouped_mm"])
@torch.no_grad()
def test_every_executor_runs_a_pruned_layer(executor):
    small, x = prune(layer(), [1, 2, 5]), torch.randn(32, D)
    expected = small(x)
    small.executor = executor
    torch.testing.assert_close(small(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("score", ["per_task", "task_conditioned"])
@torch.no_grad()
def test_the_gate_of_one_task_needs_no_context(score):
    whole, x = layer(score=score, score_options={"num_tasks": 3, "noise_std": 1.0}), torch.randn(32, D)
    for task in range(3):
        y, _ = used(whole, x, task=task)
        small = prune(whole, range(E), task=task)
        torch.testing.assert_close(small(x), y, atol=1e-6, rtol=0)
        names = [name for name, _ in small.router.score.named_parameters()]
        assert names == (["weight"] if score == "per_task" else ["weight", "bias"])


def test_a_score_that_knows_no_task_is_copied():
    score = layer().router.score
    copied = score_of_task(score, 0)
    assert copied is not score
    assert torch.equal(copied.weight, score.weight)


def test_a_pruned_layer_learns_and_travels():
    small = prune(layer(), [0, 2, 4])
    again = copy.deepcopy(small)
    x = torch.randn(16, D)
    assert torch.equal(again(x), small(x))
    small(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())
    with torch.no_grad():  # a copy shares nothing with what it was copied from
        again.router.select.number.fill_(-1)
    assert (small.router.select.number >= 0).sum() == 3


@pytest.mark.parametrize(
    ("keep", "options", "line"),
    [
        ([1], {}, r"keep=\[1\]: a token uses 2 experts; keep as many"),
        ([0, 6], {}, r"keep=\[0, 6\]: must be numbers between 0 and 5"),
        ([], {}, r"keep=\[\]: must be numbers between 0 and 5"),
        ([0, 1], {"select": "expert_choice"}, "select='ExpertChoice': only layers whose tokens choose by rank"),
        ([0, 1], {"select": "top_p"}, "select='TopP': only layers whose tokens choose by rank"),
        ([0, 1], {"select": "null_top_k"}, "select='NullTopK': only layers whose tokens choose by rank"),
    ],
)
def test_errors_say_what_cannot_be_pruned(keep, options, line):
    with pytest.raises(ConfigError, match=f"^{line}"):
        prune(layer(**options), keep)
