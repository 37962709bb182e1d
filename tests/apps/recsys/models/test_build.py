"""Models by the settings: every family on real encoders, its twin, its errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import moecore
from apps.recsys.batch import Batch, DenseInput, InputSpec, SequenceInput, SparseInput, TableSpec, TaskSpec
from apps.recsys.model_settings import (
    HoMEConfig,
    MLPConfig,
    MMoEConfig,
    MoAEConfig,
    ModelConfig,
    PLEConfig,
    TowerConfig,
)
from apps.recsys.models.build import FAMILIES, build_model
from apps.recsys.models.size import multiply_adds
from moecore.errors import ConfigError

ROWS, LENGTH = 12, 5
SPEC = InputSpec(
    (TableSpec("user", 20, 8), TableSpec("item", 30, 8)),
    (SparseInput("user", "user"), SparseInput("item", "item")),
    (DenseInput("price", "standard"), DenseInput("age", "piecewise", edges=(0.0, 1.0, 2.0))),
    (SequenceInput("seen", "item", LENGTH, "target", "item"),),
    (
        TaskSpec("click", "watch", None, 1.0, 0.3),
        TaskSpec("buy", "act", "click", 1.0, 0.05),
        TaskSpec("like", "act", None, 1.0, 0.1),
    ),
)
EXPERTS = MLPConfig(units=(16,))
SPARSE = {
    "mmoe": {"mmoe": MMoEConfig(num_experts=24, experts=EXPERTS, top_k=2)},
    "ple": {"ple": PLEConfig(shared_experts=12, task_experts=6, experts=EXPERTS, top_k=2)},
    "home": {"home": HoMEConfig(experts=EXPERTS, self_gate=False, top_k=2)},
}


def batch(rows: int = ROWS) -> Batch:
    seen = torch.randint(2, 30, (rows, LENGTH)) * (torch.arange(LENGTH) < torch.randint(0, LENGTH + 1, (rows, 1)))
    ids = torch.stack([torch.randint(0, 20, (rows,)), torch.randint(0, 30, (rows,))], 1)
    return Batch(ids, torch.randn(rows, 2), {"seen": seen}, torch.randint(0, 2, (rows, 3)).float())


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("dense", [False, True])
def test_every_family_trains_all_of_its_parameters_and_loads_them(name, dense):
    if dense and not FAMILIES[name].experts:
        pytest.skip("no experts to replace")
    config, rows = ModelConfig(name=name, dense=dense), batch()
    model = build_model(config, SPEC)
    output = model.train()(rows)
    assert output.logits.shape == (ROWS, 3)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, rows.labels)
    (loss + sum(output.losses.values())).backward()
    idle = {key for key, p in model.named_parameters() if p.grad is None}
    assert not idle
    other = build_model(config, SPEC)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(rows).logits, model.eval()(rows).logits)
    assert not model(rows).losses


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].experts])
def test_a_row_does_not_depend_on_its_neighbours_when_served(name):
    model, rows = build_model(ModelConfig(name=name), SPEC).eval(), batch()
    torch.testing.assert_close(model(rows[3:5]).logits, model(rows).logits[3:5])


@pytest.mark.parametrize("name", list(SPARSE))
def test_sparse_variants_add_their_balance_loss_in_training(name):
    model, rows = build_model(ModelConfig(name=name, **SPARSE[name]), SPEC), batch()
    with moecore.record(model) as recording:
        output = model.train()(rows)
    torch.testing.assert_close(output.losses["balance"], moecore.balance_loss(recording))
    assert output.losses["balance"] > 0
    assert not model.eval()(rows).losses
    silent = {name: dataclasses.replace(SPARSE[name][name], balance=0.0)}
    assert not build_model(ModelConfig(name=name, **silent), SPEC).train()(rows).losses


@pytest.mark.parametrize(
    "config",
    [
        *[ModelConfig(name=name) for name in ("mmoe", "ple", "home", "aw_moe", "moae")],
        *[ModelConfig(name=name, **settings) for name, settings in SPARSE.items()],
    ],
)
def test_dense_twins_cost_what_they_replace(config):
    model, twin = build_model(config, SPEC), build_model(dataclasses.replace(config, dense=True), SPEC)
    wanted, got = multiply_adds(model.network, SPEC), multiply_adds(twin.network, SPEC)
    assert got == pytest.approx(wanted, rel=0.01, abs=model.encoder.width + 64)
    assert not [module for module in twin.modules() if isinstance(module, (moecore.MultiGate, moecore.SparseMultiGate))]


def test_sparse_experts_cost_what_is_chosen():
    few, many = (
        build_model(ModelConfig(name="mmoe", mmoe=MMoEConfig(num_experts=count, experts=EXPERTS, top_k=2)), SPEC)
        for count in (4, 400)
    )
    width = few.encoder.width
    assert multiply_adds(few.network, SPEC) == 3 * (2 * 16 * width + 4 * width)
    assert multiply_adds(many.network, SPEC) == 3 * (2 * 16 * width + 400 * width)


def test_other_attributions_weigh_less():
    config = ModelConfig(name="moae", moae=MoAEConfig(main="buy", aux_weight=0.3))
    assert build_model(config, SPEC).task_weights == (0.3, 1.0, 0.3)
    assert build_model(ModelConfig(), SPEC).task_weights is None


@pytest.mark.parametrize(
    ("config", "spec", "line"),
    [
        (
            ModelConfig(name="aw_moe"),
            dataclasses.replace(SPEC, sequences=()),
            "model.aw_moe.behaviours=None: the data has no sequence",
        ),
        (
            ModelConfig(name="mmoe", mmoe=MMoEConfig(num_experts=2, top_k=3)),
            SPEC,
            "model.mmoe.top_k=3: must lie between 1 and 2",
        ),
        (ModelConfig(name="single_task", dense=True), SPEC, "model.dense=True: name=single_task has no experts"),
        (ModelConfig(name="moae", moae=MoAEConfig(main="x")), SPEC, "model.moae.main='x': is no task"),
        (ModelConfig(name="moae", moae=MoAEConfig(squeeze="dims")), SPEC, "model.moae.squeeze='dims': needs features"),
    ],
)
def test_settings_that_cannot_work_are_one_line_with_their_full_names(config, spec, line):
    with pytest.raises(ConfigError, match=line):
        build_model(config, spec)


def test_towers_are_those_of_the_settings():
    model = build_model(ModelConfig(tower=TowerConfig(units=(7, 5))), SPEC)
    assert model.network.towers.stack.units == (7, 5, 1)
    torch.testing.assert_close(
        model.network.towers.stack.biases[-1].sigmoid().flatten(), torch.tensor([0.3, 0.05, 0.1])
    )
