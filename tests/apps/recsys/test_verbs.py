"""The command line: training, evaluation, search, and mistakes in one line."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml

from apps.recsys.generated import TASKS, generate
from apps.recsys.schema import read_schema
from tests.apps.recsys.conftest import small_log, small_schema


@pytest.fixture
def own(tmp_path):
    """A log of one's own as CSV, and its schema as YAML."""

    def write(frame=None, **changes):
        frame = small_log() if frame is None else frame
        frame = frame.assign(seen=[",".join(map(str, one)) for one in frame["seen"]]) if "seen" in frame else frame
        frame.to_csv(tmp_path / "log.csv", index=False)
        (tmp_path / "schema.yaml").write_text(small_schema(**changes).yaml())
        return {"data__source": tmp_path / "log.csv", "data__schema": tmp_path / "schema.yaml"}

    return write


@pytest.mark.parametrize("name", ["shared_bottom", "single_task", "mmoe", "ple", "aw_moe", "moae"])
def test_every_model_trains_and_is_tested_beside_baselines(rec, small, tmp_path, name):
    done = rec(
        "train", *small(tmp_path, model__name=name, run__name=name, data__rows=1000), "--json", tmp_path / "x.json"
    )
    assert (done.code, done.err) == (0, "")
    figures = json.loads((tmp_path / "x.json").read_text())
    for task in ("click", "long_view", "like"):
        assert 0 <= figures[f"{task}/auc"] <= 1
        for contender in ("popularity", "logistic regression", "gradient boosting", "best possible"):
            assert f"{task}/{contender}/auc" in figures
    assert figures["click/best possible/auc"] > max(figures["click/auc"], figures["click/gradient boosting/auc"])
    assert "of the way from chance to the best possible" in done.out


def test_a_checkpoint_is_evaluated_as_it_was_after_training(rec, home_run, tmp_path):
    done = rec("evaluate", "--ckpt_path", home_run, "--boosting", "false", "--json", tmp_path / "x.json")
    assert (done.code, done.err) == (0, "")
    ours, before = json.loads((tmp_path / "x.json").read_text()), json.loads((home_run / "test.json").read_text())
    assert not any("boosting" in name for name in ours)
    for name in ours.keys() - {"rows_per_second"}:
        same = ours[name] is before[name] is None or ours[name] == pytest.approx(before[name], rel=1e-6)
        assert same, name


@pytest.mark.parametrize("balancing", ["uncertainty", "dwa", "gradnorm", "pcgrad"])
def test_tasks_can_be_balanced(rec, small, tmp_path, balancing):
    changes = {"loss__balancing": balancing, "data__rows": 1000, "optim__tables": "adagrad"}
    done = rec("train", *small(tmp_path, model__name="ple", **changes))
    assert (done.code, done.err) == (0, "")


def test_a_log_of_ones_own_trains_streamed_too(rec, small, own, tmp_path):
    for streaming in ("never", "always"):
        changes = own() | {"data__streaming": streaming, "data__batch_size": 50, "run__name": streaming}
        done = rec("train", *small(tmp_path, **changes))
        assert (done.code, done.err) == (0, "")
        assert "buy" in done.out


def test_one_class_is_a_note_and_an_undefined_auc(rec, small, own, tmp_path):
    frame = small_log()
    frame["buy"] = 0
    done = rec("train", *small(tmp_path, **own(frame), data__batch_size=50), "--json", tmp_path / "x.json")
    assert (done.code, done.err) == (0, "")
    assert "note: buy" in done.out
    assert "undefined" in done.out
    assert json.loads((tmp_path / "x.json").read_text())["buy/auc"] is None


@pytest.mark.parametrize(("first", "streaming"), [(0, "never"), (0, "always"), (340, "never")])
def test_a_task_without_any_label_to_learn_from_is_refused(rec, small, own, tmp_path, first, streaming):
    """In no row, or in those for testing only."""
    frame = small_log().assign(buy=lambda log: log["buy"].where(log["row"] >= first) if first else np.nan)
    done = rec("train", *small(tmp_path, **own(frame), data__streaming=streaming))
    assert done.line == (
        "labels.buy: column 'buy' has no value in the training rows; fill it with 0 and 1, split otherwise "
        "(data.split), or take it out of the schema"
    )
    assert not (tmp_path / "recsys").exists()


@pytest.mark.parametrize("value", [np.nan, 0])
def test_tasks_undefined_in_testing_are_called_so(rec, small, own, tmp_path, value):
    """Warnings are errors here; the report has a word for every figure."""
    frame = small_log()
    frame.loc[310:, ["click", "buy"]] = value
    flags = small(tmp_path, **own(frame), run__name="mine", data__batch_size=50)
    done = rec("train", *flags, "--run.report=true")
    assert (done.code, done.err) == (0, "")
    assert not re.search(r"\bnan\b", done.out)
    assert re.search(r"mean AUC over tasks\n  MMoE +undefined\n", done.out)
    page = re.sub(r'src="[^"]*"', "", (tmp_path / "recsys" / "mine" / "report.html").read_text())
    assert not re.search(r"\bnan\b", page)
    assert "<b>undefined</b><span>mean AUC over tasks</span>" in page


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda frame: frame.assign(click=2), ("click", "2")),
        (lambda frame: frame.drop(columns="price"), ("price",)),
        (lambda frame: frame.assign(price=np.nan), ("price",)),
        (lambda frame: frame.assign(price="cheap"), ("price", "cheap")),
    ],
)
def test_logs_that_cannot_be_are_one_line_and_leave_no_run(rec, small, own, tmp_path, change, parts):
    done = rec("train", *small(tmp_path, **own(change(small_log()))))
    assert all(part in done.line for part in parts), done.line
    assert not (tmp_path / "recsys").exists()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--data.source=nowhere.csv"], "nowhere.csv"),
        (["--model.mmoe.num_experts=0"], "num_experts=0"),
        (["--model.name=home", "--model.home.top_k=0"], "top_k=0"),
        (["--optim.tables=sparse"], "optim.tables=sparse"),
        (["--trainer.precision=16-mixed"], "trainer.precision='16-mixed'"),
        (["--loss.balancing=luck"], "loss.balancing=luck"),
        (["--data.shares=[0.5,0.5]"], "data.shares"),
    ],
)
def test_mistakes_in_settings_are_one_line(rec, small, tmp_path, argv, part):
    assert part in rec("train", *small(tmp_path), *argv).line


def test_search_maximises_the_mean_auc(rec, small, tmp_path):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}))
    flags = small(tmp_path, data__rows=1000)
    done = rec("search", *flags, "--space", tmp_path / "space.yaml", "--num_trials=2", "--json", tmp_path / "b.json")
    assert (done.code, done.err) == (0, "")
    assert 0 < json.loads((tmp_path / "b.json").read_text())["best"]["value"] < 1


def test_a_checkpoint_is_used_with_its_own_schema_alone(rec, small, own, tmp_path):
    assert rec("train", *small(tmp_path, **own(), run__name="mine", data__batch_size=50)).code == 0
    schema, run, log = tmp_path / "schema.yaml", tmp_path / "recsys" / "mine", tmp_path / "log.csv"
    scores = ["predict", "--ckpt_path", run, "--input", log, "--output", tmp_path / "s.csv"]
    verbs = [["evaluate", "--ckpt_path", run, "--boosting=false"], scores]
    for argv in verbs:
        assert rec(*argv, "--data.schema", schema).code == 0
    before = (tmp_path / "s.csv").read_text()
    text = schema.read_text()
    schema.write_text(text.replace("bins: 4", "bins: 8"))
    assert schema.read_text() != text
    for argv in verbs:
        line = rec(*argv, "--data.schema", schema).line
        assert line.startswith(f"data.schema={schema}: features.price.bins is 8 there and 4 in {run}"), line
        assert rec(*argv, "--data.schema", "none.yaml").line == "data.schema=none.yaml: no such file"
    schema.unlink()
    for argv in verbs:  # what training was given may be gone
        assert rec(*argv).code == 0
    assert (tmp_path / "s.csv").read_text() == before


def test_the_schema_is_kept_as_a_file_that_trains_again(rec, small, home_run, tmp_path):
    file = home_run / "schema.yaml"
    assert read_schema(file).labels.keys() == set(TASKS)
    generate(2000).to_parquet(tmp_path / "log.parquet")
    done = rec("train", *small(tmp_path, data__source=tmp_path / "log.parquet", data__schema=file))
    assert (done.code, done.err) == (0, "")
    assert "guessed" not in done.out
