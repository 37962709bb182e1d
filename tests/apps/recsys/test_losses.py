"""Losses as written out row by row; conditional tasks; ways to balance tasks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from apps.recsys.balancing import DWA, GradNorm, PCGrad, Uncertainty, gradient_cosines, make_balance, projected
from apps.recsys.batch import TaskSpec
from apps.recsys.losses import log_probabilities, task_losses
from apps.recsys.train_settings import LossConfig

NAN = float("nan")
TASKS = (
    TaskSpec("click", "watch", None, 1.0, 0.3),
    TaskSpec("buy", "act", "click", 1.0, 0.1),
    TaskSpec("again", "act", "buy", 1.0, 0.02),
)
LOGITS = torch.tensor([[0.5, -1.0, 2.0], [-2.0, 0.3, 0.1], [1.0, 1.0, -3.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, NAN]], dtype=torch.float64)


def bce(p: float, y: float) -> float:
    return -math.log(p) if y else -math.log(1 - p)


def test_probabilities_follow_the_chain():
    p = LOGITS.sigmoid()
    expected = torch.stack([p[:, 0], p[:, 0] * p[:, 1], p.prod(1)], 1)
    torch.testing.assert_close(log_probabilities(LOGITS, TASKS).exp(), expected)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_chained_losses_are_over_all_rows_inside(gamma):
    p = log_probabilities(LOGITS, TASKS).exp()
    found = task_losses(LOGITS, LABELS, TASKS, LossConfig(focal_gamma=gamma))
    for t in range(3):
        terms = []
        for row in range(4):
            y, q = float(LABELS[row, t]), float(p[row, t])
            if not math.isnan(y):
                terms.append(bce(q, y) * ((1 - q) if y else q) ** gamma)
        assert float(found[t]) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_without_a_chain_only_rows_whose_condition_holds_count():
    p = LOGITS.sigmoid()
    found = task_losses(LOGITS, LABELS, TASKS, LossConfig(chain=False))
    assert float(found[1]) == pytest.approx(sum(bce(float(p[r, 1]), float(LABELS[r, 1])) for r in (0, 2, 3)) / 3)
    assert float(found[2]) == pytest.approx(bce(float(p[2, 2]), 1))


def test_extreme_logits_and_empty_tasks_stay_finite():
    logits = torch.tensor([[80.0, 80.0, -80.0], [-80.0, 80.0, 80.0]], requires_grad=True)
    labels = torch.tensor([[0.0, 0.0, NAN], [1.0, 1.0, NAN]])
    losses = task_losses(logits, labels, TASKS, LossConfig())
    losses.sum().backward()
    assert losses.isfinite().all()
    assert losses[2] == 0
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] > 0  # a sure mistake still has a gradient
    assert logits.grad[1, 0] < 0


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_conversion_that_was_sure_and_failed_teaches_all_that_led_to_it(gamma):
    logits = torch.tensor([[30.0, 30.0, 25.0]], requires_grad=True)
    labels = torch.tensor([[NAN, NAN, 0.0]])
    loss = task_losses(logits, labels, TASKS, LossConfig(focal_gamma=gamma))[2]
    loss.backward()
    exact = -math.log(-math.expm1(-2 * math.log1p(math.exp(-30)) - math.log1p(math.exp(-25))))
    assert float(loss.detach()) == pytest.approx(exact, rel=1e-6)
    shares = torch.tensor([math.exp(-30), math.exp(-30), math.exp(-25)])
    torch.testing.assert_close(logits.grad[0], shares / shares.sum())  # of the chance that it fails there


def test_balanced_classes_weigh_alike():
    tasks = (TaskSpec("rare", "all", None, 1.0, 0.25),)
    labels = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    found = task_losses(torch.zeros(4, 1), labels, tasks, LossConfig(positive_weight="balanced"))
    assert float(found) == pytest.approx(math.log(2))  # half from the one positive, half from the three negatives
    more = task_losses(torch.full((4, 1), -1.0), labels, tasks, LossConfig(positive_weight="balanced"))
    assert float(more) == pytest.approx((math.log1p(math.e) + math.log1p(math.exp(-1))) / 2)


@pytest.mark.parametrize(("chain", "rate"), [(True, 0.3 * 0.1), (False, 0.1)])
def test_balanced_conditional_tasks_know_over_which_rows_they_are_trained(chain, rate):
    logits, labels = torch.zeros(1, 3), torch.tensor([[1.0, 1.0, NAN]])
    plain, balanced = (
        task_losses(logits, labels, TASKS, LossConfig(chain=chain, positive_weight=weight))[1]
        for weight in ("none", "balanced")
    )
    assert float(balanced) == pytest.approx(float(plain) * 0.5 / rate)


class Two(nn.Module):
    """A shared layer and one of each task."""

    def __init__(self):
        super().__init__()
        self.shared, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        h = self.shared(x).tanh()
        return torch.stack([(self.a(h) - 1).square().mean(), (self.b(h) + 1).square().mean()])


def test_uncertainty_is_the_published_sum_and_learns():
    balance = Uncertainty([1.0, 2.0])
    with torch.no_grad():
        balance.log_variance.copy_(torch.tensor([0.5, -1.0]))
    value = balance(torch.tensor([3.0, 0.2]))
    expected = math.exp(-0.5) * 3 + 0.25 + 2 * (math.exp(1) * 0.2 - 0.5)
    assert float(value.detach()) == pytest.approx(expected)
    value.backward()
    assert balance.log_variance.grad[0] < 0  # a large loss raises its variance


def test_dwa_weighs_tasks_that_stopped_falling():
    balance = DWA([1.0, 1.0], temperature=2.0)
    for losses in ([2.0, 2.0], [1.0, 2.0]):
        assert balance.weights().tolist() == [1, 1]
        balance(torch.tensor(losses))
        balance.end_epoch()
    share = torch.tensor([0.5 / 2, 1.0 / 2]).softmax(0) * 2
    torch.testing.assert_close(balance.weights(), share)
    again = DWA([1.0, 1.0])
    again.load_state_dict(balance.state_dict())
    torch.testing.assert_close(again.weights(), share)


def test_gradnorm_moves_weights_towards_equal_norms():
    torch.manual_seed(0)
    model, balance, x = Two(), GradNorm([1.0, 1.0], alpha=0.0, lr=0.05), torch.randn(64, 3)
    with torch.no_grad():
        model.a.weight.mul_(8)  # the gradient of task a on the shared layer is far larger
    parameters = list(model.parameters())
    for _ in range(40):
        model.zero_grad()
        balance.backward(model.losses(x), torch.zeros(()), parameters)
    assert float(balance.weights.sum()) == pytest.approx(2)
    assert balance.weights[0] < 0.5 < balance.weights[1]


def test_projected_gradients_do_not_conflict():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    first, second = projected([a, b])
    torch.testing.assert_close(first, a - (a @ b) / (b @ b) * b)
    assert float(first @ b) == pytest.approx(0, abs=1e-6)
    assert float(second @ a) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(projected([a, -b])[0], a)  # no conflict, no change


def test_pcgrad_projects_shared_parameters_only():
    torch.manual_seed(0)
    model, x = Two(), torch.randn(32, 3)
    with torch.no_grad():
        model.b.weight.copy_(model.a.weight)  # one wants more of what the other wants less of
    parameters = list(model.parameters())
    assert gradient_cosines(model.losses(x), parameters)[0, 1] < 0
    alone = [torch.autograd.grad(loss, parameters, None, True, allow_unused=True) for loss in model.losses(x)]
    PCGrad([1.0, 1.0]).backward(model.losses(x), torch.zeros(()), parameters)
    torch.testing.assert_close(model.a.weight.grad, alone[0][2])
    torch.testing.assert_close(model.b.weight.grad, alone[1][4])
    vectors = [torch.cat([g.flatten() for g in grads[:2]]) for grads in alone]
    expected = sum(projected(vectors))
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in parameters[:2]]), expected)


BALANCES = ["static", "uncertainty", "dwa", "gradnorm", "pcgrad"]


@pytest.mark.parametrize("name", BALANCES)
@pytest.mark.parametrize("absent", ["rows", "sharing"])
def test_tasks_without_rows_or_without_a_shared_parameter(name, absent):
    torch.manual_seed(0)
    model, balance, x = Two(), make_balance(LossConfig(balancing=name), [1.0, 1.0]), torch.randn(16, 3)
    present = torch.tensor([1.0, 0.0 if absent == "rows" else 1.0])
    for _ in range(3):
        h = model.shared(x).tanh()
        losses = model.losses(x) if absent == "rows" else torch.stack([model.a(h).mean(), model.b(x.new_ones(4)).sum()])
        model.zero_grad()
        balance.backward(losses * present, torch.zeros(()), list(model.parameters()))
        balance.end_epoch()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.a.weight.grad.abs().sum() > 0
    assert all(value.isfinite().all() for value in balance.state_dict().values())
    if name in ("dwa", "gradnorm"):
        weights = balance.weights() if name == "dwa" else balance.weights
        torch.testing.assert_close(weights, torch.ones(2), rtol=0.2, atol=0)


def test_cosines_without_a_shared_parameter():
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    losses = torch.stack([first(torch.ones(2)).sum(), second(torch.ones(2)).sum()])
    torch.testing.assert_close(gradient_cosines(losses, [*first.parameters(), *second.parameters()]), torch.eye(2))


@pytest.mark.parametrize("name", BALANCES)
def test_every_balance_trains(name):
    torch.manual_seed(0)
    model, balance, x = Two(), make_balance(LossConfig(balancing=name), [1.0, 0.5]), torch.randn(64, 3)
    optimizer = torch.optim.Adam([*model.parameters(), *balance.parameters()], lr=0.02)
    before = float(model.losses(x).detach().sum())
    for _ in range(60):
        optimizer.zero_grad()
        balance.backward(model.losses(x), torch.zeros(()), list(model.parameters()))
        optimizer.step()
        balance.end_epoch()
    assert float(model.losses(x).detach().sum()) < before / 2
