"""What is delivered for devices: compared, priced, noted, and refused without loss of what was there."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import moecore
from export.decisions import largest
from export.devices import deliver, single_runs
from export.errors import ExportError
from export.exportable import Exportable, Sample, Score, samples_of
from export.notes import NOTES
from export.settings import FpgaSettings

D, N = 8, 4


class Classifier(nn.Module):
    """Sequences -> scores, by one mixture whose gate may be the task's."""

    def __init__(self, tasks: int = 0, task: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"score": "per_task", "score_options": {"num_tasks": tasks}} if tasks else {}
        self.moe = moecore.MoE.build(D, num_experts=4, top_k=2, hidden=16, activation="gelu", **options)
        nn.init.normal_(self.moe.router.score.weight)
        self.head = nn.Linear(D, 3)
        self.task = task if tasks else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with moecore.routing_context(task=self.task):
            return self.head((x + self.moe(x)).mean(1))


def exportable(module: nn.Module, **options) -> Exportable:
    batches = [torch.randn(16, N, D) for _ in range(2)]
    return Exportable(
        module.eval(),
        ("tokens",),
        ("scores",),
        (torch.randn(2, N, D),),
        samples_of(("tokens",), *((batch,) for batch in batches)),
        samples_of(("tokens",), (torch.randn(16, N, D),)),
        {"classes": ["a", "b", "c"]},
        largest(),
        Score("mean", lambda outputs: float(outputs[0].mean())),
        **options,
    )


def test_a_bundle_runs_and_is_compared_priced_and_noted(tmp_path):
    path = tmp_path / "m.fpga"
    figures = deliver(exportable(Classifier()), "fpga", path, FpgaSettings(compared=20, sweep=2))
    assert figures["rows"] == 20
    assert 0 < figures["max_relative_error"] < 1e-3
    assert figures["decision_agreement"] == 1.0
    assert figures["overflows"] == 0
    assert figures["zcu104_estimated_ms"] > 0
    assert "0 mismatches" in (path / "testbench.log").read_text()
    assert json.loads((path / "estimate.json").read_text())["device"] == "zcu104"
    assert json.loads((path / "manifest.json").read_text())["metadata"]["classes"] == ["a", "b", "c"]
    assert "| 24 |" in (path / "precision.md").read_text()
    assert (path / "precision.png").stat().st_size > 1000
    assert json.loads((tmp_path / NOTES).read_text())["m.fpga"]["rows"] == 20


def test_tasks_are_tables_of_gates_in_one_bundle(tmp_path):
    modules = {name: Classifier(2, number).eval() for number, name in enumerate(("depth", "edges"))}
    ready = exportable(modules["depth"], tasks=modules)
    figures = deliver(ready, "fpga", tmp_path / "m.fpga", FpgaSettings(compared=10))
    assert figures["depth/max_relative_error"] < 1e-3
    assert figures["edges/max_relative_error"] < 1e-3
    x = ready.samples[0].tensors[0]
    with torch.no_grad():
        assert (modules["depth"](x) - modules["edges"](x)).abs().max() > 1e-2  # the tables differ


def test_what_has_no_form_is_refused_and_the_old_bundle_stays(tmp_path):
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(D, D, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.cell(x)[0].mean(1)

    path = tmp_path / "m.fpga"
    path.mkdir()
    (path / "manifest.json").touch()
    with pytest.raises(ExportError, match="GRU"):
        deliver(exportable(Strange()), "fpga", path, FpgaSettings())
    assert [one.name for one in path.iterdir()] == ["manifest.json"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_something_else_stays(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ExportError, match="no folder that an export wrote"):
        deliver(exportable(Classifier()), "fpga", tmp_path, FpgaSettings())
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_few_bits_are_refused_by_the_tasks_figure(tmp_path):
    settings = FpgaSettings(weight_width=4, activation_width=6, compared=20, max_score_change=1e-3)
    with pytest.raises(
        ExportError, match=r"^mean goes from .* in fixed point, further than fpga\.max_score_change=0\.001"
    ):
        deliver(exportable(Classifier()), "fpga", tmp_path / "m.fpga", settings)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_named(tmp_path):
    ready = exportable(Classifier())
    loud = samples_of(("tokens",), *((100 * sample.tensors[0],) for sample in ready.samples))
    ready = dataclasses.replace(ready, samples=loud, score=None)
    figures = deliver(ready, "fpga", tmp_path / "m.fpga", FpgaSettings(compared=4, margin=0))
    assert figures["overflows"] == sum(value for name, value in figures.items() if name.startswith("overflows/")) > 0
    assert figures["overflows/tokens"] > 0


def test_qonnx_is_measured_and_noted(tmp_path):
    figures = deliver(exportable(Classifier()), "qonnx", tmp_path / "m.onnx")
    assert 1e-4 < figures["relative_rms_error"] < 0.2
    assert json.loads((tmp_path / NOTES).read_text())["m.onnx"]["format"] == "qonnx"


def test_samples_are_cut_into_calls_of_one_row():
    ready = exportable(Classifier())
    runs = single_runs(ready, ready.samples, 20)
    assert [tuple(run.tensors[0].shape) for run in runs] == [(1, N, D)] * 20
    whole = torch.cat([sample.tensors[0] for sample in ready.samples])
    assert np.array_equal(torch.cat([run.tensors[0] for run in runs]), whole[:20])
    state = Sample((torch.randn(2, 1, 3), torch.randn(1, N, D)), {})
    ready = Exportable(Classifier(), ("s", "x"), ("y",), state.tensors, [state], timed=state)
    assert single_runs(ready, [state, state], 5) == [state, state]
