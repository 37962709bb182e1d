"""Export of a ranking model to ONNX with its feature transforms: raw ids and numbers in, a probability per task out."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from apps.errors import UserError
from apps.recsys.batch import Batch, InputSpec
from apps.recsys.data import RecsysData
from apps.recsys.deploy_inputs import NO_ID, feed, prepend_lookups
from apps.recsys.loading import Trained
from apps.recsys.losses import log_probabilities
from apps.recsys.models.build import Ranker
from export.onnx import ExportError
from export.onnx import export_onnx as write_onnx
from export.verify import TOLERANCE
from moecore import __version__
from moecore.files import atomic_path

COMPARED, TIMED = 4096, (1, 256, 500)
"""Test rows that a file is compared on at most, and rows of the calls that are timed."""


class Encoded(nn.Module):
    """Rows of tables and numbers -> probabilities, a function of tensors alone."""

    def __init__(self, model: Ranker, spec: InputSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, sparse: Tensor, dense: Tensor, *sequences: Tensor) -> Float[Tensor, "B T"]:
        """[B, S], [B, N], and [B, L] of each sequence -> [B, T], all conditions included."""
        named = {one.name: rows for one, rows in zip(self.spec.sequences, sequences, strict=True)}
        return log_probabilities(self.model(Batch(sparse, dense, named)).logits, self.spec.tasks).exp()


def export_onnx(trained: Trained, data: RecsysData, path: Path) -> dict[str, float]:
    """Write the model as one ONNX file and compare it with PyTorch on test rows, some with ids never seen.

    Inputs are one per feature: ids as int64 or text (as the vocabulary has them), numbers as float, `[batch]`;
    sequences `[batch, length]`. Missing ids, and padding of sequences, are the least int64 or the empty text; missing
    numbers are NaN. Ids never seen are "unknown".

    Args:
        trained: the model.
        data: whose test rows to compare on.
        path: of the file.

    Returns:
        The comparison's figures.

    Raises:
        UserError: the model or a feature has no ONNX form, or outputs differ; a file from before then stays as it is.
    """
    spec, model = trained.spec, trained.model.cpu().eval()
    module = Encoded(model, spec).eval()
    batch = data.batches("test")[(0, 0)][:2]
    inputs = (batch.sparse, batch.dense, *(batch.sequences[one.name] for one in spec.sequences))
    names = ["sparse", "dense", *(f"sequence.{one.name}" for one in spec.sequences)]
    metadata = {
        "task": "ranking",
        "model": trained.title,
        "outputs": [task.name for task in spec.tasks],
        "missing": f"ids {NO_ID} or empty text, numbers NaN; sequences are padded with it",
        "moecore_version": __version__,
    }
    rows = torch.export.Dim("batch", min=1)
    varied = ({0: rows}, {0: rows}, *([tuple({0: rows} for _ in spec.sequences)] if spec.sequences else []))
    frame = data.frame("test").head(COMPARED)
    with atomic_path(path) as temporary:
        try:
            write_onnx(module, inputs, temporary, names, "probabilities", metadata, varied)
            prepend_lookups(temporary, trained.transform)
        except ExportError as error:
            raise UserError(f"export: {error}") from error
        return _compare(trained, temporary, frame)


def _compare(trained: Trained, path: Path, frame: pd.DataFrame) -> dict[str, float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    strange = _never_seen(trained, frame)
    error = scale = 0.0
    for rows in (frame, strange):
        ours = session.run(None, feed(trained.transform, rows))[0]
        expected = trained.score(trained.transform.encode(rows, labels=False))
        error = max(error, float(np.abs(ours - expected).max()))
        scale = max(scale, float(np.abs(expected).max()))
    relative = error / max(scale, 1e-12)
    if not relative <= TOLERANCE:
        raise UserError(
            f"export: outputs differ from PyTorch by {relative:.2g} of their range (over {TOLERANCE}); no file was kept"
        )
    figures = {"rows": float(2 * len(frame)), "max_error": error, "max_relative_error": relative}
    for count in TIMED:
        figures |= _times(session, trained, frame.iloc[np.arange(count) % len(frame)])
    return figures | {"file_bytes": float(path.stat().st_size)}


def _never_seen(trained: Trained, frame: pd.DataFrame) -> pd.DataFrame:
    """The same rows with ids that no vocabulary knows."""
    count, strange = len(frame), frame.copy()
    for one in trained.spec.sparse:
        numbers = np.arange(10**12, 10**12 + count)
        text = [f"never seen {i}" for i in range(count)]
        integer = trained.transform.vocabularies[one.table].integer
        strange[trained.transform.schema.column(one.name)] = numbers if integer else text
    return strange


def _times(session: object, trained: Trained, rows: pd.DataFrame) -> dict[str, float]:
    """Median CPU milliseconds of a call: onnxruntime with lookups, PyTorch on rows encoded already."""
    given, batch = feed(trained.transform, rows), trained.transform.encode(rows, labels=False)
    spent: dict[str, list[float]] = {"onnx": [], "torch": []}
    for _ in range(9):
        for name, call in (("onnx", lambda: session.run(None, given)), ("torch", lambda: trained.score(batch))):
            started = time.process_time()
            call()
            spent[name].append(time.process_time() - started)
    return {f"{name}_ms_{len(rows)}_rows": float(np.median(times)) * 1e3 for name, times in spent.items()}
