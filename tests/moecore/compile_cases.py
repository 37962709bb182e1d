"""What `test_compile.py` runs in a process without shape checks; pytest collects this file only when named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moecore
from moecore.executors.grouped_mm import _TRACED
from moecore.layer import TRACED

D, E = 16, 4


def layer(**options) -> moecore.MoE:
    torch.manual_seed(0)
    moe = moecore.MoE.build(D, **{"num_experts": E, "top_k": 2, "hidden": 32, **options})
    nn.init.normal_(moe.router.score.weight)
    return moe


def results(call, moe: moecore.MoE, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and every gradient."""
    moe.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in moe.parameters())]


def assert_compiles(moe: moecore.MoE, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(moe, fullgraph=TRACED, backend=backend)
    for shape in ((2, 5, D), (3, 7, D)):
        x = torch.randn(shape)
        for ours, theirs in zip(results(compiled, moe, x), results(moe, moe, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("executor", "options"),
    [
        ("sorted", {"shared_hidden": 8}),
        ("sorted", {"select": "top_p", "glu": True}),
        ("dense", {"shared_hidden": 8}),
        ("grouped_mm", {"shared_hidden": 8}),
    ],
    ids=str,
)
def test_compiles_as_one_graph_and_equals_eager(executor, options):
    moe = layer(executor=executor, **options)
    if executor == "grouped_mm" and TRACED and torch.float32 not in _TRACED:
        with pytest.raises(Exception, match="compiles grouped GEMMs in bfloat16 only, not in float32"):
            assert_compiles(moe, "aot_eager")
    else:
        assert_compiles(moe, "aot_eager")


def test_compiles_grouped_gemms_in_bfloat16():
    moe = layer(executor="grouped_mm", shared_hidden=8).bfloat16()
    x = torch.randn(3, 7, D, dtype=torch.bfloat16)
    compiled = torch.compile(moe, fullgraph=TRACED, backend="aot_eager")
    torch.testing.assert_close(compiled(x), moe(x), rtol=2e-2, atol=2e-2)


def test_a_compiled_layer_follows_the_context():
    moe = layer(score="per_task", score_options={"num_tasks": 3})
    x, compiled = torch.randn(6, D), torch.compile(moe, fullgraph=TRACED, backend="aot_eager")
    for task in (0, 2, torch.tensor([0, 1, 2, 0, 1, 2]), 1):
        with moecore.routing_context(task=task):
            torch.testing.assert_close(compiled(x), moe(x))
    for allowed in ([True, False, True, True], [False, True, True, True]):
        with moecore.routing_context(task=0, allowed=torch.tensor(allowed)):
            torch.testing.assert_close(compiled(x), moe(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*TF32:UserWarning")
def test_inductor_equals_eager():
    assert_compiles(layer(executor="sorted", shared_hidden=8), "inductor")


@pytest.mark.parametrize(
    "options",
    [{}, {"select": "top_p", "shared_hidden": 8}, {"score": "centroid"}, {"unit": "sequence"}],
    ids=str,
)
def test_exports_with_any_number_of_tokens(options):
    torch.manual_seed(0)
    moe = moecore.MoE.build(D, num_experts=E, top_k=2, hidden=32, **options).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(moe, (torch.randn(2, 6, D),), dynamic_shapes=({0: dynamic, 1: dynamic},)).module()
    for shape in ((2, 6, D), (3, 11, D)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), moe(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [6, 7])
def test_exports_segments_with_any_batch(length):
    moe = moecore.MoE.build(D, num_experts=E, top_k=2, hidden=32, unit=3).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(moe, (torch.randn(2, length, D),), dynamic_shapes=({0: dynamic},)).module()
    x = torch.randn(5, length, D)
    torch.testing.assert_close(program(x), moe(x), rtol=1e-4, atol=1e-5)
