"""What calls of an exported file cost: beside PyTorch, beside all experts, beside a dense model of equal cost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.exportable import Exportable, Sample, in_torch
from export.lowering import lower
from export.lowering.node import is_opaque
from export.lowering.twin import lower_twin
from export.measure import session_of, timed

if TYPE_CHECKING:
    import onnx

SECONDS = 4.0
"""CPU time that a measurement may take."""


def latency(exportable: Exportable, path: Path, opaque: onnx.ModelProto) -> dict[str, float]:
    """Milliseconds of one call of one row: medians and 99th percentiles, all forms in turn.

    Args:
        exportable: the model.
        path: the exported file.
        opaque: the traced graph, from which the other forms are made.

    Returns:
        `<form>_ms_p50` and `_p99` in CPU time on one thread, for the file (`export`), PyTorch eager (`torch`), and
        where the model has mixtures the graph with all experts (`all_experts`) and the dense model of equal active
        multiply-adds (`dense_equal`); of the file as `export_all_threads` the wall time on all cores; `peak_memory_mib`
        of a process that loads and runs the file, less that of one that does nothing.
    """
    sample = exportable.single()
    calls = {"export": _call(session_of(path), sample)}
    calls["torch"] = lambda: in_torch(exportable.module)(sample)
    if any(map(is_opaque, opaque.graph.node)):
        for name, form in (("all_experts", "dense"), ("dense_equal", lower_twin)):
            graph = lower(opaque, form)
            graph = exportable.finish(graph) if exportable.finish else graph
            calls[name] = _call(session_of(graph), sample)
    rounds = _rounds(calls)
    found = _percentiles(timed(calls, rounds))
    threads = {"export_all_threads": _call(session_of(path, threads=0), sample)}
    found |= _percentiles(timed(threads, rounds, time.perf_counter))
    return found | ({"peak_memory_mib": peak_memory(path, sample)} if Path("/proc/self/status").exists() else {})


def _percentiles(times: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Seconds of calls, by form -> milliseconds."""
    return {
        f"{name}_ms_p{q}": 1e3 * float(np.percentile(seconds, q)) for name, seconds in times.items() for q in (50, 99)
    }


def _call(session, sample: Sample):
    given = {one.name for one in session.get_inputs()}
    feed = {name: array for name, array in sample.feed.items() if name in given}
    return lambda: session.run(None, feed)


def _rounds(calls: Mapping) -> int:
    once = sum(float(seconds[0]) for seconds in timed(calls, 1).values())
    return int(np.clip(SECONDS / max(once, 1e-6), 5, 200))


_PROGRAM = """
import sys
import numpy, onnxruntime

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024

before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = numpy.load(sys.argv[2], allow_pickle=False)
session.run(None, {one.name: feed[one.name] for one in session.get_inputs()})
print(peak() - before)
"""


def peak_memory(path: Path, sample: Sample) -> float:
    """MiB that loading a file and one call take at most, beyond the libraries; in a process of its own, on Linux."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        feed = Path(folder) / "feed.npz"
        np.savez(feed, **{name: _plain(array) for name, array in sample.feed.items()})
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(path), str(feed)], capture_output=True, text=True, check=True
        )
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def _plain(array: np.ndarray) -> np.ndarray:
    """Text as fixed-width text, which can be saved without pickling."""
    return array.astype(str) if array.dtype == object else array
