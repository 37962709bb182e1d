"""The serving example scores raw rows as PyTorch does, where nothing but onnxruntime and NumPy is installed."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from apps.recsys.model_settings import ModelConfig
from export.deliver import traced
from export.lowering import lower
from export.onnx import save
from tests.apps.recsys.conftest import small_log
from tests.apps.recsys.deployed import ready
from tests.apps.serving import serve

pytest.importorskip("onnxruntime")


def test_rows_of_tables_and_of_json_are_scored(monkeypatch, tmp_path, untyped):
    trained, one = ready(ModelConfig(name="mmoe"), monkeypatch)
    model = save(one.finish(lower(traced(one), "sparse")), tmp_path / "m.onnx", one.metadata)
    rows = small_log(30, seed=3)
    rows.loc[:3, "city"], rows.loc[4:6, "item"] = "atlantis", 10**9
    rows["user"] = rows["user"].astype(object).where(rows.index % 5 > 0)
    batch = trained.transform.encode(rows, labels=False)
    expected = pd.DataFrame(trained.score(batch), columns=["click", "buy"])
    assert expected.std().min() > 0.01
    rows.to_json(tmp_path / "rows.json", orient="records")
    listed = rows["seen"].map(lambda values: ",".join(map(str, values)))
    rows.assign(seen=listed, user=rows["user"].fillna("")).to_csv(tmp_path / "rows.csv", index=False)
    for name in ("rows.json", "rows.csv"):
        found = pd.DataFrame(map(json.loads, serve("recsys", model, tmp_path / name).splitlines()))
        np.testing.assert_allclose(found[["click", "buy"]], expected, rtol=1e-4, atol=1e-6)
