"""MMoE, PLE and HoME against formulas written out, gate by gate; what switches switch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import moecore
from apps.recsys.batch import TaskSpec
from apps.recsys.model_settings import GateConfig, HoMEConfig, MLPConfig, MMoEConfig, PLEConfig, TowerConfig
from apps.recsys.models.home import HoME, HoMELevel
from apps.recsys.models.levels import make_level
from apps.recsys.models.mmoe import PLE, MMoE
from apps.recsys.models.names import safe_names
from apps.recsys.models.towers import SharedBottom, SingleTask, Towers

B, D, OUT = 6, 9, 4
TASKS = [
    TaskSpec("click", "watch", None, 1.0, 0.4),
    TaskSpec("forward", "act", None, 1.0, 0.01),  # also the name of a method
    TaskSpec("like.all", "act", None, 1.0, 0.1),
]
KEYS = ["task_click", "task_forward", "task_like_all"]
EXPERTS = MLPConfig(units=(5, OUT))


def rows() -> Tensor:
    return torch.randn(B, D, dtype=torch.float64)


def mixture(level: moecore.MultiGate, gate: str, inputs: dict[str, Tensor], gate_x: Tensor) -> Tensor:
    """What a gate gives, from its groups one after the other."""
    outputs = torch.cat([level.experts[group](inputs[group]) for group in level.sees[gate]], 1)
    return (level.gates[gate](gate_x).softmax(-1)[..., None] * outputs).sum(1)


def test_mmoe_is_one_group_and_a_gate_per_task():
    model, x = MMoE(MMoEConfig(num_experts=3, experts=EXPERTS), TASKS, D).double(), rows()
    mixed = model(x)
    assert list(model.level.gates) == KEYS
    for i, key in enumerate(KEYS):
        torch.testing.assert_close(mixed[:, i], mixture(model.level, key, {"shared": x}, x))
    one = MMoE(MMoEConfig(num_experts=3, experts=EXPERTS, one_gate=True), TASKS, D).double()
    assert one(x).shape == (B, OUT)
    assert sum(p.numel() for p in one.level.gates.parameters()) == 3 * D


@pytest.mark.parametrize("levels", [1, 3])
def test_ple_reads_what_gates_gave_level_by_level(levels):
    config = PLEConfig(levels=levels, shared_experts=2, task_experts=1, experts=EXPERTS)
    model, x = PLE(config, TASKS, D).double(), rows()
    groups = ["shared", *KEYS]
    z = dict.fromkeys(groups, x)
    for level in list(model.levels)[:-1]:
        z = {group: mixture(level, group, z, z[group]) for group in groups}
    last = model.levels[-1]
    expected = torch.stack([mixture(last, key, z, z[key]) for key in KEYS], 1)
    torch.testing.assert_close(model(x), expected)
    assert "shared" not in last.gates
    assert last.sees["task_click"] == ("shared", "task_click")
    assert all(level.sees["shared"] == tuple(groups) for level in list(model.levels)[:-1])


HOME = {"shared_experts": 2, "group_experts": 2, "task_experts": 1, "experts": EXPERTS}
BARE = {"feature_gate": "none", "self_gate": False}


def home(**changes) -> HoME:
    return HoME(HoMEConfig(**(HOME | changes)), TASKS, D).double().eval()


def level_by_hand(
    part: HoMELevel, config: HoMEConfig, inputs: dict[str, Tensor], gate_x: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A level, one expert at a time."""

    def factors(source: str, reader: int) -> Tensor:
        gate, v = part.features.gates[source], inputs[source]
        rank, maps = config.feature_rank, config.feature_maps
        numbers = range(reader * maps, (reader + 1) * maps)
        values = [2 * (v @ gate.down[:, i * rank : (i + 1) * rank] @ gate.up[i]).sigmoid() for i in numbers]
        shares = gate.mix(v)[:, numbers.start : numbers.stop].softmax(-1)
        return v * sum(shares[:, i : i + 1] * one for i, one in enumerate(values))

    def expert(group: str, number: int) -> Tensor:
        source = part.sources[group]
        before = list(itertools.takewhile(lambda one: one != group, part.features.readers[source]))
        if config.feature_gate == "none":
            x = inputs[source]
        elif config.feature_gate == "input":
            x = factors(source, 0)
        elif config.feature_gate == "group":
            x = factors(source, len(before))
        else:
            x = factors(source, sum(part.features.counts[one] for one in before) + number)
        return part.level.experts[group](x)[:, number]

    mixed = {}
    for gate, groups in part.level.sees.items():
        outputs = [expert(group, i) for group in groups for i in range(part.features.counts[group])]
        weights = part.level.gates[gate](gate_x[gate]).softmax(-1)
        mixed[gate] = sum(weights[:, i : i + 1] * y for i, y in enumerate(outputs))
        if config.self_gate:
            group = part.own[gate]
            own = [expert(group, i) for i in range(part.features.counts[group])]
            read = inputs[part.sources[group]] if config.self_gate_input == "experts" else gate_x[gate]
            logits = part.selves[gate].gate(read)
            shares = logits.sigmoid() if len(own) == 1 else logits.softmax(-1)
            mixed[gate] = mixed[gate] + sum(shares[:, i : i + 1] * y for i, y in enumerate(own))
    return mixed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        BARE,
        {"feature_gate": "input", "self_gate_input": "gate"},
        {"feature_gate": "expert", "experts": MLPConfig((5, OUT), "silu", norm=True)},
        {"expert_input": "both"},
    ],
)
def test_home_is_a_meta_level_and_a_level_of_tasks(changes):
    model, x, config = home(**changes), rows(), HoMEConfig(**(HOME | changes))
    with torch.no_grad():
        for part in (model.meta, model.task):
            for gate in getattr(part.features, "gates", {}).values():
                gate.up.mul_(100)
    meta = level_by_hand(model.meta, config, {"features": x}, dict.fromkeys(model.meta.own, x))
    assert model.meta.level.sees["group_act"] == ("shared", "group_act")
    assert model.meta.level.sees["shared"] == ("shared", "group_watch", "group_act")
    kinds = dict(zip(KEYS, ["group_watch", "group_act", "group_act"], strict=True))
    pair = {kind: torch.cat([meta["shared"], meta[kind]], 1) for kind in ("group_watch", "group_act")}
    sources = {"shared": meta["shared"]} | (pair if config.expert_input == "both" else {k: meta[k] for k in pair})
    task = level_by_hand(model.task, config, sources, {key: pair[kind] for key, kind in kinds.items()})
    assert model.task.level.sees["task_forward"] == ("shared", "group_act", "task_forward")
    torch.testing.assert_close(model(x), torch.stack([task[key] for key in KEYS], 1))


def test_home_with_all_parts_off_is_ple_with_two_levels():
    ours = home(**BARE, hierarchy=False, group_experts=1)
    ple = PLE(PLEConfig(levels=2, shared_experts=2, task_experts=1, experts=EXPERTS), TASKS, D).double()
    for own, theirs in zip((ours.meta, ours.task), ple.levels, strict=True):
        theirs.load_state_dict(own.level.state_dict())
    x = rows()
    torch.testing.assert_close(ours(x), ple(x))


@pytest.mark.parametrize("self_gate", [False, True])
def test_self_gates_reach_experts_that_the_gate_turned_away(self_gate):
    model = home(self_gate=self_gate)
    with torch.no_grad():
        weight = model.task.level.gates["task_click"].weight
        weight.zero_()
        weight[-1] = -1e4  # the task's own expert; what gates read is positive after ReLU
    model(rows())[:, 0].sum().backward()
    gradient = model.task.level.experts["task_click"].weights[-1].grad.abs().sum()
    assert (gradient > 1e-6) == self_gate


@pytest.mark.parametrize("levels", [1, 2])
def test_sparse_ple_is_recorded_and_keeps_to_what_gates_see(levels):
    config = PLEConfig(levels=levels, shared_experts=3, task_experts=3, experts=EXPERTS, top_k=2)
    model, x = PLE(config, TASKS, D).double(), rows()
    with moecore.record(model) as recording:
        assert model(x).shape == (B, 3, OUT)
    assert len(recording) == 3 * levels + (levels - 1)
    assert {routing.probs.shape[1] for routing in recording} <= {6, 12}
    assert all(routing.assignment.expert.shape == (B, 2) for routing in recording)
    assert moecore.balance_loss(recording) > 0


def test_sparse_gates_with_all_experts_are_the_dense_ones():
    dense = MMoE(MMoEConfig(num_experts=4, experts=EXPERTS), TASKS, D).double()
    sparse = MMoE(MMoEConfig(num_experts=4, experts=EXPERTS, top_k=4), TASKS, D).double()
    with torch.no_grad():
        sparse.level.experts.load_state_dict(dense.level.experts.state_dict())
        for key in KEYS:
            sparse.level.gates[key].score.weight.copy_(dense.level.gates[key].weight)
    x = rows()
    torch.testing.assert_close(sparse(x), dense(x))


def test_sparse_home_runs_without_self_gates():
    model = home(**BARE, top_k=2)
    with moecore.record(model) as recording:
        assert model(rows()).shape == (B, 3, OUT)
    assert len(recording) == 3 + 3


def test_towers_start_at_the_priors_and_are_one_network_each():
    towers = Towers(TowerConfig(units=(5,)), TASKS, OUT).double()
    x = torch.randn(B, 3, OUT, dtype=torch.float64)
    up, down = towers.stack.weights
    for i in range(3):
        hidden = (x[:, i] @ up[i].T + towers.stack.biases[0][i]).relu()
        torch.testing.assert_close(towers(x)[:, i], (hidden @ down[i].T + towers.stack.biases[1][i]).squeeze(1))
    with torch.no_grad():
        down.zero_()
    torch.testing.assert_close(towers(x[:, 0]).sigmoid()[0], torch.tensor([0.4, 0.01, 0.1], dtype=torch.float64))
    assert Towers(TowerConfig(units=()), TASKS, OUT)(torch.randn(B, OUT)).shape == (B, 3)


def test_bottoms_are_shared_or_not():
    x = torch.randn(B, D)
    assert SharedBottom(EXPERTS, D)(x).shape == (B, OUT)
    alone = SingleTask(EXPERTS, TASKS, D)
    before = alone(x)
    with torch.no_grad():
        alone.bottoms.weights[0][1].add_(1)
    assert (before != alone(x)).any(-1).any(0).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("gates", "line"),
    [
        (GateConfig(weight="sigmoid"), "gates.weight='sigmoid': sparse gates"),
        (GateConfig(bias=True), "gates.bias=True: sparse gates"),
        (GateConfig(norm=True), "gates.norm=True: sparse gates"),
    ],
)
def test_settings_that_sparse_gates_do_not_have_are_one_line(gates, line):
    with pytest.raises(moecore.ConfigError, match=line):
        make_level({"shared": 3}, {"click": ["shared"]}, D, D, EXPERTS, gates, top_k=1)


def test_names_that_differ_in_dots_only_are_one_line():
    with pytest.raises(moecore.ConfigError, match="differ in dots only; rename one"):
        safe_names("task", ["a.b", "a_b"])
