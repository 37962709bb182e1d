"""onnxruntime sessions, and what calls cost, measured in turn so that a busy machine disturbs all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

Timed = Callable[[], object]


def session_of(model: str | Path | onnx.ModelProto, threads: int = 1) -> InferenceSession:
    """A file or a graph in onnxruntime, on the CPU.

    Args:
        model: path, or the graph itself.
        threads: how many; 0: as many as there are cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = str(model) if isinstance(model, (str, Path)) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def timed(
    calls: Mapping[str, Timed], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, np.ndarray]:
    """Seconds of each call, `[rounds]` by name; calls take turns, and one round before all others does not count.

    Args:
        calls: name -> what to call.
        rounds: how often.
        clock: CPU time as a rule; `time.perf_counter` where several threads work.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            started = clock()
            call()
            spent[name].append(clock() - started)
    return {name: np.array(seconds) for name, seconds in spent.items()}
