"""A trained ranking model in Python: DataFrames in, DataFrames out."""

from __future__ import annotations

import doctest

import pandas as pd
import pytest

from apps.errors import UserError
from apps.recsys.generated import TASKS, generate
from apps.recsys.ranker import Recommender

COLUMNS = ["user_id", "item_id", "time", *(f"p_{task}" for task in TASKS)]


@pytest.fixture(scope="module")
def recommender(home_run) -> Recommender:
    return Recommender.from_checkpoint(home_run)


@pytest.fixture
def candidates() -> pd.DataFrame:
    """Rows without labels."""
    return generate(300, seed=5).drop(columns=[*TASKS, *(f"bayes_{task}" for task in TASKS)])


def test_the_example_of_the_docstring_runs(home_run, candidates, tmp_path, monkeypatch):
    """As it stands there, on a run below runs/ and a file candidates.csv."""
    (tmp_path / "runs").symlink_to(home_run.parents[1])
    candidates.assign(history=[",".join(map(str, one)) for one in candidates["history"]]).to_csv(
        tmp_path / "candidates.csv", index=False
    )
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_examples(Recommender.__doc__)
    assert len(examples) == 6
    names: dict[str, object] = {}
    for example in examples:
        exec(example.source, names)
    assert names["recommender"].trained.path.resolve() == (home_run / "checkpoints" / "best.ckpt").resolve()
    assert list(names["scores"]) == COLUMNS
    assert len(names["scores"]) == 300
    assert list(names["best"]) == [*COLUMNS, "rank"]


def test_python_gives_what_the_command_line_gives(rec, home_run, recommender, candidates, tmp_path):
    candidates.to_parquet(tmp_path / "in.parquet")
    options = ["--ckpt_path", home_run, "--input", tmp_path / "in.parquet", "--output", tmp_path / "out.parquet"]
    assert rec("predict", *options).code == 0
    ours = recommender.predict(candidates)
    pd.testing.assert_frame_equal(ours, pd.read_parquet(tmp_path / "out.parquet"), check_dtype=False)
    assert rec("predict", *options, "--top=2", "--by=follow").code == 0
    ranked = recommender.rank(candidates, top=2, by="follow").reset_index(drop=True)
    pd.testing.assert_frame_equal(ranked, pd.read_parquet(tmp_path / "out.parquet"), check_dtype=False)


def test_rows_keep_their_index_and_are_not_changed(recommender, candidates):
    shuffled = candidates.sample(frac=1, random_state=0)
    before = shuffled.copy()
    scores = recommender.predict(shuffled)
    assert scores.index.equals(shuffled.index)
    pd.testing.assert_frame_equal(scores.sort_index(), recommender.predict(candidates), rtol=1e-4)
    pd.testing.assert_frame_equal(shuffled, before)
    assert recommender.rank(shuffled, top=1)["user_id"].is_unique


def test_dictionaries_are_frames_too(recommender, candidates):
    expected = recommender.predict(candidates)
    for form in ("records", "list"):
        pd.testing.assert_frame_equal(recommender.predict(candidates.to_dict(form)), expected)


def test_mistakes_are_one_line(recommender, candidates, tmp_path):
    assert recommender.tasks == list(TASKS)
    with pytest.raises(UserError, match=r"by=buy: no such task; choose one of click, long_view, like, follow"):
        recommender.rank(candidates, by="buy")
    with pytest.raises(UserError, match=r"top=0: must be at least 1"):
        recommender.rank(candidates, top=0)
    with pytest.raises(UserError, match=r"no column 'item_id'"):
        recommender.predict(candidates.drop(columns="item_id"))
    with pytest.raises(UserError, match=r"no run with a checkpoint"):
        Recommender.from_checkpoint("last", root=str(tmp_path))
