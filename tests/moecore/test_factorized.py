"""Features in small tables: what linear maps give, and hand back, is that of the features laid out."""

from __future__ import annotations

import pytest
import torch

from moecore.factorized import FactorizedInput, beside, dense, linear
from moecore.multigate import MultiGate
from moecore.multigate_experts import ExpertStack

B, SIZES, WIDTHS, REST, OUT = 40, (3, 5, 2), (4, 4, 6), 3, 7
D = sum(WIDTHS) + REST


def factorized(rest: int = REST, requires_grad: bool = True) -> FactorizedInput:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)

    tables = tuple(draw(rows, width) for rows, width in zip(SIZES, WIDTHS, strict=True))
    starts = (0, 3, 8)
    ids = [start + torch.randint(0, rows, (B,), generator=generator) for start, rows in zip(starts, SIZES, strict=True)]
    return FactorizedInput(tables, torch.stack(ids, 1), draw(B, rest))


def leaves(x: FactorizedInput) -> list[torch.Tensor]:
    return [*x.tables, x.rest]


def test_is_laid_out_row_by_row():
    x = factorized()
    for row, (a, b, c) in enumerate(x.ids.tolist()):
        parts = [x.tables[0][a], x.tables[1][b - 3], x.tables[2][c - 8], x.rest[row]]
        assert torch.equal(x.dense()[row], torch.cat(parts))
    assert dense(x.dense()) is not None
    assert torch.equal(dense(x), x.dense())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rest", [0, REST])
def test_maps_and_gradients_are_those_of_the_features_laid_out(bias, rest):
    x, generator = factorized(rest), torch.Generator().manual_seed(1)
    weight = torch.randn(OUT, D - REST + rest, generator=generator, dtype=torch.float64).requires_grad_()
    shift = torch.randn(OUT, generator=generator, dtype=torch.float64).requires_grad_() if bias else None
    wanted = [*leaves(x), weight, *([shift] if bias else [])]
    ours, theirs = linear(x, weight, shift), linear(x.dense(), weight, shift)
    torch.testing.assert_close(ours, theirs)
    pull = torch.randn(B, OUT, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad(ours, wanted, pull)
    torch.testing.assert_close(found, torch.autograd.grad(theirs, wanted, pull))


def test_further_columns_come_last():
    x, more = factorized(), torch.ones(B, 2, dtype=torch.float64)
    assert torch.equal(dense(beside(x, more, 2 * more)), beside(x.dense(), more, 2 * more))


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"norm": True, "weight": "sigmoid"}])
@pytest.mark.parametrize("expert", [{}, {"norm": True, "activation": "silu"}, {"bias": False}])
def test_experts_and_gates_read_it(options, expert):
    x = factorized()
    experts = {"shared": ExpertStack(3, D, [5, OUT], **expert), "a": ExpertStack(1, D, [5, OUT])}
    level = MultiGate(experts, {"a": ["shared", "a"], "b": ["shared"]}, D, **options).double()
    ours, theirs = level.mixtures(x), level.mixtures(x.dense(), x.dense())  # apart: experts, then gates
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(level.mixtures(x.dense()), theirs)
    wanted = [*leaves(x), *level.parameters()]
    found = torch.autograd.grad(ours.square().sum(), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(theirs.square().sum(), wanted))


def test_autocast_gives_what_a_linear_layer_gives():
    x = factorized(requires_grad=False)
    x = FactorizedInput(tuple(one.float() for one in x.tables), x.ids, x.rest.float())
    weight = torch.randn(OUT, D)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = linear(x, weight), linear(x.dense(), weight)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.05)
