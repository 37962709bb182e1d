"""Settings that every app shares. Imports no torch: `--help` and typing errors stay quick."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Literal

from moecore.errors import require


@dataclass
class TrainerConfig:
    """How training runs: the arguments of Lightning's Trainer, by their names."""

    accelerator: str = "auto"
    """cpu, gpu, mps, tpu or auto."""
    devices: int | str = 1
    """How many devices, or which ("0,2"); auto takes all. More than one trains data-parallel."""
    num_nodes: int = 1
    """Machines in a distributed run."""
    strategy: str = "auto"
    """Lightning strategy, e.g. ddp."""
    precision: str = "auto"
    """32-true, bf16-mixed, 16-mixed, ...; auto is bf16-mixed on GPUs that have it, else 32-true."""
    max_epochs: int = 40
    """Passes over the training data."""
    max_steps: int = -1
    """Stop after this many optimiser steps; -1: no limit."""
    max_time: str | None = None
    """Stop after DD:HH:MM:SS."""
    limit_train_batches: int | float | None = None
    """Use only so many training batches per epoch (int) or such a share (float)."""
    limit_val_batches: int | float | None = None
    """The same for validation."""
    limit_test_batches: int | float | None = None
    """The same for testing."""
    accumulate_grad_batches: int = 1
    """Batches per optimiser step."""
    gradient_clip_val: float | None = 1.0
    """Largest gradient norm; null: no clipping."""
    check_val_every_n_epoch: int = 1
    """Epochs between validations."""
    val_check_interval: int | float | None = None
    """Validate within an epoch: every so many batches (int) or at such shares (float)."""
    log_every_n_steps: int = 20
    """Steps between log lines."""
    num_sanity_val_steps: int = 0
    """Validation batches to try before training."""
    enable_progress_bar: bool = True
    """Show progress."""
    deterministic: bool = False
    """Refuse operations that are not deterministic on the device (CPU runs always repeat exactly)."""
    detect_anomaly: bool = False
    """Trace the operation that made a NaN; slow."""
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    """Time the parts of the training loop."""
    sync_batchnorm: bool = False
    """Share batch statistics between devices."""

    def __post_init__(self) -> None:
        for name in ("max_epochs", "max_steps"):
            limit = getattr(self, name)
            require(limit >= 1 or limit == -1, name, limit, "must be at least 1 (or -1: no limit)")
        for name in ("limit_train_batches", "val_check_interval"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive, or null")
        require(
            self.accumulate_grad_batches >= 1, "accumulate_grad_batches", self.accumulate_grad_batches, "at least 1"
        )
        clip = self.gradient_clip_val
        require(clip is None or clip > 0, "gradient_clip_val", clip, "must be positive, or null for no clipping")
        require(self.log_every_n_steps >= 1, "log_every_n_steps", self.log_every_n_steps, "must be at least 1")


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and a cosine to zero."""

    lr: float | None = None
    """Peak learning rate; null: what suits the model."""
    weight_decay: float = 0.05
    """On matrices only: not on biases, norms and embeddings."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    warmup: float = 0.1
    """Share of all steps spent warming up (below 1), or a number of steps."""
    min_lr: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    ema_decay: float | None = 0.99
    """Average the weights with this decay; the average is what is evaluated and saved. null: off."""

    def __post_init__(self) -> None:
        require(self.lr is None or self.lr > 0, "lr", self.lr, "must be positive, or null")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must not be negative")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "must lie in [0, 1)")
        require(self.warmup >= 0, "warmup", self.warmup, "must not be negative")
        require(0 <= self.min_lr <= 1, "min_lr", self.min_lr, "is a share of lr, between 0 and 1")
        ema = self.ema_decay
        require(ema is None or 0 < ema < 1, "ema_decay", ema, "must lie in (0, 1), or null for none")


@dataclass
class EarlyStopConfig:
    """When to stop before the last epoch."""

    patience: int | None = None
    """Validations without improvement to wait for; null: never stop early."""
    min_delta: float = 0.0
    """What counts as improvement."""


@dataclass
class RunConfig:
    """Where results go and what makes them repeatable."""

    name: str | None = None
    """Folder of the run below `root`; null: from the configuration file or data set. A number is added if taken."""
    root: str = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Seed of everything: same seed, same device, same result."""
    threads: int = 1
    """CPU threads for torch. More help only on cores that are really free."""
    checkpoint_every: int = 200
    """Steps between checkpoints to resume from (besides one at every epoch's end)."""
    report: bool = True
    """Write report.html when training ends."""
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    """Early stopping."""

    def __post_init__(self) -> None:
        require(self.threads >= 1, "threads", self.threads, "must be at least 1")
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "must be at least 1")
        bad = self.name is not None and (not self.name or any(c in self.name for c in "/\\\0") or self.name[0] == ".")
        require(not bad, "name", self.name, "is a folder name: no slashes, no leading dot")


def other_models(model: object) -> dict[str, str]:
    """Prefixes of settings that do nothing, with what would change that, where each model has a section of its name.

    Args:
        model: settings with a field `name`, and sections called as its values are.
    """
    names = typing.get_args(typing.get_type_hints(type(model))["name"])
    others = [name for name in names if name != model.name and hasattr(model, name)]
    return {f"model.{name}.": f"give --model.name {name}" for name in others}
