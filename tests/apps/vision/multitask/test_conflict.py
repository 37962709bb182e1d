"""Conflict between tasks: gradients that are known, banks whose tasks share experts or do not, and brute force."""

from __future__ import annotations

import io
import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import moecore
from apps.vision.multitask.conflict import Conflict, between, compare, measure_conflict
from apps.vision.multitask.conflict_figures import conflict_figure, pairs_figure
from moecore.errors import ConfigError

WIDTH = 4


class Blocks(nn.Module):
    """`backbone.blocks` of bare linear maps, or of MoE layers in their place."""

    def __init__(self, *mlps: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.blocks = nn.ModuleList()
        for mlp in mlps:
            block = nn.Module()
            block.attn, block.mlp = nn.Linear(WIDTH, WIDTH, bias=False), mlp
            self.backbone.blocks.append(block)

    def __getitem__(self, index: int) -> nn.Module:
        return self.backbone.blocks[index]


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=False)


def toward(weight: torch.Tensor, *direction: float) -> torch.Tensor:
    """A loss whose gradient on the weight has these first entries, and zeros."""
    return (weight.flatten()[: len(direction)] * torch.tensor(direction)).sum()


def bank(*tokens_to: int, shared: bool = False) -> moecore.MoE:
    """Four experts of which each task sends all tokens, whose first entry is 1, to the one given for it."""
    moe = moecore.MoE.build(
        WIDTH,
        num_experts=4,
        top_k=1,
        hidden=3,
        score="per_task",
        score_options={"num_tasks": len(tokens_to)},
        shared_hidden=3 if shared else 0,
    )
    with torch.no_grad():
        moe.router.score.weight.zero_()
        for task, expert in enumerate(tokens_to):
            moe.router.score.weight[task, expert, 0] = 9.0
    return moe


def tokens(count: int = 6) -> torch.Tensor:
    x = torch.randn(1, count, WIDTH)
    x[..., 0] = 1.0
    return x


def test_cosines_of_known_gradients():
    model = Blocks(linear(), linear())
    first = model[0]

    def losses(scale: float) -> dict[str, torch.Tensor]:
        return {
            "semseg": scale * (toward(first.attn.weight, 1, 0) + toward(first.mlp.weight, 2, 0)),
            "depth": scale * (toward(first.attn.weight, 5, 0) + toward(first.mlp.weight, -3, 0)),
            "edges": scale * (toward(first.attn.weight, 0, 1) + toward(first.mlp.weight, 1, 1)),
        }

    found = measure_conflict(model, losses, [1.0, 3.0], ("semseg", "depth", "edges"))
    assert found.tasks == ("semseg", "depth", "edges")
    assert list(found.layers) == ["block 0 attention", "block 0 ffn", "block 1 attention", "block 1 ffn"]
    half = 1 / math.sqrt(2)
    attention = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    ffn = [[1, -1, half], [-1, 1, -half], [half, -half, 1]]
    torch.testing.assert_close(found.layers["block 0 attention"], torch.tensor(attention, dtype=torch.float64))
    torch.testing.assert_close(found.layers["block 0 ffn"], torch.tensor(ffn, dtype=torch.float64), atol=1e-7, rtol=0)
    assert found.norms["block 0 attention"].tolist() == pytest.approx([2, 10, 2])  # mean of the scales is 2
    assert found.layers["block 1 ffn"].isnan().all()
    assert found.norms["block 1 ffn"].tolist() == [0, 0, 0]
    scalars = found.scalars()
    assert scalars["attention_cosine"] == pytest.approx(1 / 3)
    assert scalars["attention_negative"] == 0
    assert scalars["ffn_cosine"] == pytest.approx(-1 / 3)
    assert scalars["ffn_negative"] == pytest.approx(2 / 3)
    pairs = {name: value for name, value in scalars.items() if "/" in name}
    assert pairs == pytest.approx(
        {"ffn_cosine/semseg-depth": -1, "ffn_cosine/semseg-edges": half, "ffn_cosine/depth-edges": -half}
    )
    assert not any("expert" in name for name in scalars)


def test_cosines_are_of_means_and_means_of_the_batches_with_labels():
    model = Blocks(linear())
    weight = model[0].mlp.weight
    batches = [
        {"semseg": toward(weight, 1, 1), "depth": toward(weight, 1, 0)},
        {"semseg": toward(weight, 1, -1)},  # no labels for depth
        {"semseg": toward(weight, 4, 0), "depth": weight.sum() * 0},  # the same, by a loss of 0
        {"semseg": toward(weight, 2, 0), "depth": toward(weight, 3, 0), "normals": toward(weight, 7)},
        {"depth": torch.tensor(3.0)},  # without a graph
    ]
    found = measure_conflict(model, lambda batch: batch, batches, ("semseg", "depth"), progress=False)
    assert float(found.layers["block 0 ffn"][0, 1]) == pytest.approx(1)  # that of the first batch alone is 0.71
    assert found.norms["block 0 ffn"].tolist() == pytest.approx([2, 2])


def test_a_task_without_labels_has_no_cosine():
    model = Blocks(linear())
    losses = {"semseg": toward(model[0].mlp.weight, 1), "edges": toward(model[0].mlp.weight, -1)}
    found = measure_conflict(model, lambda batch: losses, [0], ("semseg", "depth", "edges"))
    cosines = found.layers["block 0 ffn"]
    assert cosines[1].isnan().all()
    assert cosines[0, 2] == -1
    scalars = found.scalars()
    assert scalars["ffn_cosine"] == -1
    assert math.isnan(scalars["ffn_cosine/semseg-depth"])
    assert math.isnan(scalars["attention_cosine"])


def test_gradients_and_modes_stay_as_they_were():
    model = Blocks(linear(), linear())
    model[0].mlp.weight.grad = torch.full((WIDTH, WIDTH), 7.0)
    model.train()
    model[1].attn.eval()
    seen = []

    def losses(batch: int) -> dict[str, torch.Tensor]:
        seen.append([module.training for module in model.modules()])
        if batch == 2:
            raise RuntimeError
        return {"semseg": toward(model[0].mlp.weight, 1), "depth": toward(model[1].mlp.weight, 1)}

    before = [module.training for module in model.modules()]
    with torch.no_grad():
        measure_conflict(model, losses, [0, 1], ("semseg", "depth"))
        assert not torch.is_grad_enabled()
    with pytest.raises(RuntimeError):
        measure_conflict(model, losses, [2], ("semseg", "depth"))
    assert len(seen) == 3
    assert not any(map(any, seen))
    assert [module.training for module in model.modules()] == before
    assert (model[0].mlp.weight.grad == 7).all()
    assert all(p.grad is None for p in model.parameters() if p is not model[0].mlp.weight)


def losses_of(model: Blocks, *signs: float):
    """Task t asks for outputs that are larger, or smaller, by its sign."""

    def losses(x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {}
        for task, sign in enumerate(signs):
            with moecore.routing_context(task=task):
                found["abc"[task]] = sign * model[0].mlp(x).sum()
        return found

    return losses


def test_tasks_on_experts_of_their_own_do_not_conflict():
    model = Blocks(bank(0, 2))
    found = measure_conflict(model, losses_of(model, 1, -1), [tokens(), tokens()], ("a", "b"))
    assert float(found.layers["block 0 ffn"][0, 1]) == 0
    assert found.experts["block 0 ffn"].shape == (4, 2, 2)
    assert between(found.experts["block 0 ffn"]).isnan().all()
    assert found.users()["block 0 ffn"].tolist() == [1, 0, 1, 0]
    scalars = found.scalars()
    assert (scalars["exclusive_experts"], scalars["unused_experts"], scalars["expert_overlap"]) == (0.5, 0.5, 0)
    assert math.isnan(scalars["expert_cosine"])
    assert math.isnan(scalars["expert_negative"])


def test_tasks_on_the_same_expert_conflict_there():
    model = Blocks(bank(1, 1, 3))
    found = measure_conflict(model, losses_of(model, 1, -2, 1), [tokens(), tokens()], ("a", "b", "c"))
    bank_cosines, experts = found.layers["block 0 ffn"], found.experts["block 0 ffn"]
    assert float(bank_cosines[0, 1]) == pytest.approx(-1)
    assert float(bank_cosines[0, 2]) == 0
    assert float(experts[1, 0, 1]) == pytest.approx(-1)
    assert experts[[0, 2]].isnan().all()
    assert experts[3, :2].isnan().all()
    assert found.users()["block 0 ffn"].tolist() == [0, 2, 0, 1]
    within = found.within_experts()["block 0 ffn"]
    assert float(within[0, 1]) == pytest.approx(-1)
    assert between(within).isnan().tolist() == [False, True, True]
    scalars = found.scalars()
    assert scalars["expert_cosine"] == pytest.approx(-1)
    assert scalars["expert_negative"] == 1
    assert scalars["ffn_cosine"] == pytest.approx(-1 / 3)
    assert scalars["ffn_negative"] == pytest.approx(1 / 3)
    assert scalars["expert_overlap"] == pytest.approx(1 / 3)


def test_shared_experts_are_a_layer_and_routers_none():
    model = Blocks(bank(0, 2, shared=True))
    found = measure_conflict(model, losses_of(model, 1, -1), [tokens()], ("a", "b"))
    assert float(found.layers["block 0 shared expert"][0, 1]) == pytest.approx(-1)
    assert float(found.layers["block 0 ffn"][0, 1]) == 0  # the gates' gradients are of opposite signs, and not in it
    assert list(found.layers) == ["block 0 attention", "block 0 ffn", "block 0 shared expert"]
    assert list(found.experts) == ["block 0 ffn"]
    assert found.scalars()["ffn_cosine"] == 0


def vit() -> nn.Module:
    """A small vision transformer with MoE in its last block, and one head per task."""
    backbone = VisionTransformer(16, 8, 3, 0, "", 8, 3, 2, final_norm=False)
    options = moecore.MoEConfig(num_experts=4, top_k=2, hidden=8, score="per_task", score_options={"num_tasks": 3})
    moecore.replace_ffn(backbone, "last-1", options, init="random")
    model = nn.Module()
    model.backbone, model.heads = backbone, nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
    with torch.no_grad():
        backbone.blocks[2].mlp.router.score.weight.normal_()
    return model


def vit_losses(model: nn.Module):
    def losses(images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {}
        for task, head in enumerate(model.heads):
            with moecore.routing_context(task=task):
                found["abc"[task]] = head(model.backbone.forward_features(images)).square().mean()
        return found

    return losses


def test_a_vision_transformer_against_brute_force():
    model, batches = vit(), [torch.randn(2, 3, 16, 16) for _ in range(3)]
    losses = vit_losses(model)
    found = measure_conflict(model, losses, batches, ("a", "b", "c"))
    model.eval()
    flat: dict[str, list[np.ndarray]] = {}
    for task in "abc":
        model.zero_grad()
        torch.stack([losses(batch)[task] for batch in batches]).mean().backward()
        for i, block in enumerate(model.backbone.blocks):
            ffn = block.mlp.experts if i == 2 else block.mlp
            grads = {"attention": block.attn.parameters(), "ffn": ffn.parameters()}
            for part, parameters in grads.items():
                row = torch.cat([p.grad.flatten() for p in parameters]).double().numpy()
                flat.setdefault(f"block {i} {part}", []).append(row)
        for expert in range(4):
            row = torch.cat([p.grad[expert].flatten() for p in model.backbone.blocks[2].mlp.experts.parameters()])
            flat.setdefault(str(expert), []).append(row.double().numpy())
    assert list(found.layers) == [name for name in flat if name.startswith("block")]
    cosine = {name: np.corrcoef(rows) * 0 for name, rows in flat.items()}
    for name, rows in flat.items():
        for i, j in np.ndindex(3, 3):
            cosine[name][i, j] = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
    for name, values in found.layers.items():
        np.testing.assert_allclose(values, cosine[name], atol=1e-5)
        np.testing.assert_allclose(found.norms[name], np.linalg.norm(flat[name], axis=1), rtol=1e-4)
    norms = np.array([np.linalg.norm(flat[str(expert)], axis=1) for expert in range(4)])  # [E, T]
    np.testing.assert_allclose(found.expert_norms["block 2 ffn"], norms, rtol=1e-4)
    assert (norms > 0).all()
    for expert in range(4):
        np.testing.assert_allclose(found.experts["block 2 ffn"][expert], cosine[str(expert)], atol=1e-5)
    within, overlap = found.within_experts()["block 2 ffn"], found.overlap()["block 2 ffn"]
    for i, j in combinations(range(3), 2):
        weights = norms[:, i] * norms[:, j]
        expected = np.average([cosine[str(expert)][i, j] for expert in range(4)], weights=weights)
        assert float(within[i, j]) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(within * overlap, found.layers["block 2 ffn"])
    assert (between(overlap) < 1).all()


def test_what_is_frozen_is_left_out():
    model, batches = vit(), [torch.randn(2, 3, 16, 16)]
    for parameter in [*model.backbone.blocks[0].parameters(), *model.backbone.blocks[1].mlp.parameters()]:
        parameter.requires_grad_(False)
    found = measure_conflict(model, vit_losses(model), batches, ("a", "b"))
    assert list(found.layers) == ["block 1 attention", "block 2 attention", "block 2 ffn"]
    model.backbone.blocks[2].mlp.requires_grad_(False)
    scalars = measure_conflict(model, vit_losses(model), batches, ("a", "b")).scalars()
    assert math.isnan(scalars["ffn_cosine"])
    assert scalars["attention_cosine"] > -1
    with pytest.raises(ConfigError, match="no trainable block"):
        measure_conflict(model.requires_grad_(False), vit_losses(model), batches, ("a", "b"))


def test_too_little_to_compare():
    model = Blocks(linear())
    with pytest.raises(ConfigError, match="tasks='semseg': conflict is between two tasks at least"):
        measure_conflict(model, lambda batch: {}, [0], ["semseg"])
    with pytest.raises(ConfigError, match="batches=0: it takes at least one"):
        measure_conflict(model, lambda batch: {}, [], ["semseg", "depth"])


def made_up(experts: bool, depth: int = 4, tasks: tuple[str, ...] = ("semseg", "depth", "normals")) -> Conflict:
    """Figures as a model might have them, with banks in odd blocks."""
    random = torch.Generator().manual_seed(depth + experts)

    def cosines(*shape: int) -> torch.Tensor:
        vectors = torch.randn(*shape, len(tasks), 4, generator=random, dtype=torch.float64)
        vectors = nn.functional.normalize(vectors, dim=-1)
        return vectors @ vectors.mT

    names = [f"block {i} {part}" for i in range(depth) for part in ("attention", "ffn")]
    banks = [f"block {i} ffn" for i in range(1, depth, 2)] if experts else []
    return Conflict(
        tasks,
        {name: cosines() for name in names},
        {name: torch.ones(len(tasks), dtype=torch.float64) for name in names},
        {name: cosines(5) for name in banks},
        {name: torch.rand(5, len(tasks), generator=random, dtype=torch.float64) for name in banks},
    )


def test_comparison_has_a_row_per_block():
    moe, dense = made_up(True), made_up(False)
    rows = compare(moe, dense)
    assert [row["block"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        name = f"block {row['block']} ffn"
        assert row["dense ffn"] == pytest.approx(float(between(dense.layers[name]).mean()))
        assert row["whole bank"] == pytest.approx(float(between(moe.layers[name]).mean()))
        assert row["whole bank, pairs below 0"] == pytest.approx(float((between(moe.layers[name]) < 0).sum()) / 3)
        if row["block"] % 2:
            assert row["within experts"] == pytest.approx(float(between(moe.within_experts()[name]).mean()))
            assert row["within experts, pairs below 0"] == float((between(moe.experts[name]) < 0).sum()) / 15
            assert row["exclusive experts"] == 0
        else:
            assert math.isnan(row["within experts"])
            assert math.isnan(row["overlap"])
            assert math.isnan(row["exclusive experts"])
    with pytest.raises(ValueError, match=r"in 4 blocks: beside it, .* in 2"):
        compare(moe, made_up(False, depth=2))
    with pytest.raises(ValueError, match="conflict of semseg"):
        compare(moe, made_up(False, tasks=("depth", "edges")))


@pytest.mark.parametrize(("experts", "beside"), [(True, True), (True, False), (False, False)])
def test_figure_shows_every_block(experts, beside):
    model, dense = made_up(experts), made_up(False)
    figure = conflict_figure(model, dense if beside else None)
    figure.savefig(io.BytesIO(), format="svg")
    ffn, attention = figure.axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in ffn.containers}
    expected = {"ffn (MoE: all experts as one)" if experts else "ffn": model.layers}
    if beside:
        expected = {"dense model's ffn": dense.layers} | expected
    for label, layers in expected.items():
        means = [float(between(layers[f"block {i} ffn"]).mean()) for i in range(4)]
        assert heights.pop(label) == pytest.approx(means)
    if experts:
        means = [float(between(model.within_experts()[f"block {i} ffn"]).mean()) for i in (1, 3)]
        assert heights.pop("within single experts") == pytest.approx(means)
    assert not heights
    assert len(attention.containers) == 1 + beside
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ffn.patches)
    assert all(left[1] <= right[0] + 1e-9 for left, right in pairwise(spans))
    assert all(round((left + right) / 2) in range(4) for left, right in spans)


def test_figure_of_pairs_names_the_tasks_and_writes_the_cosines():
    model, dense = made_up(True), made_up(False)
    figure = pairs_figure(model, dense)
    figure.savefig(io.BytesIO(), format="svg")
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in maps] == ["dense model", "MoE model", "within single experts"]
    for axes, cosines in zip(maps, (dense.pair_means(), model.pair_means()), strict=False):
        assert [label.get_text() for label in axes.get_xticklabels()] == list(model.tasks)
        written = {text.get_position(): text.get_text() for text in axes.texts}
        assert written == {(j, i): f"{cosines[i, j]:.2f}" for i, j in np.ndindex(3, 3) if i != j}
        shades = axes.images[0]
        assert (shades.get_clim(), shades.get_cmap().name) == ((-1, 1), "RdBu")


def test_figures_where_nothing_is_defined():
    weight = (model := Blocks(linear()))[0].mlp.weight
    found = measure_conflict(model, lambda batch: {"a": toward(weight, 1)}, [0], ("a", "b"))
    for figure in (conflict_figure(found), pairs_figure(found)):
        figure.savefig(io.BytesIO(), format="svg")
    assert not pairs_figure(found).axes[0].texts
