"""Weightings against their formulas in NumPy, on toy problems, with tasks absent, and across a checkpoint."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

import moecore
from apps.vision.multitask.settings import TasksConfig
from apps.vision.multitask.weighting import DWA, WEIGHTINGS, GradNorm, Uncertainty, Weighting, make_weighting
from moecore.errors import ConfigError

TASKS = ("semseg", "depth", "edges")


def constant(*values: float, tasks: tuple[str, ...] = TASKS) -> dict[str, torch.Tensor]:
    return {task: torch.tensor(value) for task, value in zip(tasks, values, strict=False)}


def quadratics(x: torch.Tensor, scales: dict[str, float]) -> dict[str, torch.Tensor]:
    """Losses with minima at different corners; the gradient of each scales with its number."""
    return {task: scale * (x - i).square().sum() for i, (task, scale) in enumerate(scales.items())}


def test_fixed_weights_are_the_published_ones_or_those_given():
    losses = constant(0.5, 2.0, 0.1)
    published = make_weighting(TasksConfig(), TASKS)
    assert published.weights() == {"semseg": 1.0, "depth": 1.0, "edges": 50.0}
    assert float(published(losses)) == pytest.approx(0.5 + 2.0 + 5.0)
    given = make_weighting(TasksConfig(weights={"edges": 10, "semseg": 2, "depth": 0.5}), TASKS)
    assert given.weights() == {"semseg": 2.0, "depth": 0.5, "edges": 10.0}
    assert float(given(losses)) == pytest.approx(1.0 + 1.0 + 1.0)
    assert float(given(constant(0.5, 2.0))) == pytest.approx(2.0)
    assert not given.state_dict()


def test_a_weight_is_needed_for_every_task_or_for_none():
    with pytest.raises(ConfigError) as missing:
        make_weighting(TasksConfig(weights={"semseg": 1.0}), ("semseg", "depth"))
    assert str(missing.value) == (
        "tasks.weights={'semseg': 1.0}: no weight for depth; give one for every task, or none for the published ones"
    )
    with pytest.raises(ConfigError) as unknown:
        make_weighting(TasksConfig(weights={"semseg": 1.0, "dept": 2.0}), ("semseg", "depth"))
    assert str(unknown.value) == (
        "tasks.weights={'semseg': 1.0, 'dept': 2.0}: dept: no such task; there are semseg, parts, saliency, depth, "
        "normals, edges, classification"
    )
    spare = make_weighting(TasksConfig(weights={"semseg": 1.0, "depth": 3.0}), ("depth",))
    assert spare.weights() == {"depth": 3.0}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weighting_starts_from_the_base_weights_in_float32(name):
    weighting = make_weighting(TasksConfig(weighting=name), TASKS).eval()
    assert weighting.weights() == pytest.approx({"semseg": 1.0, "depth": 1.0, "edges": 50.0})
    half = {task: loss.to(torch.bfloat16) for task, loss in constant(0.5, 2.0, 0.25).items()}
    total = weighting(half)
    assert total.dtype == torch.float32
    assert total.shape == ()
    assert total.item() == pytest.approx(15.0)


def test_a_loss_without_a_weight_is_refused():
    with pytest.raises(ValueError, match="losses of normals: there are weights for semseg, depth, edges"):
        make_weighting(TasksConfig(), TASKS)({"normals": torch.ones(())})


def test_uncertainty_is_the_published_formula():
    weighting = Uncertainty({"semseg": 1.0, "depth": 2.0, "edges": 50.0})
    s = np.array([0.3, -0.7, 1.1], dtype=np.float32)
    with torch.no_grad():
        weighting.log_variance.copy_(torch.from_numpy(s))
    base, losses = np.array([1.0, 2.0, 50.0]), np.array([0.4, 1.5, 0.02])
    total = weighting(constant(*losses.tolist()))
    assert total.item() == pytest.approx((np.exp(-s) * base * losses + s / 2).sum(), rel=1e-6)
    assert list(weighting.weights().values()) == pytest.approx((np.exp(-s) * base).tolist())
    total.backward()
    np.testing.assert_allclose(weighting.log_variance.grad, 0.5 - np.exp(-s) * base * losses, rtol=1e-5)


def test_uncertainty_goes_to_one_half_over_the_loss_whatever_the_base_weight():
    weighting = Uncertainty({"semseg": 1.0, "depth": 7.0})
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        weighting(constant(0.2, 5.0)).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_variance.detach(), torch.tensor([math.log(0.4), math.log(70.0)]))
    assert weighting.weights() == pytest.approx({"semseg": 1 / 0.4, "depth": 1 / 10})


@pytest.mark.parametrize("absent", [{}, {"depth": torch.zeros(())}])
def test_uncertainty_of_an_absent_task_stays(absent):
    weighting = Uncertainty({"semseg": 1.0, "depth": 1.0})
    with torch.no_grad():
        weighting.log_variance.fill_(0.5)
    weighting({"semseg": torch.tensor(2.0), **absent}).backward()
    assert weighting.log_variance.grad[1] == 0
    assert weighting.log_variance.grad[0] != 0


def test_dwa_is_equation_7():
    weighting = DWA({"semseg": 1.0, "depth": 1.0, "edges": 50.0}, temperature=2.0)
    epochs = np.random.default_rng(0).uniform(0.5, 3.0, (5, 4, 3)).astype(np.float32)  # [epochs, batches, T]
    means = epochs.mean(1)
    for t, epoch in enumerate(epochs):
        factors = np.ones(3)
        if t >= 2:
            powers = np.exp(means[t - 1] / means[t - 2] / 2.0)
            factors = 3 * powers / powers.sum()
        for losses in epoch:
            assert list(weighting.weights().values()) == pytest.approx((factors * [1, 1, 50]).tolist(), rel=1e-5)
            total = weighting(constant(*losses.tolist()))
            assert total.item() == pytest.approx((factors * [1, 1, 50] * losses).sum(), rel=1e-5)
        weighting.eval()(constant(100.0, 1.0, 1.0))  # validation counts for nothing
        weighting.train().epoch_end()


def test_dwa_means_are_of_the_batches_and_epochs_with_labels():
    weighting = DWA({"semseg": 1.0, "depth": 1.0}, temperature=1.0)
    epochs = [
        [constant(4.0, 3.0), constant(2.0), constant(3.0, 0.0)],  # means 3 and 3
        [constant(6.0)],  # depth does not occur
        [constant(3.0, 6.0)],  # 3 after 6; 6 after 3
    ]
    for epoch in epochs:
        for losses in epoch:
            weighting(losses)
        weighting.epoch_end()
    powers = np.exp([3 / 6, 6 / 3])
    assert list(weighting.weights().values()) == pytest.approx((2 * powers / powers.sum()).tolist())


def reference_step(factors, first, base, losses, norms, alpha, step):
    """GradNorm's step in NumPy, task by task."""
    pulls = factors * base * norms
    pace = losses / first
    pace = pace / pace.mean()
    moved = factors.copy()
    for i in range(len(factors)):
        sign = np.sign(pulls[i] - pulls.mean() * pace[i] ** alpha)
        moved[i] = factors[i] * np.exp(-step * sign)
    return moved * factors.sum() / moved.sum()


def test_gradnorm_steps_are_those_of_the_formula():
    scales, base = {"semseg": 1.0, "depth": 20.0, "edges": 0.3}, np.array([1.0, 1.0, 50.0])
    weighting = GradNorm({"semseg": 1.0, "depth": 1.0, "edges": 50.0}, alpha=1.5, step=0.1)
    x = nn.Parameter(torch.tensor([3.0, -1.0]))
    optimizer = torch.optim.SGD([x], lr=1e-3)
    factors, first = np.ones(3), None
    for _ in range(5):
        at, values = x.detach().numpy().astype(np.float64), list(scales.values())
        losses = np.array([scale * ((at - i) ** 2).sum() for i, scale in enumerate(values)])
        norms = np.array([2 * scale * np.linalg.norm(at - i) for i, scale in enumerate(values)])
        first = losses if first is None else first
        total = weighting(quadratics(x, scales), [x])
        assert total.item() == pytest.approx((factors * base * losses).sum(), rel=1e-5)  # weighed before the step
        factors = reference_step(factors, first, base, losses, norms, 1.5, 0.1)
        assert list(weighting.weights().values()) == pytest.approx((factors * base).tolist(), rel=1e-5)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert float(weighting.factors.sum()) == pytest.approx(3)


def test_gradnorm_makes_norms_of_very_different_losses_equal():
    scales = {"semseg": 1.0, "depth": 1000.0}
    weighting = GradNorm({"semseg": 1.0, "depth": 1.0}, alpha=0.0)
    x = nn.Parameter(torch.tensor([2.0, -1.5]))
    for _ in range(200):
        weighting(quadratics(x, scales), [x])
    weights = weighting.weights()
    pulls = [
        weights[task] * torch.autograd.grad(loss, x)[0].norm().item() for task, loss in quadratics(x, scales).items()
    ]
    assert pulls[0] == pytest.approx(pulls[1], rel=0.1)
    assert sum(weights.values()) == pytest.approx(2, abs=1e-4)


def test_gradnorm_favours_the_task_that_learns_slowly():
    x = nn.Parameter(torch.tensor([1.0]))
    weightings = {alpha: GradNorm({"semseg": 1.0, "depth": 1.0}, alpha) for alpha in (0.0, 1.5)}
    for scale in (1.0, *[0.25] * 100):  # the first task's loss has fallen to a quarter, its gradient has not
        losses = {"semseg": x.sum() + scale - 1, "depth": x.sum()}
        for weighting in weightings.values():
            weighting(losses, [x])
    even, favoured = (weighting.weights() for weighting in weightings.values())
    assert even["depth"] == pytest.approx(even["semseg"], rel=0.1)
    assert favoured["semseg"] == pytest.approx((0.25 / 0.625) ** 1.5, rel=0.05)  # its target: the mean norm is 1
    assert favoured["depth"] == pytest.approx(2 - favoured["semseg"])


@pytest.mark.parametrize("absent", ["missing", "zero", "constant", "elsewhere"])
def test_gradnorm_leaves_absent_tasks_as_they_are(absent):
    weighting = GradNorm(dict.fromkeys(TASKS, 1.0), alpha=1.5, step=0.1)
    x, other = nn.Parameter(torch.tensor([3.0, -1.0])), nn.Parameter(torch.ones(2))
    scales = {"semseg": 1.0, "depth": 20.0, "edges": 0.3}
    weighting(quadratics(x, scales), [x])
    before = {name: value.clone() for name, value in weighting.state_dict().items()}
    losses = quadratics(x, scales)
    edges = {"zero": x.sum() * 0, "constant": torch.tensor(2.0), "elsewhere": other.square().sum()}.get(absent)
    losses = {"semseg": losses["semseg"], "depth": losses["depth"]} | ({} if edges is None else {"edges": edges})
    weighting(losses, [x]).backward()
    after = weighting.state_dict()
    assert after["factors"][2] == before["factors"][2]
    assert after["first"].equal(before["first"])
    assert (after["factors"][:2] != before["factors"][:2]).all()
    assert float(after["factors"].sum()) == pytest.approx(3)


def test_gradnorm_takes_the_first_loss_of_a_task_when_it_comes():
    weighting = GradNorm(dict.fromkeys(TASKS, 1.0))
    x = nn.Parameter(torch.tensor([3.0]))
    weighting({"semseg": 2 * x.sum()}, [x])  # alone: nothing to balance
    assert weighting.factors.tolist() == [1, 1, 1]
    weighting({"semseg": x.sum(), "depth": 5 * x.sum()}, [x])
    assert weighting.first.tolist() == [6, 15, 0]
    weighting({}, [x])
    assert weighting.state_dict()["factors"].isfinite().all()


def test_gradnorm_moves_in_training_only_and_needs_shared_parameters():
    weighting, x = GradNorm({"semseg": 1.0, "depth": 1.0}), nn.Parameter(torch.tensor([3.0]))
    losses = quadratics(x, {"semseg": 1.0, "depth": 20.0})
    with pytest.raises(ValueError, match=r"shared=\(\)"):
        weighting(losses)
    weighting.eval()(losses)
    weighting.train()
    with torch.no_grad():
        weighting(losses, [x])
    assert weighting.factors.tolist() == [1, 1]
    assert x.grad is None


def test_gradnorm_skips_norms_that_overflowed():
    weighting, x = GradNorm({"semseg": 1.0, "depth": 1.0, "edges": 1.0}), nn.Parameter(torch.tensor([3.0]))
    weighting({"semseg": x.sum(), "depth": 9 * x.sum(), "edges": x.sum() * math.inf}, [x])
    assert weighting.factors.isfinite().all()
    assert weighting.factors[2] == 1
    assert weighting.factors[0] > 1 > weighting.factors[1]


def test_gradnorm_is_float32_under_autocast():
    torch.manual_seed(0)
    trunk, heads = nn.Linear(8, 8), nn.ModuleDict({"semseg": nn.Linear(8, 1), "depth": nn.Linear(8, 1)})
    weighting = GradNorm({"semseg": 1.0, "depth": 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        hidden = trunk(torch.randn(4, 8))
        assert hidden.dtype == torch.bfloat16
        losses = {task: head(hidden).square().mean() * 1e-3 for task, head in heads.items()}
        total = weighting(losses, list(trunk.parameters()))
        norm = weighting._norm(losses["semseg"], list(trunk.parameters()))
    assert (total.dtype, norm.dtype, weighting.factors.dtype) == (torch.float32,) * 3
    grads = torch.autograd.grad(losses["semseg"], list(trunk.parameters()), retain_graph=True)
    assert float(norm) == pytest.approx(math.sqrt(sum(float(grad.square().sum()) for grad in grads)), rel=1e-5)
    assert (weighting.factors != 1).all()
    total.backward()
    assert all(p.grad is not None for p in [*trunk.parameters(), *heads.parameters()])


def test_gradnorm_on_the_experts_of_an_moe_layer_leaves_the_gradients_of_training_alone():
    moe = moecore.MoE.build(8, num_experts=4, top_k=2, hidden=8, score="per_task", score_options={"num_tasks": 3})
    trunk, x = nn.Linear(8, 8), torch.randn(2, 5, 8)
    parameters = [*trunk.parameters(), *moe.parameters()]

    def losses() -> dict[str, torch.Tensor]:
        tokens, found = trunk(x), {}  # computed once for all tasks
        for i, task in enumerate(TASKS):
            with moecore.routing_context(task=i):
                found[task] = 10**i * moe(tokens).square().mean()
        return found

    weighting = GradNorm(dict.fromkeys(TASKS, 1.0))
    weighting(losses(), list(moe.experts.parameters()))
    weights = weighting.weights()
    assert weights["semseg"] > 1 > weights["edges"]
    plain = torch.autograd.grad(sum(weights[task] * loss for task, loss in losses().items()), parameters)
    weighting(losses(), list(moe.experts.parameters())).backward()
    for parameter, grad in zip(parameters, plain, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


class Training:
    """A few steps on quadratic losses, with a task absent now and then, and epochs of three batches."""

    def __init__(self, name: str) -> None:
        self.weighting = make_weighting(TasksConfig(weighting=name), TASKS)
        self.x = nn.Parameter(torch.tensor([3.0, -1.0]))
        self.optimizer = torch.optim.AdamW([self.x, *self.weighting.parameters()], lr=0.05)

    def steps(self, first: int, last: int) -> list[float]:
        totals = []
        for step in range(first, last):
            losses = quadratics(self.x, {"semseg": 1.0 + step % 3, "depth": 20.0, "edges": 0.3})
            if step % 4 == 1:
                del losses["depth"]
            total = self.weighting(losses, [self.x])
            self.optimizer.zero_grad()
            total.backward()
            self.optimizer.step()
            totals.append(total.item())
            if step % 3 == 2:
                self.weighting.epoch_end()
        return totals

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = {"weighting": self.weighting.state_dict(), "x": self.x, "optimizer": self.optimizer.state_dict()}
        torch.save(parts, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        parts = torch.load(file, weights_only=True)
        self.weighting.load_state_dict(parts["weighting"])
        self.optimizer.load_state_dict(parts["optimizer"])
        with torch.no_grad():
            self.x.copy_(parts["x"])


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("stop", [1, 5, 9, 10])
def test_a_checkpoint_at_any_batch_continues_bit_for_bit(name, stop):
    whole, before, after = Training(name), Training(name), Training(name)
    totals = whole.steps(0, 16)
    before.steps(0, stop)
    after.load(before.save())
    assert after.steps(stop, 16) == totals[stop:]
    assert after.weighting.weights() == whole.weighting.weights()
    if name != "fixed":
        assert whole.weighting.weights() != Training(name).weighting.weights()


def test_every_weighting_can_be_chosen():
    kinds = {name: type(make_weighting(TasksConfig(weighting=name), TASKS)) for name in WEIGHTINGS}
    assert kinds == {"fixed": Weighting, "uncertainty": Uncertainty, "dwa": DWA, "gradnorm": GradNorm}
    settings = TasksConfig(weighting="dwa", dwa_temperature=3.0, gradnorm_alpha=0.5)
    assert WEIGHTINGS["dwa"]({"depth": 1.0}, settings).temperature == 3.0
    assert WEIGHTINGS["gradnorm"]({"depth": 1.0}, settings).alpha == 0.5
