"""What stands before the network in an exported file: from raw ids to rows of tables, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from apps.errors import UserError
from apps.recsys.batch import MISSING, UNKNOWN, DenseInput, SequenceInput, SparseInput
from apps.recsys.columns import read_lists, read_numbers
from apps.recsys.transform import Transform
from apps.recsys.vocabulary import FIRST, HASH_A, HASH_B, PRIME, Ids, Vocabulary, read_ids

NO_ID = -(2**63)
"""Stands for a missing integer id, and pads sequences of integers; the empty text does so for text."""
STRANGE = NO_ID + 1
"""Stands for an integer id that is none (text where integers belong): never seen, whatever the vocabulary."""
OUTPUT = "probabilities"
NETWORK, LOOKUP = "network/", "lookup/"
"""Prefixes of the names inside of a file, so that features may be called as operators are (select, cat)."""
ML_OPSET = 4


def prepend_lookups(path: Path, transform: Transform) -> None:
    """Replace the inputs of an exported network, in its file, by one input per feature.

    Args:
        path: of a file with inputs `sparse`, `dense` and `sequence.<name>`, as far as the log has such features, and
            the output `probabilities`.
        transform: of the model.

    Raises:
        UserError: a feature that no ONNX operator can look up (text that is hashed), or whose name is taken.
    """
    import onnx
    from onnx import compose, helper

    _check_names(transform)
    network = compose.add_prefix(onnx.load(path), NETWORK, rename_outputs=False)
    nodes, inputs = _lookups(transform)
    columns = bool(transform.spec.sparse or transform.spec.dense)
    axis = [helper.make_tensor(f"{LOOKUP}axis", onnx.TensorProto.INT64, [1], [1])] if columns else []
    graph = network.graph
    everything = helper.make_graph(
        [*nodes, *graph.node],
        graph.name,
        inputs,
        graph.output,
        [*graph.initializer, *axis],
        value_info=graph.value_info,
    )
    opsets = [*network.opset_import, helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
    made = helper.make_model(
        everything, opset_imports=opsets, ir_version=network.ir_version, functions=network.functions
    )
    made.metadata_props.extend(network.metadata_props)
    onnx.checker.check_model(made, full_check=True)
    onnx.save_model(made, path)


def _check_names(transform: Transform) -> None:
    for name in transform.schema.features:
        if name == OUTPUT or name.startswith((NETWORK, LOOKUP)):
            raise UserError(
                f"export: features.{name}: the file has a value of its own of that name; call the feature otherwise, "
                "with its column beside it"
            )


def _lookups(transform: Transform) -> tuple[list[Any], list[Any]]:
    """Nodes from raw columns to the inputs of the network, and the inputs of the whole."""
    from onnx import helper

    spec = transform.spec
    nodes: list[Any] = []
    inputs = [helper.make_tensor_value_info(one.name, *_kind(transform, one)) for one in _features(transform)]
    for i, one in enumerate(spec.sparse):
        nodes += _lookup(one.name, transform.vocabularies[one.table], f"{LOOKUP}sparse/{i}")
    for one in spec.sequences:
        nodes += _lookup(one.name, transform.vocabularies[one.table], f"{NETWORK}sequence.{one.name}")
    if spec.sparse:
        nodes += _columns(f"{NETWORK}sparse", [f"{LOOKUP}sparse/{i}" for i in range(len(spec.sparse))], "ids")
    if spec.dense:
        nodes += _columns(f"{NETWORK}dense", [one.name for one in spec.dense], "numbers")
    return nodes, inputs


def _features(transform: Transform) -> list[SparseInput | DenseInput | SequenceInput]:
    return [*transform.spec.sparse, *transform.spec.dense, *transform.spec.sequences]


def _kind(transform: Transform, one: SparseInput | DenseInput | SequenceInput) -> tuple[int, list[str | int]]:
    """Type and shape of the input of a feature."""
    from onnx import TensorProto

    if isinstance(one, DenseInput):
        return TensorProto.FLOAT, ["batch"]
    kind = TensorProto.INT64 if transform.vocabularies[one.table].integer else TensorProto.STRING
    return kind, ["batch", one.max_len] if isinstance(one, SequenceInput) else ["batch"]


def describe(transform: Transform) -> list[dict[str, Any]]:
    """The inputs of a file as plain data: name, column of the log, type, shape, and what stands for a missing value.

    Dates are text; `format` says in which form, all in UTC.
    """
    found = []
    for one in _features(transform):
        integer = not isinstance(one, DenseInput) and transform.vocabularies[one.table].integer
        kind = "float" if isinstance(one, DenseInput) else "int64" if integer else "string"
        missing = {"float": "NaN", "int64": NO_ID, "string": ""}[kind]
        column, shape = transform.schema.column(one.name), _kind(transform, one)[1]
        about = {"name": one.name, "column": column, "type": kind, "shape": shape, "missing": missing}
        dates = None if isinstance(one, DenseInput) else transform.vocabularies[one.table].dates
        found.append(about if dates is None else about | {"format": dates})
    return found


def _columns(name: str, parts: Sequence[str], what: str) -> list[Any]:
    """`[batch]` each -> `[batch, parts]`."""
    from onnx import helper

    made = [f"{LOOKUP}{what}/{i}/column" for i in range(len(parts))]
    pairs = zip(parts, made, strict=True)
    wide = [helper.make_node("Unsqueeze", [part, f"{LOOKUP}axis"], [column]) for part, column in pairs]
    return [*wide, helper.make_node("Concat", made, [name], axis=1)]


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
        made = f"{LOOKUP}hash/{rows}/{len(nodes)}"
        tensor = helper.make_tensor(made, TensorProto.INT64, [], [value])
        nodes.append(helper.make_node("Constant", [], [made], value=tensor))
        return made

    def apply(kind: str, *given: str, out: str | None = None) -> str:
        made = out or f"{LOOKUP}hash/{rows}/{len(nodes)}"
        nodes.append(helper.make_node(kind, list(given), [made]))
        return made

    x = apply("Mod", name, constant(PRIME))
    x = apply("Add", apply("Mul", x, constant(HASH_A)), constant(HASH_B))
    x = apply("Mod", apply("Mod", x, constant(PRIME)), constant(buckets))
    x = apply("Add", x, constant(FIRST))
    x = apply("Where", apply("Equal", name, constant(STRANGE)), constant(UNKNOWN), x)
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
        return np.where(ids.missing, NO_ID, np.where(known, values, STRANGE))
    return np.array(vocabulary.spelled(ids), object)
