"""AW-MoE: what a user did feeds the experts, and weights them, behaviour by behaviour (ICDE 2023).

The published description leaves sizes and tables open; they are settings here.

B rows, L behaviours, d width of an embedding, h of an encoded behaviour, J = 3 h, K experts, T tasks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from apps.recsys.batch import InputSpec, SequenceInput
from apps.recsys.model_settings import AWMoEConfig
from apps.recsys.models.base import Fields, Output
from moecore.errors import ConfigError, require
from moecore.factorized import beside
from moecore.multigate import MultiGate
from moecore.multigate_experts import ExpertStack


def behaviour_input(spec: InputSpec, name: str | None) -> SequenceInput:
    """The sequence that experts and gate look at.

    Args:
        spec: of the data.
        name: of the sequence; None: the first with a target.

    Raises:
        ConfigError: there is none.
    """
    fitting = {one.name: one for one in spec.sequences if one.target is not None}
    if not fitting:
        ask = "the data has no sequence with pooling=target; give one (features.NAME.target) or take another model"
        raise ConfigError("behaviours", name, ask)
    require(name is None or name in fitting, "behaviours", name, f"has no target; there is {', '.join(fitting)}")
    return next(iter(fitting.values())) if name is None else fitting[name]


class BehaviourUnits(nn.Module):
    """What each behaviour says about the experts: a weight `w_j` and a vote `u_j` per expert, products summed.

    Both are MLPs of `[h_j, h_j * h_t, h_t]`: the activation unit and the gate unit.
    """

    def __init__(self, width: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 2 * hidden)
        self.activation = nn.Linear(hidden, 1)
        self.vote = nn.Linear(hidden, num_experts)

    def forward(self, joint: Float[Tensor, "B L J"]) -> Float[Tensor, "B L K"]:
        """Products, behaviour by behaviour."""
        first, second = self.hidden(joint).relu().chunk(2, -1)
        return self.activation(first) * self.vote(second)


class BehaviourGate(MultiGate):
    """Experts weighted by the sum of what behaviours say: `g = default + sum_j w_j u_j`, not normalised.

    `contrast` keeps what two views of a batch's sequences say apart from other rows.

    Args:
        experts: K experts.
        width: J.
        config: settings.
    """

    def __init__(self, experts: ExpertStack, width: int, config: AWMoEConfig) -> None:
        super().__init__({"experts": experts}, {"behaviours": ["experts"]}, 1)
        count = experts.num_experts
        even = torch.full((count,), 1 / count)
        self.gates["behaviours"] = BehaviourUnits(width, config.unit_hidden, count) if config.gate else nn.Identity()
        if config.gate and config.default_gate:
            self.default = nn.Parameter(even)
        else:
            self.register_buffer("default", torch.zeros(count) if config.gate else even, persistent=False)

    def run_gates(self, x: Float[Tensor, "B K"]) -> Float[Tensor, "B 1 K"]:
        """Weights, from what the behaviours of each row say together."""
        return (x + self.default)[:, None]


def contrast(
    gate: Float[Tensor, "B K"],
    view: Float[Tensor, "B K"],
    seen: Bool[Tensor, " B"],
    negatives: int,
    temperature: float,
) -> Float[Tensor, ""]:
    """InfoNCE on gates: each row's two views agree more than the row does with others of the batch.

    Args:
        gate: from the whole sequence.
        view: from the sequence with behaviours hidden.
        seen: rows with behaviours; others have nothing to tell apart.
        negatives: other rows that each is compared with, drawn anew; fewer in a small batch.
        temperature: divides cosines.
    """
    rows = gate.shape[0]
    shifts = torch.randperm(max(rows - 1, 0), device=gate.device)[:negatives] + 1
    gate, view = F.normalize(gate, dim=-1, eps=1e-6), F.normalize(view, dim=-1, eps=1e-6)
    others = (torch.arange(rows, device=gate.device)[:, None] + shifts) % max(rows, 1)  # [B, N]
    negative = torch.einsum("bk,bnk->bn", gate, view[others]).masked_fill(~seen[others], float("-inf"))
    positive = (gate * view).sum(-1, keepdim=True)
    scores = torch.cat([positive, negative], 1) / temperature
    losses = scores.logsumexp(1) - scores[:, 0]
    return losses.masked_fill(~seen, 0.0).sum() / seen.sum().clamp(min=1)


class AWMoE(nn.Module):
    """Experts on the user's interest, the candidate and all other features, weighted by the user's behaviours.

    `h_j = MLP(e_j)`, interest `v_u = sum_j a(h_j, h_t) h_j` (DIN, not normalised), expert k gives a score per task from
    `[features, v_u, h_t]`, and the logit is `sum_k g_k s_k` plus a constant of the task. The order of behaviours does
    not matter.

    Args:
        config: settings.
        spec: of the data.
        width: of all features side by side.

    Raises:
        ConfigError: the data has no sequence with a target.
    """

    def __init__(self, config: AWMoEConfig, spec: InputSpec, width: int) -> None:
        super().__init__()
        one = behaviour_input(spec, config.behaviours)
        self.config, self.behaviours = config, one.name
        sizes = [spec.table(one.table).dim, *config.item_units]
        layers = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
        self.encode = nn.Sequential(*layers)
        joint = 3 * sizes[-1]
        self.attend = nn.Sequential(nn.Linear(joint, config.unit_hidden), nn.ReLU(), nn.Linear(config.unit_hidden, 1))
        own, tasks = config.experts, spec.tasks
        units = (*own.units, len(tasks))
        experts = ExpertStack(
            config.num_experts, 2 * sizes[-1] + width, units, own.activation, own.norm, own.dropout, linear=True
        )
        self.level = BehaviourGate(experts, joint, config)
        self.bias = nn.Parameter(torch.tensor(_log_odds([task.prior for task in tasks])))

    def forward(self, fields: Fields) -> Output:
        """Logits of all tasks; in training, the contrastive loss."""
        seen = fields.behaviours[self.behaviours]
        behaviours, target = self.encode(seen.values), self.encode(seen.target)  # [B, L, h], [B, h]
        candidate = target[:, None].expand_as(behaviours)
        joint = torch.cat([behaviours, behaviours * candidate, candidate], -1)
        mask = seen.mask.to(behaviours.dtype)
        interest = torch.bmm((self.attend(joint).squeeze(-1) * mask)[:, None], behaviours).squeeze(1)
        x = beside(fields.features, interest, target)
        if not self.config.gate:
            none = target.new_zeros(len(target), self.config.num_experts)
            return Output(self.level(x, none)["behaviours"] + self.bias)
        votes = self.level.gates["behaviours"](joint)  # [B, L, K]
        gate = torch.einsum("blk,bl->bk", votes, mask)
        logits = self.level(x, gate)["behaviours"] + self.bias
        if not self.training or self.config.contrast == 0:
            return Output(logits)
        kept = mask * (torch.rand_like(mask) >= self.config.mask)
        view = torch.einsum("blk,bl->bk", votes, kept)
        one = self.config
        loss = contrast(gate, view, seen.mask.any(1), one.negatives, one.temperature)
        return Output(logits, {"contrast": one.contrast * loss})


def _log_odds(priors: Sequence[float]) -> list[float]:
    return [math.log(p / (1 - p)) for p in priors]
