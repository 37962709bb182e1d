"""A ranking model ready for export: rows of tables and encoded numbers in, a probability per task out.

An ONNX file has the features in front: raw ids and numbers in. A device gets what the network takes from its host.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.errors import UserError
from apps.recsys.batch import Batch, InputSpec, TaskSpec
from apps.recsys.data import RecsysData
from apps.recsys.deploy_inputs import OUTPUT, describe, features_graph, prepend
from apps.recsys.deploy_numbers import NumberEncoding, take_numbers
from apps.recsys.deploy_rows import Compared, compared_rows, first_rows, time_candidates
from apps.recsys.deploy_sparse import run_chosen_only
from apps.recsys.loading import Trained
from apps.recsys.metrics import auc
from apps.recsys.models.base import Fields
from apps.recsys.models.build import Ranker
from export.decisions import ranking
from export.exportable import Exportable, Outputs, Sample, Score, samples_of
from export.onnx import varying
from export.trace import trace
from moecore import __version__
from moecore.factorized import dense

if TYPE_CHECKING:
    import onnx

LARGEST = 2_000_000_000
"""Bytes of weights that a single ONNX file can hold, a little less than the 2 GiB of a protocol buffer."""


class Encoded(nn.Module):
    """Rows of tables and encoded numbers -> probabilities, a function of tensors alone.

    Args:
        model: whose numbers are encoded already, see `take_numbers`.
        spec: of its data.
    """

    def __init__(self, model: Ranker, spec: InputSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec

    def names(self) -> tuple[str, ...]:
        """Of the inputs, in order: sparse and numbers if the log has such features, and a sequence each."""
        kinds = [name for name, some in (("sparse", self.spec.sparse), ("numbers", self.spec.dense)) if some]
        return (*kinds, *(f"sequence.{one.name}" for one in self.spec.sequences))

    def batch(self, *inputs: Tensor) -> Batch:
        """[B, S], [B, K], and [B, L] of each sequence."""
        named = dict(zip(self.names(), inputs, strict=True))
        rows = inputs[0].shape[0]
        sparse = named["sparse"] if "sparse" in named else torch.zeros(rows, 0, dtype=torch.int64)
        numbers = named["numbers"] if "numbers" in named else torch.zeros(rows, 0)
        return Batch(sparse, numbers, {one.name: named[f"sequence.{one.name}"] for one in self.spec.sequences})

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B T"]:
        """As `batch` takes them -> [B, T], all conditions included."""
        return probabilities(self.model(self.batch(*inputs)).logits, self.spec.tasks)


class Embedding(Encoded):
    """Rows of tables and encoded numbers -> all features side by side: what hosts do where devices take vectors."""

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B D"]:
        """As `batch` takes them -> [B, D]."""
        return dense(self.model.encoder(self.batch(*inputs)).features)


class Embedded(nn.Module):
    """All features side by side -> probabilities."""

    def __init__(self, model: Ranker, spec: InputSpec) -> None:
        super().__init__()
        self.network, self.spec = model.network, spec

    def forward(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B T"]:
        """[B, D] -> [B, T], all conditions included."""
        return probabilities(self.network(Fields(features)).logits, self.spec.tasks)


def probabilities(logits: Float[Tensor, "B T"], tasks: Sequence[TaskSpec]) -> Float[Tensor, "B T"]:
    """Of a positive in every task: p(buy) = p(click) p(buy | click). One operator where no task has a condition."""
    p = logits.sigmoid()
    given = {task.name: task.given for task in tasks}
    if not any(given.values()):
        return p
    own, found = dict(zip(given, p.unbind(1), strict=True)), []
    for name in given:
        product, condition = own[name], given[name]
        while condition is not None:
            product, condition = product * own[condition], given[condition]
        found.append(product)
    return torch.stack(found, 1)


def exportable(trained: Trained, data: RecsysData, calibration: int = 256) -> Exportable:
    """The model, compared on test rows, some also with ids never seen, with missing and with infinite values.

    Inputs of an ONNX file are one per feature, by its name: ids as int64 or text (as the vocabulary has them), numbers
    as float, all `[batch]`; sequences `[batch, length]`, oldest value first. Missing ids, and padding of sequences on
    the right, are the least int64 or the empty text; missing numbers are NaN, or infinite. Ids never seen are
    "unknown". The output is `probabilities`, `[batch, tasks]`, conditions included. The metadata says all of this.

    Args:
        trained: the model.
        data: whose test rows files are compared on, and whose training rows ranges are taken from.
        calibration: how many of the latter.

    Raises:
        UserError: a feature has no ONNX form, the weights do not fit a file, or the model gives no numbers.
    """
    _check_size(trained.model)
    features = raw_features(trained)
    model = copy.deepcopy(trained.model).cpu().eval()
    run_chosen_only(model, trained.config.model)
    numbers = take_numbers(model.encoder)
    module = Encoded(model, trained.spec).eval()
    compared = compared_rows(trained, data)
    first = _sample(module, numbers, compared[0])
    _check_scores(module, first)
    one = Exportable(
        module=module,
        inputs=module.names(),
        outputs=(OUTPUT,),
        example=tuple(tensor[[0, -1]] for tensor in first.tensors),
        samples=[first, *(_sample(module, numbers, one) for one in compared[1:])],
        calibration=[_sample(module, numbers, one) for one in first_rows(trained, data, "train", calibration)],
        metadata=metadata_of(trained),
        decide=ranking,
        dynamic_shapes=(varying(first.tensors),),  # of one parameter, `*inputs`
        score=_score([one.batch.labels for one in compared if one.batch.labels is not None]),
        finish=lambda network: prepend(features, network),
    )
    return dataclasses.replace(one, further=lambda path, exact: time_candidates(one, path))


def for_device(one: Exportable, trained: Trained, vectors: bool) -> Exportable:
    """The same for a device, whose host encodes the features: see `host_features`.

    Args:
        one: as `exportable` gives it.
        trained: the model.
        vectors: whether the device takes all features side by side, embedded by the host, and no rows of tables.

    Raises:
        UserError: vectors, of a model that looks at the values of sequences one by one.
    """
    about = {"task": "ranking", "model": trained.title, "tasks": [task.name for task in trained.spec.tasks]}
    one = dataclasses.replace(one, metadata={**about, "moecore_version": __version__}, finish=None)
    if not vectors:
        return one
    if one.module.model.encoder.hands_on:
        raise UserError(
            f"export: {trained.title} looks at sequences value by value, not at one vector of features; use format=fpga"
        )
    samples, calibration = (_embedded(one, some, trained.spec) for some in (one.samples, one.calibration))
    return dataclasses.replace(
        one,
        module=Embedded(one.module.model, trained.spec).eval(),
        inputs=("features",),
        example=tuple(tensor[[0, -1]] for tensor in samples[0].tensors),
        samples=samples,
        calibration=calibration,
        dynamic_shapes=None,
    )


@torch.no_grad()
def _embedded(one: Exportable, samples: Sequence[Sample], spec: InputSpec) -> list[Sample]:
    embed = Embedding(one.module.model, spec).eval()
    return samples_of(("features",), *((embed(*sample.tensors),) for sample in samples))


def host_features(one: Exportable, trained: Trained, vectors: bool) -> onnx.ModelProto:
    """What the host of a device computes: from an input per feature to `encoded/<name>`, or to `features`.

    Args:
        one: as `exportable` gives it.
        trained: the model.
        vectors: whether the device takes all features side by side.
    """
    features = raw_features(trained)
    if not vectors:
        return features
    embed = Embedding(one.module.model, trained.spec).eval()
    return prepend(features, trace(embed, one.example, one.inputs, ("features",), one.dynamic_shapes))


def raw_features(trained: Trained) -> onnx.ModelProto:
    """What encodes the features in front of the network, a graph of its own: see `deploy_inputs.features_graph`."""
    if not trained.spec.dense:
        return features_graph(trained.transform, None)
    encoding = NumberEncoding(copy.deepcopy(trained.model.encoder).cpu()).eval()
    example = (torch.zeros(2, len(trained.spec.dense)),)
    numbers = trace(encoding, example, ("dense",), ("numbers",), varying(example))
    return features_graph(trained.transform, numbers)


def metadata_of(trained: Trained) -> dict[str, Any]:
    """What a client must know of a file."""
    return {
        "task": "ranking",
        "model": trained.title,
        "inputs": describe(trained.transform),
        "outputs": [task.name for task in trained.spec.tasks],
        "sequences": "oldest value first, padded on the right with what is missing",
        "moecore_version": __version__,
    }


def _check_size(model: nn.Module) -> None:
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size > LARGEST:
        raise UserError(
            f"export: {size / 1e9:.1f} GB of weights do not fit an ONNX file (2 GB); train with smaller tables "
            "(min_count, buckets or dim of the largest features)"
        )


@torch.no_grad()
def _sample(module: Encoded, numbers: NumberEncoding, rows: Compared) -> Sample:
    batch = rows.batch
    tensors = {"sparse": batch.sparse, "numbers": numbers(batch.dense)}
    tensors |= {f"sequence.{name}": tensor for name, tensor in batch.sequences.items()}
    return Sample(tuple(tensors[name] for name in module.names()), rows.feed)


@torch.no_grad()
def _check_scores(module: Encoded, sample: Sample) -> None:
    if not module(*sample.tensors).isfinite().all():
        raise UserError("export: the model's scores of test rows are no numbers; train it anew (a lower optim.lr?)")


def _score(labels: Sequence[Tensor]) -> Score | None:
    """Mean AUC over the tasks in which it is defined, of the rows that have labels, which come first."""
    truth = torch.cat(list(labels)).numpy()  # [N, T]

    def mean_auc(outputs: Outputs) -> float:
        values = [
            auc(scores[: len(own)][~np.isnan(own)], own[~np.isnan(own)])
            for scores, own in zip(outputs[0].T, truth[: len(outputs[0])].T, strict=True)
            if _two_classes(own)
        ]
        return float(np.mean(values)) if values else math.nan

    return Score("mean_auc", mean_auc) if any(map(_two_classes, truth.T)) else None


def _two_classes(labels: np.ndarray) -> bool:
    return bool((labels == 0).any() and (labels == 1).any())
