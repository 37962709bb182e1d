"""Who is chosen: every selection against a loop that says what it means."""

from __future__ import annotations

import math

import pytest
import torch

import moecore
from moecore.routing import Assignment
from moecore.selection import Capacity, ExpertChoice, GroupedTopK, NullTopK, Threshold, TopK, TopP

T, E = 12, 6
NOTHING = moecore.Context()


def make(name: str, experts: int = E, k: int = 2, **options):
    return moecore.SELECTIONS[name](experts, k, **options)


def masked(scores: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, moecore.Context]:
    """What a router hands to its selection under a mask."""
    return scores.masked_fill(~allowed, float("-inf")), moecore.Context(allowed=allowed)


def sets(assignment: Assignment) -> list[list[int]]:
    """Experts in the filled slots of each token, in order of slots."""
    result: list[list[int]] = [[] for _ in range(assignment.num_tokens)]
    token, expert, _ = assignment.pairs(torch.ones(assignment.expert.shape))
    for t, e in zip(token.tolist(), expert.tolist(), strict=True):
        result[t].append(e)
    return result


def ranked(row: torch.Tensor) -> list[int]:
    return sorted(range(len(row)), key=lambda e: -row[e].item())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, E])
@pytest.mark.parametrize("name", moecore.SELECTIONS)
def test_no_expert_twice_and_indices_in_range(name, k, training):
    options = {"num_groups": 1} if name == "grouped_top_k" else {}
    select = make(name, k=k, **options).train(training)
    assignment = select(torch.randn(T, E + select.num_null), NOTHING)
    assert assignment.num_tokens == T
    assert assignment.num_experts == E
    assert assignment.expert.min() >= 0
    assert assignment.expert.max() < E
    for chosen in sets(assignment):
        assert len(chosen) == len(set(chosen))
    if assignment.token is None:
        assert assignment.expert.shape == (T, select.max_slots)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("name", moecore.SELECTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_mask_is_obeyed_even_with_fewer_experts_than_slots(name, k, training, seed):
    options = {"num_groups": 2 if k % 2 == 0 else 1} if name == "grouped_top_k" else {}
    select = make(name, k=k, **options).train(training)
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(T, E + select.num_null, generator=generator) > 0.7
    allowed[0], allowed[1], allowed[2] = False, False, False
    allowed[1, 0] = True  # the first expert alone
    allowed[2, E // 2] = True  # the first of the second group alone
    assignment = select(*masked(torch.randn(T, E + select.num_null, generator=generator), allowed))
    for t, chosen in enumerate(sets(assignment)):
        assert len(chosen) == len(set(chosen))
        assert all(allowed[t, e] for e in chosen)


@pytest.mark.parametrize("name", ["top_k", "top_p"])
@pytest.mark.parametrize("k", [1, 2, 3, E])
def test_mask_leaves_as_many_as_are_allowed(name, k):
    options = {"top_p": 1.0} if name == "top_p" else {}
    allowed = torch.arange(E)[None] < torch.arange(T)[:, None] % (E + 1)  # token t may use t % 7 experts
    assignment = make(name, k=k, **options)(*masked(torch.randn(T, E), allowed))
    assert [len(chosen) for chosen in sets(assignment)] == [min(k, t % (E + 1)) for t in range(T)]


@pytest.mark.parametrize("k", [1, 2, 3, E - 1])
def test_top_k_takes_the_best_in_order(k):
    scores = torch.randn(T, E)
    assignment = TopK(E, k)(scores, NOTHING)
    assert assignment.valid is None
    assert assignment.expert.tolist() == [ranked(row)[:k] for row in scores]


def test_top_k_of_all_experts_is_complete():
    assignment = TopK(E, E)(torch.randn(T, E), NOTHING)
    assert assignment.complete
    assert assignment.expert.tolist() == [list(range(E))] * T
    under_mask = TopK(E, E)(*masked(torch.randn(T, E), torch.ones(E, dtype=torch.bool)))
    assert not under_mask.complete
    assert under_mask.load().tolist() == [T] * E


@pytest.mark.parametrize("k", [1, 2])
def test_first_of_equals_wins(k):
    assert TopK(E, k)(torch.zeros(T, E), NOTHING).expert.tolist() == [list(range(k))] * T
    tie_behind = torch.tensor([[0.0, 3.0, 3.0, 1.0, 3.0, 0.0]])
    assert TopK(E, k)(tie_behind, NOTHING).expert.tolist() == [[1, 2][:k]]


@pytest.mark.parametrize("name", moecore.SELECTIONS)
@pytest.mark.parametrize("k", [2, 4])
def test_ties_still_give_distinct_experts(name, k):
    select = make(name, k=k)
    for chosen in sets(select(torch.ones(T, E + select.num_null), NOTHING)):
        assert len(chosen) == len(set(chosen))


@pytest.mark.parametrize(("groups", "k"), [(1, 2), (2, 2), (2, 4), (3, 3), (3, 6)])
def test_grouped_takes_the_same_number_from_every_group(groups, k):
    scores = torch.randn(T, E)
    size = E // groups
    expected = []
    for row in scores:
        best = [[g * size + e for e in ranked(row[g * size : (g + 1) * size])[: k // groups]] for g in range(groups)]
        expected.append([e for group in best for e in group])
    assert GroupedTopK(E, k, num_groups=groups)(scores, NOTHING).expert.tolist() == expected


@pytest.mark.parametrize(("min_k", "k"), [(1, 1), (1, 2), (2, 2), (2, 4), (1, E), (3, E)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_top_p_takes_the_smallest_set_that_reaches_p(p, min_k, k):
    scores = (torch.randn(40, E) * 2).double()
    for row, chosen in zip(scores, sets(TopP(E, k, top_p=p, min_k=min_k)(scores, NOTHING)), strict=True):
        probs, mass, expected = row.softmax(-1), 0.0, []
        for e in ranked(row):
            if len(expected) == k or (len(expected) >= min_k and mass >= p):
                break
            expected.append(e)
            mass += probs[e].item()
        assert chosen == expected


def test_top_p_uses_fewer_experts_for_surer_tokens():
    scores = torch.stack([torch.tensor([9.0, 0, 0, 0, 0, 0]), torch.zeros(E)])
    assert [len(chosen) for chosen in sets(TopP(E, 4, top_p=0.6)(scores, NOTHING))] == [1, 4]


def test_null_experts_take_slots_and_do_nothing():
    scores = torch.tensor([[5.0, 4, 0, 0, 1, 1], [5.0, 0, 0, 0, 6, 1], [0.0, 0, 0, 0, 6, 5]])
    assignment = NullTopK(4, 2, num_null=2)(scores, NOTHING)
    assert sets(assignment) == [[0, 1], [0], []]
    assert assignment.load().tolist() == [2, 1, 0, 0]


def test_as_many_null_experts_as_experts_by_default():
    assert NullTopK(E, 2).num_null == E
    assert TopK(E, 2).num_null == 0


@pytest.mark.parametrize(("tokens", "k"), [(12, 2), (24, 1), (6, 3), (30, 4)])
def test_expert_choice_loads_experts_evenly_in_training(tokens, k):
    scores = torch.randn(tokens, E)
    scores[:, 0] += 10  # however popular one of them is
    assignment = ExpertChoice(E, k).train()(scores, NOTHING)
    assert assignment.load().tolist() == [tokens * k // E] * E
    for e in range(E):
        mine = assignment.token[assignment.expert == e].tolist()
        best = sorted(range(tokens), key=lambda t: -scores[t, e].item())[: tokens * k // E]
        assert sorted(mine) == sorted(best)


def test_expert_choice_rounds_its_share_up_and_takes_a_token_once():
    assignment = ExpertChoice(E, 2).train()(torch.randn(4, E), NOTHING)
    assert assignment.load().tolist() == [math.ceil(4 * 2 / E)] * E
    assert ExpertChoice(2, 2).train()(torch.randn(3, 2), NOTHING).load().tolist() == [3, 3]


def test_expert_choice_in_eval_looks_at_one_token_only():
    scores = torch.randn(T, E)
    select = ExpertChoice(E, 2).eval()
    together = sets(select(scores, NOTHING))
    assert together == [sets(select(row[None], NOTHING))[0] for row in scores]
    assert together == [ranked(row)[:2] for row in scores]


def test_expert_choice_as_published_depends_on_the_batch_in_eval():
    scores = torch.randn(T, E)
    select = ExpertChoice(E, 2, eval_sees_batch=True).eval()
    assert select(scores, NOTHING).load().tolist() == [T * 2 // E] * E
    assert sets(select(scores, NOTHING))[:1] != sets(select(scores[:1], NOTHING))


def test_a_samples_result_does_not_depend_on_its_neighbours_in_eval():
    moe = moecore.MoE.build(8, num_experts=4, top_k=2, select="expert_choice").eval()
    torch.nn.init.normal_(moe.router.score.weight)
    x = torch.randn(5, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(moe(x)[2:3], moe(x[2:3]))
        moe.train()
        assert not torch.allclose(moe(x)[2:3], moe(x[2:3]))


@pytest.mark.parametrize("name", moecore.SELECTIONS)
def test_only_selections_that_say_so_see_the_batch(name):
    select = make(name)
    scores = torch.randn(64, E + select.num_null)
    alone = [sets(select(row[None], NOTHING))[0] for row in scores]
    assert (alone != sets(select(scores, NOTHING))) == select.sees_batch


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1.0])
@pytest.mark.parametrize("min_k", [0, 1, 3])
def test_threshold_takes_every_passing_score(threshold, min_k):
    scores = torch.randn(T, E)
    scores[0] = -3.0 - torch.rand(E)
    chosen = sets(Threshold(E, 2, threshold=threshold, min_k=min_k)(scores, NOTHING))
    for row, mine in zip(scores, chosen, strict=True):
        passing = {e for e in range(E) if row[e] > threshold}
        assert set(mine) == passing | set(ranked(row)[:min_k])


def test_threshold_takes_no_masked_expert_to_reach_its_least():
    allowed = torch.tensor([False, False, True, False, False, False])
    assert sets(Threshold(E, 2, min_k=2)(*masked(torch.randn(3, E), allowed))) == [[2]] * 3


def test_threshold_score_must_exceed_it():
    assert sets(Threshold(E, 2)(torch.zeros(1, E), NOTHING)) == [[]]


def loaded(tokens: int = 20, k: int = 2) -> tuple[Assignment, torch.Tensor]:
    scores = torch.randn(tokens, E)
    scores[:, 0] += 2
    return TopK(E, k)(scores, NOTHING), scores


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25])
def test_capacity_drops_the_least_probable_first(factor):
    assignment, scores = loaded()
    result = Capacity(factor)(assignment, scores)
    capacity = math.ceil(factor * 20 * 2 / E)
    probs = scores.softmax(-1)
    assert torch.equal(result.load(), assignment.load().clamp(max=capacity))
    for e in range(E):
        here = assignment.expert == e
        order = sorted((probs[t, e].item() for t in here.nonzero()[:, 0]), reverse=True)
        kept = sorted((probs[t, e].item() for t in (here & result.valid).nonzero()[:, 0]), reverse=True)
        assert kept == order[:capacity]
    assert torch.equal(result.dropped, ~result.valid)


def test_capacity_that_suffices_drops_nothing():
    assignment, scores = loaded()
    result = Capacity(float(E))(assignment, scores)
    assert result.valid.all()
    assert not result.dropped.any()


def test_empty_slots_are_neither_kept_nor_dropped():
    assignment = Assignment(
        torch.tensor([[0], [0], [0], [1]]), 4, 2, valid=torch.tensor([[True], [False], [True], [True]])
    )
    scores = torch.tensor([[0.1, 0], [9.0, 0], [0.2, 0], [0.0, 0]])
    result = Capacity(0.5)(assignment, scores)  # one pair per expert
    assert result.valid.flatten().tolist() == [False, False, True, True]
    assert result.dropped.flatten().tolist() == [True, False, False, False]


def test_capacity_takes_flat_pairs_and_complete_grids():
    scores = torch.randn(T, E)
    flat = Capacity(0.5)(ExpertChoice(E, 2).train()(scores, NOTHING), scores)
    assert flat.load().tolist() == [T * 2 // E // 2] * E
    complete = Capacity(0.5)(TopK(E, E)(scores, NOTHING), scores)
    assert complete.load().tolist() == [T // 2] * E
    assert not complete.complete


def test_drop_rate_is_reported_in_training_and_nothing_dropped_in_eval():
    moe = moecore.MoE.build(8, num_experts=4, top_k=1, capacity_factor=0.5)
    torch.nn.init.normal_(moe.router.score.weight)
    x = torch.randn(64, 8)
    rates = []
    for training in (True, False):
        with moecore.record(moe.train(training)) as recording:
            moe(x)
        rates.append(moecore.routing_metrics(recording)[""].drop_rate)
    load = recording[0].assignment.load()  # eval: before any capacity
    assert rates == [(load - 8).clamp(min=0).sum().item() / 64, 0.0]
    assert rates[0] >= 0.5


@pytest.mark.parametrize(
    ("name", "k", "options", "message"),
    [
        ("grouped_top_k", 2, {"num_groups": 4}, "num_groups=4: must divide num_experts=6"),
        ("grouped_top_k", 3, {"num_groups": 2}, "num_groups=2: must divide top_k=3"),
        ("grouped_top_k", 2, {"num_groups": 0}, "num_groups=0: must be at least 1"),
        ("top_p", 2, {"top_p": 0.0}, r"top_p=0.0: must lie in \(0, 1\]"),
        ("top_p", 2, {"min_k": 3}, "min_k=3: must lie between 1 and top_k=2"),
        ("null_top_k", 2, {"num_null": 0}, "num_null=0: must be at least 1"),
        ("threshold", 2, {"min_k": 7}, "min_k=7: must lie between 0 and num_experts=6"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, k, options, message):
    with pytest.raises(moecore.ConfigError, match=f"^{message}"):
        make(name, k=k, **options)


def test_capacity_must_be_positive():
    with pytest.raises(moecore.ConfigError, match=r"^capacity_factor=0.0: must be positive"):
        Capacity(0.0)
