"""The quickstart's tables name every setting, and its candidates and its exported file work as it shows them."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from apps.recsys.generated import generate
from apps.recsys.schema import FeatureSpec, LabelSpec

PAGE = (Path(__file__).parents[3] / "docs" / "quickstart" / "recsys.md").read_text()


def table(heading: str) -> dict[str, list[str]]:
    """First column of a table -> the others."""
    rows = re.search(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M)[1].splitlines()
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize(
    ("heading", "spec"), [("setting of a feature", FeatureSpec), ("setting of a label", LabelSpec)]
)
def test_every_setting_of_a_schema_has_its_row_with_its_default(heading, spec):
    rows = table(heading)
    assert list(rows) == [field.name for field in fields(spec)]
    for field in fields(spec):
        if field.default is not None:
            assert str(field.default) in rows[field.name], field.name


def code(word: str) -> str:
    """The Python block of the page that has the word."""
    return next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if word in block)


def test_the_exported_file_is_used_as_shown(rec, home_run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    assert rec("export", "--ckpt_path", home_run, "--output", "ranker.onnx").code == 0
    monkeypatch.setattr("apps.recsys.generated.generate", lambda: generate(3000))
    exec(code("candidates.parquet"), {})
    names: dict = {"__name__": "docs"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code("InferenceSession"), names)
    for flags in ([], ["--top", "20", "--by", "click"]):
        done = rec(
            "predict", "--ckpt_path", home_run, "--input", "candidates.parquet", "--output", "scores.csv", *flags
        )
        assert (done.code, done.err) == (0, "")
        if not flags:
            scores = pd.read_csv("scores.csv")
    ours = scores[[f"p_{task}" for task in names["tasks"]]].to_numpy()[: len(names["probabilities"])]
    np.testing.assert_allclose(names["probabilities"], ours, rtol=1e-4, atol=1e-6)
    assert names["probabilities"].shape == (500, 4)
