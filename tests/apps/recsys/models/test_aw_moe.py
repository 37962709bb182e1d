"""AW-MoE: what the gate may depend on, and its special cases."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from apps.recsys.batch import InputSpec, SequenceInput, SparseInput, TableSpec, TaskSpec
from apps.recsys.model_settings import AWMoEConfig, MLPConfig
from apps.recsys.models.aw_moe import AWMoE, contrast
from apps.recsys.models.base import Behaviours, Fields
from moecore.errors import ConfigError

B, L, WIDTH, DIM = 5, 4, 7, 3
SPEC = InputSpec(
    (TableSpec("item", 30, DIM),),
    (SparseInput("item", "item"),),
    (),
    (SequenceInput("tags", "item", L, "mean"), SequenceInput("seen", "item", L, "target", "item")),
    (TaskSpec("click", "all", None, 1.0, 0.3), TaskSpec("buy", "all", None, 1.0, 0.01)),
)


def model(**changes) -> AWMoE:
    options = {"num_experts": 6, "experts": MLPConfig(units=(8,)), "item_units": (5,), "unit_hidden": 4} | changes
    return AWMoE(AWMoEConfig(**options), SPEC, WIDTH).double().eval()


def fields(lengths: tuple[int, ...] = (4, 3, 2, 1, 0), length: int = L) -> Fields:
    values = torch.randn(len(lengths), length, DIM, dtype=torch.float64)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    target = torch.randn(len(lengths), DIM, dtype=torch.float64)
    flat = torch.randn(len(lengths), WIDTH, dtype=torch.float64)
    return Fields(flat, {"seen": Behaviours(values, mask, target)})


def changed(given: Fields, **changes) -> Fields:
    return Fields(given.features, {"seen": dataclasses.replace(given.behaviours["seen"], **changes)})


def test_as_written_one_behaviour_at_a_time():
    ours, given = model(), fields()
    with torch.no_grad():
        ours.level.default.normal_()
    seen, units, stack = given.behaviours["seen"], ours.level.gates["behaviours"], ours.level.experts["experts"]
    for row in range(B):
        target = ours.encode(seen.target[row])
        interest, gate = torch.zeros(5, dtype=torch.float64), ours.level.default.clone()
        for value, there in zip(seen.values[row], seen.mask[row], strict=True):
            if not there:
                continue
            h = ours.encode(value)
            joint = torch.cat([h, h * target, target])
            interest = interest + ours.attend(joint) * h
            first, second = units.hidden(joint).relu().chunk(2)
            gate = gate + units.activation(first) * units.vote(second)
        scores = stack(torch.cat([given.features[row], interest, target])[None])[0]  # [K, T]
        torch.testing.assert_close(ours(given).logits[row], gate @ scores + ours.bias)


def test_order_and_padding_of_behaviours_do_not_matter():
    ours, given = model(), fields()
    expected, seen = ours(given).logits, given.behaviours["seen"]
    order = torch.randperm(L)
    mixed = ours(changed(given, values=seen.values[:, order], mask=seen.mask[:, order])).logits
    torch.testing.assert_close(mixed, expected)
    junk = torch.where(seen.mask[..., None], seen.values, 99.0)
    longer = changed(
        given, values=torch.cat([junk, junk + 5], 1), mask=torch.cat([seen.mask, torch.zeros_like(seen.mask)], 1)
    )
    torch.testing.assert_close(ours(longer).logits, expected)


def test_users_without_behaviours_are_ranked_by_the_default_only():
    given = fields((0, 0))
    logits = model()(given).logits
    assert logits.isfinite().all()
    assert not torch.allclose(logits[0], logits[1])
    published = model(default_gate=False)
    torch.testing.assert_close(published(given).logits, published.bias.expand(2, -1))


def test_twin_without_gate_averages_experts_and_keeps_attention():
    ours, twin, given = model(num_experts=1), model(num_experts=1, gate=False), fields()
    assert len(twin.state_dict()) == len(ours.state_dict()) - 7  # units of the gate, and its default
    twin.load_state_dict({name: w for name, w in ours.state_dict().items() if name in twin.state_dict()})
    gate = ours.level.run_gates(_votes(ours, given))[:, 0]
    torch.testing.assert_close((ours(given).logits - ours.bias) / gate, twin(given).logits - twin.bias)
    assert not twin.train()(given).losses


def _votes(ours: AWMoE, given: Fields) -> torch.Tensor:
    seen = given.behaviours["seen"]
    h, target = ours.encode(seen.values), ours.encode(seen.target)[:, None].expand(-1, L, -1)
    votes = ours.level.gates["behaviours"](torch.cat([h, h * target, target], -1))
    return (votes * seen.mask[..., None]).sum(1)


def test_contrastive_loss_is_of_the_gate_alone_and_in_training_only():
    ours, given = model(contrast=0.5, mask=0.5), fields()
    assert not ours(given).losses
    assert not model(contrast=0.0).train()(given).losses
    loss = ours.train()(given).losses["contrast"]
    loss.backward()
    units = ours.level.gates["behaviours"]
    assert all(p.grad.abs().sum() > 0 for p in units.parameters())
    assert all(p.grad is None for p in [*ours.level.experts.parameters(), *ours.attend.parameters()])


def test_contrast_is_infonce_over_rows_that_have_behaviours():
    gate, view = torch.randn(4, 6), torch.randn(4, 6)
    seen = torch.tensor([True, True, False, True])
    a, b = nn.functional.normalize(gate), nn.functional.normalize(view)
    expected = 0.0
    for row in (0, 1, 3):
        scores = torch.stack([a[row] @ b[row], *(a[row] @ b[other] for other in (0, 1, 3) if other != row)]) / 0.2
        expected = expected - scores.log_softmax(0)[0] / 3
    torch.testing.assert_close(contrast(gate, view, seen, 9, 0.2), expected)
    assert contrast(gate[:1], view[:1], seen[:1], 3, 0.2) == 0
    few = contrast(gate, view, torch.ones(4, dtype=torch.bool), 1, 0.2)
    assert few < contrast(gate, view, torch.ones(4, dtype=torch.bool), 3, 0.2)
    nothing = torch.zeros(4, 6, requires_grad=True)
    contrast(nothing, nothing, ~torch.ones(4, dtype=torch.bool), 3, 0.2).backward()
    assert nothing.grad.isfinite().all()


def test_data_without_behaviours_are_one_line():
    bare = dataclasses.replace(SPEC, sequences=SPEC.sequences[:1])
    with pytest.raises(ConfigError, match="behaviours=None: the data has no sequence with pooling=target; give one"):
        AWMoE(AWMoEConfig(), bare, WIDTH)
    with pytest.raises(ConfigError, match="behaviours='tags': has no target; there is seen"):
        AWMoE(AWMoEConfig(behaviours="tags"), SPEC, WIDTH)
