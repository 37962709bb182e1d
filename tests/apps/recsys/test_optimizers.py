"""Row-wise updates against their formulas written out; what stays untouched; state that resumes."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apps.recsys.batch import TableSpec
from apps.recsys.models.features import Tables
from apps.recsys.optimizers import RankAdamW, make_optimizer, row_updates
from apps.recsys.train_settings import RankOptimConfig
from moecore.errors import ConfigError

IDS = [torch.tensor([1, 3, 3, 5]), torch.tensor([3, 0]), torch.tensor([5, 5, 5])]


def losses(table: torch.Tensor, ids: torch.Tensor, sparse: bool) -> torch.Tensor:
    rows = F.embedding(ids, table, sparse=sparse)
    return (rows * torch.arange(1.0, 1 + rows.numel()).view(rows.shape)).sin().sum()


def test_adagrad_keeps_a_sum_per_row():
    table = nn.Parameter(torch.randn(6, 3))
    expected, total = table.detach().clone(), torch.zeros(6)
    optimizer = RankAdamW([{"params": [table], "rows": "adagrad", "lr": 0.1}])
    for ids in IDS:
        optimizer.zero_grad()
        losses(table, ids, True).backward()
        optimizer.step()
        own = expected.clone().requires_grad_()
        losses(own, ids, False).backward()
        touched = ids.unique()
        total[touched] += own.grad[touched].square().mean(1)
        expected[touched] -= 0.1 * own.grad[touched] / (total[touched].sqrt() + 1e-8)[:, None]
    torch.testing.assert_close(table.detach(), expected)
    assert optimizer.state[table]["sum"].shape == (6,)


def test_lazy_adam_is_adam_where_every_row_is_touched():
    lazy, dense = (nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3)) for _ in range(2))
    first = RankAdamW([{"params": [lazy], "rows": "adam", "lr": 0.01, "weight_decay": 0.0}])
    second = torch.optim.Adam([dense], lr=0.01)
    for shift in range(4):
        ids = (torch.arange(4) + shift) % 4
        for table, optimizer, sparse in ((lazy, first, True), (dense, second, False)):
            optimizer.zero_grad()
            losses(table, ids, sparse).backward()
            optimizer.step()
    torch.testing.assert_close(lazy, dense)


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
def test_untouched_rows_stay_and_dense_parameters_are_adamw(rule):
    table, weight, same = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3)), None
    same = nn.Parameter(weight.detach().clone())
    before = table.detach().clone()
    groups = [{"params": [weight], "lr": 0.01}, {"params": [table], "rows": rule, "lr": 0.1, "weight_decay": 0.0}]
    optimizer, adamw = RankAdamW(groups), torch.optim.AdamW([same], lr=0.01)
    (F.embedding(torch.tensor([1, 2]), table, sparse=True) * weight).sum().backward()
    same.grad = weight.grad.clone()
    optimizer.step()
    adamw.step()
    torch.testing.assert_close(weight, same)
    assert table.grad.is_sparse
    changed = (table != before).any(1)
    assert changed.tolist() == [False, True, True, False, False, False]
    stays = table.detach().clone()
    optimizer.zero_grad()  # a row that is read without an effect, as rows of small tables are, is not touched
    (F.embedding(torch.arange(6), table, sparse=True) * (torch.arange(6) == 4)[:, None]).sum().backward()
    optimizer.step()
    assert (table != stays).any(1).tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
def test_state_goes_on_exactly(rule):
    table = nn.Parameter(torch.randn(6, 3))
    optimizer = RankAdamW([{"params": [table], "rows": rule, "lr": 0.1, "weight_decay": 0.0}])

    def step(one, its, ids):
        its.zero_grad()
        losses(one, ids, True).backward()
        its.step()

    step(table, optimizer, IDS[0])
    other = nn.Parameter(table.detach().clone())
    again = RankAdamW([{"params": [other], "rows": rule, "lr": 0.1, "weight_decay": 0.0}])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ids in IDS[1:]:
        step(table, optimizer, ids)
        step(other, again, ids)
    assert torch.equal(table, other)


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
def test_scaled_gradients_are_unscaled_and_infinite_ones_change_nothing(rule):
    scaler, tables = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for scaled in (True, False):
        table = nn.Parameter(torch.linspace(-1, 1, 18).view(6, 3))
        optimizer = RankAdamW([{"params": [table], "rows": rule, "lr": 0.1, "weight_decay": 0.0}], eps=0.5)
        for factor in (1.0, float("inf"), 2.0) if scaled else (1.0, 2.0):
            loss = losses(table, IDS[0], True) * factor
            optimizer.zero_grad()
            (scaler.scale(loss) if scaled else loss).backward()
            if scaled:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        tables.append(table.detach())
    torch.testing.assert_close(*tables)


def test_a_step_costs_the_same_for_a_large_table():
    def cost(rows: int) -> float:
        table = nn.Parameter(torch.zeros(rows, 16))
        optimizer = RankAdamW([{"params": [table], "rows": "adagrad", "lr": 0.1, "weight_decay": 0.0}])
        ids = torch.randint(0, rows, (4096,))
        times = []
        for _ in range(6):
            started = time.process_time()
            F.embedding(ids, table, sparse=True).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.process_time() - started)
        return min(times)

    assert cost(2_000_000) < 10 * cost(20_000)  # a hundred times the rows


def test_tables_are_dense_until_they_are_large():
    assert not row_updates(RankOptimConfig(), 1000)
    assert row_updates(RankOptimConfig(), 300_000)
    assert not row_updates(RankOptimConfig(tables="dense"), 10**8)
    assert row_updates(RankOptimConfig(tables="adam"), 10)
    assert not row_updates(RankOptimConfig(tables="adagrad"), 1000)
    assert row_updates(RankOptimConfig(tables="adagrad"), 300_000)


def test_adagrad_is_the_same_for_dense_gradients():
    tables = []
    for sparse in (True, False):
        table = nn.Parameter(torch.linspace(-1, 1, 18).view(6, 3))
        optimizer = RankAdamW([{"params": [table], "rows": "adagrad", "lr": 0.1, "weight_decay": 0.5}])
        for ids in IDS:
            optimizer.zero_grad()
            losses(table, ids, sparse).backward()
            optimizer.step()
        tables.append(table.detach())
    torch.testing.assert_close(*tables)
    assert torch.equal(tables[0][2], tables[1][2])  # a row that no id named stays as it was


def test_the_state_of_another_rule_is_one_line():
    made = {}
    for rule in ("dense", "adagrad"):
        tables = Tables([TableSpec("item", 5, 2)])
        made[rule] = make_optimizer(tables, RankOptimConfig(tables=rule), 4)["optimizer"]
    with pytest.raises(ConfigError, match=r"^optim\.tables='adagrad': .*trained with dense; go on with that$"):
        made["adagrad"].load_state_dict(made["dense"].state_dict())


@pytest.mark.parametrize(
    ("rule", "sparse", "expected"),
    [
        ("auto", True, (0.05, 0.0, "adagrad")),
        ("auto", False, (0.01, 0.3, None)),
        ("adagrad", True, (0.05, 0.0, "adagrad")),
        ("adagrad", False, (0.05, 0.0, "adagrad")),
        ("adam", True, (0.01, 0.0, "adam")),
        ("adam", False, (0.01, 0.3, None)),  # PCGrad needs dense gradients
        ("dense", False, (0.01, 0.3, None)),
    ],
)
def test_groups_have_their_own_rates(rule, sparse, expected):

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = Tables([TableSpec("item", 5, 2)], sparse=sparse)
            self.linear = nn.Linear(2, 2)

    config = RankOptimConfig(lr=0.01, weight_decay=0.1, table_decay=0.3, tables=rule, warmup=0)
    made = make_optimizer(Model(), config, 10)
    rates = [(g["lr"], g["weight_decay"], g["rows"]) for g in made["optimizer"].param_groups]
    assert rates == [(0.01, 0.1, None), (0.01, 0.0, None), expected]


def test_a_schedule_drives_tables_and_gradients_are_clipped():
    tables = Tables([TableSpec("item", 5, 2)], sparse=True)
    made = make_optimizer(tables, RankOptimConfig(tables="adagrad", warmup=2), 4)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(4):
        tables.look_up(2, torch.tensor([1, 2, 2])).sum().mul(30).backward()
        norm = nn.utils.clip_grad_norm_(tables.parameters(), 1.0)
        assert float(norm) == pytest.approx(30 * (2 * 1 + 2 * 4) ** 0.5)  # row 2 counts as the sum of its two
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert rates == pytest.approx([0.05 / 3, 0.1 / 3, 0.05, 0.025])
