"""Export of a ranking model to ONNX with its feature transforms: raw ids and numbers in, a probability per task out."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.errors import UserError
from apps.recsys.batch import Batch, InputSpec
from apps.recsys.data import RecsysData
from apps.recsys.deploy_compare import compare
from apps.recsys.deploy_inputs import OUTPUT, describe, prepend_lookups
from apps.recsys.loading import Trained
from apps.recsys.losses import log_probabilities
from apps.recsys.models.build import Ranker
from export.onnx import ExportError
from export.onnx import export_onnx as write_onnx
from moecore import __version__
from moecore.files import atomic_path

COMPARED = 4096
"""Test rows that a file is compared on at most."""
LARGEST = 2_000_000_000
"""Bytes of weights that a single ONNX file can hold, a little less than the 2 GiB of a protocol buffer."""


class Encoded(nn.Module):
    """Rows of tables and numbers -> probabilities, a function of tensors alone."""

    def __init__(self, model: Ranker, spec: InputSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec

    def names(self) -> list[str]:
        """Of the inputs, in order: sparse and dense if the log has such features, and a sequence each."""
        kinds = [kind for kind in ("sparse", "dense") if getattr(self.spec, kind)]
        return [*kinds, *(f"sequence.{one.name}" for one in self.spec.sequences)]

    def forward(self, *inputs: Tensor) -> Float[Tensor, "B T"]:
        """[B, S], [B, N], and [B, L] of each sequence -> [B, T], all conditions included."""
        named = dict(zip(self.names(), inputs, strict=True))
        rows = inputs[0].shape[0]
        sparse = named["sparse"] if "sparse" in named else torch.zeros(rows, 0, dtype=torch.int64)
        dense = named["dense"] if "dense" in named else torch.zeros(rows, 0)
        dense = torch.where(dense.abs() == math.inf, math.nan, dense)  # missing, as columns of a log are read
        sequences = {one.name: named[f"sequence.{one.name}"] for one in self.spec.sequences}
        return log_probabilities(self.model(Batch(sparse, dense, sequences)).logits, self.spec.tasks).exp()


def export_onnx(trained: Trained, data: RecsysData, path: Path) -> dict[str, float]:
    """Write the model as one ONNX file and compare it with PyTorch on test rows.

    Inputs are one per feature, by its name: ids as int64 or text (as the vocabulary has them), numbers as float, all
    `[batch]`; sequences `[batch, length]`, oldest value first. Missing ids, and padding of sequences on the right, are
    the least int64 or the empty text; missing numbers are NaN, or infinite. Ids never seen are "unknown". The output is
    `probabilities`, `[batch, tasks]`, conditions included. The file's metadata says all of this.

    Args:
        trained: the model.
        data: whose test rows to compare on.
        path: of the file.

    Returns:
        The comparison's figures, see `apps.recsys.deploy_compare.compare`.

    Raises:
        UserError: the model or a feature has no ONNX form, or outputs differ; a file from before then stays as it is.
    """
    trained = dataclasses.replace(trained, model=copy.deepcopy(trained.model).cpu().eval())
    _check_size(trained.model)
    frame = _rows(data)
    module = Encoded(trained.model, trained.spec).eval()
    inputs = _example(trained, frame)
    shapes = (tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs),)
    with atomic_path(path) as temporary:
        try:
            write_onnx(module, inputs, temporary, module.names(), OUTPUT, _metadata(trained), shapes)
            prepend_lookups(temporary, trained.transform)
        except ExportError as error:
            raise UserError(f"export: {error}") from error
        return compare(trained, temporary, frame)


def _check_size(model: nn.Module) -> None:
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size > LARGEST:
        raise UserError(
            f"export: {size / 1e9:.1f} GB of weights do not fit an ONNX file (2 GB); train with smaller tables "
            "(min_count, buckets or dim of the largest features)"
        )


def _rows(data: RecsysData) -> pd.DataFrame:
    """The first test rows."""
    kept: list[pd.DataFrame] = []
    for frame in data.parts["test"].frames(data.schema.columns(), COMPARED):
        kept.append(frame)
        if sum(map(len, kept)) >= COMPARED:
            break
    return pd.concat(kept, ignore_index=True).head(COMPARED)


def _example(trained: Trained, frame: pd.DataFrame) -> tuple[Tensor, ...]:
    """Two rows to trace with, as the network takes them."""
    batch = trained.transform.encode(frame.iloc[[0, -1]], labels=False)
    kinds = [tensor for tensor in (batch.sparse, batch.dense) if tensor.shape[1]]
    return (*kinds, *(batch.sequences[one.name] for one in trained.spec.sequences))


def _metadata(trained: Trained) -> dict[str, Any]:
    return {
        "task": "ranking",
        "model": trained.title,
        "inputs": describe(trained.transform),
        "outputs": [task.name for task in trained.spec.tasks],
        "sequences": "oldest value first, padded on the right with what is missing",
        "moecore_version": __version__,
    }
