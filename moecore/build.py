"""From `MoEConfig` to a layer: the registries, and the parts that several layers of a model may share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moecore.config import MoEConfig
from moecore.controllers import LossFreeBias, SparsityController
from moecore.errors import ConfigError, choice, require
from moecore.experts import ExpertBank, GLUBank, MLPBank
from moecore.layer import MoE
from moecore.routing import Router
from moecore.scores import CentroidScore, CosineScore, HashScore, LinearScore, MLPScore, NoisyScore
from moecore.scores_conditioned import PerTaskScore, RecurrentScore, TaskConditionedScore
from moecore.selection import SELECTIONS, Capacity
from moecore.shared import SharedExpert
from moecore.weighting import WEIGHTINGS, Softmax

SCORES: dict[str, type[nn.Module]] = {
    "linear": LinearScore,
    "mlp": MLPScore,
    "noisy": NoisyScore,
    "cosine": CosineScore,
    "centroid": CentroidScore,
    "hash": HashScore,
    "per_task": PerTaskScore,
    "task_conditioned": TaskConditionedScore,
    "recurrent": RecurrentScore,
}
"""Scores by the name that configurations use; each is built as `cls(width, num_experts, **options)`."""

CONTROLLERS: dict[str, type[nn.Module] | None] = {
    "none": None,
    "loss_free": LossFreeBias,
    "sparsity": SparsityController,
}
"""Balance controllers by the name that configurations use."""


@dataclass(frozen=True)
class FFNShape:
    """What an expert inherits from the FFN it stands in for."""

    hidden: int
    glu: bool = False
    activation: object = "gelu"
    bias: bool = True
    dropout: float = 0.0


def build_router(config: MoEConfig, width: int, cell: nn.GRUCell | None = None) -> Router:
    """A router for tokens of width `width`.

    Softmax weights are renormalised unless the selection's published form takes them raw (`Selection.raw_weights`);
    `weight_options={"renormalize": ...}` overrides either.

    Args:
        config: the layer's settings.
        width: R of what the router sees (see `router_width`).
        cell: for a recurrent score, the cell of the layers before; None in the first.
    """
    for field, options in (("score", SCORES), ("select", SELECTIONS), ("weight", WEIGHTINGS)):
        choice(field, getattr(config, field), options)
    select = _make("select", SELECTIONS[config.select], config.select_options, config.num_experts, config.top_k)
    columns = config.num_experts + select.num_null
    extra = {"cell": cell, "first": cell is None} if config.score == "recurrent" else {}
    score = _make("score", SCORES[config.score], {**config.score_options, **extra}, width, columns)
    weight = _weighting(config, width, columns, select.raw_weights)
    capacity = None if config.capacity_factor is None else Capacity(config.capacity_factor)
    return Router(score, select, weight, _controller(config, columns, select.needs_logits), capacity)


def _weighting(config: MoEConfig, width: int, columns: int, raw: bool) -> nn.Module:
    cls, options = WEIGHTINGS[config.weight], dict(config.weight_options)
    if raw and issubclass(cls, Softmax):
        options.setdefault("renormalize", False)
    return _make("weight", cls, options, width, columns, config.top_k)


def _controller(config: MoEConfig, columns: int, needs_logits: bool) -> nn.Module | None:
    choice("controller", config.controller, CONTROLLERS)
    options = dict(config.controller_options)
    if config.controller == "loss_free":
        options.setdefault("space", "logits" if needs_logits else "probs")
        return _make("controller", LossFreeBias, options, columns)
    if config.controller == "sparsity":
        require(config.select == "threshold", "controller", "sparsity", "needs select=threshold")
        return _make("controller", SparsityController, options, columns, config.top_k)
    return None


def _make(field: str, cls: type[nn.Module], options: dict, *args: object) -> nn.Module:
    """`cls(*args, **options)`, with a one-line error for an unknown option."""
    try:
        return cls(*args, **options)
    except TypeError as error:
        raise ConfigError(f"{field}_options", options, f"{cls.__name__} says: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{field}_options.{error.field}", error.value, error.remedy) from error


def build_bank(config: MoEConfig, width: int, ffn: FFNShape, num_experts: int, hidden: int) -> ExpertBank:
    """A bank of MLP or GLU experts."""
    glu = ffn.glu if config.glu is None else config.glu
    activation = ("silu" if glu and not ffn.glu else ffn.activation) if config.activation is None else config.activation
    bias = ffn.bias if config.bias is None else config.bias
    dropout = ffn.dropout if config.dropout is None else config.dropout
    bank = GLUBank if glu else MLPBank
    return bank(num_experts, width, hidden, activation=activation, bias=bias, dropout=dropout)


def _comparable_hidden(config: MoEConfig, ffn: FFNShape) -> int:
    """Hidden units with which an FFN of the kind asked for costs what `ffn` does: gated ones have a third matrix."""
    glu = ffn.glu if config.glu is None else config.glu
    return ffn.hidden * (2 + ffn.glu) // (2 + glu)


def router_width(config: MoEConfig, width: int) -> int:
    """Width of what the router of a layer for tokens of width `width` sees."""
    if config.pool != "flatten":
        return width
    fixed = not isinstance(config.unit, str)
    require(fixed, "pool", config.pool, "flatten needs a unit of fixed length (a number of tokens)")
    return width * config.unit


def build_moe(config: MoEConfig, width: int, ffn: FFNShape | None = None, router: Router | None = None) -> MoE:
    """A layer for tokens of width `width`.

    Args:
        config: its settings.
        width: D.
        ffn: the FFN it stands in for; None: one of hidden size 4 D with GELU and biases.
        router: a router to use instead of a new one, e.g. one shared by several layers.
    """
    ffn = ffn or FFNShape(hidden=4 * width)
    if router is None:
        router = build_router(config, router_width(config, width))
    hidden = config.hidden_for(_comparable_hidden(config, ffn))
    experts = build_bank(config, width, ffn, config.num_experts, hidden)
    shared = None
    if config.shared_hidden:
        shared = SharedExpert(build_bank(config, width, ffn, 1, config.shared_hidden), config.shared_gate)
    return MoE(
        router,
        experts,
        shared,
        unit=config.unit,
        pool=config.pool,
        executor=config.executor,
        aux_loss=config.aux_loss,
    )
