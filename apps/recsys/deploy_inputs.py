"""What stands before the network in an exported file: ids to rows of tables, numbers encoded, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from apps.errors import UserError
from apps.recsys.batch import MISSING, UNKNOWN, DenseInput, SequenceInput, SparseInput
from apps.recsys.columns import read_lists, read_numbers
from apps.recsys.transform import Transform
from apps.recsys.vocabulary import FIRST, HASH_A, HASH_B, PRIME, Ids, Vocabulary, read_ids
from export.trace import IR_VERSION, OPSET

if TYPE_CHECKING:
    import onnx

NO_ID = -(2**63)
"""Stands for a missing integer id, and pads sequences of integers; the empty text does so for text."""
STRANGE = NO_ID + 1
"""Stands for an integer id that is none (text where integers belong): never seen, whatever the vocabulary."""
OUTPUT = "probabilities"
ENCODED, NETWORK = "encoded/", "network/"
"""Prefixes of names inside of a file: of all before the network, and of what in the network is called as a feature is
(select, cat)."""
ML_OPSET = 4


def features_graph(transform: Transform, numbers: onnx.ModelProto | None) -> onnx.ModelProto:
    """From an input per feature to the inputs of the network, called `encoded/<name>`.

    Args:
        transform: of the model.
        numbers: encodes all numbers, `[batch, N]`; None: the log has none.

    Raises:
        UserError: a feature that no ONNX operator can look up (text that is hashed), or whose name is taken.
    """
    from onnx import TensorProto, compose, helper

    _check_names(transform)
    spec = transform.spec
    nodes, outputs = _lookups(transform)
    tables = [helper.make_tensor(f"{ENCODED}axis", TensorProto.INT64, [1], [1])] if spec.sparse or spec.dense else []
    if numbers is not None:
        inner = compose.add_prefix(numbers, f"{ENCODED}dense/").graph
        nodes += _columns(inner.input[0].name, [one.name for one in spec.dense])
        nodes += [*inner.node, helper.make_node("Identity", [inner.output[0].name], [f"{ENCODED}numbers"])]
        tables += inner.initializer
        width = inner.output[0].type.tensor_type.shape.dim[1].dim_value
        outputs.append(helper.make_tensor_value_info(f"{ENCODED}numbers", TensorProto.FLOAT, ["batch", width]))
    inputs = [helper.make_tensor_value_info(one.name, *_kind(transform, one)) for one in _features(transform)]
    graph = helper.make_graph(nodes, "features", inputs, outputs, tables)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def prepend(features: onnx.ModelProto, network: onnx.ModelProto) -> onnx.ModelProto:
    """A network that reads an input per feature.

    Its inner names stay as they are, but for those that features have too.

    Args:
        features: as `features_graph` gives it.
        network: from rows of tables and encoded numbers to probabilities.
    """
    import onnx
    from onnx import compose

    made = onnx.ModelProto()
    made.CopyFrom(network)
    graph, front = made.graph, features.graph
    renamed = {one.name: f"{NETWORK}{one.name}" for one in front.input}
    renamed |= {one.name: f"{ENCODED}{one.name}" for one in graph.input}
    kinds = ("edges", "inputs", "outputs", "initializers", "value_infos")
    flags = {f"rename_{kind}": False for kind in kinds}  # nothing is prefixed, names change as the map says
    compose.add_prefix_graph(graph, "", **flags, inplace=True, name_map=renamed)
    nodes = [*front.node, *(onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node)]
    for field, messages in (("node", nodes), ("input", front.input)):
        graph.ClearField(field)
        getattr(graph, field).extend(messages)
    graph.initializer.extend(front.initializer)
    known = {one.domain for one in network.opset_import}
    made.opset_import.extend(one for one in features.opset_import if one.domain not in known)
    return made


def _check_names(transform: Transform) -> None:
    for name in transform.schema.features:
        if name == OUTPUT or name.startswith((NETWORK, ENCODED)):
            raise UserError(
                f"export: features.{name}: the file has a value of its own of that name; call the feature otherwise, "
                "with its column beside it"
            )


def _lookups(transform: Transform) -> tuple[list[onnx.NodeProto], list[onnx.ValueInfoProto]]:
    """Nodes from ids to rows of tables, and what they give."""
    from onnx import TensorProto, helper

    spec = transform.spec
    nodes: list[onnx.NodeProto] = []
    shapes: dict[str, list[str | int]] = {}
    for i, one in enumerate(spec.sparse):
        nodes += _lookup(one.name, transform.vocabularies[one.table], f"{ENCODED}sparse/{i}")
    if spec.sparse:
        nodes += _columns(f"{ENCODED}sparse", [f"{ENCODED}sparse/{i}" for i in range(len(spec.sparse))])
        shapes["sparse"] = ["batch", len(spec.sparse)]
    for one in spec.sequences:
        nodes += _lookup(one.name, transform.vocabularies[one.table], f"{ENCODED}sequence.{one.name}")
        shapes[f"sequence.{one.name}"] = ["batch", one.max_len]
    values = [helper.make_tensor_value_info(f"{ENCODED}{name}", TensorProto.INT64, s) for name, s in shapes.items()]
    return nodes, values


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

    For integers also what stands for text where they belong (`unknown`), for sequences what stands between the values
    of text columns (`separator`). Dates are text; `format` says in which form, all in UTC.
    """
    found = []
    for one in _features(transform):
        vocabulary = None if isinstance(one, DenseInput) else transform.vocabularies[one.table]
        kind = "float" if vocabulary is None else "int64" if vocabulary.integer else "string"
        missing = {"float": "NaN", "int64": NO_ID, "string": ""}[kind]
        column, shape = transform.schema.column(one.name), _kind(transform, one)[1]
        about = {"name": one.name, "column": column, "type": kind, "shape": shape, "missing": missing}
        if kind == "int64":
            about["unknown"] = STRANGE
        if isinstance(one, SequenceInput):
            about["separator"] = transform.schema.features[one.name].separator
        if vocabulary is not None and vocabulary.dates is not None:
            about["format"] = vocabulary.dates
        found.append(about)
    return found


def _columns(name: str, parts: Sequence[str]) -> list[Any]:
    """`[batch]` each -> `[batch, parts]`."""
    from onnx import helper

    made = [f"{name}/column/{i}" for i in range(len(parts))]
    pairs = zip(parts, made, strict=True)
    wide = [helper.make_node("Unsqueeze", [part, f"{ENCODED}axis"], [column]) for part, column in pairs]
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
        made = f"{rows}/hash/{len(nodes)}"
        tensor = helper.make_tensor(made, TensorProto.INT64, [], [value])
        nodes.append(helper.make_node("Constant", [], [made], value=tensor))
        return made

    def apply(kind: str, *given: str, out: str | None = None) -> str:
        made = out or f"{rows}/hash/{len(nodes)}"
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
