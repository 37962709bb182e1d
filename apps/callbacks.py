"""What every training run does besides training: repeat exactly, keep checkpoints, stop on NaN, watch the routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

import moecore
from apps.errors import UserError
from apps.loading import derive_seed
from apps.runs import LAST, load_plain
from moecore.files import atomic_path


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints written whole or not at all, and loaded without executing anything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write atomically."""
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(full := error.__context__, OSError):  # torch's own message would not tell
                    raise OSError(full.errno, full.strerror, str(path)) from None
                raise

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        """Load plain data only."""
        return load_plain(path)


class ResumePoints(Checkpoint):
    """Writes `last.ckpt` every so many steps and at the end of every epoch; a validation due then comes first.

    A `Checkpoint`, so that Lightning calls it after all that change with a batch or a validation: what is saved is the
    state that the next batch finds.

    Args:
        folder: of the checkpoints.
        every: steps between.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.file, self.every = folder / LAST, every
        self._saved_step = 0
        self._due = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """What training starts from need not be saved, least of all with gradients of its first batches pending."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save within an epoch; its end is saved after validation."""
        step = trainer.global_step
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._due = step % self.every == 0 and step != self._saved_step and not last
        if self._due and not _validates_now(trainer):
            # Lightning logs a step after this hook: a process killed between the two would lose a row of the curves
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save what was to wait for this validation; resumed before it, Lightning would leave it out."""
        if self._due:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save between epochs."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._due, self._saved_step = False, trainer.global_step
        trainer.save_checkpoint(self.file)


def _validates_now(trainer: Trainer) -> bool:
    """Whether a validation within the epoch follows this batch."""
    epochs, progress = trainer.check_val_every_n_epoch, trainer.fit_loop.epoch_loop.batch_progress
    if not trainer.enable_validation or (epochs is not None and (trainer.current_epoch + 1) % epochs):
        return False
    batch = progress.total.ready if epochs is None else progress.current.ready
    return batch % trainer.val_check_batch == 0


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`; of equally good validations the later one, as small validation sets often tie.

    Args:
        folder: of the checkpoints.
        monitor: name of the validation metric.
        mode: "max" or "min".
    """

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        # At validations, not at the end of epochs: the state to resume from, saved then, is to know the best score.
        super().__init__(
            folder, "best", monitor=monitor, mode=mode, enable_version_counter=False, save_on_train_epoch_end=False
        )

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether to save: better than before, or as good."""
        if current is None or not self.best_k_models:
            return super().check_monitor_top_k(trainer, current)
        kept = self.best_k_models[self.kth_best_model_path]
        good = current <= kept if self.mode == "min" else current >= kept
        return trainer.strategy.reduce_boolean_decision(bool(good))


class StepSeeds(Callback):
    """Seeds torch before every batch from (seed, batch number), so that dropout, noise and mixing repeat exactly.

    A run that is resumed at any batch then continues as if it had never stopped.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Seed by the batch's number over all epochs, differently on every rank."""
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        torch.manual_seed(derive_seed(self.seed, number, trainer.global_rank))


class StopOnNaN(Callback):
    """Ends training with one line when the loss or a gradient is no longer finite, before weights are touched.

    Args:
        folder: of the checkpoints, for the message.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        """With fp16 check the loss: its scaler raises the gradients until they overflow, and skips those steps."""
        if _scales_loss(trainer):
            self._check(trainer, loss)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        """Otherwise check the gradients; they are NaN wherever the loss is."""
        if not _scales_loss(trainer):
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            self._check(trainer, torch.nn.utils.get_total_norm(grads))

    def _check(self, trainer: Trainer, value: Tensor) -> None:
        if not torch.isfinite(value):
            file = self.folder / LAST
            kept = f"the last good checkpoint is {file}" if file.is_file() else "no checkpoint had been written yet"
            raise UserError(
                f"step {trainer.global_step}: loss or gradients are {'NaN' if torch.isnan(value) else 'infinite'}; "
                f"training stopped, {kept}; try a lower learning rate"
            )


def _scales_loss(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


class AveragedWeights(EMAWeightAveraging):
    """Exponential moving average of the weights, with the early steps averaged less so that they are soon forgotten.

    Args:
        decay: of the average once it has warmed up.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)
        self._decay = decay
        self._kwargs["avg_fn"] = self._average

    def _average(self, average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        decay = min(self._decay, (1 + int(updates)) / (10 + int(updates)))
        return average * decay + current * (1 - decay) if average.is_floating_point() else current


class RoutingMonitor(Callback):
    """Logs balance and sharpness of every MoE layer, and lets balance controllers take their steps.

    The module leaves what it recorded of a batch in `module.recording`.
    """

    def __init__(self) -> None:
        self._step = 0
        self._since = moecore.Recording()
        """What was routed since the last step of the optimiser."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start where training stands."""
        self._step = trainer.global_step
        self._since.clear()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        """After a batch: controllers once per step of the optimiser, metrics at logging steps."""
        recording: moecore.Recording = module.recording
        self._since += recording
        if trainer.global_step != self._step:
            moecore.update_controllers(self._since)
            self._step = trainer.global_step
            self._since.clear()
        if recording and trainer.global_step % trainer.log_every_n_steps == 0:
            for layer, metrics in moecore.routing_metrics(recording).items():
                for name, value in metrics.scalars().items():
                    module.log(f"routing/{layer}/{name}", value)
                for expert, share in enumerate(metrics.load):
                    module.log(f"load/{layer}/{expert}", share)
        module.recording = moecore.Recording()
