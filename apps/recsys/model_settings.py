"""Settings of the ranking models. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moecore.errors import require

Activation = Literal["relu", "silu", "gelu", "tanh", "identity"]


def _check_mlp(units: tuple[int, ...], dropout: float, layers: int) -> None:
    good = len(units) >= layers and all(unit >= 1 for unit in units)
    require(good, "units", units, f"give {'at least one layer' if layers else 'layers'} of at least 1 unit")
    require(0 <= dropout < 1, "dropout", dropout, "must lie in [0, 1)")


def _check_counts(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 1, name, value, "must be at least 1")


def _check_sparse(top_k: int | None, balance: float) -> None:
    require(top_k is None or top_k >= 1, "top_k", top_k, "must be at least 1, or null for all experts")
    require(balance >= 0, "balance", balance, "must not be negative")


@dataclass
class MLPConfig:
    """Layers of one kind: experts, or a bottom."""

    units: tuple[int, ...] = (64,)
    """Units of each layer; the last is the width of the output."""
    activation: Activation = "relu"
    """After every layer."""
    norm: bool = False
    """BatchNorm before every activation. Lifts tasks with few positives, costs a little on the others."""
    dropout: float = 0.0
    """After every activation."""

    def __post_init__(self) -> None:
        _check_mlp(self.units, self.dropout, 1)


@dataclass
class TowerConfig:
    """The network of each task that ends in its logit."""

    units: tuple[int, ...] = (32,)
    """Hidden units of each layer; none: one linear map."""
    activation: Activation = "relu"
    """After every hidden layer."""
    norm: bool = False
    """BatchNorm before every activation."""
    dropout: float = 0.0
    """After every activation."""

    def __post_init__(self) -> None:
        _check_mlp(self.units, self.dropout, 0)


@dataclass
class GateConfig:
    """How gates weight experts."""

    weight: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: weights sum to one; sigmoid: each expert by itself. Sparse gates (top_k) are softmax."""
    bias: bool = False
    """Of the linear map; published MMoE and PLE have none."""
    norm: bool = False
    """BatchNorm on the logits, as torch-rechub has it."""


@dataclass
class SharedBottomConfig:
    """One network for all tasks, a tower per task: no experts."""

    bottom: MLPConfig = field(default_factory=lambda: MLPConfig(units=(256, 64)))
    """The network."""


@dataclass
class SingleTaskConfig:
    """A network of its own for each task; only embeddings are shared."""

    bottom: MLPConfig = field(default_factory=lambda: MLPConfig(units=(128, 64)))
    """Of each task."""


@dataclass
class MMoEConfig:
    """MMoE (Ma et al., KDD 2018): experts that all tasks share, a gate per task."""

    num_experts: int = 8
    """Experts."""
    experts: MLPConfig = field(default_factory=MLPConfig)
    """Of each expert."""
    gates: GateConfig = field(default_factory=GateConfig)
    """Of each task."""
    one_gate: bool = False
    """The same gate for all tasks (OMoE)."""
    top_k: int | None = None
    """Experts per row and task, chosen by a sparse gate; of the others nothing is computed. null: all of them,
    weighted."""
    balance: float = 0.01
    """top_k: coefficient of the balance loss."""

    def __post_init__(self) -> None:
        _check_counts(self, "num_experts")
        _check_sparse(self.top_k, self.balance)


@dataclass
class PLEConfig:
    """PLE (Tang et al., RecSys 2020): shared and own experts of every task, in levels; CGC is one level."""

    levels: int = 2
    """Levels; 1: CGC."""
    shared_experts: int = 2
    """Experts that all tasks see, per level."""
    task_experts: int = 2
    """Experts of each task, per level."""
    experts: MLPConfig = field(default_factory=MLPConfig)
    """Of each expert."""
    gates: GateConfig = field(default_factory=GateConfig)
    """Of each task, and of the shared experts of all levels but the last."""
    top_k: int | None = None
    """Experts per row and gate, of those it sees; null: all of them, weighted."""
    balance: float = 0.01
    """top_k: coefficient of the balance loss."""

    def __post_init__(self) -> None:
        _check_counts(self, "levels", "shared_experts", "task_experts")
        _check_sparse(self.top_k, self.balance)


@dataclass
class HoMEConfig:
    """HoME (arXiv 2408.05430): normalised experts, a meta level per group of tasks, gates on features and on selves.

    Groups are those of the labels (`group`). Each part can be switched off; all off, it is PLE with two levels.
    """

    shared_experts: int = 2
    """Experts that all groups see, per level."""
    group_experts: int = 2
    """Experts of each group of tasks, per level."""
    task_experts: int = 1
    """Experts of each task, at the task level."""
    experts: MLPConfig = field(default_factory=lambda: MLPConfig(activation="silu", norm=True))
    """Of each expert; published: Swish after BatchNorm."""
    hierarchy: bool = True
    """Group tasks at the meta level; false: every task is a group of its own, without experts per group."""
    feature_gate: Literal["none", "input", "group", "expert"] = "group"
    """Who reads features weighted by a low-rank gate of its own: nobody, all experts of an input as one, each group of
    experts, or each expert."""
    feature_rank: int = 8
    """Rank of each low-rank map of a feature gate."""
    feature_maps: int = 2
    """Low-rank maps of a feature gate, mixed by a softmax."""
    self_gate: bool = True
    """Add a mixture of its own experts to what a gate gives, so that gradients reach them."""
    self_gate_input: Literal["experts", "gate"] = "experts"
    """What self gates read: what the experts read before their feature gates, or what the gate reads. They differ at
    the task level only."""
    expert_input: Literal["own", "both"] = "own"
    """What experts of the task level read: the mixture of their kind (shared, or group), or shared and group mixture
    side by side, as some variants have it."""
    gates: GateConfig = field(default_factory=GateConfig)
    """Of groups and tasks."""
    top_k: int | None = None
    """Experts per row and gate, of those it sees; null: all of them, weighted. Sparse experts are normalised per row,
    not over the batch, and have no self gates and no feature gates per expert."""
    balance: float = 0.01
    """top_k: coefficient of the balance loss."""

    def __post_init__(self) -> None:
        _check_counts(self, "shared_experts", "group_experts", "task_experts", "feature_rank", "feature_maps")
        _check_sparse(self.top_k, self.balance)
        if self.top_k is not None:
            require(not self.self_gate, "self_gate", self.self_gate, "sparse experts (top_k) have none; set false")
            per_expert = self.feature_gate == "expert"
            require(not per_expert, "feature_gate", self.feature_gate, "sparse experts (top_k) take group or input")


@dataclass
class AWMoEConfig:
    """AW-MoE (ICDE 2023): what a user did feeds the experts, and weights them, behaviour by behaviour."""

    behaviours: str | None = None
    """Sequence feature with pooling=target that experts and gate look at; null: the first."""
    num_experts: int = 8
    """Experts K."""
    experts: MLPConfig = field(default_factory=MLPConfig)
    """Of each expert, before its score of each task."""
    item_units: tuple[int, ...] = (32,)
    """Layers of the network that behaviours and candidate pass first."""
    unit_hidden: int = 32
    """Hidden units of the attention, gate and activation unit."""
    gate: bool = True
    """Weight experts by behaviours; false: average them, the attention over behaviours stays (the twin that shows what
    the gate is worth)."""
    default_gate: bool = True
    """A learned weight per expert besides those of the behaviours, so that users without any are ranked too; published:
    false."""
    contrast: float = 0.05
    """Coefficient of the contrastive loss on the gate."""
    mask: float = 0.1
    """Probability with which a behaviour is hidden from the gate's second view."""
    negatives: int = 3
    """Other rows of the batch that the gate must be told apart from."""
    temperature: float = 0.1
    """Divides cosines in the contrastive loss."""

    def __post_init__(self) -> None:
        _check_counts(self, "num_experts", "unit_hidden", "negatives")
        good = len(self.item_units) >= 1 and all(unit >= 1 for unit in self.item_units)
        require(good, "item_units", self.item_units, "give at least one layer of at least 1 unit")
        require(self.contrast >= 0, "contrast", self.contrast, "must not be negative")
        require(0 < self.mask < 1, "mask", self.mask, "must lie between 0 and 1")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")


@dataclass
class MoAEConfig:
    """MoAE (mixture of asymmetric experts, PyMAL): one label under several attributions, the main one served."""

    main: str | None = None
    """The task that the others help; null: the first."""
    public_experts: int = 1
    """Experts that all tasks see."""
    private_experts: int = 1
    """Experts of each task."""
    experts: MLPConfig = field(default_factory=lambda: MLPConfig(units=(256,)))
    """Of each expert."""
    squeeze: Literal["none", "fields", "dims"] = "fields"
    """Weights on the features that an expert reads (squeeze and excitation): none, one per feature, or one per
    dimension of all features as published, which needs features of one width."""
    squeeze_ratio: int = 4
    """Hidden units of squeeze and excitation are this many times fewer."""
    input_norm: bool = False
    """LayerNorm on the input, as published; of little use where features differ in kind."""
    tower: tuple[int, ...] = (128, 64, 32)
    """Hidden units of each layer of the towers."""
    fusion: bool = True
    """Every layer of the main tower takes in those of the others; false: plain towers."""
    outputs: Literal[1, 2] = 1
    """Outputs of a tower; 2, as published: the logit is their difference."""
    aux_weight: float = 0.2
    """Weight of the other tasks in the loss, beside 1 of the main one; published: .1 to .3."""

    def __post_init__(self) -> None:
        _check_counts(self, "public_experts", "squeeze_ratio")
        require(self.private_experts >= 0, "private_experts", self.private_experts, "must not be negative")
        _check_mlp(self.tower, 0.0, 1)
        require(self.aux_weight >= 0, "aux_weight", self.aux_weight, "must not be negative")


@dataclass
class ModelConfig:
    """Which model, and the settings of each."""

    name: Literal["shared_bottom", "single_task", "mmoe", "ple", "home", "aw_moe", "moae"] = "mmoe"
    """The model; its settings are in the section of that name, the other sections do nothing."""
    dense: bool = False
    """The model's dense twin instead: one bottom for all tasks, of as many multiply-adds as the experts and gates it
    replaces."""
    tower: TowerConfig = field(default_factory=TowerConfig)
    """Of each task (moae has its own)."""
    shared_bottom: SharedBottomConfig = field(default_factory=SharedBottomConfig)
    """Shared bottom."""
    single_task: SingleTaskConfig = field(default_factory=SingleTaskConfig)
    """Single-task networks."""
    mmoe: MMoEConfig = field(default_factory=MMoEConfig)
    """MMoE."""
    ple: PLEConfig = field(default_factory=PLEConfig)
    """CGC and PLE."""
    home: HoMEConfig = field(default_factory=HoMEConfig)
    """HoME."""
    aw_moe: AWMoEConfig = field(default_factory=AWMoEConfig)
    """AW-MoE."""
    moae: MoAEConfig = field(default_factory=MoAEConfig)
    """MoAE."""
