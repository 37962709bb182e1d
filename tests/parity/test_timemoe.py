"""Time-MoE (arXiv 2409.16040) against heads, states, losses, gradients and generation of the published code."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import moecore
from apps.timeseries.models.base import Windows
from apps.timeseries.models.timemoe import TimeMoE
from apps.timeseries.models.timemoe_checkpoint import to_published
from apps.timeseries.models.timemoe_loss import aux_loss, huber, targets

TOLERANCE = 1e-5
LOG = logging.getLogger(__name__)
"""What was measured: `pytest --log-cli-level=INFO`."""


@pytest.fixture
def reference(shared_data: Path) -> dict:
    file = shared_data / "parity" / "timemoe_mha.pt"
    if not file.is_file():
        pytest.skip(f"no reference outputs at {file}")
    return torch.load(file, weights_only=True)


@pytest.fixture
def folder(reference, tmp_path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(reference["config"]))
    save_file(reference["state_dict"], folder / "model.safetensors")
    return folder


@pytest.fixture(params=["auto", "dense"])
def model(request, folder) -> TimeMoE:
    model = TimeMoE.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, moecore.MoE):
            module.executor = request.param
    return model


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, what
    error = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1e-12))
    LOG.info("%s: relative error %.1e", what, error)
    assert error <= TOLERANCE, f"{what}: {error}"


@torch.no_grad()
def test_hidden_states_heads_and_router_logits(model, reference):
    with moecore.record(model) as recording:
        outputs = model.decode(reference["input"], keep_states=True)
    close(outputs.hidden, reference["last_hidden_state"], "last hidden state")
    for i, state in enumerate(reference["hidden_states"]):
        close(outputs.states[i], state, f"hidden state {i}")
    for routing, logits in zip(recording, reference["router_logits"], strict=True):
        close(routing.scores, logits, f"logits of {routing.name}")
    heads = model.head_outputs(reference["input"])
    for points, expected in reference["heads"].items():
        close(heads[int(points)], expected, f"head {points}")
    for longest, expected in reference["heads_max"].items():
        close(heads[model.head_for(int(longest)).out_features], expected, f"head for {longest}")


@pytest.mark.parametrize("masked", [False, True])
def test_losses_of_every_head(model, reference, masked):
    sequence, mask = reference["loss_seq"], reference["loss_mask"].bool() if masked else None
    heads = model.head_outputs(sequence[:, :-1])
    kind = "masked" if masked else "nomask"
    for points, expected in reference[f"ar_losses_{kind}"].items():
        points = int(points)
        target = targets(sequence[:, 1:], points)
        weight = None if mask is None else targets(mask, points)
        close(huber(heads[points], target, weight), expected, f"loss of head {points}, {kind}")


def test_loss_gradients_and_balance(model, reference):
    sequence = reference["loss_seq"]
    with moecore.record(model) as recording:
        heads = model.head_outputs(sequence[:, :-1])
    balance = aux_loss(recording)
    close(balance, reference["aux_loss"], "balance loss")
    totals = {}
    for kind, mask in (("nomask", None), ("masked", reference["loss_mask"].bool())):
        weights = {points: None if mask is None else targets(mask, points) for points in heads}
        losses = [huber(out, targets(sequence[:, 1:], points), weights[points]) for points, out in heads.items()]
        totals[kind] = sum(losses) / len(losses) + model.config.aux_loss * balance
        close(totals[kind], reference[f"loss_{kind}"], f"loss, {kind}")
    totals["masked"].backward()
    published = to_published({name: p.grad for name, p in model.named_parameters()})
    for name, norm in reference["grad_norms"].items():
        own = float(published[name].norm())
        assert abs(own - float(norm)) <= TOLERANCE * max(float(norm), 1e-3), name


def test_loss_of_windows_with_missing_targets(model, reference):
    """A target that is missing is what the published loss mask leaves out."""
    sequence = reference["loss_seq"].clone()
    sequence[:, -10:] = torch.nan  # at the end, where positions without input say nothing of targets either
    mask = torch.ones(len(sequence), sequence.shape[1] - 1, dtype=torch.bool)
    mask[:, -10:] = False
    heads = model.head_outputs(reference["loss_seq"][:, :-1])
    whole = reference["loss_seq"]
    losses = [huber(out, targets(whole[:, 1:], p), targets(mask, p)) for p, out in heads.items()]
    with moecore.record(model) as recording:
        model.decode(sequence[:, :-1])
    balance = aux_loss(recording, sequence[:, :-1].isfinite())
    expected = sum(losses) / len(losses) + model.config.aux_loss * balance
    close(model.loss(Windows(sequence[:, :64], sequence[:, 64:])), expected, "loss with missing targets")


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation(model, reference, use_cache):
    context = reference["input"]
    for kind in ("generate", "generate_nocache"):
        for horizon, expected in reference[kind].items():
            ours = model.forecast(context, int(horizon), use_cache=use_cache)
            close(ours, expected[:, context.shape[1] :], f"{horizon} points, cache {use_cache}, {kind}")


def test_published_folder_round_trip(folder, reference, tmp_path):
    saved = TimeMoE.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    again = TimeMoE.from_pretrained(saved)
    published = to_published(again.state_dict())
    assert published.keys() == reference["state_dict"].keys()
    assert all(torch.equal(published[name], tensor) for name, tensor in reference["state_dict"].items())
    config = json.loads((saved / "config.json").read_text())
    assert {k: config[k] for k in reference["config"]} == reference["config"]


def test_left_padding(model, reference):
    """Padded rows give what the published code gives with a mask, and what the context alone gives."""
    mask = reference["leftpad_mask"].bool()
    context = reference["input"].masked_fill(~mask, torch.nan)
    assert not mask.all()
    head = model.head_outputs(context)[64]
    close(head[mask], reference["leftpad_head64_pos"][mask], "head 64 of padded rows")
    ours = model.forecast(context, 96)
    close(ours, reference["leftpad_generate96"][:, context.shape[1] :], "96 points after padded rows")
    for row, own in enumerate(context):
        alone = model.forecast(own[mask[row]][None], 96)
        close(ours[row : row + 1], alone, f"row {row} alone")
