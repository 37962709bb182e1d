"""Sparse multi-gate experts: gates keep the largest weights of their dense twin, and only those are computed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moecore
from moecore import ExpertStack, MultiGate, SparseMultiGate, StackBank

B, D, OUT = 7, 6, 4
SIZES = {"shared": 3, "a": 2, "b": 1}
SEES = {"a": ["shared", "a"], "b": ["b", "shared"], "all": ["a", "shared", "b"]}


def twins(
    top_k: int, units: tuple[int, ...] = (5, OUT), norm: bool = False, executor: str = "auto"
) -> tuple[MultiGate, SparseMultiGate]:
    """The same experts and gates, dense and sparse."""
    dense = MultiGate({name: ExpertStack(count, D, units) for name, count in SIZES.items()}, SEES, D).double()
    banks = {name: StackBank(count, D, units, norm=norm) for name, count in SIZES.items()}
    sparse = SparseMultiGate(banks, SEES, D, top_k, executor, aux_loss={"switch": 0.01}).double()
    with torch.no_grad():
        for name, bank in banks.items():
            weights = {**dict(dense.experts[name].named_parameters()), **dict(bank.scales.named_parameters("scales"))}
            bank.load_state_dict(weights)
        for name, router in sparse.gates.items():
            router.score.weight.copy_(dense.gates[name].weight)
    return dense, sparse


@pytest.mark.parametrize("executor", ["sorted", "dense", "auto"])
@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize(("top_k", "units"), [(1, (5, OUT)), (2, (OUT,)), (3, (5, 3, OUT))])
def test_gates_keep_the_largest_weights(top_k, units, own_inputs, executor):
    dense, sparse = twins(top_k, units, executor=executor)
    x = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    inputs = {name: x * (i + 1) for i, name in enumerate(SIZES)} if own_inputs else x
    gate_x = {name: x.flip(1) * (i + 1) for i, name in enumerate(SEES)} if own_inputs else None
    weights = dense.run_gates(inputs if gate_x is None else gate_x)
    kept = weights * (weights >= weights.topk(top_k, -1).values[..., -1:])
    kept = kept / kept.sum(-1, keepdim=True) if top_k > 1 else kept
    expected = torch.bmm(kept, dense.run_experts(inputs))
    outputs = sparse.mixtures(inputs, gate_x)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(sparse(inputs, gate_x)["b"], expected[:, 1])
    (ours,) = torch.autograd.grad(outputs.square().sum(), x, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_each_gate_is_recorded_and_balanced():
    model = nn.Sequential(twins(2)[1])
    x = torch.randn(50, D, dtype=torch.float64)
    with moecore.record(model) as recording:
        model(x)
    model(x)
    assert [routing.name for routing in recording] == ["0.a", "0.b", "0.all"]
    assert [routing.probs.shape[1] for routing in recording] == [5, 4, 6]
    loss = moecore.balance_loss(recording)
    expected = sum(0.01 * r.probs.shape[1] * (r.fractions() * r.probs.mean(0)).sum() for r in recording)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(router.score.weight.grad.abs().sum() > 0 for router in model[0].gates.values())
    assert copy.deepcopy(model)[0]._recorder is None


def test_experts_are_normalised_row_by_row():
    model = twins(2, norm=True)[1].train()
    with torch.no_grad():
        for bank in model.experts.values():
            bank.scales[0].normal_()
    x = torch.randn(B, D, dtype=torch.float64)
    together = model(x)["all"]
    torch.testing.assert_close(together[:1], model(x[:1])["all"])
    routing, expected = model.gates["all"](x), 0.0
    owners = [(model.experts[name], i) for name in SEES["all"] for i in range(SIZES[name])]
    for expert, weight in zip(routing.assignment.expert[0].tolist(), routing.weights[0], strict=True):
        bank, number = owners[expert]
        h = x[0]
        for matrix, scale, shift in zip(bank.weights, bank.scales, bank.biases, strict=True):
            h = nn.functional.layer_norm(matrix[number] @ h, matrix.shape[1:2])
            h = (h * scale[number] + shift[number]).relu()
        expected = expected + weight * h
    torch.testing.assert_close(together[0], expected)


def test_mistakes_are_one_line():
    with pytest.raises(moecore.ConfigError, match="top_k=5: must lie between 1 and 4, the experts that a gate sees"):
        twins(5)
    with pytest.raises(moecore.ConfigError, match=r"units=\[\]: give at least one layer"):
        StackBank(2, D, [])
