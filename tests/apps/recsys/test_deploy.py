"""Exported files take raw ids and numbers, seen or not, and give what PyTorch gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from apps import exporting
from apps.errors import UserError
from apps.recsys import deploy, deploy_numbers
from apps.recsys.arguments import Export
from apps.recsys.data import RecsysData
from apps.recsys.deploy import exportable
from apps.recsys.deploy_inputs import NO_ID, feed
from apps.recsys.deploy_rows import unfamiliar
from apps.recsys.loading import Trained
from apps.recsys.models.build import build_model
from apps.recsys.schema import FeatureSpec, Schema
from apps.recsys.settings import RecsysConfig
from apps.recsys.sources import from_frame
from export.compare import Comparison, compare
from export.deliver import traced
from export.errors import ExportError
from export.lowering import lower
from export.onnx import save
from export.verify import in_onnxruntime, refuse_inexact
from tests.apps.recsys.conftest import small_log, small_schema

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("untyped")


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def make(schema: Schema, frame: pd.DataFrame, path) -> tuple[Trained, RecsysData]:
    """A model with fresh weights, tables so large that any wrong row of theirs shows, and its data."""
    config = RecsysConfig()
    data = RecsysData(config.data, 0, source=from_frame(frame, config.data, schema))
    model = build_model(config.model, data.spec).eval()
    for weight in model.encoder.tables.weights.values():
        torch.nn.init.normal_(weight, std=10)
    return Trained(model, config, data.transform, path), data


def write(trained: Trained, data: RecsysData, path: Path) -> dict[str, float]:
    """A file, and its figures."""
    return exporting.write(exportable(trained, data), Export("run"), path)


def measured(trained: Trained, data: RecsysData, path: Path) -> Comparison:
    """A file that is compared, and not timed."""
    one = exportable(trained, data)
    save(one.finish(lower(traced(one), "sparse")), path, one.metadata)
    return compare(one, in_onnxruntime(path))


def text_lists(frame: pd.DataFrame) -> pd.DataFrame:
    """As CSV files have them."""
    return frame.assign(seen=[",".join(map(str, values)) for values in frame["seen"]])


def every_kind() -> Schema:
    """Hashed integers, text, a list of text, numbers; a feature is called as an operator is."""
    schema = small_schema(features={"user": FeatureSpec(vocabulary="hash", buckets=16)})
    schema.features["cat"] = schema.features.pop("city")
    schema.features["cat"].column = "city"
    return schema


def assert_equal(session, trained: Trained, frame: pd.DataFrame) -> None:
    ours = session.run(None, feed(trained.transform, frame))[0]
    expected = trained.score(trained.transform.encode(frame, labels=False))
    assert expected.std(0).min() > 0.01  # it would show
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_verb_compares_a_file_with_the_model(rec, home_run, tmp_path):
    options = ["--output", tmp_path / "m.onnx", "--json", tmp_path / "x.json"]
    done = rec("export", "--ckpt_path", home_run, *options)
    assert (done.code, done.err) == (0, "")
    figures = json.loads((tmp_path / "x.json").read_text())
    assert figures["max_relative_error"] < 1e-5
    tested = json.loads((home_run / "test.json").read_text())["mean_auc"]
    assert [figures[f"mean_auc_{name}"] for name in ("torch", "export")] == pytest.approx([tested] * 2, abs=1e-6)
    assert figures["export_ms_p50"] < figures["torch_ms_p50"]
    assert all(figures[f"{name}_500_rows_ms_p50"] > 0 for name in ("export", "torch"))
    assert json.loads((tmp_path / "export.json").read_text())["m.onnx"]["rows"] == figures["rows"]


def test_raw_rows_in_probabilities_out(tmp_path):
    path, log = tmp_path / "m.onnx", text_lists(small_log())
    trained, data = make(every_kind(), log, tmp_path)
    assert write(trained, data, path)["max_relative_error"] < 1e-5
    session, fresh = session_of(path), text_lists(small_log(50, seed=9))
    assert_equal(session, trained, fresh)
    fresh.loc[:9, "user"], fresh.loc[5:14, "item"], fresh.loc[10:19, "city"] = -(10**15), 5, "atlantis"
    fresh["price"] = fresh["price"].where(fresh.index % 3 > 0)
    fresh["seen"] = fresh["seen"].where(fresh.index % 4 > 0, "9,101,8,7")
    assert_equal(session, trained, fresh)
    assert_equal(session, trained, fresh.assign(user=[f"u{i}" for i in range(50)]))  # text where integers belong
    assert_equal(session, trained, unfamiliar(trained, fresh))
    assert_plain_arrays_do(session)
    assert_what_differs_is_refused(trained, data, path)


def assert_plain_arrays_do(session) -> None:
    """What the metadata says is all that a client needs."""
    metadata = session.get_modelmeta().custom_metadata_map
    inputs = {one["name"]: one for one in json.loads(metadata["inputs"])}
    assert list(inputs) == [one.name for one in session.get_inputs()] == ["user", "item", "cat", "row", "price", "seen"]
    kinds = {name: (one["column"], one["type"], one["missing"]) for name, one in inputs.items()}
    assert kinds["user"] == ("user", "int64", NO_ID)
    assert kinds["cat"] == ("city", "string", "")
    assert kinds["price"] == ("price", "float", "NaN")
    assert inputs["seen"]["shape"] == ["batch", 3]
    given = {
        "user": np.array([3, NO_ID]),
        "item": np.array(["101", "never seen"], object),
        "cat": np.array(["rome", ""], object),
        "row": np.array([1, np.nan], np.float32),
        "price": np.array([5.0, np.nan], np.float32),
        "seen": np.array([["101", "", ""], ["", "", ""]], object),
    }
    (scores,) = session.run(["probabilities"], given)
    assert scores.shape == (2, len(json.loads(metadata["outputs"])))
    assert inputs["user"]["unknown"] == NO_ID + 1
    assert inputs["seen"]["separator"] == ","
    assert ((scores > 0) & (scores < 1)).all()
    assert (scores[:, 1] <= scores[:, 0]).all()  # buy, given a click


def test_infinite_numbers_are_missing_ones(tmp_path, monkeypatch):
    """In PyTorch, in the file, and in the rows that both are compared on."""
    log = text_lists(small_log())
    trained, data = make(every_kind(), log, tmp_path)
    one = exportable(trained, data)
    network = lower(traced(one), "sparse")
    session, rows = session_of(save(one.finish(network), tmp_path / "m.onnx")), log.head(40)
    missing = feed(trained.transform, rows.assign(price=np.nan, row=np.nan))
    expected = session.run(None, missing)[0]
    assert not np.allclose(session.run(None, feed(trained.transform, rows))[0], expected)
    for value in (np.inf, -np.inf):
        infinite = missing | {name: np.full(40, value, np.float32) for name in ("price", "row")}
        assert np.array_equal(session.run(None, infinite)[0], expected)
        read = trained.transform.encode(rows.assign(price=value, row=value), labels=False)
        np.testing.assert_allclose(trained.score(read), expected, rtol=1e-4, atol=1e-6)
    unaware = SimpleNamespace(inf=1e30, nan=np.nan)
    monkeypatch.setattr(deploy_numbers, "math", unaware)  # what the file was without the rule
    found = compare(one, in_onnxruntime(exportable(trained, data).finish(network)))
    with pytest.raises(ExportError, match=r"^outputs differ from PyTorch by "):
        refuse_inexact(found)


def assert_what_differs_is_refused(trained: Trained, data: RecsysData, path: Path) -> None:
    """Another row of a table, and a model that gives no numbers."""
    weight = trained.model.encoder.tables.weights["16"]
    with torch.no_grad():
        weight[:, 0] = 9.0
    found = compare(exportable(trained, data), in_onnxruntime(path))
    with pytest.raises(ExportError, match=r"outputs differ from PyTorch by .* no file was kept"):
        refuse_inexact(found)
    with torch.no_grad():
        weight[:, 0] = float("nan")
    with pytest.raises(UserError, match=r"^export: the model's scores of test rows are no numbers"):
        exportable(trained, data)


def test_weights_that_fit_no_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"^export: 0\.0 GB of weights do not fit an ONNX file \(2 GB\); train with"):
        exportable(*make(small_schema(), small_log(), tmp_path))


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_logs_of_ids_alone_or_of_numbers_alone(tmp_path, kind):
    schema = small_schema()
    schema.features = {name: one for name, one in schema.features.items() if one.kind == kind}
    trained, data = make(schema, small_log(), tmp_path)
    weight = next(trained.model.parameters())
    assert measured(trained, data, tmp_path / "m.onnx").max_relative_error < 1e-5
    assert next(trained.model.parameters()) is weight  # the caller's model stays where it is
    names = [one.name for one in session_of(tmp_path / "m.onnx").get_inputs()]
    assert names == list(schema.features)


@pytest.mark.parametrize(
    ("name", "spec", "line"),
    [
        (
            "city",
            FeatureSpec(vocabulary="hash", buckets=8),
            "export: city is hashed text, which ONNX cannot hash; give it vocabulary: fit",
        ),
        (
            "probabilities",
            FeatureSpec(column="city"),
            "export: features.probabilities: the file has a value of its own of that name; call the feature otherwise, "
            "with its column beside it",
        ),
    ],
)
def test_what_has_no_form_leaves_the_file_as_it_was(tmp_path, name, spec, line):
    schema = small_schema()
    schema.features = {"user": FeatureSpec(), name: spec}
    (tmp_path / "m.onnx").write_text("from before")
    with pytest.raises(UserError) as caught:
        write(*make(schema, small_log(), tmp_path), tmp_path / "m.onnx")
    assert str(caught.value) == line
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "from before"
