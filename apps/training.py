"""From settings to a Lightning trainer in a run folder, the same for every app."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from apps import tree
from apps.callbacks import (
    AveragedWeights,
    BestCheckpoint,
    CheckpointFiles,
    ResumePoints,
    RoutingMonitor,
    StepSeeds,
    StopOnNaN,
)
from apps.curves import CurveLogger
from apps.errors import UserError
from apps.progress import Progress
from apps.runs import load_plain
from apps.settings import OptimConfig, RunConfig, TrainerConfig
from moecore.files import write_atomic


def prepare_process(run: RunConfig) -> None:
    """Threads, seed, and the warnings that say nothing to a user."""
    torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*smaller than the logging interval.*", ".*treespec.*"):
        warnings.filterwarnings("ignore", message)


def save_settings(config: object, folder: Path) -> None:
    """`config.yaml`, which `-c` reads back."""
    write_atomic(folder / "config.yaml", yaml.safe_dump(tree.plain(config), sort_keys=False))


def make_trainer(
    trainer: TrainerConfig,
    run: RunConfig,
    optim: OptimConfig,
    folder: Path,
    monitor: str,
    mode: str,
    extra: Sequence[Callback] = (),
) -> Trainer:
    """A trainer that logs, keeps the best and the last checkpoint, and repeats exactly.

    Args:
        trainer: Lightning's arguments.
        run: seed, checkpoint interval, early stopping.
        optim: for weight averaging.
        folder: of the run.
        monitor: validation metric that decides which checkpoint is best.
        mode: "max" or "min".
        extra: further callbacks.
    """
    checkpoints = folder / "checkpoints"
    callbacks: list[Callback] = [
        StepSeeds(run.seed),
        RoutingMonitor(),
        StopOnNaN(checkpoints),
        ResumePoints(checkpoints, run.checkpoint_every),
        BestCheckpoint(checkpoints, monitor, mode),
    ]
    if optim.ema_decay is not None:
        callbacks.append(AveragedWeights(optim.ema_decay))
    if run.early_stop.patience is not None:
        stop = run.early_stop
        callbacks.append(EarlyStopping(monitor, stop.min_delta, stop.patience, mode=mode))
    if trainer.enable_progress_bar:
        callbacks.append(Progress())
    callbacks += extra
    options = vars(trainer) | {"precision": _precision(trainer), "enable_progress_bar": False}
    try:
        return Trainer(
            **options,
            default_root_dir=folder,
            callbacks=callbacks,
            plugins=[CheckpointFiles()],
            logger=[CurveLogger(folder, run_every(trainer)), TensorBoardLogger(folder, name="", version="tensorboard")],
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except Exception as error:  # Lightning's complaints about its arguments, of many types
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error


def run_every(trainer: TrainerConfig) -> int:
    """Log rows between writes of metrics.csv: about every hundred steps."""
    return max(1, 100 // trainer.log_every_n_steps)


def _precision(trainer: TrainerConfig) -> str:
    if trainer.precision != "auto":
        return trainer.precision
    on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


def make_optimizer(module: nn.Module, optim: OptimConfig, steps: int) -> dict[str, Any]:
    """AdamW with warm-up and cosine, as Lightning's `configure_optimizers` returns it.

    Args:
        module: whose parameters; vectors, embeddings and class tokens are not decayed.
        optim: its settings.
        steps: of the whole training.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.dim() < 2 or "pos_embed" in name or "token" in name or name.endswith("bias")]
    ids = {id(p) for p in plain}
    groups = [
        {"params": [p for _, p in named if id(p) not in ids], "weight_decay": optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas))
    warmup = optim.warmup * steps if optim.warmup < 1 else optim.warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
        return optim.min_lr + (1 - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def fit(
    trainer: Trainer,
    task: LightningModule,
    data: LightningDataModule,
    folder: Path,
    config: object,
    resume: Path | None,
) -> None:
    """Train from the start, or on from a checkpoint, in a run folder that then holds the settings."""
    save_settings(config, folder)
    if resume is not None:
        step = load_plain(resume)["global_step"]
        for logger in trainer.loggers:
            if isinstance(logger, CurveLogger):
                logger.continue_from(step)
    trainer.fit(task, data, ckpt_path=resume)


def check_fits(state: dict[str, torch.Tensor], module: nn.Module, path: Path) -> None:
    """Raise a one-line error unless `state` has exactly the tensors of `module`."""
    own = module.state_dict()
    differing = [k for k in own if k not in state] + [k for k in state if k not in own]
    differing += [k for k in own if k in state and own[k].shape != state[k].shape]
    if differing:
        name = differing[0]
        shapes = [str(list(s[name].shape)) if name in s else "absent" for s in (state, own)]
        raise UserError(
            f"{path}: of another architecture ({len(differing)} tensors differ; {name} is {shapes[0]} there, "
            f"{shapes[1]} here); use the settings it was trained with"
        )
