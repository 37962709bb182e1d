"""MoAE: one label under several attributions, the main one helped by the others, never the other way round.

Mixture of asymmetric experts of PyMAL (Alimama, github.com/alimama-tech/PyMAL).

B rows, D width of the features, E experts, S weights of squeeze and excitation, T tasks, U units of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.recsys.batch import TaskSpec
from apps.recsys.model_settings import MLPConfig, MoAEConfig
from apps.recsys.models.base import Fields, Output, Slot
from apps.recsys.models.names import safe_names
from moecore.errors import require
from moecore.factorized import dense
from moecore.multigate import MultiGate
from moecore.multigate_experts import ExpertStack


class Squeeze(nn.Module):
    """Features weighted for each expert by what all of them are on average (squeeze and excitation).

    Hu et al. 2018, arXiv 1709.01507. The weights are a sigmoid of two linear maps without bias, ReLU between them.

    Args:
        num_experts: E.
        slots: where features lie.
        kind: "fields", a weight per feature from the mean of its dimensions (FiBiNET); "dims", a weight per dimension
            from its mean over features (PyMAL), which must then have one width.
        ratio: hidden units are S / ratio.
    """

    def __init__(self, num_experts: int, slots: Sequence[Slot], kind: str = "fields", ratio: int = 4) -> None:
        super().__init__()
        widths = [slot.stop - slot.start for slot in slots]
        if kind == "dims":
            same = len(set(widths)) == 1
            require(same, "squeeze", kind, f"needs features of one width, these have {sorted(set(widths))}; use fields")
            place = torch.arange(widths[0]).repeat(len(widths))
        else:
            place = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
        one_hot = nn.functional.one_hot(place).float()  # [D, S]
        self.register_buffer("spread", one_hot.T.contiguous(), persistent=False)
        self.register_buffer("mean", one_hot / one_hot.sum(0), persistent=False)
        size = one_hot.shape[1]
        self.weights = ExpertStack(num_experts, size, (max(size // ratio, 1), size), bias=False, linear=True)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E D"]:
        """[B, D] -> [B, E, D]."""
        factors = self.weights(x @ self.mean.to(x.dtype)).sigmoid()  # [B, E, S]
        return x[:, None] * (factors @ self.spread.to(x.dtype))  # a product: its backward is faster than an index's


class SqueezedStack(ExpertStack):
    """Experts that each weight the features first."""

    reads_input = False

    def __init__(self, num_experts: int, width: int, experts: MLPConfig, squeeze: Squeeze) -> None:
        super().__init__(num_experts, width, experts.units, experts.activation, experts.norm, experts.dropout)
        self.squeeze = squeeze

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E O"]:
        """Outputs of all experts."""
        return super().forward(self.squeeze(x))


class AsymmetricTowers(nn.Module):
    """Towers of which the main one takes in the others, layer by layer.

    In each hidden layer the main tower has `a = fc(h)` and goes on with `relu(Fuse[a; h_1; h_2; ...] + a)`, h_i being
    what the others have after that layer; gradients of the main loss reach them (nothing is detached).

    Args:
        priors: share of positives of each task; the start of its logit.
        width: of the inputs.
        units: of each hidden layer.
        main: number of the main task; None: all are plain towers.
        outputs: 1, the logit; or 2, whose difference it is.
    """

    def __init__(
        self, priors: Sequence[float], width: int, units: Sequence[int], main: int | None = 0, outputs: int = 1
    ) -> None:
        super().__init__()
        tasks, sizes = len(priors), list(zip([width, *units], units, strict=False))
        self.main = main if tasks > 1 else None
        self.layers = nn.ModuleList(ExpertStack(tasks, into, (out,), linear=True) for into, out in sizes)
        self.fuse = nn.ModuleList(nn.Linear(tasks * out, out) for _, out in sizes if self.main is not None)
        self.last = ExpertStack(tasks, units[-1], (outputs,), linear=True)
        with torch.no_grad():
            self.last.biases[0].zero_()
            self.last.biases[0][:, -1] = torch.tensor([math.log(p / (1 - p)) for p in priors])

    def forward(self, h: Float[Tensor, "B T W"]) -> Float[Tensor, "B T"]:
        """Logits."""
        for number, layer in enumerate(self.layers):
            a = layer(h)  # [B, T, U]
            h = a.relu() if self.main is None else self._fused(a, self.fuse[number])
        y = self.last(h)
        return y[..., 0] if y.shape[2] == 1 else y[..., 1] - y[..., 0]

    def _fused(self, a: Float[Tensor, "B T U"], fuse: nn.Linear) -> Float[Tensor, "B T U"]:
        before, own, after = a[:, : self.main], a[:, self.main], a[:, self.main + 1 :]
        before, after = before.relu(), after.relu()
        own = (fuse(torch.cat([own, before.flatten(1), after.flatten(1)], 1)) + own).relu()
        return torch.cat([before, own[:, None], after], 1)


class MoAE(nn.Module):
    """Public and private experts behind a gate per task, and towers of which the main one takes in the others.

    Args:
        config: settings; as published are squeeze=dims, input_norm=true, outputs=2. Without private experts and fusion
            it is the MMoE of the published code.
        tasks: the attributions.
        slots: where features lie.

    Attributes:
        task_weights: of each task in the loss: 1 for the main one, `aux_weight` for the others.
    """

    def __init__(self, config: MoAEConfig, tasks: Sequence[TaskSpec], slots: Sequence[Slot]) -> None:
        super().__init__()
        names, width = [task.name for task in tasks], slots[-1].stop
        main = config.main or names[0]
        require(main in names, "main", main, f"is no task; there is {', '.join(names)}")
        own = safe_names("task", names)
        self.norm = nn.LayerNorm(width) if config.input_norm else None

        def stack(count: int) -> ExpertStack:
            if config.squeeze == "none":
                one = config.experts
                return ExpertStack(count, width, one.units, one.activation, one.norm, one.dropout)
            squeeze = Squeeze(count, slots, config.squeeze, config.squeeze_ratio)
            return SqueezedStack(count, width, config.experts, squeeze)

        experts = {"public": stack(config.public_experts)}
        if config.private_experts:
            experts |= {key: stack(config.private_experts) for key in own.values()}
        sees = {key: ["public", key] if config.private_experts else ["public"] for key in own.values()}
        self.level = MultiGate(experts, sees, width, bias=True)
        fused = names.index(main) if config.fusion else None
        priors = [task.prior for task in tasks]
        self.towers = AsymmetricTowers(priors, self.level.out_width, config.tower, fused, config.outputs)
        self.task_weights = tuple(1.0 if name == main else config.aux_weight for name in names)

    def forward(self, fields: Fields) -> Output:
        """Logits of all attributions."""
        x = fields.features if self.norm is None else self.norm(dense(fields.features))
        return Output(self.towers(torch.stack(list(self.level(x).values()), 1)))
