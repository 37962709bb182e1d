"""MoAE: experts one at a time, towers that help in one direction only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apps.recsys.batch import TaskSpec
from apps.recsys.model_settings import MLPConfig, MoAEConfig
from apps.recsys.models.base import Fields, Slot
from apps.recsys.models.moae import AsymmetricTowers, MoAE, Squeeze
from apps.recsys.models.pymal import PublishedInput, PyMAL
from moecore.errors import ConfigError

B = 6
EVEN = [Slot("a", 0, 4), Slot("b", 4, 8), Slot("c", 8, 12)]
MIXED = [Slot("a", 0, 4), Slot("b", 4, 5), Slot("c", 5, 12)]
TASKS = [TaskSpec(name, "all", None, 1.0, prior) for name, prior in (("first", 0.2), ("last", 0.5), ("linear", 0.01))]


def config(**changes) -> MoAEConfig:
    return MoAEConfig(**({"main": "last", "experts": MLPConfig(units=(8,)), "tower": (6, 5)} | changes))


def by_hand(model: MoAE, x: Tensor, slots: list[Slot], kind: str) -> list[Tensor]:
    """Mixtures of each task, one expert and one feature at a time."""

    def expert(group: str) -> Tensor:
        stack = model.level.experts[group]
        parts = [x[:, slot.start : slot.stop] for slot in slots]
        mean = torch.stack([part.mean(1) for part in parts], 1) if kind == "fields" else torch.stack(parts).mean(0)
        down, up = stack.squeeze.weights.weights
        factors = ((mean @ down[0].T).relu() @ up[0].T).sigmoid()
        own = [factors[:, i : i + 1] if kind == "fields" else factors for i in range(len(parts))]
        weighted = torch.cat([part * factor for part, factor in zip(parts, own, strict=True)], 1)
        return (weighted @ stack.weights[0][0].T + stack.biases[0][0]).relu()

    mixed = []
    for task in TASKS:
        key = f"task_{task.name}"
        weights = model.level.gates[key](x).softmax(-1)
        mixed.append(weights[:, :1] * expert("public") + weights[:, 1:] * expert(key))
    return mixed


@pytest.mark.parametrize(("kind", "slots"), [("fields", EVEN), ("fields", MIXED), ("dims", EVEN)])
def test_experts_weight_features_and_main_tower_takes_in_the_others(kind, slots):
    model = MoAE(config(squeeze=kind, squeeze_ratio=2), TASKS, slots).double()
    x = torch.randn(B, 12, dtype=torch.float64)
    h = by_hand(model, x, slots, kind)
    for layer, fuse in zip(model.towers.layers, model.towers.fuse, strict=True):
        a = [one @ layer.weights[0][i].T + layer.biases[0][i] for i, one in enumerate(h)]
        first, linear = a[0].relu(), a[2].relu()
        h = [first, (fuse(torch.cat([a[1], first, linear], 1)) + a[1]).relu(), linear]
    last = model.towers.last
    expected = torch.cat([one @ last.weights[0][i].T + last.biases[0][i] for i, one in enumerate(h)], 1)
    torch.testing.assert_close(model(Fields(x)).logits, expected)


def test_help_goes_one_way_in_values_and_both_in_gradients():
    model = MoAE(config(), TASKS, EVEN)
    x = torch.randn(B, 12)
    before = model(Fields(x)).logits
    with torch.no_grad():
        model.level.experts["task_last"].weights[0].add_(1)
    after = model(Fields(x)).logits
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.allclose(before[:, 1], after[:, 1])
    model(Fields(x)).logits[:, 1].sum().backward()
    assert model.level.experts["task_first"].weights[0].grad.abs().sum() > 0
    model.zero_grad()
    model(Fields(x)).logits[:, 0].sum().backward()
    assert model.level.experts["task_last"].weights[0].grad.abs().sum() == 0
    assert model.task_weights == (0.2, 1.0, 0.2)


@pytest.mark.parametrize("outputs", [1, 2])
def test_logits_start_at_the_priors(outputs):
    towers = AsymmetricTowers([0.2, 0.01], 4, (3,), outputs=outputs)
    with torch.no_grad():
        towers.last.weights[0].zero_()
    torch.testing.assert_close(towers(torch.randn(B, 2, 4)).sigmoid(), torch.tensor([[0.2, 0.01]]).expand(B, -1))


def test_without_fusion_towers_are_alone():
    model = MoAE(config(fusion=False, private_experts=0, squeeze="none", input_norm=True), TASKS, MIXED)
    x = torch.randn(B, 12)
    before = model(Fields(x)).logits
    with torch.no_grad():
        model.towers.layers[0].weights[0][0].add_(1)
    changed = (model(Fields(x)).logits != before).any(0)
    assert changed.tolist() == [True, False, False]
    torch.testing.assert_close(model(Fields(x * 3 + 1)).logits, model(Fields(x)).logits, atol=1e-4, rtol=1e-4)


def test_published_inputs_read_sequences_as_the_ad_asks():
    inputs = PublishedInput(20, users=2, ads=3, sequences=2, histograms=1, dim=4, heads=2, bins=8)
    tasks = [TaskSpec(name, "all", None, 1.0, 0.5) for name in ("last", "first")]
    model = PyMAL(config(main=None, squeeze="dims", input_norm=True, outputs=2), tasks, inputs)
    user, ad = torch.randint(0, 20, (B, 2)), torch.randint(0, 20, (B, 3))
    seen, cosines = torch.randint(0, 20, (B, 2, 5)), torch.rand(B, 1, 5) * 2 - 1
    cosines[0, 0] = torch.tensor([-1.0, 1.0, 0.99, 0.0, 0.1])
    flat = inputs(user, ad, seen, cosines).features
    assert flat.shape == (B, inputs.slots[-1].stop)
    counts = 2 ** (flat[0, -8:] / inputs.histograms[0].weight) - 1
    torch.testing.assert_close(counts, torch.tensor([1.0, 0, 0, 0, 2, 0, 0, 2]), atol=1e-4, rtol=0)
    order = torch.randperm(5)
    torch.testing.assert_close(flat, inputs(user, ad, seen[..., order], cosines).features)
    query = inputs(user, ad.flip(0), seen, cosines).features
    assert not torch.allclose(query[:, 20:28], flat[:, 20:28])
    model(user, ad, seen, cosines).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_mistakes_are_one_line():
    with pytest.raises(ConfigError, match=r"squeeze='dims': needs features of one width, these have \[1, 4, 7\]"):
        Squeeze(1, MIXED, "dims")
    with pytest.raises(ConfigError, match="main='nope': is no task; there is first, last, linear"):
        MoAE(config(main="nope"), TASKS, EVEN)
