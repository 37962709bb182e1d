"""M³ViT (arXiv 2210.14793) against block outputs and gates of the published code, multi-gate, two tasks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moecore
from apps.vision.models.m3vit import block_outputs, m3vit_backbone, m3vit_moe
from apps.vision.models.m3vit_weights import load_published, to_published

TASKS, DEPTH = 2, 4
TOLERANCE = 1e-5
LOG = logging.getLogger(__name__)
"""What was measured: `pytest --log-cli-level=INFO`."""


@pytest.fixture
def published(shared_data: Path) -> dict[str, Tensor]:
    file = shared_data / "parity" / "m3vit_multigate.pt"
    if not file.is_file():
        pytest.skip(f"no reference outputs at {file}")
    return torch.load(file, weights_only=True)


def weights(published: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("sd."): value for name, value in published.items() if name.startswith("sd.")}


def loaded(published: dict[str, Tensor], executor: str) -> torch.nn.Module:
    """The model of the fixture: 64 x 96 pixels, D = 192 in 3 heads, 4 of 16 experts of 192 units."""
    moe = replace(m3vit_moe("multi", num_tasks=TASKS, num_experts=16, top_k=4), executor=executor)
    model = m3vit_backbone(moe, published["image"].shape[-2:], embed_dim=192, depth=DEPTH, num_heads=3)
    load_published(model, weights(published))
    return model.eval()


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("executor", ["sorted", "dense", "grouped_mm"])
@pytest.mark.parametrize("task", range(TASKS))
@torch.no_grad()
def test_blocks_and_gates(published, executor, task):
    model = loaded(published, executor)
    with moecore.record(model) as recording, moecore.routing_context(task=task):
        outputs = block_outputs(model, published["image"])
    errors = {f"block{i}": error(output, published[f"task{task}.block{i}"]) for i, output in enumerate(outputs)}
    for i, routing in enumerate(recording):
        assert torch.equal(routing.assignment.expert, published[f"task{task}.gate{i}.idx"])
        errors[f"gate{i}"] = error(routing.weights, published[f"task{task}.gate{i}.score"])
    assert len(errors) == DEPTH + DEPTH // 2
    LOG.info("task %d, %s: largest error %.1e", task, executor, max(errors.values()))
    assert max(errors.values()) < TOLERANCE, errors


@torch.no_grad()
def test_a_task_for_every_image(published):
    """In one batch every image comes out as the published code gave it for its task."""
    model = loaded(published, "auto")
    with moecore.routing_context(task=torch.arange(TASKS)):
        outputs = block_outputs(model, published["image"])
    for i, output in enumerate(outputs):
        theirs = torch.stack([published[f"task{task}.block{i}"][task] for task in range(TASKS)])
        assert error(output, theirs) < TOLERANCE


def test_weights_come_back_as_published(published):
    back = to_published(loaded(published, "auto"))
    theirs = weights(published)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
