"""What stands before the network in an exported file: from raw ids to rows of tables, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from apps.errors import UserError
from apps.recsys.batch import MISSING, UNKNOWN
from apps.recsys.columns import read_lists, read_numbers
from apps.recsys.transform import Transform
from apps.recsys.vocabulary import FIRST, HASH_A, HASH_B, PRIME, Ids, Vocabulary, read_ids

NO_ID = -(2**63)
"""Stands for a missing integer id; the empty text for a missing text."""
ML_OPSET = 4


def prepend_lookups(path: Path, transform: Transform) -> None:
    """Replace the inputs of an exported network, in its file, by one input per feature.

    Args:
        path: of a file with inputs `sparse`, `dense` and `sequence.<name>`.
        transform: of the model.

    Raises:
        UserError: a feature that no ONNX operator can look up: text that is hashed.
    """
    import onnx
    from onnx import TensorProto, helper

    proto = onnx.load(path)
    graph, spec = proto.graph, transform.spec
    nodes: list[Any] = []
    inputs: list[Any] = []

    def add(name: str, vocabulary: Vocabulary | None, shape: Sequence[str | int], rows: str) -> None:
        kind = TensorProto.FLOAT
        if vocabulary is not None:
            kind = TensorProto.INT64 if vocabulary.integer else TensorProto.STRING
            nodes.extend(_lookup(name, vocabulary, rows))
        inputs.append(helper.make_tensor_value_info(name, kind, shape))

    for one in spec.sparse:
        add(one.name, transform.vocabularies[one.table], ["batch"], f"{one.name}/rows")
    for one in spec.dense:
        add(one.name, None, ["batch"], "")
    for one in spec.sequences:
        shape = ["batch", one.max_len]
        add(one.name, transform.vocabularies[one.table], shape, f"sequence.{one.name}")
    used = {i.name for i in graph.input}
    nodes += _columns("sparse", [f"{one.name}/rows" for one in spec.sparse]) if "sparse" in used else []
    nodes += _columns("dense", [one.name for one in spec.dense]) if "dense" in used and spec.dense else []
    empty = [i for i in graph.input if i.name in ("sparse", "dense") and not getattr(spec, i.name)]
    axis = helper.make_tensor("axis/1", TensorProto.INT64, [1], [1])
    everything = helper.make_graph(
        [*nodes, *graph.node], graph.name, [*inputs, *empty], graph.output, [*graph.initializer, axis]
    )
    everything.value_info.extend(graph.value_info)
    opsets = [*proto.opset_import, helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
    made = helper.make_model(everything, opset_imports=opsets, ir_version=proto.ir_version, functions=proto.functions)
    made.metadata_props.extend(proto.metadata_props)
    onnx.checker.check_model(made)
    onnx.save_model(made, path)


def _columns(name: str, parts: Sequence[str]) -> list[Any]:
    """`[batch]` each -> `[batch, parts]`."""
    from onnx import helper

    wide = [helper.make_node("Unsqueeze", [part, "axis/1"], [f"{part}/column"]) for part in parts]
    return [*wide, helper.make_node("Concat", [f"{part}/column" for part in parts], [name], axis=1)]


def _lookup(name: str, vocabulary: Vocabulary, rows: str) -> list[Any]:
    """From values to rows of a table."""
    from onnx import helper

    if vocabulary.buckets is not None:
        if not vocabulary.integer:
            raise UserError(f"export: {name} is hashed text, which ONNX cannot hash; give it vocabulary: fit")
        return _hash(name, vocabulary.buckets, rows)
    numbers = list(range(FIRST, FIRST + len(vocabulary.values)))
    kind = "keys_int64s" if vocabulary.integer else "keys_strings"
    values = vocabulary.values.tolist() if vocabulary.integer else vocabulary.values.to_pylist()
    keys = {kind: [*values, NO_ID if vocabulary.integer else ""], "values_int64s": [*numbers, MISSING]}
    return [
        helper.make_node("LabelEncoder", [name], [rows], domain="ai.onnx.ml", default_int64=UNKNOWN, **keys),
    ]


def _hash(name: str, buckets: int, rows: str) -> list[Any]:
    """The integer hash of `apps.recsys.vocabulary`."""
    from onnx import TensorProto, helper

    nodes: list[Any] = []

    def constant(value: int) -> str:
        made = f"{name}/hash/{len(nodes)}"
        tensor = helper.make_tensor(made, TensorProto.INT64, [], [value])
        nodes.append(helper.make_node("Constant", [], [made], value=tensor))
        return made

    def apply(kind: str, *given: str, out: str | None = None) -> str:
        made = out or f"{name}/hash/{len(nodes)}"
        nodes.append(helper.make_node(kind, list(given), [made]))
        return made

    x = apply("Mod", name, constant(PRIME))
    x = apply("Add", apply("Mul", x, constant(HASH_A)), constant(HASH_B))
    x = apply("Mod", apply("Mod", x, constant(PRIME)), constant(buckets))
    x = apply("Add", x, constant(FIRST))
    apply("Where", apply("Equal", name, constant(NO_ID)), constant(MISSING), x, out=rows)
    return nodes


def feed(transform: Transform, frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """The inputs of an exported file for rows of a table, by feature.

    Args:
        transform: of the model.
        frame: with the feature columns of its schema.
    """
    schema, spec = transform.schema, transform.spec
    given: dict[str, np.ndarray] = {}
    for one in spec.sparse:
        given[one.name] = _values(read_ids(frame[schema.column(one.name)]), transform.vocabularies[one.table])
    for one in spec.dense:
        given[one.name] = read_numbers(frame[schema.column(one.name)], one.name).astype(np.float32)
    for one in spec.sequences:
        vocabulary = transform.vocabularies[one.table]
        lists = read_lists(frame[schema.column(one.name)], schema.features[one.name].separator)
        values = _values(lists.ids, vocabulary)
        padded = np.full((len(frame), one.max_len), NO_ID if vocabulary.integer else "", values.dtype)
        ends = np.cumsum(lists.lengths)
        for row, (end, length) in enumerate(zip(ends, lists.lengths, strict=True)):
            own = values[end - length : end]
            own = own[own != (NO_ID if vocabulary.integer else "")][-one.max_len :]
            padded[row, : len(own)] = own
        given[one.name] = padded
    return given


def _values(ids: Ids, vocabulary: Vocabulary) -> np.ndarray:
    if vocabulary.integer:
        values, known = ids.as_integers()
        strange = NO_ID + 1  # text where integers belong: never seen
        return np.where(ids.missing, NO_ID, np.where(known, values, strange))
    return np.array([value or "" for value in ids.as_text().to_pylist()], object)
