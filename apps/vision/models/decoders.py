"""Decoders by name: what turns the tokens of M³ViT's backbone into the predictions of each task.

A decoder tells by `blocks` which of the backbone's blocks it reads, the last always among them. It takes the patch
tokens of those blocks, without the class token, row by row of the patch grid, and the name of a task. It gives
`[B, channels, H, W]` at the size of the image, or `[B, classes]` where the task is to classify the image. All that
belongs to one task has the prefix `heads.<task>.` in the state, its norm included: the backbone ends without one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from apps.vision.models.task_expert import NORM_EPS, TaskExpert, as_map
from apps.vision.multitask.settings import M3ViTConfig
from apps.vision.multitask.tasks import SceneSpec, TaskSpec
from moecore.errors import require

FIRST_GUESS = {"depth": 2.0, "edges": -3.0}
"""Bias of a task's last layer before training, where not 0: metres; log-odds of pixels of which 5% are edges."""


def _last(layer: nn.Linear | nn.Conv2d, task: TaskSpec) -> nn.Module:
    """The layer that predicts, with a bias that is the first guess."""
    nn.init.constant_(layer.bias, FIRST_GUESS.get(task.name, 0.0))
    return layer


class ClassHead(nn.Module):
    """Class scores of the image: a linear map of the mean of the normalised tokens.

    Args:
        task: what to predict.
        width: D.
    """

    def __init__(self, task: TaskSpec, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.predict = _last(nn.Linear(width, task.channels), task)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B classes"]:
        """[B, N, D] -> [B, classes]."""
        return self.predict(self.norm(tokens).mean(1))


class LightHead(nn.Module):
    """Maps for a few percent of the backbone's cost: a linear map, one 3x3 convolution, a 1x1 convolution.

    The linear map spreads a token over 4 x 4 cells of its patch (2 x 2 or 1 for patches of 4 or 2 pixels; sub-pixel
    convolution, arXiv 1609.05158), so that a boundary may pass through the midst of a patch. All cells of a patch
    start alike (arXiv 1707.02937): there is no checkerboard to be unlearned. The convolution, to C / 2 channels, sees
    over the seams between patches. The rest of the way to the full size is bilinear.

    A token costs C (16 D + 72 C + 8 channels) multiply-adds. With C = 64 and 12 blocks that is 2% of a backbone with
    D = 384 and patches of 16 pixels, 6% with D = 192 and patches of 8 pixels, but 22% with D = 96, where a smaller C
    may do.

    Args:
        task: what to predict.
        width: D.
        hidden: C, channels of the cells.
        grid: rows and columns of patches.
        size: height and width of the image.
    """

    def __init__(self, task: TaskSpec, width: int, hidden: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.size = grid, size
        cells = min(4, 2 ** int(math.log2(max(1, size[0] // grid[0] // 2))))  # a side; at most every second pixel
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.spread = nn.Linear(width, hidden * cells**2)
        self.shuffle = nn.PixelShuffle(cells)
        self.refine = nn.Sequential(nn.GELU(), nn.Conv2d(hidden, hidden // 2, 3, padding=1), nn.GELU())
        self.predict = _last(nn.Conv2d(hidden // 2, task.channels, 1), task)
        self._start_cells_alike(cells**2)

    @torch.no_grad()
    def _start_cells_alike(self, cells: int) -> None:
        """Give all cells of a patch the weights of the first."""
        for weight in self.spread.parameters():
            weight.copy_(weight[::cells].repeat_interleave(cells, 0))

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """[B, N, D] -> [B, channels, H, W]."""
        x = as_map(self.spread(self.norm(tokens)), self.grid)  # [B, C * cells, rows, columns]
        x = self.predict(self.refine(self.shuffle(x)))
        return F.interpolate(x, self.size, mode="bilinear")


class UpsampleHead(nn.Module):
    """The head of M³ViT as published (arXiv 2210.14793): four 3x3 convolutions with upsampling between them.

    LayerNorm; four times a convolution to C channels, batch norm, ReLU and bilinear upsampling by 2; a 1x1 convolution.
    That is for patches of 16 pixels; for smaller ones the first convolutions do without upsampling, for others the last
    upsampling goes to the full size. It is done after the 1x1 convolution, which gives the same, as the one mixes only
    channels and the other only pixels by weights of sum 1, for a quarter of the cost and of the memory.

    Args:
        task: what to predict.
        width: D.
        hidden: C.
        grid: rows and columns of patches.
        size: height and width of the image.
    """

    def __init__(self, task: TaskSpec, width: int, hidden: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.size = grid, size
        self.norm = nn.LayerNorm(width, NORM_EPS)
        doublings = max(1, math.ceil(math.log2(size[0] / grid[0])))
        layers: list[nn.Module] = []
        for left in (4, 3, 2, 1):  # convolutions from here on, the last of which has its upsampling at the end
            layers += [nn.Conv2d(width, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
            if 1 < left <= doublings:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            width = hidden
        self.convolve = nn.Sequential(*layers)
        self.predict = _last(nn.Conv2d(hidden, task.channels, 1), task)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """[B, N, D] -> [B, channels, H, W]."""
        x = self.convolve(as_map(self.norm(tokens), self.grid))  # [B, C, up to H / 2, W / 2]
        return F.interpolate(self.predict(x), self.size, mode="bilinear")


class HeadPerTask(nn.Module):
    """Decoder that reads the last block alone, by a head for each task.

    Args:
        heads: by task, from tokens [B, N, D] to the prediction.
        depth: blocks of the backbone.
    """

    def __init__(self, heads: Mapping[str, nn.Module], depth: int) -> None:
        super().__init__()
        self.blocks = (depth - 1,)
        self.heads = nn.ModuleDict(heads)

    def forward(self, features: Sequence[Float[Tensor, "B N D"]], task: str) -> Tensor:
        """Patch tokens of the last block -> prediction of a task, [B, channels, H, W] or [B, classes]."""
        (tokens,) = features
        return self.heads[task](tokens)

    def forward_all(self, features: Sequence[Float[Tensor, "B N D"]], tasks: Iterable[str]) -> dict[str, Tensor]:
        """Predictions of several tasks from the same tokens."""
        return {task: self(features, task) for task in tasks}

    def only(self, task: str) -> HeadPerTask:
        """A copy for one task, with the same predictions: without the heads of the others."""
        decoder = copy.deepcopy(self)
        decoder.heads = nn.ModuleDict({task: decoder.heads[task]})
        return decoder


Head = Callable[[TaskSpec, int, int, tuple[int, int], tuple[int, int]], nn.Module]
"""(task, D, C, grid, size) -> from tokens [B, N, D] to maps [B, channels, H, W]."""


def _heads(head: Head, spec: SceneSpec, width: int, hidden: int, grid: tuple[int, int]) -> dict[str, nn.Module]:
    """A head for every task that predicts maps; those that classify images have a head that is always the same."""
    size = spec.height, spec.width
    return {
        task.name: head(task, width, hidden, grid, size) if task.kind.dense else ClassHead(task, width)
        for task in spec.tasks
    }


def _light(config: M3ViTConfig, spec: SceneSpec, width: int, depth: int, grid: tuple[int, int]) -> HeadPerTask:
    return HeadPerTask(_heads(LightHead, spec, width, config.decoder_width or 64, grid), depth)


def _upsample(config: M3ViTConfig, spec: SceneSpec, width: int, depth: int, grid: tuple[int, int]) -> HeadPerTask:
    return HeadPerTask(_heads(UpsampleHead, spec, width, config.decoder_width or 256, grid), depth)


def _task_expert(config: M3ViTConfig, spec: SceneSpec, width: int, depth: int, grid: tuple[int, int]) -> TaskExpert:
    hidden, layers = config.decoder_width or 64, config.decoder_layers
    require(layers <= depth, "model.m3vit.decoder_layers", layers, f"the backbone has {depth} blocks; at most so many")
    blocks = tuple(math.ceil(depth * layer / layers) - 1 for layer in range(1, layers + 1))
    heads = _heads(LightHead, spec, hidden, hidden, grid)  # which read the memory
    return TaskExpert(heads, width, hidden, config.decoder_experts, blocks, grid)


DECODERS: dict[str, Callable[[M3ViTConfig, SceneSpec, int, int, tuple[int, int]], nn.Module]] = {
    "light": _light,
    "upsample": _upsample,
    "task_expert": _task_expert,
}
"""What builds each decoder. A further one is a line here and a name in `M3ViTConfig.decoder`."""


def make_decoder(config: M3ViTConfig, spec: SceneSpec, width: int, depth: int, grid: tuple[int, int]) -> nn.Module:
    """The decoder that the settings name, for all tasks of the data.

    Args:
        config: which decoder, and its sizes.
        spec: tasks and the size of the images.
        width: D of the backbone.
        depth: blocks of the backbone.
        grid: rows and columns of patches.

    Returns:
        A module called with the patch tokens [B, N, D] of its `blocks`, and a task. It has `forward_all(features,
        tasks)` for tokens that do not depend on the task, and `only(task)`, a copy that holds but one task.

    Raises:
        ConfigError: if it is to read more blocks than there are.
    """
    return DECODERS[config.decoder](config, spec, width, depth, grid)
