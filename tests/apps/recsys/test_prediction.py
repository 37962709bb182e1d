"""Scores of rows never seen, and the best candidates of every user."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from apps.errors import UserError
from apps.recsys import prediction
from apps.recsys.arguments import Predict
from apps.recsys.data import RecsysData
from apps.recsys.generated import TASKS, generate
from apps.recsys.loading import Trained, load_trained
from apps.recsys.models.build import build_model
from apps.recsys.prediction import predict_file, rank_frame, score_frame
from apps.recsys.score_files import join
from apps.recsys.settings import RecsysConfig
from apps.recsys.sources import from_frame
from tests.apps.recsys.conftest import small_log, small_schema

COLUMNS = [f"p_{task}" for task in TASKS]


@pytest.fixture
def candidates(tmp_path):
    """Rows without labels, of users and items of whom some were never seen."""
    frame = generate(300, seed=5).drop(columns=[*TASKS, *(f"bayes_{task}" for task in TASKS)])
    frame.loc[:20, "user_id"] = 10**9
    frame.loc[10:30, "item_id"] = -7
    frame.to_parquet(tmp_path / "candidates.parquet")
    return frame


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_every_row_has_a_score(rec, home_run, candidates, tmp_path, suffix):
    output = tmp_path / f"scores.{suffix}"
    done = rec("predict", "--ckpt_path", home_run, "--input", tmp_path / "candidates.parquet", "--output", output)
    assert (done.code, done.err) == (0, "")
    read = {"csv": pd.read_csv, "json": pd.read_json, "parquet": pd.read_parquet}[suffix]
    scores = read(output)
    assert scores["user_id"].tolist() == candidates["user_id"].tolist()
    values = scores[COLUMNS].to_numpy()
    assert ((values > 0) & (values < 1)).all()
    assert (np.diff(values, axis=1) <= 0).all()  # each step needs the one before
    trained = load_trained(home_run / "checkpoints" / "best.ckpt")
    expected = trained.score(trained.transform.encode(candidates, labels=False))
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_the_best_candidates_of_every_user(rec, home_run, candidates, tmp_path):
    options = ["--ckpt_path", home_run, "--input", tmp_path / "candidates.parquet"]
    done = rec("predict", *options, "--top=3", "--by=like", "--output", tmp_path / "top.json")
    assert (done.code, done.err) == (0, "")
    rows = pd.DataFrame(json.loads((tmp_path / "top.json").read_text()))
    counts = candidates["user_id"].value_counts()
    for user, best in rows.groupby("user_id"):
        assert best["rank"].tolist() == list(range(1, min(3, counts[user]) + 1))
        assert best["p_like"].is_monotonic_decreasing
    rec("predict", *options, "--output", tmp_path / "all.csv")
    every = pd.read_csv(tmp_path / "all.csv")
    assert rows.loc[rows["rank"] == 1].set_index("user_id")["p_like"].sort_index().tolist() == pytest.approx(
        every.groupby("user_id")["p_like"].max().tolist(), rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--top=2", "--by=buy"], "by=buy: no such task; choose one of click, long_view, like, follow"),
        (["--top=0"], "top=0: must be at least 1, or null"),
        (["--by=like"], "by=like: is for ranking; say with --top how many candidates to keep of every user"),
        (["--output=scores.txt"], "must end in .csv, .parquet or .json"),
    ],
)
def test_mistakes_are_one_line(rec, home_run, candidates, tmp_path, options, line):
    argv = [
        "--ckpt_path",
        home_run,
        "--input",
        tmp_path / "candidates.parquet",
        "--output",
        tmp_path / "x.csv",
        *options,
    ]
    assert line in rec("predict", *argv).line


def test_a_missing_column_is_named_and_nothing_is_written(rec, home_run, candidates, tmp_path):
    candidates.drop(columns="item_id").to_parquet(tmp_path / "candidates.parquet")
    options = ["--input", tmp_path / "candidates.parquet", "--output", tmp_path / "x.csv"]
    assert "item_id" in rec("predict", "--ckpt_path", home_run, *options).line
    assert not (tmp_path / "x.csv").exists()


@pytest.fixture
def fresh(tmp_path):
    """Makes a model with fresh weights for the small log, its users named by text."""

    def make(**changes) -> Trained:
        schema, config = small_schema(), RecsysConfig()
        for name, value in changes.items():
            setattr(schema, name, value)
        data = RecsysData(config.data, 0, source=from_frame(own_log(), config.data, schema))
        return Trained(build_model(config.model, data.spec).eval(), config, data.transform, tmp_path)

    return make


def own_log(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    log = small_log(rows, seed)
    return log.assign(user="u" + log["user"].astype(str), seen=[",".join(map(str, one)) for one in log["seen"]])


def files(frame: pd.DataFrame, folder, count: int = 4) -> str:
    """Rows in several text files, one piece each."""
    folder.mkdir()
    for i, part in enumerate(np.array_split(np.arange(len(frame)), count)):
        frame.iloc[part].to_csv(folder / f"part{i}.csv", index=False)
    return str(folder)


READ = {"csv": pd.read_csv, "json": pd.read_json, "parquet": pd.read_parquet}


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_pieces_give_what_one_frame_gives(fresh, parquet, tmp_path, suffix):
    trained, frame = fresh(), own_log(120, seed=3).drop(columns=["click", "buy"])
    frame.loc[5:9, "user"], frame.loc[90:, "item"] = "nobody", -1
    expected = score_frame(trained, frame)
    assert list(expected) == ["user", "item", "when", "p_click", "p_buy"]
    for source in (parquet(frame, group=17), files(frame, tmp_path / "text")):
        said = predict_file(trained, Predict("", source, str(tmp_path / f"out.{suffix}")))
        assert said == f"120 rows: {tmp_path / f'out.{suffix}'}"
        pd.testing.assert_frame_equal(READ[suffix](tmp_path / f"out.{suffix}"), expected, check_dtype=False, rtol=1e-5)


def test_the_best_of_all_pieces_are_kept(fresh, parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "PENDING", 30)
    trained, frame = fresh(), own_log(200, seed=3).drop(columns=["click", "buy"])
    output = str(tmp_path / "best.parquet")
    assert predict_file(trained, Predict("", parquet(frame, group=17), output, top=2, by="buy")).startswith("40 rows")
    found, scored = pd.read_parquet(output), score_frame(trained, frame)
    scored["rank"] = scored.groupby("user")["p_buy"].rank(ascending=False, method="first").astype(int)
    expected = scored[scored["rank"] <= 2].sort_values(["user", "rank"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_a_user_is_one_whether_read_as_a_number_or_as_text(fresh, tmp_path):
    """Pandas guesses types file by file."""
    trained, frame = fresh(), own_log(80, seed=3)
    frame["user"] = [*("7", "8") * 20, *("7", "u9") * 20]
    source = files(frame, tmp_path / "text", 2)
    for suffix in READ:
        predict_file(trained, Predict("", source, str(tmp_path / f"out.{suffix}"), top=30))
        found = READ[suffix](tmp_path / f"out.{suffix}")
        assert found["user"].astype(str).value_counts().to_dict() == {"7": 30, "8": 20, "u9": 20}
    predict_file(trained, Predict("", source, str(tmp_path / "all.parquet")))
    assert pd.read_parquet(tmp_path / "all.parquet")["user"].tolist() == frame["user"].tolist()


def test_whole_ids_with_gaps_stay_whole(fresh, tmp_path):
    frame = own_log(60, seed=3)
    frame["item"] = frame["item"].where(frame.index % 7 > 0)
    frame.to_csv(tmp_path / "in.csv", index=False)
    predict_file(fresh(), Predict("", str(tmp_path / "in.csv"), str(tmp_path / "out.csv")))
    items = pd.read_csv(tmp_path / "out.csv", dtype=str)["item"]
    assert items.isna().sum() == 9
    assert items.dropna().str.fullmatch(r"\d+").all()


def test_ranks(fresh):
    trained = fresh()
    scored = pd.DataFrame({"user": [2, None, 10, 2, 10, 2], "p_click": [0.1, 0.9, 0.5, 0.3, 0.5, 0.2], "p_buy": 0.0})
    best = rank_frame(trained, scored, 2)
    assert best.index.tolist() == [3, 5, 2, 4, 1]  # users as numbers, equal scores as they came, nobody last
    assert best["rank"].tolist() == [1, 2, 1, 2, 1]
    assert len(rank_frame(trained, scored.head(0), 2)) == 0


def test_a_schema_without_names_gives_all_columns(fresh, parquet, tmp_path):
    trained, frame = fresh(user=None, item=None, time=None), own_log(40, seed=3)
    options = Predict("", parquet(frame), str(tmp_path / "out.csv"))
    predict_file(trained, options)
    found = pd.read_csv(tmp_path / "out.csv")
    assert list(found) == [*frame, "p_click", "p_buy"]
    with pytest.raises(UserError, match=r"top=3: ranks the candidates of each user, and the schema .* names no user"):
        predict_file(trained, Predict("", options.input, options.output, top=3))


def test_pieces_of_several_types_are_joined_as_text():
    joined = join([pd.DataFrame({"a": [1, 2], "b": [1, 2]}), pd.DataFrame({"a": ["x", None], "b": [0.5, None]})])
    assert joined["a"].tolist()[:3] == ["1", "2", "x"]
    assert joined["a"].isna().tolist() == [False, False, False, True]
    assert joined["b"].dtype == float
