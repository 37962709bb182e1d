"""Which form of the mixtures runs fastest here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from export.errors import ExportError
from export.lowering import lower
from export.measure import Timed, session_of, timed

if TYPE_CHECKING:
    import onnx

EXACT = ("sparse", "loop", "ort_moe", "dense")
"""Forms that give PyTorch's numbers up to rounding, the more general first."""


def fastest(proto: onnx.ModelProto, inputs: Sequence[np.ndarray], rounds: int = 9) -> str:
    """The exact form of a traced graph that takes the least CPU time on these inputs, one thread, medians.

    Args:
        proto: as `export.trace.trace` gives it.
        inputs: what to run it on, in the order of its inputs.
        rounds: how often, the forms in turn.
    """
    feed = dict(zip((one.name for one in proto.graph.input), inputs, strict=True))
    calls: dict[str, Timed] = {}
    for form in EXACT:
        try:
            session = session_of(lower(proto, form))
        except ExportError:  # a form that these layers cannot take
            continue
        calls[form] = lambda session=session: session.run(None, feed)
    times = timed(calls, rounds)
    return min(times, key=lambda form: float(np.median(times[form])))
