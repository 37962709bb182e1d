"""Guesses of what the columns of a log mean."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from apps.errors import UserError
from apps.recsys.inference import infer_schema
from apps.recsys.schema import read_schema
from apps.recsys.transform import Transform
from tests.apps.recsys.conftest import small_log


def kinds(schema) -> dict[str, str]:
    return {name: one.kind for name, one in schema.features.items()}


def test_what_a_log_looks_like(tmp_path):
    log = small_log(500).rename(columns={"when": "timestamp", "seen": "history", "user": "user_id", "item": "item_id"})
    log = log.assign(
        tags=["a|b", "b|c", "c"] * 166 + ["a"] * 2, empty=np.nan, constant=3, name=np.arange(500).astype(str)
    )
    schema = infer_schema(log)
    assert (schema.user, schema.item, schema.time) == ("user_id", "item_id", "timestamp")
    assert list(schema.labels) == ["click", "buy"]
    assert [one.group for one in schema.labels.values()] == ["watch", "interact"]
    assert kinds(schema) == {
        "row": "dense",
        "user_id": "sparse",
        "item_id": "sparse",
        "city": "sparse",
        "price": "dense",
        "history": "sequence",
        "tags": "sequence",
        "name": "sparse",
    }
    assert schema.features["tags"].separator == "|"
    assert (schema.features["history"].share, schema.features["history"].target) == ("item_id", "item_id")
    (tmp_path / "schema.yaml").write_text(schema.yaml())
    assert read_schema(tmp_path / "schema.yaml") == schema
    Transform.fit(schema, log).encode(log)  # it works as it is


def test_files_are_looked_at_too(tmp_path):
    frame = pd.DataFrame({"age": np.arange(60) / 2, "sex": ["f", "m"] * 30, "a": [0, 1] * 30, "b": [1, 1, 0] * 20})
    frame.to_csv(tmp_path / "log.csv", index=False)
    schema = infer_schema(tmp_path / "log.csv")
    assert list(schema.labels) == ["a", "b"]  # no name says so: the last columns
    assert kinds(schema) == {"age": "dense", "sex": "sparse"}


def test_text_with_commas_is_no_list():
    titles = [f"the {i}th film, part {i}" for i in range(50)]
    schema = infer_schema(pd.DataFrame({"title": titles, "is_like": [0, 1] * 25}))
    assert kinds(schema) == {"title": "sparse"}
    assert list(schema.labels) == ["is_like"]


def test_a_table_without_labels():
    with pytest.raises(UserError, match=r"no column of 0 and 1 could be a label; write a schema"):
        infer_schema(pd.DataFrame({"x": [1, 2, 3], "y": ["a", "b", "c"]}))
