"""Recording, and what is measured on a recording, against hand counts."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import nn

import moecore
from moecore.routing import Assignment, Routing

D, E, K = 8, 4, 2


def layer(**options) -> moecore.MoE:
    moe = moecore.MoE.build(D, **{"num_experts": E, "top_k": K, "hidden": 4, **options})
    nn.init.normal_(moe.router.score.weight)
    return moe


def routing_of(assignment: Assignment, scores: torch.Tensor | None = None, weights=None, lead=(), name="") -> Routing:
    scores = torch.zeros(assignment.num_tokens, assignment.num_experts) if scores is None else scores
    weights = torch.ones(assignment.expert.shape) if weights is None else weights
    return Routing(scores, assignment, weights, lambda s: s.softmax(-1), lead=lead, name=name)


def test_record_collects_every_call_in_order_under_its_layers_name():
    model = nn.ModuleDict({"a": layer(), "b": nn.Sequential(nn.Identity(), layer())})
    x, y = torch.randn(2, 3, D), torch.randn(5, D)
    with moecore.record(model) as recording:
        model["a"](x)
        model["b"](y)
        model["a"](y)
    assert [r.name for r in recording] == ["a", "b.1", "a"]
    assert [r.lead for r in recording] == [(2, 3), (5,), (5,)]
    assert [r.assignment.num_tokens for r in recording] == [6, 5, 5]
    assert {name: len(calls) for name, calls in recording.by_layer().items()} == {"a": 2, "b.1": 1}


def test_two_calls_in_one_record_count_together():
    moe = layer()
    x = torch.randn(12, D)
    with moecore.record(moe) as twice:
        moe(x[:5])
        moe(x[5:])
    with moecore.record(moe) as once:
        moe(x)
    first, second = moecore.routing_metrics(twice)[""], moecore.routing_metrics(once)[""]
    assert first.load == pytest.approx(second.load)
    assert first.scalars() == pytest.approx(second.scalars())


def test_the_record_is_what_the_layer_used():
    moe, x = layer(), torch.randn(6, D)
    with moecore.record(moe) as recording:
        y = moe(x)
    routing = recording[0]
    torch.testing.assert_close(moecore.run_reference(x, moe.experts, routing.assignment, routing.weights), y)
    assert routing.aux_loss == {"switch": 0.01}


def test_nested_records_both_see_the_layer_by_their_own_names():
    model = nn.Sequential(nn.Sequential(layer()))
    x = torch.randn(3, D)
    with moecore.record(model) as outer:
        model(x)
        with moecore.record(model[0]) as inner:
            model(x)
        model(x)
    model(x)
    assert [r.name for r in outer] == ["0.0"] * 3
    assert [r.name for r in inner] == ["0"]
    assert inner[0].assignment is outer[1].assignment


def test_recording_stops_after_an_error():
    moe = layer()

    def fail():
        with moecore.record(moe):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert moe._recorder is None


def test_a_copy_made_while_recording_is_not_recorded():
    model, x = nn.Sequential(layer()), torch.randn(3, D)
    with moecore.record(model) as recording:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
        for each in copies:
            each(x)
        assert recording == []
        with moecore.record(copies[0]) as own:
            copies[0](x)
        model(x)
    assert [len(own), len(recording)] == [1, 1]
    for each in copies:
        torch.testing.assert_close(each(x), model(x), rtol=0, atol=0)


def test_recording_changes_nothing_and_keeps_the_graph():
    moe, x = layer(), torch.randn(6, D)
    expected = moe(x)
    with moecore.record(moe) as recording:
        y = moe(x)
    assert torch.equal(y, expected)
    recording[0].weights[:, 0].sum().backward()
    assert moe.router.score.weight.grad.abs().sum() > 0


def test_a_layer_used_twice_has_one_name():
    moe = layer()
    model = nn.Sequential(moe, nn.Identity(), moe)
    with moecore.record(model) as recording:
        model(torch.randn(3, D))
    assert [r.name for r in recording] == ["0", "0"]


def test_metrics_against_hand_counts():
    expert = torch.tensor([[0, 1], [0, 2], [0, 1], [2, 0], [0, 1]])
    valid = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [0, 0]]).bool()
    dropped = torch.tensor([[0, 0], [0, 1], [0, 0], [0, 0], [0, 0]]).bool()
    scores = torch.zeros(5, E)
    scores[0, 0] = 1000.0  # one sure token of five
    routing = routing_of(Assignment(expert, 5, E, valid=valid, dropped=dropped), scores, name="x")
    metrics = moecore.routing_metrics(moecore.Recording([routing]))["x"]
    assert metrics.load == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    assert metrics.max_violation == pytest.approx(4 / (7 / 4) - 1)
    entropy = -sum(p * math.log(p) for p in (4 / 7, 2 / 7, 1 / 7)) / math.log(4)
    assert metrics.load_entropy == pytest.approx(entropy)
    assert metrics.router_entropy == pytest.approx(4 / 5)
    assert metrics.dead_experts == 1
    assert metrics.experts_per_token == pytest.approx(7 / 5)
    assert metrics.drop_rate == pytest.approx(1 / 8)
    assert "load" not in metrics.scalars()
    assert metrics.scalars()["dead_experts"] == 1.0


def test_metrics_of_even_and_of_collapsed_routing():
    even = routing_of(Assignment(torch.arange(8)[:, None] % E, 8, E))
    metrics = moecore.routing_metrics(moecore.Recording([even]))[""]
    assert metrics.scalars() == pytest.approx(
        {
            "max_violation": 0.0,
            "load_entropy": 1.0,
            "router_entropy": 1.0,
            "dead_experts": 0.0,
            "experts_per_token": 1.0,
            "drop_rate": 0.0,
        }
    )
    scores = torch.zeros(8, E)
    scores[:, 3] = 1000.0
    collapsed = routing_of(Assignment(torch.full((8, 1), 3), 8, E), scores)
    metrics = moecore.routing_metrics(moecore.Recording([collapsed]))[""]
    assert metrics.max_violation == pytest.approx(E - 1)
    assert (metrics.load_entropy, metrics.router_entropy, metrics.dead_experts) == (0.0, 0.0, E - 1)


def test_metrics_of_a_call_without_tokens_and_of_one_expert_are_finite():
    for moe, x in ((layer(), torch.randn(0, D)), (layer(num_experts=1, top_k=1), torch.randn(3, D))):
        with moecore.record(moe) as recording:
            moe(x)
        metrics = moecore.routing_metrics(recording)[""]
        assert all(math.isfinite(v) for v in metrics.scalars().values())


def test_label_counts_follow_each_samples_tokens():
    moe = layer(select="top_p", select_options={"top_p": 0.5})
    labels = torch.tensor([2, 0, 2])
    with moecore.record(moe) as recording:
        moe(torch.randn(3, 4, D))
    chosen = recording[0].assignment.chosen().view(3, 4, E)
    expected = torch.zeros(3, E, dtype=torch.long)
    for sample, label in enumerate(labels.tolist()):
        expected[label] += chosen[sample].sum(0)
    assert torch.equal(moecore.expert_label_counts(recording[0], labels, 3), expected)


def test_label_counts_of_flat_pairs():
    moe = layer(select="expert_choice").train()
    with moecore.record(moe) as recording:
        moe(torch.randn(4, 4, D))
    counts = moecore.expert_label_counts(recording[0], torch.tensor([0, 1, 0, 1]), 2)
    assert counts.sum(0).tolist() == [8] * E
    assert counts[0].tolist() == recording[0].assignment.chosen()[[0, 1, 2, 3, 8, 9, 10, 11]].sum(0).tolist()


@pytest.mark.parametrize("shape", [(3, 4), (10, 2), (1, 4), (4, 1)])
def test_mutual_information_is_that_of_sklearn(shape):
    counts = torch.randint(0, 20, shape)
    counts[0, 0] = 5
    expected = mutual_info_score(None, None, contingency=counts.double().numpy())
    assert moecore.mutual_information(counts) == pytest.approx(expected, abs=1e-9)
    assert moecore.mutual_information(counts.float()) == pytest.approx(expected, abs=1e-9)


def test_specialisation_lies_between_chance_and_certainty():
    assert moecore.specialisation(torch.full((3, E), 7)) == pytest.approx(0, abs=1e-12)
    assert moecore.specialisation(torch.eye(E) * 9) == pytest.approx(1)
    assert moecore.specialisation(torch.tensor([[5, 0, 3, 0]])) == 0.0  # one label: nothing to tell apart
    assert moecore.specialisation(torch.zeros(3, E)) == 0.0
    counts = torch.tensor([[4, 0], [4, 0], [0, 8]])  # the expert tells the third label from the others
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert moecore.specialisation(counts) == pytest.approx(math.log(2) / entropy)


def test_routing_degree_counts_distinct_combinations():
    model = nn.Sequential(*(layer() for _ in range(3)))
    with moecore.record(model) as recording:
        for x in torch.randn(3, 2, 5, D):
            model(x)
    sets = [
        [tuple(row) for r in calls for row in r.assignment.chosen().tolist()] for calls in recording.by_layer().values()
    ]
    expected = [len(set(zip(*sets[: n + 1], strict=True))) for n in range(3)]
    assert moecore.routing_degree(recording) == expected
    assert expected == sorted(expected)


def test_routing_degree_stops_growing_where_a_layer_decides_nothing():
    first, fixed = layer(), layer(num_experts=K)
    with moecore.record(nn.Sequential(first, fixed)) as recording:
        fixed(first(torch.randn(40, D)))
    degrees = moecore.routing_degree(recording)
    assert degrees[0] == degrees[1] > 1


def test_routing_degree_needs_the_same_tokens():
    model = nn.ModuleList([layer(), layer()])
    with moecore.record(model) as recording:
        model[0](torch.randn(4, D))
        model[1](torch.randn(5, D))
    with pytest.raises(ValueError, match=r"routing_degree: layers route different numbers of tokens"):
        moecore.routing_degree(recording)


def test_token_map_shows_the_heaviest_expert_in_the_layout_of_the_input():
    moe = layer()
    with moecore.record(moe) as recording:
        moe(torch.randn(2, 3, D))
    routing = recording[0]
    best = routing.assignment.expert.gather(1, routing.weights.argmax(-1, keepdim=True))
    assert torch.equal(moecore.token_map(routing), best.view(2, 3))


def test_token_map_marks_tokens_without_experts():
    assignment = Assignment(
        torch.tensor([[2, 1], [3, 0], [0, 1]]), 3, E, valid=torch.tensor([[True, True], [False, False], [False, True]])
    )
    weights = torch.tensor([[0.3, 0.7], [0.0, 0.0], [0.0, -0.5]])
    assert moecore.token_map(routing_of(assignment, weights=weights, lead=(3,))).tolist() == [1, -1, 1]


def test_token_map_of_routed_samples_has_one_entry_per_sample():
    moe = layer(unit="sequence")
    with moecore.record(moe) as recording:
        moe(torch.randn(5, 3, D))
    assert moecore.token_map(recording[0]).shape == (5,)


def test_running_totals_equal_one_recording():
    model, labels = nn.Sequential(layer(capacity_factor=0.8), layer()), torch.tensor([1, 0, 2, 1])
    x = torch.randn(4, 5, D)
    stats, whole = moecore.RoutingStats(num_labels=3), moecore.Recording()
    for part in range(2):
        with moecore.record(model) as recording:
            model(x[2 * part : 2 * part + 2])
        stats.update(recording, labels[2 * part : 2 * part + 2])
        whole.extend(recording)
    for name, metrics in moecore.routing_metrics(whole).items():
        running = stats.metrics()[name]
        assert running.scalars() == pytest.approx(metrics.scalars())
        assert running.load == pytest.approx(metrics.load)
    for name, calls in whole.by_layer().items():
        halves = [
            moecore.expert_label_counts(call, labels[2 * part : 2 * part + 2], 3) for part, call in enumerate(calls)
        ]
        assert torch.equal(stats.label_counts()[name], halves[0] + halves[1])


def test_running_totals_count_beyond_what_float32_can():
    stats, pair = moecore.RoutingStats(), torch.zeros(1, 1, dtype=torch.long)
    for tokens in (2**24, 1):
        dropped = torch.ones(1, 1, dtype=torch.bool)
        routing = routing_of(Assignment(pair, tokens, 1, dropped=dropped), torch.zeros(1, 1))
        stats.update(moecore.Recording([routing]))
    assert stats.metrics()[""].experts_per_token == 2 / (2**24 + 1)
    assert {total.dtype for total in stats._totals[""].values()} == {torch.float64}


def test_running_totals_without_labels_count_none():
    moe, stats = layer(), moecore.RoutingStats()
    with moecore.record(moe) as recording:
        moe(torch.randn(3, D))
    stats.update(recording)
    assert stats.label_counts() == {}
    assert stats.metrics()[""].experts_per_token == K
