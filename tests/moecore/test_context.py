"""Side information on its way to routers inside a foreign model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moecore


class Probe(nn.Module):
    """Remembers the context that was current when it ran."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.fail = fail
        self.seen: list[moecore.Context | None] = []

    def forward(self, x):
        self.seen.append(moecore.current_context())
        if self.fail:
            raise RuntimeError("on purpose")
        return x


def test_tensors_of_any_prefix_are_expanded_to_tokens():
    lead = (2, 3)
    task = torch.tensor([5, 7])
    context = moecore.Context(task=task, ids=torch.arange(6).view(2, 3), allowed=torch.tensor([[True, False]] * 2))
    rows = context.per_token(lead)
    assert rows.task.tolist() == [5, 5, 5, 7, 7, 7]
    assert rows.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert rows.allowed.tolist() == [[True, False]] * 6
    assert moecore.Context(task=torch.tensor(4)).per_token(lead).task.tolist() == [4] * 6


def test_mask_per_sample_follows_its_sample():
    allowed = torch.tensor([[True, False], [False, True]])
    assert (
        moecore.Context(allowed=allowed).per_token((2, 2)).allowed.tolist() == [[True, False]] * 2 + [[False, True]] * 2
    )


def test_what_needs_no_expansion_is_left_alone():
    context = moecore.Context(task=3, allowed=torch.tensor([True, False, True]))
    assert context.per_token((4, 5)) is context


def test_carried_state_is_shared_by_the_expanded_context():
    context = moecore.Context(task=torch.tensor([0, 1]))
    context.per_token((2, 3)).carry["cell"] = torch.zeros(1)
    assert list(context.carry) == ["cell"]


@pytest.mark.parametrize("field", ["task", "ids"])
def test_wrong_shape_is_named(field):
    context = moecore.Context(**{field: torch.zeros(3, dtype=torch.long)})
    with pytest.raises(ValueError, match=rf"context\.{field} has shape \(3,\).*prefix of \(2, 5\)"):
        context.per_token((2, 5))


def test_wrong_mask_shape_is_named():
    context = moecore.Context(allowed=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"context\.allowed has shape \(3, 4\)"):
        context.per_token((2, 5))


def test_context_reaches_every_layer_and_ends_with_its_block():
    probe = Probe()
    model = nn.Sequential(nn.Sequential(probe), nn.Identity())
    model(torch.zeros(1))
    with moecore.routing_context(task=1) as outer:
        model(torch.zeros(1))
        with moecore.routing_context(task=2) as inner:
            model(torch.zeros(1))
        model(torch.zeros(1))
    model(torch.zeros(1))
    assert probe.seen == [None, outer, inner, outer, None]
    assert (outer.task, inner.task) == (1, 2)


def test_context_ends_when_its_block_fails():
    def use():
        with moecore.routing_context(task=1):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        use()
    assert moecore.current_context() is None


def test_mask_changes_what_a_layer_does():
    moe = moecore.MoE.build(8, num_experts=4, top_k=2)
    x = torch.randn(2, 3, 8)
    only = torch.tensor([False, False, True, False])
    with moecore.record(moe) as recording, moecore.routing_context(allowed=only):
        inside = moe(x)
    assert recording[0].assignment.load().tolist() == [0, 0, 6, 0]
    assert torch.equal(inside, moe(x, moecore.Context(allowed=only)))
    assert not torch.allclose(inside, moe(x))


def test_context_given_to_a_layer_beats_the_one_around_it():
    moe = moecore.MoE.build(8, num_experts=4, top_k=1)
    x = torch.randn(3, 8)
    masks = torch.eye(4, dtype=torch.bool)
    with moecore.record(moe) as recording, moecore.routing_context(allowed=masks[0]):
        moe(x)
        moe(x, moecore.Context(allowed=masks[3]))
    assert [r.assignment.load().argmax().item() for r in recording] == [0, 3]


def test_one_mask_per_sample_in_a_batch():
    moe = moecore.MoE.build(8, num_experts=4, top_k=1)
    with moecore.record(moe) as recording, moecore.routing_context(allowed=torch.eye(4, dtype=torch.bool)):
        moe(torch.randn(4, 5, 8))
    assert moecore.token_map(recording[0]).tolist() == [[e] * 5 for e in range(4)]


def test_context_per_sample_when_segments_are_routed():
    moe = moecore.MoE.build(8, num_experts=4, top_k=1, unit=2)
    with moecore.record(moe) as recording, moecore.routing_context(allowed=torch.eye(4, dtype=torch.bool)):
        moe(torch.randn(4, 5, 8))
    assert moecore.token_map(recording[0]).tolist() == [[e] * 3 for e in range(4)]


def test_carry_across_layers_opens_one_context_per_forward():
    probe = Probe()
    model = nn.Sequential(probe, probe)
    moecore.carry_across_layers(model)
    model(torch.zeros(1))
    model(torch.zeros(1))
    a, b, c, d = probe.seen
    assert a is b
    assert c is d
    assert a is not None
    assert a is not c
    assert moecore.current_context() is None


def test_carry_across_layers_uses_the_callers_context():
    probe = Probe()
    model = nn.Sequential(probe)
    moecore.carry_across_layers(model)
    with moecore.routing_context(task=1) as context:
        model(torch.zeros(1))
    assert probe.seen == [context]


def test_carry_across_layers_nests_and_closes_after_an_error():
    inner = nn.Sequential(Probe())
    model = nn.Sequential(inner, Probe(fail=True))
    moecore.carry_across_layers(inner)
    moecore.carry_across_layers(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(torch.zeros(1))
    assert moecore.current_context() is None
    assert inner[0].seen[0] is model[1].seen[0]
    model[1].fail = False
    model(torch.zeros(1))
    assert inner[0].seen[1] is not inner[0].seen[0]
    assert moecore.current_context() is None
