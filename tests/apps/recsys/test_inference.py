"""Guesses of what the columns of a log mean."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from apps.errors import UserError
from apps.recsys.inference import guess, infer_schema
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


def test_a_column_called_like_a_label_with_other_values_is_no_feature():
    log = small_log()
    words = log.assign(click=np.where(log["click"] == 1, "yes", "no"))
    found = guess(words)
    assert list(found.schema.labels) == ["buy"]
    assert "click" not in found.schema.features  # it would give `buy` away
    assert found.notes[0].startswith("column 'click' is called like a label and holds ")
    assert "make it 0, 1 or empty" in found.notes[0]
    signs = guess(log.assign(click=2 * log["click"] - 1))
    assert "click" not in signs.schema.features
    empty = guess(log.assign(click=np.nan))
    assert "has no value" in empty.notes[0]
    with pytest.raises(UserError, match="no column of 0 and 1 could be a label; column 'click' is called like"):
        infer_schema(words.drop(columns="buy"))


def test_a_guess_in_short():
    lines = guess(small_log().rename(columns={"user": "user_id", "item": "item_id"})).lines()
    assert lines[:2] == ["user=user_id", "item=item_id"]
    assert "labels=click, buy" in lines
    assert "sequence=seen" in lines
    assert not any(line.startswith("note") for line in lines)


def test_users_and_items_are_ids_whatever_they_look_like():
    log = small_log().rename(columns={"user": "user_id", "item": "item_id"})
    log["item_id"] = [f"shoes,red|{item % 7}" for item in log["item_id"]]
    log["user_id"] = log["user_id"] * 1.5
    assert {name: kind for name, kind in kinds(infer_schema(log)).items() if name.endswith("_id")} == {
        "user_id": "sparse",
        "item_id": "sparse",
    }


def test_ids_by_name_or_size_are_no_quantities():
    rows = np.arange(400)
    log = small_log().assign(
        sessionId=rows * 7, web_session=rows * 3, session_length=rows * 2, big=2**60 + rows * 1000, paid=rows * 1.5
    )
    found = kinds(infer_schema(log))
    assert [found[name] for name in ("sessionId", "web_session", "big")] == ["sparse"] * 3
    assert [found[name] for name in ("session_length", "paid")] == ["dense"] * 2


def test_decimal_commas_are_no_lists_and_printed_lists_are():
    log = small_log()
    log["price"] = [f"{i % 90},{i % 10}" for i in range(len(log))]
    log["seen"] = [f"['{i % 9}' '{i % 5}']" for i in range(len(log))]
    found = infer_schema(log)
    assert kinds(found)["price"] == "sparse"
    assert kinds(found)["seen"] == "sequence"


def test_why_there_is_no_feature():
    with pytest.raises(UserError, match="has one row only, from which nothing can be learned"):
        infer_schema(small_log(1).drop(columns="seen"))
    with pytest.raises(UserError, match="no column is left to be a feature beside click"):
        infer_schema(small_log()[["click"]])
    with pytest.raises(UserError, match="no feature: each of city has a single value or none"):
        infer_schema(small_log()[["click", "city"]].assign(city="rome"))
