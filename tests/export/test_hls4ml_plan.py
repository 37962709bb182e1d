"""Layers that hls4ml has, made from whole models: the same numbers, no slicing, no more work; and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moecore
from apps.recsys.batch import TaskSpec
from apps.recsys.model_settings import HoMEConfig, MLPConfig, MMoEConfig, PLEConfig, TowerConfig
from apps.recsys.models.base import Fields
from apps.recsys.models.home import HoME
from apps.recsys.models.mmoe import PLE, MMoE
from apps.recsys.models.towers import WithTowers
from export.errors import ExportError
from export.hls4ml.elements import ACTIVATIONS, PAIRS
from export.hls4ml.formats import Format, Settings, choose_formats
from export.hls4ml.norms import PEAK, fit_layernorms
from export.hls4ml.plan import Layer, Plan, make_plan
from export.lowering import lower
from export.onnx import trace
from moecore.errors import ConfigError
from moecore.multigate import MultiGate
from moecore.multigate_experts import ExpertStack

D = 12
TASKS = (TaskSpec("click", "a", None, 1.0, 0.3), TaskSpec("like", "b", None, 1.0, 0.1))


class Head(nn.Module):
    """A recommender behind its embeddings."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.network = WithTowers(trunk, TowerConfig((6,)), TASKS)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(Fields(x)).logits


class Moves(nn.Module):
    """Elements moved about and spread in ways that no layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 12), nn.Linear(24, 5)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.up(x)).view(-1, 3, 4)
        turned = y.transpose(1, 2).relu()  # [B, 4, 3], read element by element
        spread = torch.sigmoid(y[:, :, :1]) * y  # a factor per row
        mean = turned.mean(1, keepdim=True) - 0.5 * turned  # [B, 4, 3]
        flipped = 2 - x.flip(1) / 3
        return self.down(torch.cat([mean.flatten(1), spread.flatten(1)], 1)) + flipped[:, :5]


class Kinds(nn.Module):
    """Every elementwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 8), nn.Linear(D, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        y = nn.functional.elu(a, 0.7) + nn.functional.leaky_relu(b, 0.2) - torch.tanh(a) * b.sigmoid()
        return torch.maximum(y, a) * torch.minimum(a, b).relu() + (-nn.functional.silu(b)) / 4 + y.sum(1, keepdim=True)


def gates(weight: str = "softmax") -> nn.Module:
    """One level, of which no gate sees all."""
    stacks = {"shared": ExpertStack(3, D, [10, 8]), "own": ExpertStack(2, D, [10, 8])}
    return MultiGate(stacks, {"a": ["shared"], "b": ["shared", "own"], "c": ["own"]}, D, weight, bias=True)


class Level(nn.Module):
    """Mixtures side by side."""

    def __init__(self, level: nn.Module) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.level(x).values()), 1)


def actor() -> nn.Module:
    """What a visual agent has behind its encoder."""
    return nn.Sequential(
        nn.Linear(D, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3), nn.Tanh()
    )


def normed(units: tuple[int, ...]) -> MLPConfig:
    return MLPConfig(units, activation="silu", norm=True)


MODELS = {
    "mmoe": lambda: Head(MMoE(MMoEConfig(num_experts=4, experts=MLPConfig((10, 8))), TASKS, D)),
    "omoe": lambda: Head(MMoE(MMoEConfig(num_experts=3, experts=normed((8,)), one_gate=True), TASKS, D)),
    "ple": lambda: Head(PLE(PLEConfig(experts=normed((8,))), TASKS, D)),
    "home": lambda: Head(HoME(HoMEConfig(experts=normed((8,))), TASKS, D)),
    "softmax gates": lambda: Level(gates()),
    "actor": actor,
    "moves": Moves,
    "kinds": Kinds,
}


def settle(model: nn.Module) -> nn.Module:
    """Statistics and weights as after training: not at their start, gates decided."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.mul_(3.0 if "gates" in name else 1.0).add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def planned(model: nn.Module) -> Plan:
    return make_plan(lower(trace(model, torch.randn(1, D), ["x"], ["y"]), "dense"))


@pytest.mark.parametrize("name", MODELS)
def test_layers_give_the_models_numbers_and_are_such_as_hls4ml_has(name):
    model = settle(MODELS[name]())
    plan, x = planned(model), torch.randn(32, D)
    got = plan.run({"x": x.numpy()})[plan.outputs["y"]]
    expected = model.double()(x.double()).detach().numpy()
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    known = {"input", "dense", "affine", "softmax", "layernorm", "mix", "concatenate"}
    known |= set(ACTIVATIONS.values()) | set(PAIRS.values())
    made: set[str] = set()
    for layer in plan.layers:
        assert layer.kind in known
        assert set(layer.inputs) <= made
        assert layer.kind != "concatenate" or len(layer.inputs) == 2
        made.add(layer.name)


def test_experts_and_gates_are_computed_once_each():
    plan = planned(settle(MODELS["mmoe"]()))
    experts, mixtures, towers = 4 * (D * 10 + 10 * 8), 2 * 4 * 8, 2 * (8 * 6 + 6)
    assert sum(layer.multiply_adds for layer in plan.layers) == experts + 2 * D * 4 + mixtures + towers
    assert not [layer for layer in plan.layers if layer.origin == "select"]


def test_what_a_gate_does_not_see_it_does_not_mix():
    plan = planned(settle(MODELS["softmax gates"]()))
    assert sorted(int(layer.weights["count"]) for layer in plan.layers if layer.kind == "mix") == [2, 3, 5]
    assert sum(layer.kind == "relu" for layer in plan.layers) >= 2


REFUSED = {
    "top-k": (
        lambda: moecore.MoE.build(D, num_experts=4, top_k=2, activation="relu"),
        r"^router \((TopK|ArgMax)\): chooses experts per sample.*--format fpga, or gates that mix all experts",
    ),
    "gelu": (lambda: nn.Sequential(nn.Linear(D, 4), nn.GELU()), r"^1 \(Gelu\): hls4ml has no GELU.*--format fpga$"),
    "square root": (lambda: Function(lambda x: x.abs().sqrt()), r"\((Abs|Sqrt)\): hls4ml has no layer for it"),
    "division": (lambda: Function(lambda x: x / x.exp()), r"\((Exp|Div)\): hls4ml"),
    "constant output": (lambda: Function(lambda x: torch.ones(1, 2)), r"^output y: is the same for every input"),
}


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", REFUSED)
def test_what_hls4ml_lacks_is_refused_in_one_line(name):
    make, message = REFUSED[name]
    with pytest.raises(ExportError, match=message) as caught:
        planned(make().eval())
    assert "\n" not in str(caught.value)


def test_embeddings_stay_on_the_host():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2)).eval()
    proto = trace(model, torch.tensor([[1, 4]]), ["ids"], ["y"])
    with pytest.raises(ExportError, match=r"^0 \(Gather\).*embeddings stay on the host"):
        make_plan(proto)


def test_a_batch_is_refused():
    proto = trace(nn.Linear(D, 2), torch.randn(2, D), ["x"], ["y"])
    with pytest.raises(ExportError, match=r"^input x: shape \[2, 12\] is not that of one sample"):
        make_plan(proto)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(0.0, (16, 1)), (0.4, (16, 0)), (0.5, (16, 1)), (1.0, (16, 2)), (1.9, (16, 2)), (100.0, (16, 8))],
)
def test_a_format_holds_its_largest_number_and_is_the_finest_that_does(largest, expected):
    made = Format.holding(16, largest)
    assert (made.width, made.integer) == expected
    top = 2.0 ** (made.integer - 1) - 2.0**-made.fraction
    assert top >= largest - 2.0**-made.fraction
    if largest > 0:
        assert largest >= 2.0 ** (made.integer - 2)


def test_formats_are_spelled_as_tools_read_them():
    assert str(Format(16, 3)) == "ap_fixed<16,3,AP_RND,AP_SAT>"
    assert str(Format(18, 1, signed=False)) == "ap_ufixed<18,1,AP_RND,AP_SAT>"
    assert str(Format(40, 6, rounds=False)) == "ap_fixed<40,6>"


def test_formats_follow_calibration_and_accumulators_lose_nothing():
    weight, bias = np.array([[0.75, -3.0]]), np.array([10.0])
    plan = Plan(
        (Layer("input", "x", "x", 2), Layer("dense", "y", "m", 1, ("x",), {"weight": weight, "bias": bias})),
        {"x": "x"},
        {"y": "y"},
    )
    values = plan.run({"x": np.array([[1.0, -1.5], [0.0, 1.0]])})
    assert values["y"].tolist() == [[15.25], [7.0]]
    found = choose_formats(plan, values, Settings(width=12, weight_width=8, margin=1.0))
    assert found["y"].largest == 15.25
    assert found["x"].precision["result"] == Format(12, 2)
    assert found["y"].precision["result"] == Format(12, 5)
    assert found["y"].precision["weight"] == Format(8, 3)
    assert found["y"].precision["bias"] == Format(8, 5)
    accumulator = found["y"].precision["accum"]
    assert accumulator.fraction == (12 - 2) + (8 - 3)
    assert 2.0 ** (accumulator.integer - 1) > 4 * 15.25  # spare bits beyond what was seen


@pytest.mark.parametrize(("field", "value"), [("width", 7), ("weight_width", 33), ("margin", 0.5), ("backend", "CUDA")])
def test_settings_are_checked(field, value):
    with pytest.raises(ConfigError, match=f"^{field}="):
        Settings(**{field: value})


@pytest.mark.parametrize(("size", "shared"), [(1e-3, False), (200.0, False), (200.0, True)])
def test_layer_norms_are_scaled_into_their_tables_range_and_give_the_same(size, shared):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(D, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return torch.cat([self.norm(y), y], 1) if shared else self.norm(y)

    torch.manual_seed(0)
    model, x = Normed(), torch.randn(64, D)
    with torch.no_grad():
        model.linear.weight.mul_(size)
        model.linear.bias.zero_()
    plan = planned(model)
    before = plan.run({"x": x.numpy()})
    fitted = fit_layernorms(plan, before)
    after = fitted.run({"x": x.numpy()})
    np.testing.assert_allclose(after[fitted.outputs["y"]], before[plan.outputs["y"]], rtol=1e-12, atol=1e-12)
    (norm,) = (layer for layer in fitted.layers if layer.kind == "layernorm")
    assert PEAK / 4 < after[norm.inputs[0]].var(1).max() <= PEAK
    assert sum(layer.kind == "affine" for layer in fitted.layers) == shared
