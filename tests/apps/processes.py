"""Command lines of an app in processes of their own, forked from one that has everything imported: half a second each.

Tests import this module by name, because what a process runs must be importable there.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["apps.vision.verbs", "apps.vision.report", "apps.timeseries.verbs"])


@dataclass
class Command:
    """A command that runs, or has run."""

    process: BaseProcess
    log: Path

    @property
    def err(self) -> str:
        """What it wrote to stderr so far."""
        return self.log.with_suffix(".err").read_text()

    @property
    def out(self) -> str:
        """What it wrote to stdout so far."""
        return self.log.with_suffix(".out").read_text()

    def wait(self, seconds: float = 400) -> int:
        """The exit code; negative: the signal that ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s: {self.out[-2000:]} {self.err[-2000:]}")
        return self.process.exitcode


def start(
    argv: Sequence[str],
    log: Path,
    kill_at_batch: int | None = None,
    file_size: int | None = None,
    app: str = "vision",
) -> Command:
    """Start `python -m apps.<app> ARGV`.

    Args:
        argv: verb and flags.
        log: output goes to this path with .out and .err.
        kill_at_batch: the process sends itself SIGKILL when it is about to train on the batch of this number.
        file_size: bytes beyond which no file can grow, as on a disk that fills up.
        app: whose command line.
    """
    given = (app, list(argv), str(log), kill_at_batch, file_size, dict(os.environ))
    process = CONTEXT.Process(target=_run, args=given)
    process.start()
    return Command(process, log)


def _run(
    app: str,
    argv: list[str],
    log: str,
    kill_at_batch: int | None,
    file_size: int | None,
    environment: Mapping[str, str],
) -> None:
    from apps.callbacks import StepSeeds
    from apps.cli import run

    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # a loader's workers as from a command line, not from a server
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    if kill_at_batch is not None:
        seed = StepSeeds.on_train_batch_start

        def fatal(self, trainer, *args):
            if trainer.fit_loop.epoch_loop.batch_progress.total.ready == kill_at_batch + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            seed(self, trainer, *args)

        StepSeeds.on_train_batch_start = fatal
    sys.argv = [f"python -m apps.{app}", *argv]
    run(importlib.import_module(f"apps.{app}").APP)
