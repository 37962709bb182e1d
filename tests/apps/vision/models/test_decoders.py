"""Decoders: sizes, places, counts against the published ones, and slices for one task."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import moecore
from apps.vision.models.decoders import DECODERS, LightHead, UpsampleHead, make_decoder
from apps.vision.models.task_expert import as_map
from apps.vision.multitask.settings import M3ViTConfig
from apps.vision.multitask.tasks import TASKS, SceneSpec, TaskSpec

CLASSED = {"semseg": 5, "parts": 3, "classification": 4}
SPECS = tuple(TaskSpec(name, tuple(f"class {i}" for i in range(CLASSED.get(name, 0)))) for name in TASKS)
D, DEPTH = 24, 4
SHAPES = [((24, 40), 4), ((16, 40), 8), ((32, 48), 16), ((28, 42), 14), ((6, 4), 2), ((64, 96), 32), ((5, 7), 1)]
"""Height and width, and side of a patch."""


def decoder(name: str, size: tuple[int, int] = (16, 40), patch: int = 8, **options: object) -> nn.Module:
    config = M3ViTConfig(name, **{"decoder_width": 16, **options})
    grid = size[0] // patch, size[1] // patch
    return make_decoder(config, SceneSpec(*size, SPECS), D, DEPTH, grid).eval()


def tokens(model: nn.Module, patches: int = 10, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, patches, D) for _ in model.blocks]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(("size", "patch"), SHAPES)
def test_predictions_have_the_size_of_the_image(name, size, patch):
    model = decoder(name, size, patch)
    assert list(model.blocks) == sorted(set(model.blocks))
    assert model.blocks[-1] == DEPTH - 1
    features = tokens(model, size[0] // patch * (size[1] // patch))
    for task in SPECS:
        shape = (2, task.channels, *size) if task.kind.dense else (2, task.channels)
        assert model(features, task.name).shape == shape


@pytest.mark.parametrize("name", DECODERS)
def test_an_image_that_patches_do_not_divide_is_covered(name):
    model = make_decoder(M3ViTConfig(name, decoder_width=8), SceneSpec(30, 45, SPECS), D, DEPTH, (2, 3))
    assert model(tokens(model, 6), "normals").shape == (2, 3, 30, 45)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("patch", [4, 16])
def test_a_patch_changes_the_pixels_at_its_place(name, patch):
    rows, columns, row, column = 6, 10, 2, 7
    model = decoder(name, (rows * patch, columns * patch), patch)
    features = tokens(model, rows * columns, 1)
    changed = [x.clone() for x in features]
    for x in changed:
        x[:, row * columns + column] = torch.randn(D)
    change = (model(changed, "normals") - model(features, "normals")).detach().square().sum((0, 1))  # [H, W]
    share = change / change.sum()
    y = (share.sum(1) * (torch.arange(rows * patch) + 0.5)).sum() / patch - 0.5  # centre of the change, in patches
    x = (share.sum(0) * (torch.arange(columns * patch) + 0.5)).sum() / patch - 0.5
    assert (y - row).abs() < 0.5
    assert (x - column).abs() < 0.5


@pytest.mark.parametrize("name", DECODERS)
def test_a_slice_gives_the_same_and_holds_nothing_of_other_tasks(name):
    model = decoder(name)
    features, state = tokens(model), model.state_dict()
    for task in TASKS:
        one = model.only(task)
        assert torch.equal(one(features, task), model(features, task))
        assert one.blocks == model.blocks
        kept = {key for key in state if not key.startswith("heads.") or key.startswith(f"heads.{task}.")}
        assert set(one.state_dict()) == kept
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.zero_()  # a copy: the whole decoder has its own
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(value.any() for key, value in state.items() if key.endswith("weight"))


@pytest.mark.parametrize("name", DECODERS)
def test_a_task_has_a_norm_of_its_own(name):
    model = decoder(name)
    assert {task for task in TASKS if any(".norm." in key for key in model.only(task).heads.state_dict())} == set(TASKS)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("training", [False, True])
def test_all_tasks_at_once_give_what_each_gives(name, training):
    model = decoder(name).train(training)
    features = tokens(model)
    together = model.forward_all(features, ("depth", "semseg", "classification"))
    assert list(together) == ["depth", "semseg", "classification"]
    for task, prediction in together.items():
        assert torch.equal(prediction, model(features, task))


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_reach_everything(name):
    model = decoder(name).train()
    features = [x.requires_grad_() for x in tokens(model)]
    sum(prediction.square().sum() for prediction in model.forward_all(features, TASKS).values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(x.grad.abs().sum(-1).all() for x in features)  # every patch of every block


@pytest.mark.parametrize("name", DECODERS)
def test_a_task_leaves_the_others_alone(name):
    model = decoder(name)
    model(tokens(model), "edges").sum().backward()
    touched = {key.split(".")[1] for key, p in model.named_parameters() if p.grad is not None and "heads." in key}
    assert touched == {"edges"}


@pytest.mark.parametrize("name", DECODERS)
def test_first_guesses(name):
    model = decoder(name)
    for task in TASKS:
        (bias,) = (value for key, value in model.heads[task].state_dict().items() if key.endswith("predict.bias"))
        assert bias.unique().tolist() == [{"depth": 2.0, "edges": -3.0}.get(task, 0.0)]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("task", ["depth", "classification"])
def test_one_task_exports_for_any_batch(name, task):
    model = decoder(name).only(task)
    features = tokens(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"features": [{0: batch} for _ in features], "task": None}
    program = torch.export.export(model, (features, task), dynamic_shapes=shapes, strict=False)
    for size in (2, 5):
        features = tokens(model, batch=size)
        torch.testing.assert_close(program.module()(features, task), model(features, task))


def published(width: int, size: tuple[int, int], classes: int) -> nn.Module:
    spec = SceneSpec(*size, (TaskSpec("semseg", tuple(f"class {i}" for i in range(classes))),))
    return make_decoder(M3ViTConfig("upsample"), spec, width, 12, (size[0] // 16, size[1] // 16))


def test_parameters_of_the_published_head():
    assert sum(p.numel() for p in published(192, (128, 256), 19).parameters()) == pytest.approx(2.2e6, rel=0.01)


@pytest.mark.parametrize(("size", "classes", "total"), [((512, 512), 21, 83.8e9), ((480, 640), 40, 100.5e9)])
def test_multiply_adds_of_the_published_model(size, classes, total):
    patches = size[0] * size[1] // 256
    with torch.device("meta"):
        head = published(384, size, classes)
        macs = moecore.count_cost(head, [torch.empty(1, patches, 384)], "semseg").macs
    n = patches + 1
    block = 12 * n * 384**2 + 2 * n**2 * 384  # the active experts cost what the FFN did
    backbone = 12 * block + patches * 768 * 384 + 6 * n * 384 * 16  # with patch projection and gates
    assert macs + backbone == pytest.approx(total, rel=5e-4)
    assert 0.605 < macs / (macs + backbone) < 0.625


def test_the_published_head_upsamples_before_its_last_convolution():
    head = UpsampleHead(SPECS[0], D, 8, (2, 3), (32, 48)).eval()
    for norm in head.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    tokens = torch.randn(2, 6, D)
    convolutions = [m for m in head.convolve if isinstance(m, nn.Conv2d)]
    norms = [m for m in head.convolve if isinstance(m, nn.BatchNorm2d)]
    x = F.layer_norm(tokens, (D,), eps=1e-6).reshape(2, 2, 3, D).permute(0, 3, 1, 2)
    for convolution, norm in zip(convolutions, norms, strict=True):
        x = F.interpolate(norm(convolution(x)).relu(), scale_factor=2, mode="bilinear")
    assert len(convolutions) == 4
    torch.testing.assert_close(head(tokens), head.predict(x))


@pytest.mark.parametrize(("patch", "doublings"), [(1, 0), (2, 0), (4, 1), (8, 2), (14, 3), (16, 3), (32, 3)])
def test_upsampling_stops_one_short_of_the_full_size(patch, doublings):
    head = UpsampleHead(SPECS[0], D, 8, (2, 3), (2 * patch, 3 * patch))
    assert sum(isinstance(m, nn.Upsample) for m in head.modules()) == doublings
    assert sum(isinstance(m, nn.Conv2d) for m in head.convolve) == 4


def test_cells_of_a_patch_start_alike():
    head = LightHead(SPECS[0], D, 8, (2, 3), (32, 48))
    cells = head.shuffle(as_map(head.spread(torch.randn(1, 6, D)), (2, 3)))
    assert cells.shape == (1, 8, 8, 12)
    alike = cells[..., ::4, ::4].repeat_interleave(4, -2).repeat_interleave(4, -1)
    torch.testing.assert_close(cells, alike)
    assert cells[0, 0].unique().numel() > 6 - 1


def test_the_light_head_costs_what_it_says():
    width, hidden, patches = 384, 64, 32 * 32
    with torch.device("meta"):
        head = LightHead(TaskSpec("normals"), width, hidden, (32, 32), (512, 512))
        macs = moecore.count_cost(head, torch.empty(1, patches, width)).macs
    assert macs == patches * hidden * (16 * width + 72 * hidden + 8 * 3)


@pytest.mark.parametrize(("name", "most"), [("light", 0.025), ("task_expert", 0.035)])
def test_cheap_decoders_cost_a_few_percent_of_the_backbone(name, most):
    with torch.device("meta"):
        vit = VisionTransformer(512, 16, 3, 0, "", 384, 12, 6, final_norm=False)  # active experts cost what FFNs do
        model = make_decoder(M3ViTConfig(name), SceneSpec(512, 512, SPECS), 384, 12, (32, 32))
        for block in vit.blocks:
            block.attn.fused_attn = False
        backbone = moecore.count_cost(vit, torch.empty(1, 3, 512, 512)).macs
        macs = moecore.count_cost(model, [torch.empty(1, 1024, 384) for _ in model.blocks], "normals").macs
    assert macs < most * backbone


@pytest.mark.parametrize("name", DECODERS)
def test_boundaries_within_patches_can_be_learned(name):
    model = decoder(name, (32, 48), 8).train()
    features = [torch.randn(1, 24, D)] * len(model.blocks)
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(48) + 0.5, indexing="ij")
    disc = ((rows - 15).square() + (columns - 21).square() < 11**2).float()[None]  # [1, H, W]
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(features, "saliency")[:, 0], disc).backward()
        optimizer.step()
    right = ((model(features, "saliency")[:, 0] > 0) == disc.bool()).float().mean()
    by_patch = disc.reshape(1, 4, 8, 6, 8).mean((2, 4))  # the best that one value a patch could do
    assert right > 0.99 > torch.maximum(by_patch, 1 - by_patch).mean() + 0.05
