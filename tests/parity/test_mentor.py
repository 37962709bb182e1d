"""MENTOR's mixture (arXiv 2410.14972) against output, auxiliary loss and gradients of the published layer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import moecore
from apps.rl.agent_settings import MoEActorConfig
from apps.rl.agents.mentor import reference_aux
from apps.rl.agents.networks import MoELayer

TOLERANCE = 1e-5
LOG = logging.getLogger(__name__)


@pytest.fixture
def reference(shared_data: Path) -> dict:
    file = shared_data / "parity" / "mentor_moe_small.pt"
    if not file.is_file():
        pytest.skip(f"no reference outputs at {file}")
    return torch.load(file, weights_only=True)


def place(name: str) -> tuple[str, int | None]:
    """Where a weight of the published layer is in ours: parameter, and number of the expert."""
    kind, first, second, leaf = name.split(".")
    if kind == "gate":
        return f"router.score.{'fc1' if second == '0' else 'fc2'}.{leaf}", None
    side = "up" if second == "0" else "down"
    return f"experts.{side}{'_bias' if leaf == 'bias' else ''}", int(first)


def loaded(reference: dict) -> MoELayer:
    sizes = reference["cfg"]
    config = MoEActorConfig(sizes["num_experts"], sizes["top_k"], sizes["hidden_dim"], sizes["gate_dim"])
    layer = MoELayer(config, sizes["input_dim"], sizes["output_dim"]).eval()
    own = dict(layer.named_parameters())
    with torch.no_grad():
        for name, value in reference["state_dict"].items():
            key, expert = place(name)
            (own[key] if expert is None else own[key][expert]).copy_(value)
    return layer


@pytest.mark.parametrize("executor", ["auto", "dense"])
def test_published_layer(reference, executor):
    layer = loaded(reference)
    layer.executor = executor
    x = reference["input"].clone().requires_grad_()
    with moecore.record(layer) as routings:
        y = layer(x)
    (routing,) = routings
    aux = reference_aux(routing)
    (y.square().mean() + aux).backward()
    own = dict(layer.named_parameters())
    errors = {
        "output": y - reference["output"],
        "aux": aux - reference["aux_loss"],
        "probs": routing.probs - reference["gate_probs"],
        "input": x.grad - reference["grad_input"],
    }
    for name, value in reference["grads"].items():
        key, expert = place(name)
        errors[name] = (own[key].grad if expert is None else own[key].grad[expert]) - value
    worst = max(errors, key=lambda name: errors[name].abs().max())
    LOG.info("largest error: %s, %.1e", worst, errors[worst].abs().max())
    assert all(error.abs().max() < TOLERANCE for error in errors.values()), worst
    assert torch.equal(routing.assignment.expert.sort(1).values, reference["topk_idx"].sort(1).values)
