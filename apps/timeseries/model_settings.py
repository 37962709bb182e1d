"""Settings of the forecasting models. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moecore.errors import require

Normalize = Literal["instance", "none"]


@dataclass
class TimeMoEConfig:
    """Time-MoE (arXiv 2409.16040): a decoder of point tokens. The fields are those of the published config.json."""

    pretrained: str | None = None
    """Folder in the published format (config.json and safetensors or bin) to start from; it sets all sizes."""
    preset: Literal["none", "50m", "200m", "ultra"] = "none"
    """Sizes of a published model; none: the fields below."""
    hidden_size: int = 96
    """Width."""
    intermediate_size: int = 192
    """Hidden units of the shared expert; each routed expert has 1 / top_k of them."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int | None = None
    """Heads of keys and values (grouped-query attention); null: as many as num_heads."""
    num_experts: int = 8
    """Routed experts per block; 0: plain FFNs."""
    top_k: int = 2
    """Experts per token."""
    horizons: tuple[int, ...] = (1, 8, 32, 64)
    """Output heads: points each predicts at once. The first must be 1."""
    max_positions: int = 4096
    """Longest sequence."""
    rope_theta: float = 10000.0
    """Base of the rotary angles."""
    aux_loss: float = 0.02
    """Coefficient of the balance loss over all layers together."""
    huber_delta: float = 2.0
    """Error, in deviations of the context, from which the loss grows linearly; small: a median rather than a mean."""
    attention_dropout: float = 0.0
    """Dropout on attention weights."""
    normalize: Normalize = "instance"
    """Contexts are brought to mean 0 and deviation 1, or taken as they are (the published evaluation)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of weights and matrix products; all between them stays float32. bfloat16, as published weights are stored, is for
    forecasts only: half the memory, and about half the time on CPUs that multiply it (avx512_bf16)."""
    checkpoint_blocks: bool = False
    """Compute blocks again for their gradients instead of keeping what is in them: training takes less memory, more
    time."""

    def __post_init__(self) -> None:
        heads, kv = self.num_heads, self.num_kv_heads
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "max_positions"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.num_experts >= 0, "num_experts", self.num_experts, "must not be negative; 0 for plain FFNs")
        require(self.huber_delta > 0, "huber_delta", self.huber_delta, "must be positive")
        require(self.hidden_size % heads == 0, "hidden_size", self.hidden_size, f"must be a multiple of {heads} heads")
        require(self.hidden_size // heads % 2 == 0, "num_heads", heads, "must leave an even width per head")
        require(kv is None or (kv >= 1 and heads % kv == 0), "num_kv_heads", kv, f"must divide num_heads={heads}")
        top = self.top_k
        require(self.num_experts == 0 or 1 <= top <= self.num_experts, "top_k", top, "between 1 and num_experts")
        ordered = list(self.horizons) == sorted(set(self.horizons)) and len(self.horizons) > 0
        require(ordered and self.horizons[0] == 1, "horizons", self.horizons, "must rise from 1")


@dataclass
class SegMoEConfig:
    """Seg-MoE (arXiv 2601.21641): a patch encoder whose experts are chosen per segment of consecutive patches."""

    patch_size: int = 16
    """Points per patch; a whole season, or a part of one, suits best."""
    d_model: int = 32
    """Width."""
    d_ff: int = 64
    """Hidden units of an expert per patch."""
    num_layers: int = 2
    """Blocks."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int = 2
    """Heads of keys and values (grouped-query attention)."""
    segments: tuple[int, ...] = (3, 5)
    """Patches per segment in each block, the last repeated for blocks beyond; 1 routes every patch by itself."""
    num_experts: int = 4
    """Routed experts per block."""
    top_k: int = 1
    """Experts per segment."""
    routed: Literal["token", "segment"] = "token"
    """Routed experts treat a segment's patches one by one (the published code) or see the segment whole (the paper's
    abstract)."""
    shared: bool = True
    """A gated expert that sees every segment whole, beside the routed ones."""
    head: Literal["direct", "shift"] = "direct"
    """direct: one linear map from all patches to the block (as PatchTST); shift: as published, every patch gives the
    patch that is one block later, and what the input shows is learned from too."""
    seasonal: bool = True
    """Add a linear map over the seasons of the context, the same for every phase (as SparseTSF): a start that the
    experts then correct. Not in the published model."""
    block: int | None = None
    """Points predicted at once; longer horizons are rolled out block by block. null: data.horizon."""
    loss: Literal["mae", "huber"] = "mae"
    """Of each point; published: huber, with its delta at 2 deviations of the context."""
    loss_horizons: tuple[int, ...] = ()
    """Weight points so that the loss is the mean of those at these horizons; none: all points of the block alike."""
    dropout: float = 0.2
    """Dropout in attention, experts and before the head."""
    drop_path: float = 0.3
    """Stochastic depth of the last block, rising linearly from 0."""
    router_dropout: float = 0.1
    """Probability that an expert cannot be chosen for a segment, in training."""
    temperature: float = 1.0
    """Divides the router's logits."""
    aux_loss: float = 0.02
    """Coefficient of each layer's balance loss."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "num_experts"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        heads, kv = self.num_heads, self.num_kv_heads
        require(self.d_model % heads == 0, "d_model", self.d_model, f"must be a multiple of {heads} heads")
        require(self.d_model // heads % 2 == 0, "num_heads", heads, "must leave an even width per head")
        require(heads % kv == 0, "num_kv_heads", kv, f"must divide num_heads={heads}")
        good = len(self.segments) > 0 and min(self.segments) >= 1
        require(good, "segments", self.segments, "one length of at least 1 per block")
        require(1 <= self.top_k <= self.num_experts, "top_k", self.top_k, f"between 1 and {self.num_experts}")
        for name in ("dropout", "drop_path", "router_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in [0, 1)")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(self.block is None or self.block >= 1, "block", self.block, "must be at least 1, or null")
        require(all(h >= 1 for h in self.loss_horizons), "loss_horizons", self.loss_horizons, "positive numbers")


@dataclass
class MoiraiMoEConfig:
    """Moirai-MoE (arXiv 2410.10469): any-variate attention, experts by distance to centroids, mixture output."""

    pretrained: str | None = None
    """Folder of a published checkpoint (config.json and model.safetensors) to start from; it sets all sizes."""
    patch_size: int = 16
    """Points per patch."""
    d_model: int = 64
    """Width."""
    d_ff: int = 128
    """Hidden units of each expert (of the FFN in a dense model: top_k times as many)."""
    num_layers: int = 3
    """Blocks."""
    num_heads: int = 4
    """Attention heads."""
    num_experts: int = 8
    """Experts per block; 1: a dense model, from which centroids can be fitted."""
    top_k: int = 2
    """Experts per patch."""
    prefer: Literal["nearest", "farthest"] = "nearest"
    """Experts whose centroids are nearest; farthest is what published checkpoints were trained with."""
    centroids_from: str | None = None
    """Checkpoint or run folder of a dense run of the same sizes: its weights are the start, and the k-means centroids
    of its attention outputs the router. null: random centroids."""
    known_ahead: bool = True
    """A patch is predicted with covariates known over that very patch; false: only up to the patch before, as
    published."""
    max_context: int = 4096
    """Longest context in points."""
    num_samples: int = 100
    """Sample paths per forecast, of which quantiles are taken."""
    dropout: float = 0.1
    """Dropout in attention and experts."""

    def __post_init__(self) -> None:
        sizes = (
            "patch_size",
            "d_model",
            "d_ff",
            "num_layers",
            "num_heads",
            "num_experts",
            "max_context",
            "num_samples",
        )
        for name in sizes:
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        heads = self.num_heads
        require(self.d_model % heads == 0, "d_model", self.d_model, f"must be a multiple of {heads} heads")
        wide = self.d_model // heads >= 4 and self.d_model // heads % 2 == 0
        require(wide, "num_heads", heads, "must leave an even width of at least 4 per head")
        top, most = self.top_k, self.num_experts
        require(top >= 1 and (top <= most or most == 1), "top_k", top, f"between 1 and num_experts={most}")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must lie in [0, 1)")


@dataclass
class LDLMoEConfig:
    """LDL-MoE (arXiv 2602.04678): experts that predict distributions, trained with maximum mean discrepancy."""

    heads: Literal["continuous", "bins"] = "continuous"
    """Experts give samples of a continuous distribution, or weights over fixed bins."""
    pattern: bool = False
    """Pattern-aware: trend, seasonality, change-point and volatility experts whose outputs sum to the forecast."""
    num_experts: int = 4
    """Distribution experts; pattern-aware, the experts of each pattern."""
    top_k: int = 2
    """Experts per window and layer."""
    d_model: int = 128
    """Width of the encoded context."""
    d_ff: int = 256
    """Hidden units of an expert."""
    num_samples: int = 8
    """Draws per step and training window (continuous), from which discrepancy is measured; its cost grows with their
    square."""
    num_bins: int = 32
    """Bins per step (bins)."""
    mmd: float = 3.0
    """Weight of the distribution loss beside the point loss."""
    aux_loss: float = 0.01
    """Coefficient of the balance loss."""
    dropout: float = 0.3
    """Dropout on hidden units."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "d_model", "d_ff"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(1 <= self.top_k <= self.num_experts, "top_k", self.top_k, f"between 1 and {self.num_experts}")
        require(self.num_samples >= 2, "num_samples", self.num_samples, "must be at least 2")
        require(self.num_bins >= 2, "num_bins", self.num_bins, "must be at least 2")
        require(self.mmd >= 0, "mmd", self.mmd, "must not be negative")
        require(self.aux_loss >= 0, "aux_loss", self.aux_loss, "must not be negative")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must lie in [0, 1)")


@dataclass
class DLinearConfig:
    """DLinear (arXiv 2205.13504): one linear map of the trend and one of the rest."""

    kernel: int = 25
    """Points of the moving average that separates the trend; odd."""

    def __post_init__(self) -> None:
        require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", self.kernel, "must be odd and positive")


@dataclass
class ModelConfig:
    """Which model, and the settings of each."""

    name: Literal["segmoe", "timemoe", "moirai_moe", "ldl_moe", "dlinear", "seasonal_naive"] = "segmoe"
    """The model; its settings are in the section of that name, the other sections do nothing."""
    dense: bool = False
    """The model's dense twin instead: plain FFNs of equal active multiply-adds where the MoE layers were."""
    segmoe: SegMoEConfig = field(default_factory=SegMoEConfig)
    """Seg-MoE."""
    timemoe: TimeMoEConfig = field(default_factory=TimeMoEConfig)
    """Time-MoE."""
    moirai_moe: MoiraiMoEConfig = field(default_factory=MoiraiMoEConfig)
    """Moirai-MoE."""
    ldl_moe: LDLMoEConfig = field(default_factory=LDLMoEConfig)
    """LDL-MoE."""
    dlinear: DLinearConfig = field(default_factory=DLinearConfig)
    """DLinear."""
