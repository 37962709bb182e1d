"""Progress: a bar on a terminal, a line per validation in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, show: bool = True) -> Iterator[Item]:
    """The items, with a bar that vanishes when they are through; no bar where output is no terminal."""
    return iter(tqdm(items, description, leave=False, dynamic_ncols=True, disable=None if show else True))


class Progress(Callback):
    """One bar over the whole training with the loss and the last validation; in a log file, a line per validation."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar where training stands."""
        batches = trainer.num_training_batches
        total = batches * trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        if trainer.max_steps > 0:
            steps = trainer.max_steps * trainer.accumulate_grad_batches
            total = steps if total is None else min(total, steps)
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        disable = True if trainer.global_rank != 0 else None
        self._bar = tqdm(
            total=total, initial=done, desc="training", disable=disable, dynamic_ncols=True, smoothing=0.05
        )
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        """One batch further."""
        self._bar.set_postfix_str(f"epoch={trainer.current_epoch + 1}, {_figures(trainer)}", refresh=False)
        self._bar.update()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """A line, where there is no bar."""
        if self._bar is not None and self._bar.disable and trainer.global_rank == 0:
            seconds = time.monotonic() - self._started
            print(
                f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: {_figures(trainer)} ({seconds:.0f} s)",
                flush=True,
            )

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Close the bar."""
        self._bar.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def _figures(trainer: Trainer) -> str:
    """What tasks log with `prog_bar=True`."""
    shown = {name.removeprefix("train/"): value for name, value in trainer.progress_bar_metrics.items()}
    return ", ".join(f"{name}={value:.3g}" for name, value in shown.items() if name != "v_num")
