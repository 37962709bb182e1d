"""An MoE layer as plain data: what configuration files and command lines set. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from moecore.errors import choice, require

ScoreName = Literal["linear", "mlp", "noisy", "cosine", "centroid", "hash", "per_task", "task_conditioned", "recurrent"]
SelectionName = Literal["top_k", "grouped_top_k", "top_p", "null_top_k", "expert_choice", "threshold"]
WeightName = Literal["softmax", "softmax_chosen", "sigmoid", "relu", "constant", "decoupled"]


@dataclass
class MoEConfig:
    """Settings of one Mixture-of-Experts layer."""

    num_experts: int = 8
    """Routed experts per layer."""
    top_k: int = 2
    """Experts each token uses (an upper or average number for the selections that vary it)."""
    hidden: int | None = None
    """Hidden units per routed expert; null: as many as make the active multiply-adds equal the FFN replaced."""
    glu: bool | None = None
    """Gated experts (SwiGLU and kin) instead of two-layer ones; null: as the FFN replaced."""
    activation: str | None = None
    """gelu, gelu_tanh, silu, relu, relu2, tanh, sigmoid, identity; null: as the FFN replaced."""
    bias: bool | None = None
    """Biases in the experts; null: as the FFN replaced."""
    dropout: float | None = None
    """Dropout on the experts' hidden units; null: as the FFN replaced."""
    shared_hidden: int = 0
    """Hidden units of a shared expert that every token passes; 0: no shared expert."""
    shared_gate: bool = False
    """Scale the shared expert per token by a sigmoid gate."""
    score: ScoreName = "linear"
    """What the router scores with."""
    score_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the score, e.g. {noise_std: 1.0} for noisy."""
    select: SelectionName = "top_k"
    """Who is chosen."""
    select_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the selection, e.g. {top_p: 0.4} for top_p."""
    weight: WeightName = "softmax"
    """How chosen experts are weighted."""
    weight_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the weighting, e.g. {renormalize: false} for softmax and decoupled, which divide the chosen
    probabilities by their sum: by default yes, but no for select top_p and expert_choice, as published."""
    controller: Literal["none", "loss_free", "sparsity"] = "none"
    """Balance without a loss: loss_free moves a selection bias, sparsity steers a threshold router."""
    controller_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the controller, e.g. {rate: 0.001}."""
    capacity_factor: float | None = None
    """Drop what an expert is sent beyond this multiple of its even share, in training; null: drop nothing."""
    unit: Literal["token", "sequence"] | int = "token"
    """What is routed as one: token, sequence (a whole image), or a number of consecutive tokens."""
    pool: Literal["mean", "first", "flatten"] = "mean"
    """How the router sees a unit of several tokens; first is the class token."""
    aux_loss: dict[str, float] = field(default_factory=lambda: {"switch": 0.01})
    """Balance losses of the layer, name: coefficient (switch, importance_cv2, load_cv2, z, entropy, ...)."""
    executor: Literal["auto", "sorted", "grouped_mm", "dense"] = "auto"
    """How experts are computed; auto fits device and dtype."""

    def __post_init__(self) -> None:
        require(self.num_experts >= 1, "num_experts", self.num_experts, "must be at least 1")
        require(self.top_k >= 1, "top_k", self.top_k, "must be at least 1")
        require(
            self.top_k <= self.num_experts,
            "top_k",
            self.top_k,
            f"must not exceed num_experts={self.num_experts}",
        )
        require(self.hidden is None or self.hidden >= 1, "hidden", self.hidden, "must be at least 1, or null")
        require(self.shared_hidden >= 0, "shared_hidden", self.shared_hidden, "must not be negative")
        dropout = self.dropout
        require(dropout is None or 0 <= dropout < 1, "dropout", dropout, "must lie in [0, 1), or null")
        factor = self.capacity_factor
        require(factor is None or factor > 0, "capacity_factor", factor, "must be positive, or null for dropless")
        require(isinstance(self.unit, str) or self.unit >= 1, "unit", self.unit, "a segment has at least 1 token")
        for name, coefficient in self.aux_loss.items():
            choice("aux_loss", name, AUX_LOSSES)
            require(coefficient >= 0 or name == "entropy", f"aux_loss.{name}", coefficient, "must not be negative")

    def hidden_for(self, ffn_hidden: int) -> int:
        """Hidden units per routed expert in place of an FFN with `ffn_hidden`: equal active multiply-adds."""
        if self.hidden is not None:
            return self.hidden
        left = ffn_hidden - self.shared_hidden
        require(
            left >= self.top_k,
            "shared_hidden",
            self.shared_hidden,
            f"leaves {left} of the FFN's {ffn_hidden} hidden units for top_k={self.top_k} experts; set hidden",
        )
        return left // self.top_k


AUX_LOSSES = ("switch", "importance_cv2", "load_cv2", "z", "entropy", "mutual_information", "l1")
"""Names that `aux_loss` may use; the functions are in `moecore.balance`."""
