"""The layer as a whole: whatever it is built from, it runs, learns, and keeps its promises."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import moecore
from moecore.routing import Routing

B, N, D, E, K = 2, 5, 8, 4, 2
IDS = torch.arange(B * N).view(B, N)


def build(**options) -> moecore.MoE:
    return moecore.MoE.build(D, **{"num_experts": E, "top_k": K, "hidden": 8, **options})


def spread(moe: moecore.MoE) -> moecore.MoE:
    """The same layer with a router that has opinions."""
    nn.init.normal_(moe.router.score.weight)
    return moe


@pytest.mark.parametrize("weight", ["softmax", "softmax_chosen", "sigmoid", "relu", "decoupled"])
@pytest.mark.parametrize("select", moecore.SELECTIONS)
@pytest.mark.parametrize("score", moecore.SCORES)
def test_every_combination_runs_forward_and_backward(score, select, weight):
    moe = build(score=score, select=select, weight=weight)
    x = torch.randn(B, N, D, requires_grad=True)
    with moecore.record(moe) as recording, moecore.routing_context(task=1, ids=IDS):
        y = moe(x)
        with torch.no_grad():
            in_eval = moe.eval()(x)
    assert y.shape == in_eval.shape == (B, N, D)
    assert y.isfinite().all()
    assert in_eval.isfinite().all()
    (y.square().sum() + moecore.balance_loss(recording[:1], {"switch": 1.0, "z": 1.0})).backward()
    grads = [p.grad for p in (x, *moe.parameters()) if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    assert moe.experts.up.grad is not None
    assert all(p.grad is not None for p in moe.router.parameters())


@pytest.mark.parametrize("executor", ["sorted", "dense", "grouped_mm"])
@pytest.mark.parametrize("select", moecore.SELECTIONS)
def test_executors_agree(select, executor):
    moe = spread(build(select=select, shared_hidden=4, weight="sigmoid", capacity_factor=1.0))
    x = torch.randn(B, N, D)
    routing = moe.router(x.view(-1, D))
    expected = moecore.run_reference(x.view(-1, D), moe.experts, routing.assignment, routing.weights).view(x.shape)
    expected = moe.shared(x, onto=expected.detach().clone())
    moe.executor = executor
    torch.testing.assert_close(moe(x), expected)


@pytest.mark.parametrize("lead", [(), (7,), (3, 4), (2, 3, 4)])
def test_tokens_of_any_leading_shape_are_routed_one_by_one(lead):
    moe = spread(build()).eval()
    x = torch.randn(*lead, D)
    y = moe(x)
    assert y.shape == x.shape
    flat = moe(x.reshape(-1, D))
    torch.testing.assert_close(y.reshape(-1, D), flat)
    torch.testing.assert_close(flat[-1:], moe(x.reshape(-1, D)[-1:]))


@pytest.mark.parametrize("unit", ["token", "sequence", 2, 3, 5, 8])
def test_no_samples_in_no_samples_out(unit):
    moe = build(unit=unit, shared_hidden=4)
    x = torch.zeros(0, N, D, requires_grad=True)
    y = moe(x)
    assert y.shape == x.shape
    y.sum().backward()


@pytest.mark.parametrize("executor", moecore.EXECUTORS)
@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("unit", ["token", "sequence", 3])
def test_no_tokens_in_no_tokens_out(unit, pool, executor):
    moe = build(unit=unit, pool=pool, executor=executor, shared_hidden=4, score="per_task")
    x = torch.zeros(B, 0, D, requires_grad=True)
    with moecore.record(moe) as recording:
        y = moe(x, moecore.Context(task=torch.zeros(B, dtype=torch.long)))
    assert y.shape == (B, 0, D)
    assert moecore.token_map(recording[0]).shape == (B, 0)
    (y.sum() + moecore.balance_loss(recording)).backward()


@pytest.mark.parametrize("unit", ["sequence", 3])
def test_units_need_sequences(unit):
    with pytest.raises(ValueError, match=r"input of shape \(7, 8\): unit=.* routes sequences \[B, N, D\]"):
        build(unit=unit)(torch.zeros(7, D))


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_sequences_are_routed_as_a_whole(pool):
    """Image-level routing: all tokens of a sample meet the same experts with the same weights."""
    moe, x = spread(build(unit="sequence", pool=pool)), torch.randn(B, N, D)
    with moecore.record(moe) as recording:
        y = moe(x)
    routing = recording[0]
    assert routing.lead == (B,)
    seen = x.mean(1) if pool == "mean" else x[:, 0]
    assert torch.equal(routing.assignment.expert, moe.router(seen).assignment.expert)
    for b in range(B):
        expert, weight = routing.assignment.expert[b : b + 1].expand(N, K), routing.weights[b : b + 1].expand(N, K)
        assignment = moecore.Assignment(expert, N, E)
        torch.testing.assert_close(y[b], moecore.run_reference(x[b], moe.experts, assignment, weight))


@pytest.mark.parametrize("pool", ["mean", "first", "flatten"])
@pytest.mark.parametrize("length", [4, 6, 7, 1])
def test_segments_are_routed_as_a_whole_whatever_the_length(length, pool):
    unit = 3
    moe, x = spread(build(unit=unit, pool=pool)), torch.randn(B, length, D)
    with moecore.record(moe) as recording:
        y = moe(x)
    segments = -(-length // unit)
    routing = recording[0]
    assert y.shape == x.shape
    assert routing.lead == (B, segments)
    padded = torch.cat([x, torch.zeros(B, segments * unit - length, D)], 1).view(B * segments, unit, D)
    seen = {"mean": padded.mean(1), "first": padded[:, 0], "flatten": padded.flatten(1)}[pool]
    torch.testing.assert_close(routing.scores, seen @ moe.router.score.weight.t())
    expert = routing.assignment.expert.repeat_interleave(unit, 0)
    weight = routing.weights.repeat_interleave(unit, 0)
    rows = moecore.Assignment(expert, expert.shape[0], E)
    expected = moecore.run_reference(padded.flatten(0, 1), moe.experts, rows, weight)
    torch.testing.assert_close(y, expected.view(B, segments * unit, D)[:, :length])


def test_one_token_segments_are_tokens():
    moe, x = spread(build()), torch.randn(B, N, D)
    expected = moe(x)
    moe.unit = 1
    torch.testing.assert_close(moe(x), expected)


def test_more_leading_dimensions_than_a_batch():
    for unit in ("sequence", 3):
        moe, x = spread(build(unit=unit)).eval(), torch.randn(2, 3, N, D)
        torch.testing.assert_close(moe(x)[1, 2], moe(x[1, 2:3])[0])


@pytest.mark.parametrize("unit", ["token", "sequence", 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("glu", [False, True])
def test_shared_expert_is_added_to_every_token(glu, gated, unit):
    moe, x = build(shared_hidden=6, shared_gate=gated, glu=glu, unit=unit), torch.randn(B, N, D)
    y = moe(x)
    shared, moe.shared = moe.shared, None
    bank = shared.bank
    up = torch.nn.functional.linear(x, bank.up[0], bank.up_bias[0])
    if glu:
        gate = torch.nn.functional.linear(x, bank.gate[0], bank.gate_bias[0])
        hidden = torch.nn.functional.silu(gate) * up
    else:
        hidden = torch.nn.functional.gelu(up)
    own = torch.nn.functional.linear(hidden, bank.down[0], bank.down_bias[0])
    if gated:
        own = own * torch.sigmoid(x @ shared.gate.weight.t())
    torch.testing.assert_close(y, moe(x) + own)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_expert_learns_beside_the_routed_ones(gated):
    moe = build(shared_hidden=6, shared_gate=gated)
    moe(torch.randn(B, N, D)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in moe.shared.parameters())
    assert moe.experts.up.grad.abs().sum() > 0


def test_experts_take_up_the_active_width_of_the_ffn_unless_told():
    moe = moecore.MoE.build(D, num_experts=8, top_k=2, shared_hidden=8)
    assert moe.experts.hidden == (4 * D - 8) // 2
    assert moe.shared.bank.hidden == 8
    with pytest.raises(moecore.ConfigError, match=r"^shared_hidden=31: leaves 1 of the FFN's 32 hidden units"):
        moecore.MoE.build(D, num_experts=8, top_k=2, shared_hidden=31)


@pytest.mark.parametrize("options", [{"score": s} for s in moecore.SCORES] + [{"controller": "loss_free"}], ids=str)
def test_state_dict_round_trip(options):
    first, second = build(shared_hidden=4, **options).eval(), build(shared_hidden=4, **options).eval()
    x, context = torch.randn(B, N, D), moecore.Context(task=1)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(x, context), first(x, context), rtol=0, atol=0)


@pytest.mark.parametrize("select", moecore.SELECTIONS)
@pytest.mark.parametrize("score", moecore.SCORES)
def test_copies_and_pickles_compute_the_same(score, select):
    moe = build(score=score, select=select, shared_hidden=4, controller="loss_free", capacity_factor=2.0).eval()
    x, context = torch.randn(B, N, D), moecore.Context(task=1)
    expected = moe(x, context)
    again = pickle.loads(pickle.dumps(moe))  # noqa: S301
    torch.testing.assert_close(copy.deepcopy(moe)(x, context), expected, rtol=0, atol=0)
    torch.testing.assert_close(again(x, context), expected, rtol=0, atol=0)


def reachable(moe: nn.Module) -> set[int]:
    """Identities of all tensors and routings that hang on the modules."""
    found = set()
    for module in moe.modules():
        for value in vars(module).values():
            for item in value.values() if isinstance(value, dict) else [value]:
                if isinstance(item, (torch.Tensor, Routing)):
                    found.add(id(item))
    return found


@pytest.mark.parametrize("score", moecore.SCORES)
def test_nothing_is_kept_outside_record(score):
    moe = build(score=score, controller="loss_free")
    before = reachable(moe)
    moe(torch.randn(B, N, D), moecore.Context(task=1))
    assert reachable(moe) == before
    assert moe._recorder is None


def test_same_seed_same_result():
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        moe = build(score="noisy")
        results.append(moe(torch.randn(B, N, D)))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("executor", "fast", "executor='fast': choose one of auto, dense, "),
        ("pool", "max", "pool='max': choose one of first, flatten, mean"),
        ("unit", "image", "unit='image': choose one of sequence, token"),
        ("unit", 0, "unit=0: a segment has at least 1 token"),
        ("score", "conv", "score='conv': choose one of centroid, cosine, "),
        ("select", "best", "select='best': choose one of expert_choice, "),
        ("weight", "even", "weight='even': choose one of constant, decoupled, "),
        ("controller", "pid", "controller='pid': choose one of loss_free, none, sparsity"),
    ],
)
def test_unknown_choices_are_refused(field, value, message):
    config = moecore.MoEConfig()
    setattr(config, field, value)  # past the type checker that runs in tests
    with pytest.raises(moecore.ConfigError, match=f"^{message}"):
        moecore.MoE.from_config(config, D)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 2, "top_k": 3}, "top_k=3: must not exceed num_experts=2"),
        ({"pool": "flatten"}, "pool='flatten': flatten needs a unit of fixed length"),
        ({"pool": "flatten", "unit": "sequence"}, "pool='flatten': flatten needs a unit of fixed length"),
        ({"score_options": {"depth": 2}}, r"score_options=\{'depth': 2\}: LinearScore says: .*'depth'"),
        ({"select": "top_p", "select_options": {"top_p": 2.0}}, r"select_options\.top_p=2.0: must lie in"),
        ({"weight_options": {"temperature": 2}}, r"weight_options=\{'temperature': 2\}: Softmax says"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(moecore.ConfigError, match=f"^{message}"):
        moecore.MoE.build(D, **options)
