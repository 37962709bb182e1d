"""Multi-gate experts: the batched form gives what one expert and one gate at a time give; what recordings show."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import moecore
from moecore import ExpertStack, FeatureGate, GateStats, MultiGate, SelfGate

B, D, OUT = 7, 6, 4


def one_by_one(stack: ExpertStack, x: Tensor, expert: int) -> Tensor:
    """An expert alone, written out."""
    for i, weight in enumerate(stack.weights):
        x = x @ weight[expert].T
        if len(stack.biases):
            x = x + stack.biases[i][expert]
        if len(stack.norms):
            norm, units = stack.norms[i], slice(expert * weight.shape[1], (expert + 1) * weight.shape[1])
            mean, var = (
                (x.mean(0), x.var(0, correction=0))
                if stack.training
                else (
                    norm.running_mean[units],
                    norm.running_var[units],
                )
            )
            x = (x - mean) / (var + norm.eps).sqrt() * norm.weight[units] + norm.bias[units]
        x = stack.activation(x)
    return x


def gate_by_gate(level: MultiGate, x: dict[str, Tensor], gate_x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every mixture as a sum over what its gate sees."""
    mixed = {}
    for name, groups in level.sees.items():
        outputs = [
            one_by_one(level.experts[group], x[group], e)
            for group in groups
            for e in range(level.experts[group].num_experts)
        ]
        logits = level.gates[name](gate_x[name])
        weights = logits.softmax(-1) if level.weight == "softmax" else logits.sigmoid()
        mixed[name] = sum(weights[:, i : i + 1] * output for i, output in enumerate(outputs))
    return mixed


def level(units: tuple[int, ...] = (5, OUT), **options) -> MultiGate:
    kinds = {name: options.pop(name) for name in ("norm", "activation", "expert_bias") if name in options}
    kinds["bias"] = kinds.pop("expert_bias", True)
    sizes = {"shared": 3, "a": 2, "b": 1}
    experts = {name: ExpertStack(count, D, units, **kinds) for name, count in sizes.items()}
    sees = {"a": ["shared", "a"], "b": ["b", "shared"], "all": ["a", "shared", "b"]}
    return MultiGate(experts, sees, D, **options).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"units": (OUT,), "weight": "sigmoid", "bias": True},
        {"norm": True, "activation": "silu"},
        {"units": (5, 3, OUT), "expert_bias": False},
    ],
)
def test_equals_one_expert_and_one_gate_at_a_time(options, training):
    ours = level(**options).train(training)
    theirs = copy.deepcopy(ours)
    x = torch.randn(B, D, dtype=torch.float64)
    same = dict.fromkeys(("shared", "a", "b", "all"), x)
    outputs, expected = ours(x), gate_by_gate(theirs, same, same)
    assert list(outputs) == ["a", "b", "all"]
    for name in outputs:
        torch.testing.assert_close(outputs[name], expected[name])
    sum((y**2).sum() for y in outputs.values()).backward()
    sum((y**2).sum() for y in expected.values()).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_groups_and_gates_may_read_different_inputs():
    ours = level()
    x = {name: torch.randn(B, D, dtype=torch.float64) for name in ("shared", "a", "b")}
    gate_x = {name: torch.randn(B, D, dtype=torch.float64) for name in ("a", "b", "all")}
    expected = gate_by_gate(ours, x, gate_x)
    for name, y in ours(x, gate_x).items():
        torch.testing.assert_close(y, expected[name])


def test_normalised_logits_are_normalised_per_column():
    ours = level(norm=False)
    normed = MultiGate(dict(ours.experts), ours.sees, D, norm=True).double()
    normed.gates.load_state_dict(ours.gates.state_dict())
    x = torch.randn(B, D, dtype=torch.float64)
    logits = torch.cat([gate(x) for gate in ours.gates.values()], 1)
    logits = (logits - logits.mean(0)) / (logits.var(0, correction=0) + normed.norm.eps).sqrt()
    weights = normed.run_gates(x)
    torch.testing.assert_close(weights[:, 0, :5], logits[:, :5].softmax(-1))  # gate a: the shared three, then its two
    assert (weights[:, 0, 5] == 0).all()


def test_recordings_hold_gates_only_inside_of_record():
    model = nn.Sequential(level())
    x = torch.randn(B, D, dtype=torch.float64)
    model(x)
    with moecore.record(model) as recording:
        outputs = model(x)
    model(x)
    (record,) = recording.gates
    assert not list(recording)
    assert (record.name, record.gates) == ("0", ("a", "b", "all"))
    assert record.experts == ("shared.0", "shared.1", "shared.2", "a.0", "a.1", "b")
    mixed = torch.einsum("bge,beo->bgo", record.weights, record.outputs)
    torch.testing.assert_close(mixed[:, 2], outputs["all"])
    assert copy.deepcopy(model)[0]._recorder is None


def test_health_tells_a_lonely_expert_and_a_dead_one():
    model = level((OUT,), expert_bias=False)
    with torch.no_grad():
        model.experts["b"].weights[0].zero_()  # dead
        model.experts["a"].weights[0].mul_(50)  # loud
        model.gates["b"].weight.zero_()
    stats = GateStats()
    for _ in range(3):
        with moecore.record(model) as recording:
            model(torch.randn(50, D, dtype=torch.float64))
        stats.update(recording.gates)
    (health,) = stats.health().values()
    torch.testing.assert_close(health.mass.sum(1), torch.ones(3))
    torch.testing.assert_close(health.entropy[1], torch.tensor(1.0))  # all-zero gate: even over what it sees
    assert health.zeros[5] == 1
    assert health.std[3] > 10 * health.std[0]
    assert health.std_ratio > 1e6
    assert health.contribution[0, 3:5].sum() > 0.8
    assert health.own_mass() == {}  # gate "all" sees every expert too
    assert set(health.dominance()) == set(health.experts)


def test_own_experts_are_those_that_no_other_gate_sees():
    experts = {name: ExpertStack(count, D, [OUT]) for name, count in {"shared": 2, "a": 2, "b": 1}.items()}
    model = MultiGate(experts, {"a": ["shared", "a"], "b": ["shared", "b"]}, D)
    with torch.no_grad():
        for gate in model.gates.values():
            gate.weight.zero_()
    stats = GateStats()
    with moecore.record(model) as recording:
        model(torch.randn(9, D))
    stats.update(recording.gates)
    (health,) = stats.health().values()
    own = health.own_mass()
    assert own["a"] == pytest.approx((0.5, 0.5))
    assert own["b"] == pytest.approx((1 / 3, 1 / 3))
    owner, part = health.dominance()["shared.0"]
    assert (owner, part) == ("b", pytest.approx((1 / 3) / (1 / 3 + 1 / 4)))


def test_a_single_row_trains_by_the_running_statistics():
    experts = {name: ExpertStack(count, D, (5, OUT), norm=True) for name, count in (("shared", 3), ("a", 1))}
    ours = MultiGate(experts, {"a": ["a", "shared"], "all": ["shared"]}, D, norm=True).double()
    for _ in range(3):
        ours(torch.randn(B, D, dtype=torch.float64))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x = torch.randn(1, D, dtype=torch.float64)
    trained = ours.train().mixtures(x)
    assert trained.shape == (1, 2, OUT)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    torch.testing.assert_close(trained, ours.eval().mixtures(x))
    trained.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize("readers", [None, 3])
def test_feature_gates_take_no_rows(readers):
    shape = (0, D) if readers is None else (0, readers, D)
    assert FeatureGate(D, rank=2, num_readers=readers)(torch.randn(0, D)).shape == shape


@pytest.mark.parametrize("maps", [1, 3])
def test_feature_gate_is_near_the_identity_and_as_written(maps):
    gate = FeatureGate(D, rank=2, num_maps=maps)
    v = torch.randn(B, D)
    torch.testing.assert_close(gate(v), v, rtol=0.1, atol=0.1)
    with torch.no_grad():
        gate.up.mul_(100)
    factors = [2 * (v @ gate.down[:, 2 * i : 2 * i + 2] @ gate.up[i]).sigmoid() for i in range(maps)]
    shares = gate.mix(v).softmax(-1) if maps > 1 else torch.ones(B, 1)
    torch.testing.assert_close(gate(v), v * sum(shares[:, i : i + 1] * f for i, f in enumerate(factors)))


def test_feature_gates_of_several_readers_are_those_of_each():
    both = FeatureGate(D, rank=2, num_maps=3, num_readers=2)
    with torch.no_grad():
        both.up.mul_(100)
    v = torch.randn(B, D)
    for reader, gated in enumerate(both(v).unbind(1)):
        alone = FeatureGate(D, rank=2, num_maps=3)
        with torch.no_grad():
            alone.down.copy_(both.down[:, 6 * reader : 6 * reader + 6])
            alone.up.copy_(both.up[3 * reader : 3 * reader + 3])
            alone.mix.weight.copy_(both.mix.weight[3 * reader : 3 * reader + 3])
        torch.testing.assert_close(gated, alone(v))
    assert not torch.equal(both(v)[:, 0], both(v)[:, 1])


@pytest.mark.parametrize("units", [(1,), (5, 1), (5, 3, 2)])
def test_a_linear_end_and_inputs_of_their_own(units):
    stack = ExpertStack(3, D, units, norm=True, linear=True).double().eval()
    assert len(stack.norms) == len(units) - 1
    x = torch.randn(B, 3, D, dtype=torch.float64)
    y = stack(x)
    assert (y < 0).any()
    for e in range(3):
        torch.testing.assert_close(y[:, e], stack(x[:, e])[:, e])
    shared = hidden = torch.randn(B, D, dtype=torch.float64)
    for i, weight in enumerate(stack.weights):
        hidden = hidden @ weight[1].T + stack.biases[i][1]
        hidden = (hidden / (1 + stack.norms[0].eps) ** 0.5).relu() if i < len(units) - 1 else hidden
    torch.testing.assert_close(stack(shared)[:, 1], hidden)


def test_self_gate_is_a_sigmoid_for_one_and_a_softmax_for_several():
    v, outputs = torch.randn(B, D), torch.randn(B, 2, OUT)
    one, two = SelfGate(D, 1), SelfGate(D, 2)
    torch.testing.assert_close(one(v, outputs[:, :1]), one.gate(v).sigmoid() * outputs[:, 0])
    torch.testing.assert_close(two(v, outputs), (two.gate(v).softmax(-1)[..., None] * outputs).sum(1))


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda: ExpertStack(0, D, [OUT]), "num_experts=0: must be at least 1"),
        (lambda: ExpertStack(1, D, []), r"units=\[\]: give at least one layer"),
        (lambda: MultiGate({}, {"a": ["x"]}, D), r"experts=\[\]: give at least one group"),
        (
            lambda: MultiGate({"s": ExpertStack(1, D, [OUT])}, {"a": ["t"]}, D),
            r"gates.a=\['t'\]: give different groups",
        ),
        (
            lambda: MultiGate({"s": ExpertStack(1, D, [OUT]), "t": ExpertStack(1, D, [3])}, {"a": ["s"]}, D),
            "experts=.*: must all give the same width",
        ),
    ],
)
def test_mistakes_are_one_line(build, line):
    with pytest.raises(moecore.ConfigError, match=line):
        build()
