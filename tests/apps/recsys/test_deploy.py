"""Exported files take raw ids and numbers, seen or not, and give what PyTorch gives."""

from __future__ import annotations

import json

import numpy as np
import pytest

from apps.recsys.deploy_inputs import NO_ID, feed
from apps.recsys.loading import load_trained
from tests.apps.recsys.conftest import small_log, small_schema

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("untyped")


def session_of(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture
def own_run(rec, small, tmp_path):
    """A run on a log with text ids, missing values, sequences and a hashed column."""

    def make(**changes):
        small_log().assign(seen=lambda f: [",".join(map(str, s)) for s in f["seen"]]).to_csv(tmp_path / "log.csv")
        schema = small_schema()
        for name, change in changes.items():
            schema.features[name] = type(schema.features[name])(**change)
        (tmp_path / "schema.yaml").write_text(schema.yaml())
        source = {"data__source": tmp_path / "log.csv", "data__schema": tmp_path / "schema.yaml"}
        done = rec("train", *small(tmp_path, **source, data__batch_size=50, run__name="own"))
        assert (done.code, done.err) == (0, "")
        return tmp_path / "recsys" / "own"

    return make


def test_a_file_is_compared_with_the_model(rec, home_run, tmp_path):
    options = ["--output", tmp_path / "m.onnx", "--json", tmp_path / "x.json"]
    done = rec("export", "--ckpt_path", home_run, *options)
    assert (done.code, done.err) == (0, "")
    figures = json.loads((tmp_path / "x.json").read_text())
    assert figures["max_relative_error"] < 1e-5
    assert figures["onnx_ms_500_rows"] > 0


@pytest.mark.parametrize("hashed", [False, True])
def test_raw_rows_in_probabilities_out(rec, own_run, tmp_path, hashed):
    run = own_run(**({"user": {"vocabulary": "hash", "buckets": 16}} if hashed else {}))
    done = rec("export", "--ckpt_path", run, "--output", tmp_path / "m.onnx")
    assert (done.code, done.err) == (0, "")
    trained, session = load_trained(run / "checkpoints" / "best.ckpt"), session_of(tmp_path / "m.onnx")
    assert [i.name for i in session.get_inputs()] == ["user", "item", "city", "row", "price", "seen"]
    fresh = small_log(50, seed=9)
    fresh.loc[:9, "user"], fresh.loc[5:14, "item"], fresh.loc[10:19, "city"] = 10**15, -3, "atlantis"
    fresh["price"] = fresh["price"].where(fresh.index % 3 > 0)
    ours = session.run(None, feed(trained.transform, fresh))[0]
    expected = trained.score(trained.transform.encode(fresh, labels=False))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_ids_are_plain_arrays_that_any_client_can_make(rec, own_run, tmp_path):
    run = own_run()
    assert rec("export", "--ckpt_path", run, "--output", tmp_path / "m.onnx").code == 0
    session = session_of(tmp_path / "m.onnx")
    given = {
        "user": np.array([3, NO_ID]),
        "item": np.array([101, 10**17]),
        "city": np.array(["rome", ""], object),
        "row": np.array([1, 2], np.float32),
        "price": np.array([5.0, np.nan], np.float32),
        "seen": np.array([[101, NO_ID, NO_ID], [NO_ID] * 3]),
    }
    for one in session.get_inputs():  # ids of a log in text are text where lists of them are
        if one.type == "tensor(string)" and given[one.name].dtype != object:
            given[one.name] = np.where(given[one.name] == NO_ID, "", given[one.name].astype(str)).astype(object)
    scores = session.run(None, given)[0]
    assert scores.shape == (2, 2)
    assert ((scores > 0) & (scores < 1)).all()
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["outputs"]) == ["click", "buy"]


def test_hashed_text_has_no_form_and_leaves_no_file(rec, own_run, tmp_path):
    run = own_run(city={"vocabulary": "hash", "buckets": 8})
    line = rec("export", "--ckpt_path", run, "--output", tmp_path / "m.onnx").line
    assert line == "export: city is hashed text, which ONNX cannot hash; give it vocabulary: fit"
    assert not (tmp_path / "m.onnx").exists()
