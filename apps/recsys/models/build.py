"""Models by the settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from apps.recsys.batch import Batch, InputSpec
from apps.recsys.model_settings import MLPConfig, ModelConfig, TowerConfig
from apps.recsys.models.aw_moe import AWMoE, behaviour_input
from apps.recsys.models.base import Output, RankModel, Slot
from apps.recsys.models.features import FeatureEncoder
from apps.recsys.models.home import HoME
from apps.recsys.models.mmoe import PLE, MMoE
from apps.recsys.models.moae import MoAE
from apps.recsys.models.size import multiply_adds
from apps.recsys.models.towers import SharedBottom, SingleTask, WithTowers
from moecore.balance import balance_loss
from moecore.errors import ConfigError, require
from moecore.inspect import record
from moecore.multigate_sparse import SparseMultiGate


@dataclass(frozen=True)
class Inputs:
    """What a network is built for."""

    spec: InputSpec
    width: int
    """Of all features side by side."""
    slots: Sequence[Slot]
    """Where each lies."""


@dataclass(frozen=True)
class Family:
    """How a network is made, and what it is called."""

    title: str
    """Its name in tables."""
    build: Callable[[ModelConfig, Inputs], nn.Module]
    """(settings, inputs) -> a module from `Fields` to `Output`."""
    experts: bool = True
    """Whether there are experts, which a dense twin has not."""
    linear: Callable[[ModelConfig], bool] = lambda _: True
    """Whether what reads the features first is linear, so that they need not be laid out (`moecore.factorized`)."""


def _with_towers(trunk: Callable[[ModelConfig, Inputs], nn.Module]) -> Callable[[ModelConfig, Inputs], nn.Module]:
    return lambda config, inputs: WithTowers(trunk(config, inputs), config.tower, inputs.spec.tasks)


FAMILIES: dict[str, Family] = {
    "shared_bottom": Family(
        "Shared bottom",
        _with_towers(lambda config, inputs: SharedBottom(config.shared_bottom.bottom, inputs.width)),
        experts=False,
    ),
    "single_task": Family(
        "Single task",
        _with_towers(lambda config, inputs: SingleTask(config.single_task.bottom, inputs.spec.tasks, inputs.width)),
        experts=False,
    ),
    "mmoe": Family(
        "MMoE",
        _with_towers(lambda config, inputs: MMoE(config.mmoe, inputs.spec.tasks, inputs.width)),
        linear=lambda config: config.mmoe.top_k is None,
    ),
    "ple": Family(
        "PLE",
        _with_towers(lambda config, inputs: PLE(config.ple, inputs.spec.tasks, inputs.width)),
        linear=lambda config: config.ple.top_k is None,
    ),
    "home": Family(
        "HoME",
        _with_towers(lambda config, inputs: HoME(config.home, inputs.spec.tasks, inputs.width)),
        linear=lambda _: False,
    ),
    "aw_moe": Family("AW-MoE", lambda config, inputs: AWMoE(config.aw_moe, inputs.spec, inputs.width)),
    "moae": Family(
        "MoAE",
        lambda config, inputs: MoAE(config.moae, inputs.spec.tasks, inputs.slots),
        linear=lambda config: config.moae.squeeze == "none" and not config.moae.input_norm,
    ),
}
"""Networks by the name that configurations use."""


class Ranker(RankModel):
    """Features, and a network on them.

    Args:
        encoder: from encoded rows to features.
        network: from features to logits.

    Attributes:
        task_weights: of each task in the loss, beside the weights of the labels; None: 1.
    """

    def __init__(self, encoder: FeatureEncoder, network: nn.Module) -> None:
        super().__init__()
        self.encoder, self.network = encoder, network
        self.task_weights: tuple[float, ...] | None = getattr(network, "task_weights", None)
        self.sparse = any(isinstance(module, SparseMultiGate) and module.aux_loss for module in network.modules())

    def forward(self, batch: Batch) -> Output:
        """Logits of every task; in training also the balance loss of sparse gates."""
        fields = self.encoder(batch)
        if not (self.training and self.sparse):
            return self.network(fields)
        with record(self.network) as recording:
            output = self.network(fields)
        return Output(output.logits, {**output.losses, "balance": balance_loss(recording)})


def build_model(config: ModelConfig, spec: InputSpec, sparse_gradients: bool = False) -> Ranker:
    """A model with fresh weights.

    Args:
        config: which, and its settings.
        spec: of the data.
        sparse_gradients: embedding tables get gradients of touched rows only.

    Raises:
        ConfigError: for settings that do not go together, by their full names.
    """
    try:
        aware = config.name == "aw_moe" and not config.dense
        hand_on = [behaviour_input(spec, config.aw_moe.behaviours).name] if aware else []
        linear = config.dense or FAMILIES[config.name].linear(config)
        encoder = FeatureEncoder(spec, sparse_gradients, hand_on, factorize=linear)
        inputs = Inputs(spec, encoder.width, encoder.slots)
        return Ranker(
            encoder, _dense_twin(config, inputs) if config.dense else FAMILIES[config.name].build(config, inputs)
        )
    except ConfigError as error:
        field = error.field if error.field.startswith(("data.", "model.")) else f"model.{config.name}.{error.field}"
        field = "model.dense" if error.field == "dense" else field
        raise ConfigError(field, error.value, error.remedy) from None


def _dense_twin(config: ModelConfig, inputs: Inputs) -> nn.Module:
    """One bottom and the same towers, of about as many multiply-adds."""
    family = FAMILIES[config.name]
    require(family.experts, "dense", config.dense, f"name={config.name} has no experts to replace")
    experts: MLPConfig = getattr(config, config.name).experts
    budget = multiply_adds(family.build(config, inputs), inputs.spec)
    out = experts.units[-1]
    hidden = max(round(budget / (inputs.width + out)), 1)
    units = (hidden, out)
    bottom = MLPConfig(units, experts.activation, experts.norm, experts.dropout)
    tower = TowerConfig(config.moae.tower) if config.name == "moae" else config.tower
    return WithTowers(SharedBottom(bottom, inputs.width), tower, inputs.spec.tasks)
