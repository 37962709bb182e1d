"""What columns mean: checks, files, printing."""

from __future__ import annotations

import pytest

from apps.errors import ConfigError, UserError
from apps.recsys.schema import FeatureSpec, LabelSpec, Schema, read_schema

FEATURES = {
    "user": FeatureSpec(min_count=2),
    "item": FeatureSpec(dim=4),
    "history": FeatureSpec("sequence", share="item", pooling="target", target="item"),
    "price": FeatureSpec("dense", encode="log"),
}
LABELS = {"click": LabelSpec(), "buy": LabelSpec(column="bought", group="shop", given="click")}


@pytest.fixture
def written(tmp_path):
    """Path of a YAML file with such a text."""

    def write(text: str):
        file = tmp_path / "schema.yaml"
        file.write_text(text)
        return file

    return write


def test_printed_schemas_read_back(written):
    schema = Schema(FEATURES, LABELS, user="user", item="item", time="when")
    text = schema.yaml()
    assert "buckets" not in text  # what is as by default is left out
    assert read_schema(written(text)) == schema
    assert Schema.from_plain(schema.plain()) == schema


def test_columns_are_those_that_are_read():
    schema = Schema(FEATURES, LABELS, user="user", item="sku", time="when")
    assert schema.columns() == ["user", "item", "history", "price", "click", "bought", "sku", "when"]
    assert schema.columns(labels=False) == ["user", "item", "history", "price", "sku", "when"]
    assert (schema.table("history"), schema.table("user")) == ("item", "user")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("features: {a: {}, a: {}}\nlabels: {c: {}}", "column='a': is named twice"),
        ("features: {a: {}, b: {column: a}}\nlabels: {c: {}}", "column='a': is named twice"),
        ("features: {a: {}}\nlabels: {c: {column: a}}", "column='a': is named twice"),
        ("features: {a: {}}\nlabels: {a: {column: b}}", "a label may not be a feature too"),
        ("features: {a: {}}", "labels={}: give at least one label"),
        ("labels: {a: {}}", "features={}: give at least one feature"),
        ("features: {a: {share: b}}\nlabels: {c: {}}", "features.a.share='b': names no other feature"),
        ("features: {a: {}, b: {share: a}, d: {share: b}}\nlabels: {c: {}}", "features.d.share='b': names no other"),
        ("features: {a: {}, b: {kind: dense, share: a}}\nlabels: {c: {}}", "features.b.share='a': names no other"),
        (
            "features: {a: {}, h: {kind: sequence, pooling: target, target: a}}\nlabels: {c: {}}",
            "features.h.target='a': must be a sparse feature that shares its table",
        ),
        ("features: {h: {kind: sequence, pooling: target}}\nlabels: {c: {}}", "features.h.target=None: pooling=target"),
        ("features: {a: {}}\nlabels: {c: {given: d}}", "labels.c.given='d': names no other label; there is none"),
        ("features: {a: {}}\nlabels: {c: {given: d}, d: {given: c}}", "labels.c.given='d': leads back to the label"),
        ("features: {a: {kind: text}}\nlabels: {c: {}}", "features.a.kind='text': choose one of dense, sequence"),
        ("features: {a: {dims: 3}}\nlabels: {c: {}}", "features.a.dims=3: is no setting; there is kind, column"),
        ("features: {a: {dim: x}}\nlabels: {c: {}}", "has a value of a wrong type"),
        ("features: {a: {}}\nlabels: {c: {weight: 0}}", "labels.c.weight=0: must be positive"),
        ("- a", "schema=['a']: is a section"),
        ("features: [", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(written, text, words):
    file = written(text)
    with pytest.raises(UserError) as error:
        read_schema(file)
    line = str(error.value)
    assert line.startswith(f"{file}: ")
    assert words in line
    assert "\n" not in line


def test_schemas_in_python_are_checked_too():
    with pytest.raises(ConfigError, match=r"^column='user': is named twice"):
        Schema({"user": FeatureSpec(), "who": FeatureSpec(column="user")}, {"click": LabelSpec()})


def test_missing_files():
    with pytest.raises(UserError, match=r"^data.schema=nowhere.yaml: no such file$"):
        read_schema("nowhere.yaml")
