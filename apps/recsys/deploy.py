"""A ranking model ready for export: rows of tables and encoded numbers in, a probability per task out.

An ONNX file has the features in front: raw ids and numbers in. A device gets what the network takes from its host.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.errors import UserError
from apps.recsys.batch import Batch, InputSpec
from apps.recsys.data import RecsysData
from apps.recsys.deploy_inputs import OUTPUT, describe, features_graph, prepend
from apps.recsys.deploy_numbers import NumberEncoding, take_numbers
from apps.recsys.deploy_rows import Compared, compared_rows, first_rows
from apps.recsys.deploy_sparse import run_chosen_only
from apps.recsys.loading import Trained
from apps.recsys.losses import log_probabilities
from apps.recsys.metrics import auc
from apps.recsys.models.build import Ranker
from export.decisions import ranking
from export.exportable import Exportable, Outputs, Sample, Score
from export.onnx import varying
from export.trace import trace
from moecore import __version__

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

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B T"]:
        """[B, S], [B, K], and [B, L] of each sequence -> [B, T], all conditions included."""
        named = dict(zip(self.names(), inputs, strict=True))
        rows = inputs[0].shape[0]
        sparse = named["sparse"] if "sparse" in named else torch.zeros(rows, 0, dtype=torch.int64)
        numbers = named["numbers"] if "numbers" in named else torch.zeros(rows, 0)
        sequences = {one.name: named[f"sequence.{one.name}"] for one in self.spec.sequences}
        return log_probabilities(self.model(Batch(sparse, numbers, sequences)).logits, self.spec.tasks).exp()


def exportable(trained: Trained, data: RecsysData, calibration: int = 256) -> Exportable:
    """The model, compared on test rows, each also with ids never seen, with missing and with infinite values.

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
    return Exportable(
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
    inside = ~np.isnan(truth)
    tasks = [t for t, column in enumerate(truth.T) if len(np.unique(column[inside[:, t]])) > 1]
    if not tasks:
        return None

    def mean_auc(outputs: Outputs) -> float:
        scores = outputs[0][: len(truth)]
        return float(np.mean([auc(scores[inside[:, t], t], truth[inside[:, t], t]) for t in tasks]))

    return Score("mean_auc", mean_auc)
