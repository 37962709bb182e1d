"""TaskExpert against loops over its experts, and what its gates and memory do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apps.errors import ConfigError
from apps.vision.models.decoders import make_decoder
from apps.vision.models.task_expert import BlockExperts, TaskExpert, as_map
from apps.vision.multitask.settings import M3ViTConfig
from apps.vision.multitask.tasks import SceneSpec, TaskSpec

TASKS = (TaskSpec("depth"), TaskSpec("normals"), TaskSpec("classification", ("cat", "dog")))
B, D, C, E, GRID = 2, 12, 8, 3, (2, 5)


def decoder(layers: int = 3, depth: int = 6) -> TaskExpert:
    config = M3ViTConfig("task_expert", decoder_width=C, decoder_experts=E, decoder_layers=layers)
    return make_decoder(config, SceneSpec(16, 40, TASKS), D, depth, GRID).eval()


def tokens(layers: int = 3) -> list[Tensor]:
    return [torch.randn(B, 10, D) for _ in range(layers)]


def only_memory(model: TaskExpert, task: str) -> None:
    """Make the gates of a task heed nothing but its memory."""
    with torch.no_grad():
        for gate in model.heads[task].gates:
            gate[-1].weight.zero_()
            gate[-1].bias.copy_(torch.tensor([-100.0] * E + [100.0]))


def test_tokens_become_a_picture_row_by_row():
    numbers = torch.arange(10.0).view(1, 10, 1)
    assert as_map(numbers, GRID)[0, 0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("depth", "layers", "blocks"),
    [(12, 3, (3, 7, 11)), (12, 4, (2, 5, 8, 11)), (12, 1, (11,)), (4, 3, (1, 2, 3)), (4, 4, (0, 1, 2, 3))],
)
def test_blocks_are_spread_up_to_the_last(depth, layers, blocks):
    assert decoder(layers, depth).blocks == blocks


def test_more_blocks_than_there_are():
    with pytest.raises(ConfigError, match=r"^model\.m3vit\.decoder_layers=5: the backbone has 4 blocks; [^\n]+$"):
        decoder(5, 4)


def test_experts_are_networks_side_by_side():
    block = BlockExperts(D, C, E, GRID)
    x = torch.randn(B, 10, D)
    features, views = block(x)
    torch.testing.assert_close(features, as_map(F.layer_norm(x, (D,), eps=1e-6), GRID))
    reduce, mix, gelu, project = block.networks
    assert views.shape == (B, E, C, *GRID)
    for number in range(E):
        own = slice(number * C, (number + 1) * C)
        y = F.conv2d(features, reduce.weight[own], reduce.bias[own])
        y = F.conv2d(y, mix.weight[own], mix.bias[own], padding=1, groups=C)
        torch.testing.assert_close(views[:, number], F.conv2d(gelu(y), project.weight[own], project.bias[own]))


def test_a_task_assembles_pixel_by_pixel():
    model, features = decoder(), tokens()
    head, weights = model.heads["depth"], model.gate_weights(features, "depth")
    memory = head.start.expand(B, C, *GRID).clone()
    for layer, block in enumerate(model.experts):
        _, views = block(features[layer])
        assembled = torch.zeros(B, C, *GRID)
        for b in range(B):
            for row in range(GRID[0]):
                for column in range(GRID[1]):
                    at = (b, slice(None), row, column)
                    choices = [*views[b, :, :, row, column], memory[at]]
                    assembled[at] = sum(w * x for w, x in zip(weights[layer, b, row, column], choices, strict=True))
        memory = memory + head.writes[layer](assembled)
    expected = head.head(memory.flatten(2).transpose(1, 2))
    torch.testing.assert_close(model(features, "depth"), expected)


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_gate_weights_are_shares(task):
    model, features = decoder(), tokens()
    weights = model.gate_weights(features, task)
    assert weights.shape == (3, B, *GRID, E + 1)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, B, *GRID))
    assert weights.std((1, 2, 3)).min() > 0  # by pixel
    assert model.heads[task].state_dict().keys() == decoder().heads[task].state_dict().keys()  # nothing is kept


def test_gates_are_the_tasks_own():
    model, features = decoder(), tokens()
    before = {task.name: model(features, task.name) for task in TASKS}
    assert (model.gate_weights(features, "depth") - model.gate_weights(features, "normals")).abs().max() > 1e-3
    only_memory(model, "depth")
    assert not torch.allclose(model(features, "depth"), before["depth"])
    assert torch.equal(model(features, "normals"), before["normals"])


def test_the_memory_is_an_expert_of_its_own():
    model = decoder()
    only_memory(model, "depth")
    assert model.gate_weights(tokens(), "depth")[..., -1].min() > 0.999
    torch.testing.assert_close(model(tokens(), "depth"), model(tokens(), "depth"))  # whatever the experts see


def test_the_memory_carries_earlier_blocks_to_the_last():
    model, features = decoder(), tokens()
    changed = [torch.randn_like(features[0]), *features[1:]]
    before, after = model.gate_weights(features, "depth"), model.gate_weights(changed, "depth")
    assert (before - after).abs().amax((1, 2, 3, 4)).min() > 1e-6  # of all blocks, though but the first has changed
    assert (model(features, "depth") - model(changed, "depth")).abs().max() > 1e-3
    with torch.no_grad():
        for parameter in model.heads["depth"].writes[0].parameters():
            parameter.zero_()
    assert torch.equal(model(features, "depth"), model(changed, "depth"))


def test_later_blocks_leave_earlier_gates_alone():
    model, features = decoder(), tokens()
    changed = [*features[:2], torch.randn_like(features[2])]
    before, after = model.gate_weights(features, "normals"), model.gate_weights(changed, "normals")
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])


def test_experts_run_once_for_all_tasks():
    model, features = decoder(), tokens()
    calls: list[nn.Module] = []
    for block in model.experts:
        block.register_forward_hook(lambda module, *_: calls.append(module))
    predictions = model.forward_all(features, [task.name for task in TASKS])
    assert calls == list(model.experts)
    for task, prediction in predictions.items():
        assert torch.equal(prediction, model(features, task))


def test_a_slice_keeps_all_experts():
    model = decoder()
    state = model.only("normals").state_dict()
    shared = {key: value for key, value in model.state_dict().items() if key.startswith("experts.")}
    assert shared
    assert all(torch.equal(state[key], value) for key, value in shared.items())
    assert {key.split(".")[1] for key in state if key.startswith("heads.")} == {"normals"}


def test_features_of_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        decoder()(tokens(2), "depth")
