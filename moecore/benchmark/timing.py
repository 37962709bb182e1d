"""Interleaved timing: on a machine with neighbours only ratios within one run mean something."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds, and the ratio to the first contender in the same round."""

    median: float
    ratio: float
    """Median over rounds of this contender's time over the first one's."""
    ratio_low: float
    """Lower quartile of that ratio."""
    ratio_high: float
    """Upper quartile."""


SLOW, SLOW_ROUNDS = 5.0, 3
"""A contender that takes so many times the base's time is measured in so many rounds only."""


def interleave(
    contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, Timing]:
    """Call every contender once per round and compare within rounds.

    Args:
        contenders: name -> function; the first is the base of all ratios.
        rounds: counted rounds; contenders far slower than the base take part in the first few only.
        warmup: rounds before.
        device: "cpu" measures process CPU time (of all threads), anything else wall time after a synchronisation.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    base = seconds[next(iter(contenders))]
    enabled = gc.isenabled()
    gc.disable()  # a collection in somebody's turn would be his bad luck
    try:
        for number in range(-warmup, rounds):
            if number == SLOW_ROUNDS:
                contenders = {name: call for name, call in contenders.items() if seconds[name][-1] <= SLOW * base[-1]}
            for name, call in contenders.items():
                elapsed = _timed(call, device)
                if number >= 0:
                    seconds[name].append(elapsed)
            gc.collect(0)
    finally:
        if enabled:
            gc.enable()
    return {name: _timing(own, base[: len(own)]) for name, own in seconds.items()}


def _timed(call: Callable[[], object], device: str) -> float:
    started = _clock(device)
    call()
    return _clock(device) - started


def _timing(own: list[float], base: list[float]) -> Timing:
    ratios = sorted(a / b for a, b in zip(own, base, strict=True))
    quarter = len(ratios) // 4
    return Timing(statistics.median(own), statistics.median(ratios), ratios[quarter], ratios[-1 - quarter])


def _clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def forward_call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """One forward pass without gradients."""

    def call() -> None:
        with torch.no_grad():
            module(x)

    return call


def training_call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """One forward and backward pass; gradients of the input as well."""
    grad: Tensor | None = None

    def call() -> None:
        nonlocal grad
        own = x.detach().requires_grad_()
        y = module(own)
        if grad is None or grad.shape != y.shape:
            grad = torch.randn_like(y)
        y.backward(grad)
        for p in module.parameters():
            p.grad = None

    return call


def peak_memory(make: Callable[[], tuple[nn.Module, Tensor]]) -> int | None:
    """Bytes that forward and backward need beyond module and input, at their peak; in a process of its own.

    Args:
        make: a module-level function (or partial of one) that builds the module and its input.

    Returns:
        None where the system does not tell (anything but Linux).
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_peak, make).result()


def _measure_peak(make: Callable[[], tuple[nn.Module, Tensor]]) -> int:
    torch.set_num_threads(1)
    module, x = make()
    training_call(module, x[: max(1, len(x) // 64)])()  # loads kernels; too small to matter
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    own = x.detach().requires_grad_()
    module(own).sum().backward()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0
