"""Where logs come from: generated, the user's files, the catalogue."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from apps.errors import UserError
from apps.recsys import published
from apps.recsys.data import RecsysData
from apps.recsys.data_settings import DataConfig
from apps.recsys.sources import load_source
from tests.apps.recsys.conftest import small_log, small_schema


@pytest.fixture
def written(tmp_path) -> str:
    """Path of the small schema."""
    (tmp_path / "schema.yaml").write_text(small_schema().yaml())
    return str(tmp_path / "schema.yaml")


def load(source: object, **changes):
    return load_source(DataConfig(source=str(source), **changes))


def test_a_file_of_the_user(tmp_path, written):
    small_log().to_parquet(tmp_path / "log.parquet")
    source = load(tmp_path / "log.parquet", schema=written)
    assert source.schema == small_schema()
    assert source.parts["val"].frame()["when"].min() > source.parts["train"].frame()["when"].max()
    guessed = load(tmp_path / "log.parquet", split="user")
    assert list(guessed.schema.labels) == ["click", "buy"]


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_files_that_are_split(tmp_path, written, streaming):
    parts = dict(zip(("train", "valid", "test"), np.split(np.arange(400), [200, 300]), strict=True))
    for name, rows in parts.items():
        small_log().iloc[rows].to_parquet(tmp_path / f"{name}.parquet")
    source = load(tmp_path, schema=written, streaming=streaming)
    assert [len(part) for part in source.parts.values()] == [200, 100, 100]
    (tmp_path / "valid.parquet").unlink()
    source = load(tmp_path, schema=written, streaming=streaming, shares=(0.6, 0.2, 0.2))
    assert [len(part) for part in source.parts.values()] == pytest.approx([150, 50, 100], abs=2)
    assert set(source.parts) == {"train", "val", "test"}


def test_folders_that_are_split(tmp_path, written):
    for name in ("train", "val", "test"):
        (tmp_path / name).mkdir()
        small_log(100).to_parquet(tmp_path / name / "0.parquet")
    assert [len(part) for part in load(tmp_path, schema=written).parts.values()] == [100, 100, 100]
    whole = load(tmp_path, schema=written, split="random")
    assert sum(len(part) for part in whole.parts.values()) == 300


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "nowhere.csv"}, "data.source=nowhere.csv: no such file or folder, and none of generated, census-"),
        ({"source": "log.csv", "split": "files"}, "data.split=files: log.csv has no train and test files"),
        ({"source": "log.csv", "schema": "no.yaml"}, "data.schema=no.yaml: no such file"),
        ({"source": "log.csv", "schema": "schema.yaml"}, "log.csv: no column 'row'; it has click, x"),
        ({"source": "ali-ccp"}, "data.source=ali-ccp: ali-ccp: needs an account at https://tianchi.aliyun.com"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, monkeypatch, written, changes, words):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"click": [0, 1] * 9, "x": range(18)}).to_csv("log.csv", index=False)
    with pytest.raises(UserError) as error:
        load_source(DataConfig(**changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


CENSUS_ROW = (
    "{age}, Private, 33, 2, Bachelors degree, 0, Not in universe, {marital}, Manufacturing, Executive, Other, "
    "NA, Male, No, Not in universe, Full-time schedules, 0, 0, {stock}, Joint both under 65, Not in universe, ?, "
    "Householder, Householder, 1700.09, ?, ?, ?, Not in universe, ?, 4, Not in universe, United-States, United-States, "
    "United-States, Native, 0, Not in universe, 2, 52, 95, {income}."
)


def census(count: int) -> str:
    rng = np.random.default_rng(count)
    return "\n".join(
        CENSUS_ROW.format(
            age=rng.integers(0, 90),
            marital=rng.choice(["Never married", "Divorced"]),
            stock=rng.integers(0, 9),
            income=rng.choice(["- 50000", " 50000+"]),
        )
        for _ in range(count)
    )


def fill_constants(monkeypatch) -> None:
    """Columns that are missing in all of these rows."""
    lacking = [name for name in published.CENSUS_COLUMNS if name.startswith(("mig_", "state_"))]
    monkeypatch.setattr(published, "CENSUS_LEFT_OUT", (*published.CENSUS_LEFT_OUT, *lacking))


def test_census_by_its_test_file_alone_and_by_both(tmp_path, monkeypatch):
    fill_constants(monkeypatch)
    folder = tmp_path / "census-income-kdd"
    folder.mkdir()
    (folder / "census-income.test.gz").write_bytes(gzip.compress(census(300).encode()))
    data = RecsysData(DataConfig(source="census-income", root=str(tmp_path)), seed=0)
    assert [len(data.parts[name]) / 300 for name in data.parts] == pytest.approx([0.7, 0.1, 0.2], abs=0.05)
    assert [task.name for task in data.spec.tasks] == ["income", "marital"]
    assert all(0.3 < task.prior < 0.7 for task in data.spec.tasks)
    assert {"education", "marital_stat", "instance_weight"}.isdisjoint(one.name for one in data.spec.sparse)
    assert len(data.spec.dense) == 7
    (folder / "census-income.data").write_text(census(200))
    both = load("census-income", root=str(tmp_path))
    assert len(both.parts["train"]) == 200
    assert len(both.parts["val"]) + len(both.parts["test"]) == 300


def kuairand_log(day: int, count: int = 12) -> pd.DataFrame:
    rng = np.random.default_rng(day)
    frame = pd.DataFrame({"user_id": np.arange(count) % 3, "video_id": np.arange(count) % 4, "date": day})
    frame["time_ms"], frame["hourmin"], frame["tab"] = 1000 * day + np.arange(count), 1030, 1
    for name in ("is_click", "long_view", "is_like", "is_profile_enter"):
        frame[name] = rng.integers(0, 2, count)
    return frame


def write_kuairand(folder: Path) -> None:
    folder.mkdir(parents=True)
    pd.concat([kuairand_log(20220420), kuairand_log(20220421)]).to_csv(
        folder / "log_standard_4_08_to_4_21_pure.csv", index=False
    )
    days = [20220424, 20220425, 20220430, 20220501, 20220503]
    pd.concat([kuairand_log(day) for day in days]).to_csv(folder / "log_standard_4_22_to_5_08_pure.csv", index=False)
    users = pd.DataFrame({"user_id": [0, 1, 2], "user_active_degree": "full"})
    videos = pd.DataFrame({"video_id": range(4), "upload_dt": "2022-04-10", "tag": ["1,2", "3", None, "2"]})
    for name in (*published.KUAIRAND_SPARSE, *published.KUAIRAND_DENSE):
        if name not in ("user_id", "video_id", "tab", "hour", "age_of_video", "history_len", "user_active_degree"):
            table = videos if name in ("author_id", "music_id", *_VIDEO) else users
            table[name] = np.arange(len(table))
    users.to_csv(folder / "user_features_pure.csv", index=False)
    videos.to_csv(folder / "video_features_basic_pure.csv", index=False)


_VIDEO = ("video_type", "upload_type", "music_type", "video_duration", "server_width", "server_height")


def test_kuairand_as_published_has_histories_that_end_before_training(tmp_path):
    write_kuairand(tmp_path / "kuairand-pure" / "data")
    data = RecsysData(DataConfig(source="kuairand-pure", root=str(tmp_path)), seed=0)
    days = {name: set(part.frame()["date"]) for name, part in data.parts.items()}
    assert days == {"train": {20220425, 20220430}, "val": {20220501}, "test": {20220503}}
    frame = data.frame("train")
    assert frame["history_len"].tolist() == [12] * 24  # four a day, on three days
    before = pd.concat([kuairand_log(day) for day in (20220420, 20220421, 20220424)])
    for name, kept in {"watch_seq": before.index >= 0, "long_view_seq": before["long_view"] == 1}.items():
        own = before[kept & (before["user_id"] == 1)]["video_id"].tolist()
        assert list(frame[frame["user_id"] == 1][name].iloc[0]) == own
    batch = data.encoded("train")
    shared = data.transform.vocabularies["video_id"]
    assert set(shared.values.tolist()) == {0, 1, 2, 3}
    assert batch.sequences["watch_seq"].max() == 5
    assert set(frame["age_of_video"]) == {15, 20}
    assert [task.name for task in data.spec.tasks] == ["click", "long_view", "like", "profile"]


def test_real_logs_are_split_as_their_literature_does(shared_data):
    root = str(shared_data / "recsys")
    census, kuairand = (load(name, root=root) for name in ("census-income", "kuairand-pure"))
    assert {name: len(part) for name, part in kuairand.parts.items()} == {"train": 94784, "val": 40344, "test": 93201}
    assert {name: len(part) for name, part in census.parts.items()} == {"train": 69833, "val": 9976, "test": 19953}
    assert not any("_cnt" in name or "play_time" in name for name in kuairand.schema.features)
    income = census.parts["train"].frame()["income"].mean()
    assert income == pytest.approx(0.062, abs=0.003)


def test_movielens(tmp_path):
    folder = tmp_path / "movielens-1m"
    folder.mkdir()
    ratings = [f"{i % 5}::{i % 7}::{i % 5 + 1}::{1000 + i}" for i in range(200)]
    (folder / "ratings.dat").write_text("\n".join(ratings))
    (folder / "users.dat").write_text("\n".join(f"{i}::F::{i}::{i}::{i:05d}" for i in range(5)))
    movies = "\n".join(f"{i}::Café {i}::1 (199{i})::Drama|War" for i in range(7)).replace("::1 (", " (")
    (folder / "movies.dat").write_text(movies, encoding="latin-1")
    data = RecsysData(DataConfig(source="movielens-1m", root=str(tmp_path)), seed=0)
    batch = data.encoded("train")
    assert [len(part) for part in data.parts.values()] == [160, 20, 20]
    assert batch.labels.mean(0).tolist() == pytest.approx([0.4, 0.2])
    assert data.spec.tasks[1].prior == pytest.approx(0.5)
    assert batch.sequences["genres"].shape == (160, 2)


def test_ali_ccp_and_aliexpress(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train", "val", "test"):
        frame = pd.DataFrame({"click": [1, 0] * 20, "purchase": [1, 0, 0, 0] * 10, "101": rng.integers(0, 2, 40)})
        frame["D109_14"] = rng.random(40)
        (tmp_path / "ali-ccp").mkdir(exist_ok=True)
        frame.to_csv(tmp_path / "ali-ccp" / f"{name}.csv", index=False)
        (tmp_path / "aliexpress-nl").mkdir(exist_ok=True)
        columns = ["search_id", *(f"c{i}" for i in range(16)), *(f"n{i}" for i in range(63)), "click", "conversion"]
        values = pd.DataFrame(rng.integers(0, 2, (200, 82)), columns=columns)
        values.to_csv(tmp_path / "aliexpress-nl" / f"{name}.csv", index=False)
    ali = RecsysData(DataConfig(source="ali-ccp", root=str(tmp_path)), seed=0)
    assert (ali.spec.sparse[0].name, ali.spec.dense[0].name, ali.spec.tasks[1].given) == ("101", "D109_14", "click")
    express = RecsysData(DataConfig(source="aliexpress-nl", root=str(tmp_path)), seed=0)
    assert (len(express.spec.sparse), len(express.spec.dense), len(express.parts["test"])) == (16, 63, 200)
    assert torch.isfinite(express.encoded("test").dense).all()


def raw_features(**fields: int) -> str:
    return "\x01".join(f"{name[1:]}\x02{value}\x031.0" for name, value in fields.items())


def test_ali_ccp_as_published_is_joined_once(tmp_path):
    folder = tmp_path / "ali-ccp"
    folder.mkdir()
    for part in ("train", "test"):
        common = [f"key{i},3,{raw_features(_101=i, _109_14=5, _121=9)}" for i in range(10)]
        rows = [f"{i},{i % 2},{int(i % 4 == 1)},key{i % 12},2,{raw_features(_205=i % 7, _301=1)}" for i in range(120)]
        (folder / f"common_features_{part}.csv").write_text("\n".join(common))
        (folder / f"sample_skeleton_{part}.csv").write_text("\n".join(rows))
    source = load("ali-ccp", root=str(tmp_path), schema=None)
    frame = source.parts["test"].frame()
    assert frame["click"].tolist() == [i % 2 for i in range(120)]
    assert frame["purchase"].sum() == 30
    assert frame["205"].tolist() == [i % 7 for i in range(120)]
    assert frame["101"].fillna(-1).tolist() == [i % 12 if i % 12 < 10 else -1 for i in range(120)]
    assert frame["216"].isna().all()
    for file in folder.glob("*.csv"):
        file.unlink()
    assert load("ali-ccp", root=str(tmp_path)).parts["test"].frame().equals(frame)


def test_aliexpress_as_published_is_joined_once(tmp_path):
    folder = tmp_path / "aliexpress-es"
    folder.mkdir()
    for part in ("train", "test"):
        pages = pd.DataFrame(np.arange(20)[:, None] * 100 + np.arange(33))
        items = pd.DataFrame(np.arange(60)[:, None] * 1000 + np.arange(49))
        items[0], items[48] = pages[0].sample(60, replace=True, random_state=0).to_numpy(), np.arange(60) % 3
        pages.iloc[1:].to_csv(folder / f"es_user_{part}.zip", index=False, header=False)
        items.to_csv(folder / f"es_item_{part}.csv", index=False, header=False)
    source = load("aliexpress-es", root=str(tmp_path))
    frame = source.parts["test"].frame()
    known = items[items[0] != 0].reset_index(drop=True)
    assert frame["search_id"].tolist() == known[0].tolist()
    assert frame["categorical_1"].tolist() == (known[0] + 1).tolist()
    assert frame["categorical_10"].tolist() == known[18].tolist()
    assert frame["numerical_1"].tolist() == (known[0] + 8).tolist()
    assert frame["numerical_24"].tolist() == known[1].tolist()
    assert frame["click"].tolist() == (known[48] > 0).astype(int).tolist()
    assert frame["conversion"].tolist() == (known[48] == 2).astype(int).tolist()
    assert len(source.schema.named("sparse")) == 16
    assert len(source.schema.named("dense")) == 63
