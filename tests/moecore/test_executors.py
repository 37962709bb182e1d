"""Every executor gives the numbers of the reference, outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

import moecore
from moecore.executors.grouped_mm import why_not
from moecore.routing import Assignment

D, F = 8, 16


def bank_of(kind: str, experts: int) -> moecore.ExpertBank:
    banks = {
        "mlp": lambda: moecore.MLPBank(experts, D, F),
        "mlp_relu_nobias": lambda: moecore.MLPBank(experts, D, F, activation="relu", bias=False),
        "mlp_gelu_tanh": lambda: moecore.MLPBank(experts, D, F, activation="gelu_tanh"),
        "mlp_other_activation": lambda: moecore.MLPBank(experts, D, F, activation=torch.nn.PReLU()),
        "mlp_narrowing": lambda: moecore.MLPBank(experts, D, F, out_width=12),
        "glu": lambda: moecore.GLUBank(experts, D, F),
        "glu_bias": lambda: moecore.GLUBank(experts, D, F, activation="gelu", bias=True),
        "constant": lambda: moecore.ConstantBank(experts, D, "constant"),
        "copy": lambda: moecore.ConstantBank(experts, D, "copy"),
        "mixed": lambda: moecore.MixedBank(
            [moecore.MLPBank(experts - 1, D, F), moecore.ConstantBank(1, D, "zero")]
            if experts > 1
            else [moecore.MLPBank(1, D, F)]
        ),
    }
    return banks[kind]()


BANK_KINDS = [
    "mlp",
    "mlp_relu_nobias",
    "mlp_gelu_tanh",
    "mlp_other_activation",
    "mlp_narrowing",
    "glu",
    "glu_bias",
    "constant",
    "copy",
    "mixed",
]


def routed(case: str, tokens: int, experts: int, k: int) -> Assignment:
    """Assignments that cover the corners."""
    choose = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]) if tokens else None
    choose = torch.zeros(0, k, dtype=torch.long) if choose is None else choose
    if case == "random":
        return Assignment(choose, tokens, experts)
    if case == "one_expert":
        return Assignment(torch.zeros(tokens, 1, dtype=torch.long), tokens, experts)
    if case == "idle_expert":
        return Assignment(choose % max(experts - 1, 1), tokens, experts)
    if case == "every_expert":
        return Assignment(torch.arange(experts).expand(tokens, experts), tokens, experts, complete=True)
    if case == "empty_slots":
        return Assignment(choose, tokens, experts, valid=torch.rand(tokens, k) > 0.5)
    if case == "all_slots_empty":
        return Assignment(choose, tokens, experts, valid=torch.zeros(tokens, k, dtype=torch.bool))
    capacity = max(tokens * k // experts, min(tokens, 1))
    token = torch.rand(experts, tokens).argsort(1)[:, :capacity]
    expert = torch.arange(experts)[:, None].expand_as(token)
    flat = Assignment(expert.flatten(), tokens, experts, token=token.flatten())
    if case == "expert_choice":
        return flat
    return Assignment(flat.expert, tokens, experts, token=flat.token, valid=torch.rand(flat.expert.shape) > 0.3)


CASES = [
    "random",
    "one_expert",
    "idle_expert",
    "every_expert",
    "empty_slots",
    "all_slots_empty",
    "expert_choice",
    "expert_choice_masked",
]


def run(execute, x, bank, assignment, weights, grad):
    """Output, and gradients of input, weights and bank."""
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    bank.zero_grad()
    y = execute(x, bank, assignment, weights)
    if y.requires_grad:  # nobody's output depends on anything when every slot is empty
        (y * grad).sum().backward()
    grads = {"x": x.grad, "weights": weights.grad, **{n: p.grad for n, p in bank.named_parameters()}}
    return y.detach(), {n: torch.zeros(()) if g is None else g.clone() for n, g in grads.items()}


def assert_like_reference(executor, x, bank, assignment, rtol):
    weights = torch.rand(assignment.expert.shape, dtype=x.dtype)
    grad = torch.randn(*x.shape[:-1], bank.out_width, dtype=x.dtype)
    y, grads = run(moecore.EXECUTORS[executor], x, bank, assignment, weights, grad)
    expected, expected_grads = run(moecore.run_reference, x, bank, assignment, weights, grad)
    assert y.shape == expected.shape
    scale = lambda t: rtol * max(1.0, t.abs().max().item() if t.numel() else 0.0)  # noqa: E731
    torch.testing.assert_close(y, expected, rtol=0, atol=scale(expected))
    for name, g in expected_grads.items():
        torch.testing.assert_close(
            grads[name].expand_as(g) if grads[name].dim() == 0 else grads[name],
            g.expand_as(grads[name]) if g.dim() == 0 else g,
            rtol=0,
            atol=scale(g),
            check_dtype=False,
            msg=lambda m, name=name: f"gradient of {name}: {m}",
        )


GRID = [
    (executor, dtype)
    for executor, dtype in itertools.product(moecore.EXECUTORS, (torch.float64, torch.float32))
    if not (executor == "grouped_mm" and dtype == torch.float64)
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("executor", "dtype"), GRID, ids=str)
@pytest.mark.parametrize("bank", BANK_KINDS)
def test_matches_reference(executor, dtype, bank, case):
    assignment = routed(case, tokens=9, experts=4, k=2)
    bank = bank_of(bank, 4).to(dtype)
    assert_like_reference(
        executor, torch.randn(9, D, dtype=dtype), bank, assignment, 1e-10 if dtype.itemsize == 8 else 1e-5
    )


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bank", ["mlp", "glu", "mlp_other_activation", "mixed"])
@pytest.mark.parametrize("executor", moecore.EXECUTORS)
def test_few_tokens_and_experts(executor, bank, case, experts, tokens):
    assignment = routed(case, tokens, experts, k=1)
    assert_like_reference(executor, torch.randn(tokens, D), bank_of(bank, experts), assignment, 1e-5)


@pytest.mark.parametrize("executor", moecore.EXECUTORS)
@pytest.mark.parametrize("bank", ["mlp", "glu", "mlp_other_activation", "segment", "constant", "mixed"])
def test_units_of_several_tokens(executor, bank):
    bank = moecore.SegmentBank(4, 3, D, F) if bank == "segment" else bank_of(bank, 4)
    assignment = routed("random", 7, 4, 2)
    assert_like_reference(executor, torch.randn(7, 3, D), bank, assignment, 1e-5)


@pytest.mark.parametrize("executor", moecore.EXECUTORS)
def test_input_need_not_be_contiguous(executor):
    x = torch.randn(D, 9).t()
    assert not x.is_contiguous()
    for case in ("random", "every_expert"):
        assert_like_reference(executor, x, bank_of("glu_bias", 4), routed(case, 9, 4, 2), 1e-5)


@pytest.mark.parametrize("executor", moecore.EXECUTORS)
def test_rows_without_filled_slots_are_zero(executor):
    assignment = routed("all_slots_empty", 5, 4, 2)
    y = moecore.EXECUTORS[executor](torch.randn(5, D), bank_of("mlp", 4), assignment, torch.rand(5, 2))
    assert torch.equal(y, torch.zeros(5, D))


@pytest.mark.parametrize("executor", moecore.EXECUTORS)
@pytest.mark.parametrize("bank", ["mlp", "glu", "glu_bias", "mlp_other_activation", "constant"])
def test_autocast_runs_experts_in_bfloat16(executor, bank):
    bank, assignment = bank_of(bank, 4), routed("random", 16, 4, 2)
    x, weights = torch.randn(16, D, requires_grad=True), torch.rand(16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = moecore.execute(x, bank, assignment, weights, executor)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    expected = moecore.run_reference(x.detach(), bank, assignment, weights)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    assert x.grad.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in bank.parameters())


@pytest.mark.parametrize("executor", moecore.EXECUTORS)
def test_gradients_are_skipped_where_not_needed(executor):
    bank, assignment = bank_of("glu", 4), routed("random", 9, 4, 2)
    x, weights = torch.randn(9, D), torch.rand(9, 2, requires_grad=True)
    bank.requires_grad_(False)
    y = moecore.EXECUTORS[executor](x, bank, assignment, weights)
    y.sum().backward()
    assert weights.grad is not None
    with torch.no_grad():
        assert moecore.EXECUTORS[executor](x, bank, assignment, weights).grad_fn is None


@pytest.mark.parametrize("executor", moecore.EXECUTORS)
def test_inference_mode_then_training(executor):
    """Scratch memory made in inference mode must stay usable outside."""
    moecore.release_workspace()
    bank, assignment = bank_of("glu", 4), routed("random", 9, 4, 2)
    x, weights = torch.randn(9, D), torch.rand(9, 2)
    with torch.inference_mode():
        expected = moecore.EXECUTORS[executor](x, bank, assignment, weights).clone()
    y = moecore.EXECUTORS[executor](x.requires_grad_(), bank, assignment, weights)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), expected.clone())


class HalvedBank(moecore.ExpertBank):
    """Weights made anew in every call, as of a factorised bank."""

    def __init__(self) -> None:
        super().__init__(4, D)
        self.first, self.second = (torch.nn.Parameter(torch.randn(4, D, D)) for _ in range(2))

    def forward(self, x, layout):
        return layout.linear(layout.linear(x, self.first / 2, None).relu(), self.second / 2, None)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("executor", moecore.EXECUTORS)
def test_weights_need_not_outlive_their_use(executor, mode):
    bank, assignment, weights = HalvedBank(), routed("random", 9, 4, 2), torch.rand(9, 2)
    x = torch.randn(9, D)
    each = [(x @ first.t() / 2).relu() @ second.t() / 2 for first, second in zip(bank.first, bank.second, strict=True)]
    expected = (torch.stack(each) * assignment.dense(weights).t()[..., None]).sum(0)
    with mode():
        torch.testing.assert_close(moecore.EXECUTORS[executor](x, bank, assignment, weights), expected)


@pytest.mark.parametrize("executor", moecore.EXECUTORS)
def test_backward_twice_through_retained_graph(executor):
    bank, assignment = bank_of("glu", 4), routed("random", 9, 4, 2)
    x = torch.randn(9, D, requires_grad=True)
    y = moecore.EXECUTORS[executor](x, bank, assignment, torch.rand(9, 2))
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(first, second)


def test_two_layers_between_forward_and_backward_do_not_share_scratch():
    banks = [bank_of("glu", 4), bank_of("glu", 4)]
    assignment, weights = routed("random", 9, 4, 2), torch.rand(9, 2)
    x = torch.randn(9, D, requires_grad=True)

    def both(execute):
        y = execute(execute(x, banks[0], assignment, weights), banks[1], assignment, weights)
        return y, torch.autograd.grad(y.sum(), x)[0]

    for ours, expected in zip(both(moecore.EXECUTORS["sorted"]), both(moecore.run_reference), strict=True):
        torch.testing.assert_close(ours, expected)


def test_same_seed_same_result():
    bank, assignment = bank_of("mlp", 4), routed("random", 33, 4, 2)
    x, weights = torch.randn(33, D), torch.rand(33, 2)
    results = [run(moecore.EXECUTORS["sorted"], x, bank, assignment, weights, torch.ones(33, D)) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in results[0][1])


def test_grouped_mm_says_what_it_cannot_do():
    assert "float64" in why_not(torch.randn(2, D, dtype=torch.float64), bank_of("mlp", 2).double())
    odd = moecore.MLPBank(2, 7, 16)
    with pytest.raises(ValueError, match=r"grouped_mm.*multiple of 16 bytes.*sorted"):
        moecore.EXECUTORS["grouped_mm"](torch.randn(3, 7), odd, routed("random", 3, 2, 1), torch.rand(3, 1))


def test_unknown_executor_is_refused():
    with pytest.raises(moecore.ConfigError, match="executor='fast': choose one of auto, dense"):
        moecore.execute(torch.randn(3, D), bank_of("mlp", 2), routed("random", 3, 2, 1), torch.rand(3, 1), "fast")
