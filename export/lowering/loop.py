"""Loop: as sparse, with one small body for all experts, run once for each that has tokens; for very many experts.

The graph does not grow with their number, so it loads at once; each turn copies its expert's weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.lowering.dense import lower_dense
from export.lowering.expert import hidden_units, table_weights
from export.lowering.node import Emitter, Experts
from export.lowering.sparse import combine, silence, sort_slots

if TYPE_CHECKING:
    import onnx


def lower_loop(emit: Emitter, node: Experts) -> str:
    """The layer; returns the name of its output."""
    if node.slots == "every":
        return lower_dense(emit, node)
    from onnx import helper

    sent = sort_slots(emit, node)
    rows = emit.op("Gather", node.x, sent.token)  # [P, D]
    ends = emit.op("CumSum", sent.counts, emit.constant(0))
    starts = emit.op("Sub", ends, sent.counts)
    counts, nowhere = sent.counts, emit.constant([node.num_experts])
    if node.slots == "some":
        counts = emit.op("Slice", counts, emit.constant([0]), nowhere)
    active = emit.op("Reshape", emit.op("NonZero", counts), emit.constant([-1]))
    body = _body(emit, node, active, rows, (starts, ends))
    said = emit.op("SequenceEmpty", dtype=helper.np_dtype_to_tensor_dtype(node.up.dtype))
    said = emit.op("Loop", emit.op("Size", active), "", said, body=body)
    if node.slots == "some":
        left = emit.op("Slice", rows, emit.op("Gather", starts, nowhere), sent.pairs)
        said = emit.op("SequenceInsert", said, silence(emit, node, left))
    return combine(emit, node, sent, emit.op("ConcatFromSequence", said, axis=0))


def _body(emit: Emitter, node: Experts, active: str, rows: str, spans: tuple[str, str]) -> onnx.GraphProto:
    """One turn: the next active expert on its span of the rows, its output put at the end of a sequence."""
    from onnx import TensorProto, helper

    body, tables = emit.inner("body"), table_weights(emit, node)
    turn, going, said = (f"{body.prefix}/{name}" for name in ("turn", "going", "said"))
    expert = body.op("Gather", active, turn)
    first, last = (body.op("Unsqueeze", body.op("Gather", span, expert), body.constant([0])) for span in spans)

    def linear(x: str, kind: str) -> str:
        given = [tables[name] for name in (kind, f"{kind}_bias") if name in tables]
        return body.op("Gemm", x, *(body.op("Gather", one, expert) for one in given))

    y = linear(hidden_units(body, node, linear, body.op("Slice", rows, first, last)), "down")
    longer, on = body.op("SequenceInsert", said, y), body.op("Identity", going)
    info, sequence = helper.make_tensor_value_info, helper.make_tensor_sequence_value_info
    kind = helper.np_dtype_to_tensor_dtype(node.up.dtype)
    inputs = [info(turn, TensorProto.INT64, []), info(going, TensorProto.BOOL, []), sequence(said, kind, None)]
    outputs = [info(on, TensorProto.BOOL, []), sequence(longer, kind, None)]
    return helper.make_graph(body.nodes, body.prefix, inputs, outputs)
