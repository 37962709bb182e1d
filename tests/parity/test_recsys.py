"""Multi-gate experts against outputs, losses and gradients of torch-rechub and of PyMAL."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apps.recsys.batch import TaskSpec
from apps.recsys.model_settings import MLPConfig, MoAEConfig
from apps.recsys.models.pymal import PublishedInput, PyMAL
from moecore import ExpertStack, MultiGate

TOLERANCE = 1e-6
LOG = logging.getLogger(__name__)
"""What was measured: `pytest --log-cli-level=INFO`."""


def published(folder: Path, name: str) -> dict[str, Any]:
    file = folder / "parity" / name
    if not file.is_file():
        pytest.skip(f"no reference outputs at {file}")
    return torch.load(file, weights_only=True)


def error(ours: Tensor, theirs: Tensor, floor: float = 1.0) -> float:
    """Largest difference, relative to the largest entry, or to the floor where all entries are below."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=floor))


class Rechub(nn.Module):
    """torch-rechub's MMoE from our parts: 4 experts, gates and towers of linear, BatchNorm and activation."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({"a": nn.Embedding(20, 4), "b": nn.Embedding(30, 4)})
        tasks = [f"task{i}" for i in range(3)]
        experts = {"shared": ExpertStack(4, 13, (16,), norm=True)}
        self.level = MultiGate(experts, {task: ["shared"] for task in tasks}, 13, bias=True, norm=True)
        self.towers = ExpertStack(3, 16, (8, 1), norm=True, linear=True)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        history = self.tables["b"](inputs["h"]) * (inputs["h"] != 0)[..., None]
        pooled = history.sum(1) / ((inputs["h"] != 0).sum(1, keepdim=True) + 1e-16)
        single = [self.tables[name](inputs[name]) for name in ("a", "b")]
        flat = torch.cat([*single, pooled, inputs["x"][:, None]], 1)
        return self.towers(torch.stack(list(self.level(flat).values()), 1)).squeeze(2).sigmoid()


def rechub_weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their names and shapes -> ours; also of gradients, where the statistics of BatchNorm are missing."""

    def stacked(part: str, name: str) -> Tensor | None:
        keys = [f"{part}.{i}.mlp.{name}" for i in range(4 if part == "experts" else 3)]
        return torch.stack([theirs[key] for key in keys]) if keys[0] in theirs else None

    ours = {f"tables.{name}.weight": theirs[f"embedding.embed_dict.{name}.weight"] for name in ("a", "b")}
    parts = {"experts": "level.experts.shared", "towers": "towers"}
    for part, place in parts.items():
        for i, layer in enumerate([0] if part == "experts" else [0, 4]):
            ours[f"{place}.weights.{i}"] = stacked(part, f"{layer}.weight")
            ours[f"{place}.biases.{i}"] = stacked(part, f"{layer}.bias")
    for i in range(3):
        for kind in ("weight", "bias"):
            ours[f"level.gates.task{i}.{kind}"] = theirs[f"gates.{i}.mlp.0.{kind}"]
    norms = {**{part: f"{place}.norms.0" for part, place in parts.items()}, "gates": "level.norm"}
    for part, place in norms.items():
        for kind in ("weight", "bias", "running_mean", "running_var"):
            found = stacked(part, f"1.{kind}")
            ours |= {} if found is None else {f"{place}.{kind}": found.flatten()}
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mmoe_of_torch_rechub(shared_data, dtype):
    file = published(shared_data, "torch_rechub_mmoe.pt")
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in file["inputs"].items()}
    model = Rechub().to(dtype)
    missing = model.load_state_dict(rechub_weights(file["state_dict"]), strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    errors = {"eval": error(model.eval()(inputs), file["out_eval"].to(dtype))}
    outputs = model.train()(inputs)
    errors["train"] = error(outputs, file["out_train"].to(dtype))
    LOG.info("torch-rechub MMoE: %s", {name: f"{value:.1e}" for name, value in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors


def labels_from_gradients(model: Rechub, logits: Tensor, theirs: Mapping[str, Tensor]) -> Tensor:
    """The labels, which the file leaves out: gradients of the towers are linear in them, and they are 0 or 1."""
    towers = dict(model.towers.named_parameters())
    rows = [torch.autograd.grad(row.sum(), list(towers.values()), retain_graph=True) for row in logits]
    found = []
    for task in range(logits.shape[1]):

        def own(gradients: Mapping[str, Tensor], task: int = task) -> Tensor:
            return torch.cat([g.reshape(3, -1)[task] for g in gradients.values()])

        slopes = torch.stack([own(dict(zip(towers, row, strict=True))) for row in rows], 1)  # [parameters, rows]
        total = own({name: theirs[f"towers.{name}"] for name in towers}) * logits.numel()
        residual = torch.linalg.lstsq(slopes, total.to(slopes)[:, None], driver="gelsd").solution.squeeze(1)
        found.append(logits[:, task].sigmoid() - residual)
    labels = torch.stack(found, 1).detach()
    torch.testing.assert_close(labels, labels.round().clamp(0, 1), atol=0.01, rtol=0)
    return labels.round()


def test_loss_and_gradients_of_torch_rechub(shared_data):
    file = published(shared_data, "torch_rechub_mmoe.pt")
    theirs = {name: g.double() for name, g in rechub_weights(file["grads_train"]).items()}
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in file["inputs"].items()}
    model = Rechub().double().train()
    model.load_state_dict(rechub_weights(file["state_dict"]), strict=False)
    outputs = model(inputs)
    logits = outputs.logit()
    labels = labels_from_gradients(model, logits, theirs)
    loss = F.binary_cross_entropy(outputs, labels)
    loss.backward()
    errors = {"loss": error(loss, file["loss_train"].double())}
    zero = [name for name, g in theirs.items() if g.abs().max() < 1e-7]  # biases that a BatchNorm takes away again
    errors |= {n: error(p.grad, theirs[n], 1.0 if n in zero else 0.0) for n, p in model.named_parameters()}
    assert len(zero) == 5
    LOG.info("torch-rechub MMoE: largest error of %d gradients %.1e", len(errors) - 1, max(errors.values()))
    assert len(errors) == 1 + len(theirs)
    assert max(errors.values()) < TOLERANCE, errors


def pymal(file: Mapping[str, Any]) -> PyMAL:
    """PyMAL's MMoE: two experts that every view sees, plain towers."""
    views = [file["main_view"], *file["aux_views"]]
    tasks = [TaskSpec(view, "all", None, 1.0, 0.5) for view in views]
    config = MoAEConfig(
        main="last", public_experts=2, private_experts=0, experts=MLPConfig(units=(256,)), squeeze="dims",
        input_norm=True, outputs=2, fusion=False, aux_weight=file["lamda"],
    )  # fmt: skip
    return PyMAL(config, tasks, PublishedInput(file["vocab"])).double()


def pymal_weights(file: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
    """Their names -> ours; of weights or gradients."""
    theirs, columns, views = file[kind], file["cols"], [file["main_view"], *file["aux_views"]]

    def each(pattern: str, names: list[Any]) -> Tensor:
        return torch.stack([theirs[pattern.format(name)] for name in names])

    tables = "EmbeddingTable.embs_table.{}.weight"
    ours = {"inputs.table.weight": each(tables, columns["user"] + columns["ad"]).flatten(0, 1)}
    for kind in ("weight", "bias"):
        plural = {"weight": "weights", "bias": "biases"}[kind]
        ours[f"inputs.queries.{kind}"] = each(f"FC.queryproj{{}}.{kind}", [0, 1, 2]).flatten(0, 1)
        for i in range(3):
            for part in (f"in_proj_{kind}", f"out_proj.{kind}"):
                ours[f"inputs.attention.{i}.{part}"] = theirs[f"CrossAtten.{i}.cross_attn.{part}"]
        ours[f"moae.norm.{kind}"] = theirs[f"fused_norm.{kind}"]
        ours[f"moae.level.experts.public.{plural}.0"] = each(f"EXPERT.expert{{}}.fc1.{kind}", [0, 1])
        for view in views:
            ours[f"moae.level.gates.task_{view}.{kind}"] = theirs[f"FC.{view}gate.{kind}"]
        for i, place in enumerate(["layers.0", "layers.1", "layers.2", "last"]):
            ours[f"moae.towers.{place}.{plural}.0"] = each(f"FC.{{}}fc{i + 2}.{kind}", views)
    for i, part in enumerate(("Pic", "Text")):
        ours[f"inputs.histograms.{i}.weight"] = theirs[f"DeepSet{part}.bin_embs"].squeeze(1)
    for i, layer in enumerate((0, 2)):
        gates = each(f"EXPERT.expert{{}}.senet.fc.{layer}.weight", [0, 1])
        ours[f"moae.level.experts.public.squeeze.weights.weights.{i}"] = gates
    return ours


def test_mmoe_of_pymal(shared_data):
    file = published(shared_data, "pymal_mmoe.pt")
    model = pymal(file)
    model.load_state_dict(pymal_weights(file, "state_dict"))
    inputs = file["inputs"]
    fields = model.inputs(inputs["user"], inputs["ad"], inputs["seq"], inputs["mm"])
    errors = {"input": error(model.moae.norm(fields.features), file["intermediates"]["fused_norm"][0])}
    logits = model(inputs["user"], inputs["ad"], inputs["seq"], inputs["mm"]).logits
    views = [file["main_view"], *file["aux_views"]]
    errors |= {view: error(logits[:, i].sigmoid(), file["probs"][view][:, 1]) for i, view in enumerate(views)}
    labels = torch.stack([file["labels"][view] for view in views], 1).double()
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0)
    expected = torch.stack([file["main_loss"], *file["aux_losses"]])
    errors |= {"losses": error(losses, expected)}
    total = (losses * torch.tensor(model.moae.task_weights, dtype=losses.dtype)).sum()
    errors |= {"loss": error(total, file["total_loss"])}
    total.backward()
    theirs = pymal_weights(file, "grads")
    errors |= {name: error(p.grad, theirs[name], 1e-7) for name, p in model.named_parameters()}
    LOG.info("PyMAL MMoE: largest error %.1e", max(errors.values()))
    assert max(errors.values()) < TOLERANCE, errors
