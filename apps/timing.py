"""CPU time: of calls that take turns, and a clock for devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, count: int) -> dict[str, list[float]]:
    """CPU seconds of every call, by name; in each round all have a turn of so many calls, and one round warms up."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            for _ in range(count):
                started = time.process_time()
                call()
                if number:
                    spent[name].append(time.process_time() - started)
    return spent


def clock(device: torch.device) -> float:
    """Seconds: CPU time on a CPU; on a GPU wall time, once all that was asked of it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
