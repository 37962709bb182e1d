"""From settings to a Lightning trainer in a run folder, the same for every app."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
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
from apps.runs import Runs, load_plain
from apps.settings import OptimConfig, RunConfig, TrainerConfig
from moecore.errors import require
from moecore.files import write_atomic

Model = TypeVar("Model", bound=nn.Module)


def prepare_process(run: RunConfig) -> None:
    """Threads, seed, and the warnings that say nothing to a user."""
    torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in ("does not have many workers", "smaller than the logging interval", "treespec", "is not empty"):
        warnings.filterwarnings("ignore", f".*{message}.*")


def save_settings(config: object, folder: Path) -> None:
    """`config.yaml`, which `-c` reads back."""
    write_atomic(folder / "config.yaml", yaml.safe_dump(tree.plain(config), sort_keys=False))


def new_folder(runs: Runs, name: str) -> Path:
    """A new run folder, made once however many processes train together: only the first of them writes there."""
    return runs.create(name) if rank_zero_only.rank == 0 else runs.folder / name


def make_trainer(
    trainer: TrainerConfig,
    run: RunConfig,
    ema_decay: float | None,
    folder: Path,
    monitor: str,
    mode: str,
    extra: Sequence[Callback] = (),
) -> Trainer:
    """A trainer that logs, keeps the best and the last checkpoint, and repeats exactly.

    Args:
        trainer: Lightning's arguments.
        run: seed, checkpoint interval, early stopping.
        ema_decay: of averaged weights; None: weights as they are.
        folder: of the run.
        monitor: validation metric that decides which checkpoint is best.
        mode: "max" or "min".
        extra: further callbacks.
    """
    checkpoints = folder / "checkpoints"
    callbacks: list[Callback] = [StepSeeds(run.seed), RoutingMonitor(), StopOnNaN(checkpoints)]
    if ema_decay is not None:
        callbacks.append(AveragedWeights(ema_decay))
    validates = trainer.limit_val_batches != 0
    if validates:
        callbacks.append(BestCheckpoint(checkpoints, monitor, mode))
    stop = run.early_stop
    if stop.patience is not None:
        require(validates, "run.early_stop.patience", stop.patience, "needs trainer.limit_val_batches above 0")
        callbacks.append(EarlyStopping(monitor, stop.min_delta, stop.patience, mode=mode))
    if trainer.enable_progress_bar:
        callbacks.append(Progress())
    callbacks += [*extra, ResumePoints(checkpoints, run.checkpoint_every)]  # last: what it saves has all others' state
    options = vars(trainer) | {"precision": _precision(trainer), "enable_progress_bar": False}
    try:
        return Trainer(
            **options,
            default_root_dir=folder,
            callbacks=callbacks,
            plugins=[CheckpointFiles()],
            logger=[CurveLogger(folder), TensorBoardLogger(folder, name="", version="tensorboard")],
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except Exception as error:  # Lightning's complaints about its arguments, of many types
        with contextlib.suppress(OSError):
            folder.rmdir()  # a new one is still empty, and stays so
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error


def _precision(trainer: TrainerConfig) -> str:
    if trainer.precision != "auto":
        return trainer.precision
    on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


def make_optimizer(module: nn.Module, optim: OptimConfig, steps: int, default_lr: float) -> dict[str, Any]:
    """AdamW with warm-up and cosine, as Lightning's `configure_optimizers` returns it.

    Args:
        module: whose parameters; vectors, embeddings and class tokens are not decayed.
        optim: its settings.
        steps: of the whole training.
        default_lr: peak learning rate where the settings leave it open.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.dim() < 2 or "pos_embed" in name or "token" in name or name.endswith("bias")]
    ids = {id(p) for p in plain}
    groups = [
        {"params": [p for _, p in named if id(p) not in ids], "weight_decay": optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    lr = default_lr if optim.lr is None else optim.lr
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=tuple(optim.betas))
    schedule = LambdaLR(optimizer, learning_rate_factor(optim, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(optim: OptimConfig, steps: int) -> Callable[[int], float]:
    """Share of the peak learning rate at every step: a line up, a cosine down."""
    warmup = optim.warmup * steps if optim.warmup < 1 else optim.warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
        return optim.min_lr + (1 - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def count_steps(trainer: Trainer, batches: int) -> int:
    """Optimiser steps of the whole training.

    Lightning's own estimate would create the training iterator before the position to resume at is known.

    Args:
        trainer: its limits.
        batches: per epoch and process.

    Raises:
        UserError: if there is nothing to train on, or no end.
    """
    every = trainer.val_check_interval
    if batches < 1:
        raise UserError(
            "data: not one training batch per epoch and process; raise trainer.limit_train_batches, or "
            "lower data.batch_size or trainer.devices"
        )
    if isinstance(every, int) and trainer.check_val_every_n_epoch is not None and every > batches:
        raise UserError(f"trainer.val_check_interval={every}: an epoch has only {batches} batches")
    steps = -(-batches // trainer.accumulate_grad_batches) * trainer.max_epochs
    limits = [limit for limit in (steps, trainer.max_steps) if limit > 0]
    if not limits:
        raise UserError("trainer.max_epochs=-1: give trainer.max_steps, over which the learning rate can fall")
    return min(limits)


def fit(
    trainer: Trainer,
    task: LightningModule,
    data: LightningDataModule,
    folder: Path,
    config: object,
    resume: Path | None,
) -> None:
    """Train from the start, or on from a checkpoint, in a run folder that then holds the settings.

    Raises:
        UserError: for what Lightning refuses, e.g. fewer epochs than are done.
        KeyboardInterrupt: at Ctrl-C and SIGTERM.
    """
    if resume is not None:
        checkpoint = load_plain(resume)
        _say_what_changed(checkpoint["config"], config, trainer)
        step = checkpoint["global_step"]
        for logger in trainer.loggers:
            if isinstance(logger, CurveLogger):
                logger.continue_from(step)
    if trainer.is_global_zero:
        save_settings(config, folder)
    try:
        trainer.fit(task, data, ckpt_path=resume)
    except MisconfigurationException as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error
    except SystemExit as leave:  # Lightning's end at Ctrl-C and SIGTERM, with exit code 0 for the latter
        raise KeyboardInterrupt from leave


def _say_what_changed(stored: dict[str, Any], config: Any, trainer: Trainer) -> None:
    """A line for every setting in which a resumed run differs from what it was started with."""
    before, now = tree.flatten(stored), tree.flatten(tree.plain(config))
    if trainer.is_global_zero:
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name]:
                print(f"resumed with another setting: {name}={now[name]} (was {before[name]})", flush=True)


def load_weights(model: Model, checkpoint: Mapping[str, Any], path: Path, trainer: TrainerConfig) -> Model:
    """A model with the weights of a checkpoint, in eval mode, on the GPU if there is one and it may be used.

    Args:
        model: of the architecture that was trained, as the task's `model`.
        checkpoint: as `apps.runs.load_checkpoint` gives it.
        path: of the checkpoint, for errors.
        trainer: says which accelerator may be used.

    Raises:
        UserError: if the weights are of another architecture.
    """
    state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}
    check_fits(state, model, path)
    model.load_state_dict(state)
    return on_device(model, trainer)


def on_device(model: Model, trainer: TrainerConfig) -> Model:
    """In eval mode, on the GPU if there is one and it may be used."""
    on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
    return model.to("cuda" if on_gpu else "cpu").eval()


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
