"""The transformer: what it sees, what its gates are taught, what its layers cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moecore
from apps.rl.agents.t2mir import T2MIR, TaskKeys, Windows, task_queries, token_balance
from apps.rl.incontext.settings import T2MIRConfig
from moecore.cost import count_cost
from moecore.errors import ConfigError

N, A, L = 3, 2, 5


def agent(**options) -> T2MIR:
    torch.manual_seed(0)
    return T2MIR(T2MIRConfig(**{"width": 16, "heads": 2, "context": L, "layers": 2} | options), N, A)


def windows(count=4, length=L, seed=0) -> Windows:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((count, length, N), (count, length, A), (count, length), (count, length, A))
    return Windows(*(torch.rand(shape, generator=draw) * 2 - 1 for shape in shapes))


def inputs(batch: Windows) -> tuple[torch.Tensor, ...]:
    return batch.obs, batch.action, batch.reward


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("experts", ["both", "token", "task", "none"])
def test_an_action_depends_on_what_came_before_and_on_nothing_else(experts, whole):
    one, batch = agent(experts=experts, whole_steps=whole).eval(), windows()
    with torch.no_grad():
        actions = one(*inputs(batch))
        assert actions.shape == (4, L, A)
        assert actions.abs().max() < 1
        for step in range(L):
            for part, name in ((batch.obs, "obs"), (batch.action, "action"), (batch.reward, "reward")):
                changed = part.clone()
                changed[:, step] += 1.0
                other = one(*inputs(Windows(**(vars(batch) | {name: changed}))))
                first = step if name == "obs" else step + 1
                torch.testing.assert_close(other[:, :first], actions[:, :first])
                assert first == L or not torch.allclose(other[:, first:], actions[:, first:])
        nexts = one.next_action(batch.obs, batch.action[:, :-1], batch.reward[:, :-1])
    torch.testing.assert_close(nexts, actions[:, -1])


def test_a_short_history_is_the_beginning_of_a_long_one():
    one, batch = agent().eval(), windows()
    with torch.no_grad():
        long, short = one(*inputs(batch)), one(*(part[:, :2] for part in inputs(batch)))
    torch.testing.assert_close(short, long[:, :2])


@pytest.mark.parametrize("experts", ["both", "token", "task"])
def test_experts_cost_as_many_multiply_adds_as_the_dense_network(experts):
    sizes = {"width": 64, "heads": 4, "context": 20}
    batch = inputs(windows(2, 20))
    dense, mixed = (count_cost(agent(**sizes, experts=kind).eval(), *batch).macs for kind in ("none", experts))
    assert dense * 0.97 < mixed < dense * 1.04


def test_states_and_rewards_are_standardised_by_what_was_seen():
    one = agent()
    obs, reward = torch.randn(200, N) * 7 + 3, torch.randn(200) * 50 - 400
    one.fit_scale(obs, reward)
    other = agent()
    shifted = Windows(obs[None, :L], windows(1).action, reward[None, :L], windows(1).target)
    seen = [(obs - obs.mean(0)) / obs.std(0), (reward - reward.mean()) / reward.std()]
    plain = Windows(seen[0][None, :L], shifted.action, seen[1][None, :L], shifted.target)
    torch.testing.assert_close(one.eval()(*inputs(shifted)), other.eval()(*inputs(plain)), atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_sum_of_its_parts():
    one, batch = agent(balance=0.3, contrast=0.2).eval(), windows()
    found, routings = one.losses(batch)
    token, task = ({r.name.rsplit(".", 1)[-1]: r for r in routings}[name] for name in ("token", "task"))
    imitation = (one(*inputs(batch)) - batch.target).square().mean()
    torch.testing.assert_close(found["imitation"], imitation)
    torch.testing.assert_close(found["balance"], token_balance(token))
    parts = found["imitation"] + 0.3 * found["balance"] + 0.2 * found["contrast"]
    torch.testing.assert_close(found["loss"], parts)
    assert task.scores.shape == (4 * 3 * L, 8)


def test_balance_is_the_squared_variation_of_importance_and_load():
    found, routings = agent(experts="token").eval().losses(windows())
    (routing,) = routings
    chosen = routing.assignment.dense(routing.weights).sum(0).detach().numpy()
    load = routing.assignment.load().numpy()
    expected = sum(values.var(ddof=1) / values.mean() ** 2 for values in (chosen, load.astype(float)))
    assert found["balance"].item() == pytest.approx(expected, rel=1e-4)


def test_contrast_is_the_cross_entropy_of_finding_the_other_window_both_ways():
    one, batch = agent(), windows(6)
    keys: TaskKeys = one.keys
    with torch.no_grad():
        keys.form.copy_(torch.randn(8, 8))
        keys.gate.weight.add_(0.3)
    with moecore.record(one) as routings:
        tokens = one.last_tokens(*inputs(batch))
        one._act(tokens)
    task = next(r for r in routings if r.name.endswith("task"))
    seen = one.layers[-1].norm(tokens)
    queries = (seen @ one.layers[-1].network.parts["task"].router.score.weight.T).mean(1)
    torch.testing.assert_close(task_queries(task, 6), queries, atol=1e-5, rtol=1e-5)
    keyed = (seen @ keys.gate.weight.T).mean(1)
    table = (queries[::2] @ keys.form @ keyed[1::2].T).detach().numpy()  # [3, 3]
    rows, columns = (np.log(np.exp(t).sum(1)) - np.diag(t) for t in (table, table.T))
    assert keys.loss(queries, seen).item() == pytest.approx((rows.mean() + columns.mean()) / 2, rel=1e-4)


def test_the_contrastive_loss_teaches_the_gate_alone_and_the_slow_gate_follows():
    one = agent(balance=0.0, contrast=1.0).train()
    found, _ = one.losses(windows())
    gate, slow = one.layers[-1].network.parts["task"].router.score, one.keys.gate
    grads = torch.autograd.grad(found["contrast"], [gate.weight, one.keys.form], retain_graph=True)
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert not slow.weight.requires_grad
    with torch.no_grad():
        gate.weight.add_(1.0)
    before = slow.weight.clone()
    one.follow()
    torch.testing.assert_close(slow.weight, before + 0.005 * (gate.weight - before))


@pytest.mark.parametrize("experts", ["none", "token"])
def test_without_a_task_gate_there_is_no_contrast(experts):
    one = agent(experts=experts)
    found, _ = one.losses(windows())
    one.follow()
    assert "contrast" not in found
    assert one.keys is None


def test_whole_sequences_can_be_routed_by_task():
    one, batch = agent(task_unit="sequence"), windows()
    found, routings = one.losses(batch)
    task = next(r for r in routings if r.name.endswith("task"))
    assert task.scores.shape == (4, 8)
    assert torch.isfinite(found["loss"])
    assert one.eval().next_action(batch.obs[:, :1], batch.action[:, :0], batch.reward[:, :0]).shape == (4, A)


def test_the_task_is_read_from_rewards_alone():
    """Two tasks with opposite actions and the same states: only what was rewarded tells them apart."""
    torch.manual_seed(0)
    one = agent(context=4, batch_tasks=2, balance=0.0)
    optimizer = torch.optim.AdamW(one.parameters(), 5e-3)

    def batch(seed):
        draw = torch.Generator().manual_seed(seed)
        sign = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(8)[:, None, None]
        obs, action = torch.randn(32, 4, N, generator=draw), torch.rand(32, 4, A, generator=draw) * 2 - 1
        return Windows(obs, action, (sign * action).mean(-1), 0.8 * sign.expand(32, 4, A))

    for step in range(120):
        optimizer.zero_grad()
        one.losses(batch(step))[0]["loss"].backward()
        optimizer.step()
        one.follow()
    with torch.no_grad():
        new = batch(1000)
        errors = (one.eval()(*inputs(new)) - new.target).square().mean((0, 2))
    assert errors[0] > 0.4  # nothing is known yet
    assert errors[-1] < 0.1


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"width": 30, "heads": 4}, "width"),
        ({"width": 15, "heads": 3}, "width"),
        ({"top_k": 7}, "top_k"),
        ({"context": 1}, "context"),
        ({"momentum": 0.0}, "momentum"),
        ({"balance": -1.0}, "balance"),
        ({"dropout": 1.0}, "dropout"),
        ({"hidden": 0}, "hidden"),
        ({"lr": 0.0}, "lr"),
        ({"early": 0.0}, "early"),
        ({"batch_tasks": 1}, "batch_tasks"),
    ],
)
def test_sizes_that_cannot_work(wrong, field):
    with pytest.raises(ConfigError, match=field):
        T2MIRConfig(**wrong)
