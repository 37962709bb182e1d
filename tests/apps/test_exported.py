"""The report's section on exported files."""

from __future__ import annotations

import json

from apps.exported import exported_files
from apps.report import Page
from tests.apps import pages


def test_files_that_are_there_are_shown_with_their_figures(tmp_path):
    notes = {
        "model.onnx": {
            "experts": "sparse",
            "file_bytes": 1_234_000,
            "max_relative_error": 3e-7,
            "decision_agreement": 1.0,
            "routing_agreement": 0.975,
            "accuracy_torch": 0.91,
            "accuracy_export": 0.9,
            "export_ms_p50": 0.5,
            "dense_equal_ms_p50": 0.4,
            "torch_ms_p50": 3.0,
        },
        "model.fpga": {"experts": "queues"},
        "gone.onnx": {"file_bytes": 1},
    }
    (tmp_path / "export.json").write_text(json.dumps(notes))
    (tmp_path / "model.onnx").touch()
    (tmp_path / "model.fpga").mkdir()
    page = Page("run", "", {})
    exported_files(page, tmp_path)
    read = pages.Page(page.write(tmp_path / "report.html").read_text())
    assert "Exported files" in read.headings
    for text in ("model.onnx", "sparse", "1.23 MB", "97.50%", "accuracy: 0.91 to 0.9", "0.5", "model.fpga", "queues"):
        assert text in read.cells
    assert "gone.onnx" not in read.cells
    assert len(read.sources) == 1


def test_a_run_without_exports_has_no_section(tmp_path):
    page = Page("run", "", {})
    exported_files(page, tmp_path)
    (tmp_path / "export.json").write_text("{}")
    exported_files(page, tmp_path)
    assert page.sections == []
