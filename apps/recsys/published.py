"""Published logs as their authors distribute them, with the schemas the literature uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int

from apps.errors import UserError
from apps.recsys import joins
from apps.recsys.schema import FeatureSpec, LabelSpec, Schema
from apps.recsys.splits import Rule, by_borders, by_rows
from apps.recsys.tables import FrameTable, Table, open_table


@dataclass(frozen=True)
class Log:
    """A log that is not split yet."""

    table: Table | None
    """All rows; None where `files` has them."""
    schema: Schema | None
    """None: the settings name one."""
    rule: Rule | None = None
    """The split its literature uses."""
    files: dict[str, Table] = field(default_factory=dict)
    """Tables of the parts, where the log comes so."""


CENSUS_COLUMNS = [
    "age",
    "class_worker",
    "det_ind_code",
    "det_occ_code",
    "education",
    "wage_per_hour",
    "hs_college",
    "marital_stat",
    "major_ind_code",
    "major_occ_code",
    "race",
    "hisp_origin",
    "sex",
    "union_member",
    "unemp_reason",
    "full_or_part_emp",
    "capital_gains",
    "capital_losses",
    "stock_dividends",
    "tax_filer_stat",
    "region_prev_res",
    "state_prev_res",
    "det_hh_fam_stat",
    "det_hh_summ",
    "instance_weight",
    "mig_chg_msa",
    "mig_chg_reg",
    "mig_move_reg",
    "mig_same",
    "mig_prev_sunbelt",
    "num_emp",
    "fam_under_18",
    "country_father",
    "country_mother",
    "country_self",
    "citizenship",
    "own_or_self",
    "vet_question",
    "vet_benefits",
    "weeks_worked",
    "year",
    "income_50k",
]
CENSUS_DENSE = ["age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp", "weeks_worked"]
CENSUS_LEFT_OUT = ("education", "marital_stat", "instance_weight", "income_50k")
"""Education is a task elsewhere, marital status and income are tasks here, and the weight is of the sampling."""


def census_income(folder: Path) -> Log:
    """Census-Income (KDD): income above 50,000 dollars, and never married (Ma et al. 2018, section 6.2).

    With both files of UCI, the first is for training, and halves of the second are for validation and testing, as Ma et
    al. do. With the test file alone, its rows are split 70 : 10 : 20 by numpy's permutation with seed 2022.
    """
    files = {name: _first(folder, f"census-income.{end}", f"census-income.{end}.gz") for name, end in _UCI.items()}
    if files["test"] is None:
        raise UserError(f"{folder}: has no census-income.test or census-income.test.gz")
    names = [name for name in CENSUS_COLUMNS if name not in CENSUS_LEFT_OUT]
    features = {name: FeatureSpec(kind="dense" if name in CENSUS_DENSE else "sparse") for name in names}
    schema = Schema(features, {"income": LabelSpec(), "marital": LabelSpec()})
    test = _census_frame(files["test"])
    if files["train"] is None:
        return Log(FrameTable(test, str(folder)), schema, by_rows(_permuted(len(test), (0.7, 0.1, 0.2))))
    half = np.random.default_rng(2022).random(len(test)) < 0.5
    parts = {"train": _census_frame(files["train"]), "val": test[half], "test": test[~half]}
    return Log(None, schema, files={name: FrameTable(frame, str(folder)) for name, frame in parts.items()})


def _permuted(count: int, shares: Sequence[float]) -> Int[np.ndarray, " N"]:
    """The part of each row."""
    parts = np.empty(count, int)
    order = np.random.RandomState(2022).permutation(count)
    for i, rows in enumerate(np.split(order, (np.cumsum(shares)[:-1] * count).astype(int))):
        parts[rows] = i
    return parts


_UCI = {"train": "data", "test": "test"}


def _census_frame(file: Path) -> pd.DataFrame:
    frame = pd.read_csv(
        file, header=None, names=CENSUS_COLUMNS, skipinitialspace=True, keep_default_na=False, na_values=["?"]
    )
    frame["income"] = frame["income_50k"].str.startswith("50000+").astype(np.int8)
    frame["marital"] = frame["marital_stat"].eq("Never married").astype(np.int8)
    return frame


KUAIRAND_SPARSE = [
    "user_id",
    "video_id",
    "author_id",
    "music_id",
    "tab",
    "hour",
    "video_type",
    "upload_type",
    "music_type",
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
] + [f"onehot_feat{i}" for i in range(18)]
KUAIRAND_DENSE = [
    "follow_user_num",
    "fans_user_num",
    "friend_user_num",
    "register_days",
    "video_duration",
    "server_width",
    "server_height",
    "age_of_video",
    "history_len",
]
KUAIRAND_RARE = ("user_id", "author_id", "music_id")
"""Those seen once in training are unknown, so that there is something to learn for those first seen in testing."""
KUAIRAND_HISTORIES = ("watch_seq", "long_view_seq", "like_seq")
KUAIRAND_BEGIN, KUAIRAND_VAL, KUAIRAND_TEST = 20220425, 20220501, 20220503
"""Days: training until 30 April, validation on 1 and 2 May, then testing; what came before is history."""


def kuairand(folder: Path) -> Log:
    """KuaiRand-Pure: click, long view, like, entering the author's profile (Gao et al. 2022).

    Statistics of videos (`*_cnt`) are averages over the whole month, test days included, and are left out. Histories
    end on 24 April, the day before training begins.
    """
    logs, histories = _kuairand_logs(folder)
    places = (folder, folder / "data")
    users = _read(places, "user_features_pure.csv").set_index("user_id").join(histories)
    videos = _read(places, "video_features_basic_pure.csv").set_index("video_id")
    frames = [_kuairand_frame(log, users, videos) for log in logs]
    features = {name: FeatureSpec(min_count=2 if name in KUAIRAND_RARE else 1) for name in KUAIRAND_SPARSE}
    features |= {name: FeatureSpec(kind="dense") for name in KUAIRAND_DENSE}
    features["tag"] = FeatureSpec(kind="sequence", max_len=5)
    features |= {
        name: FeatureSpec(kind="sequence", share="video_id", pooling="target", target="video_id")
        for name in KUAIRAND_HISTORIES
    }
    labels = {
        "click": LabelSpec("is_click", "watch"),
        "long_view": LabelSpec(None, "watch"),
        "like": LabelSpec("is_like", "interact"),
        "profile": LabelSpec("is_profile_enter", "interact"),
    }
    schema = Schema(features, labels, user="user_id", item="video_id", time="time_ms")
    return Log(FrameTable(frames, str(folder)), schema, by_borders("date", (KUAIRAND_VAL, KUAIRAND_TEST)))


def _kuairand_logs(folder: Path) -> tuple[list[pd.DataFrame], pd.DataFrame]:
    """Impressions from 25 April on, and what users did before."""
    if (folder / "user_sequences.parquet").is_file():  # already cut
        names = {"watch_seq": "watch_seq", "long_watch_seq": "long_view_seq", "like_seq": "like_seq"}
        before = open_table(folder / "user_sequences.parquet").load().frames[0].set_index("user_id")
        logs = [open_table(folder / name).load().frames[0] for name in ("val.parquet", "test.parquet")]
        return logs, before[["history_len", *names]].rename(columns=names)
    places = (folder, folder / "data")
    log = pd.concat(
        [_read(places, f"log_standard_{days}_pure.csv") for days in ("4_08_to_4_21", "4_22_to_5_08")], ignore_index=True
    )
    earlier = log[log["date"] < KUAIRAND_BEGIN].sort_values("time_ms", kind="stable")
    parts = {
        "watch_seq": earlier,
        "long_view_seq": earlier[earlier["long_view"] == 1],
        "like_seq": earlier[earlier["is_like"] == 1],
    }
    lists = {
        name: part.groupby("user_id")["video_id"].agg(lambda ids: ids.to_numpy()[-50:]) for name, part in parts.items()
    }
    lists["history_len"] = earlier.groupby("user_id").size()
    return [log[log["date"] >= KUAIRAND_BEGIN].reset_index(drop=True)], pd.DataFrame(lists)


def _kuairand_frame(log: pd.DataFrame, users: pd.DataFrame, videos: pd.DataFrame) -> pd.DataFrame:
    keep = ["user_id", "video_id", "date", "time_ms", "hourmin", "tab", "is_click", "long_view", "is_like"]
    frame = log[[*keep, "is_profile_enter"]].reset_index(drop=True)
    own, shown = users.reindex(log["user_id"]), videos.reindex(log["video_id"])
    whole = pd.concat([frame, own.reset_index(drop=True), shown.reset_index(drop=True)], axis=1)
    whole["hour"] = whole["hourmin"] // 100
    day = pd.to_datetime(whole["date"].astype(str), format="%Y%m%d")
    whole["age_of_video"] = (day - pd.to_datetime(whole["upload_dt"])).dt.days
    whole["history_len"] = whole["history_len"].fillna(0)
    return whole.drop(columns=["hourmin", "upload_dt"])


def movielens(folder: Path) -> Log:
    """MovieLens-1M (Harper and Konstan 2015): likes (4 or 5 stars), and 5 stars given a like; split by time."""

    def table(name: str, columns: Sequence[str]) -> pd.DataFrame:
        file = _first(folder, f"{name}.dat")
        if file is None:
            raise UserError(f"{folder}: has no {name}.dat")
        lines = file.read_text(encoding="latin-1").splitlines()
        return pd.DataFrame([line.split("::") for line in lines], columns=list(columns))

    ratings = table("ratings", ("user_id", "movie_id", "rating", "time")).astype(np.int64)
    users = table("users", ("user_id", "gender", "age", "occupation", "zip")).astype({"user_id": np.int64})
    movies = table("movies", ("movie_id", "title", "genres")).astype({"movie_id": np.int64})
    movies["year"] = movies["title"].str.extract(r"\((\d{4})\)\s*$", expand=False).astype(float)
    frame = ratings.merge(users, "left", "user_id").merge(movies, "left", "movie_id")
    frame["like"] = (frame["rating"] >= 4).astype(np.int8)
    frame["favourite"] = (frame["rating"] == 5).astype(np.int8)
    features = {name: FeatureSpec() for name in ("user_id", "movie_id", "gender", "age", "occupation", "zip")}
    features["genres"] = FeatureSpec(kind="sequence", separator="|", max_len=6)
    features["year"] = FeatureSpec(kind="dense")
    labels = {"like": LabelSpec(), "favourite": LabelSpec(given="like")}
    schema = Schema(features, labels, user="user_id", item="movie_id", time="time")
    return Log(FrameTable(frame, str(folder)), schema)


def aliexpress(folder: Path) -> Log:
    """AliExpress search logs of one country (Li et al. 2020): click, and conversion after a click.

    Tables train and test of a number of the search, 16 categories, 63 numbers, click and conversion, as multi-task
    libraries share them; made from the published files (nl_user_train, nl_item_train, ...), plain or zipped, if absent.
    """
    land = folder.name.rpartition("-")[2]
    tables: dict[str, Table] = {}
    for part in ("train", "test"):
        path = _prepared(folder, part)
        if path is None:
            halves = [_must(folder, *(f"{land}_{half}_{part}{end}" for end in (".csv", ".zip"))) for half in _HALVES]
            path = joins.aliexpress(*halves, folder / part)
        tables[part] = open_table(path)
    search, *inputs, click, conversion = tables["train"].columns
    if len(inputs) != 79:
        found = len(inputs) + 3
        raise UserError(f"{tables['train'].name}: {found} columns, expected 82: search, 16 + 63 features, 2 labels")
    features = {name: FeatureSpec(kind="sparse" if i < 16 else "dense") for i, name in enumerate(inputs)}
    labels = {"click": LabelSpec(click), "conversion": LabelSpec(conversion, given="click")}
    return Log(None, Schema(features, labels, user=search), files=tables)


_HALVES = ("user", "item")


def ali_ccp(folder: Path) -> Log:
    """Ali-CCP (Ma et al. 2018, ESMM): click, and purchase after a click.

    Tables train and test (and val, if there) with click, purchase, categories, and numbers in columns that begin with
    D, as multi-task libraries share them; made from the published files (sample_skeleton_train.csv and
    common_features_train.csv, and those of the test) if absent.
    """
    tables: dict[str, Table] = {}
    for part in ("train", "val", "test"):
        path = _prepared(folder, part, f"ali_ccp_{part}")
        if path is None and part != "val":
            raw = [f"{half}_{part}.csv" for half in ("sample_skeleton", "common_features")]
            halves = [_must(folder, name, f"sample_{part}/{name}") for name in raw]
            path = joins.ali_ccp(*halves, folder / part)
        if path is not None:
            tables[part] = open_table(path)
    tables["train"].expect(("click", "purchase"))
    inputs = [name for name in tables["train"].columns if name not in ("click", "purchase")]
    inputs = [name for name in inputs if not name.startswith("Unnamed")]
    features = {
        name: FeatureSpec(kind="dense") if name.startswith("D") else FeatureSpec(min_count=10) for name in inputs
    }
    labels = {"click": LabelSpec(), "purchase": LabelSpec(given="click")}
    user, item = ("101" if "101" in inputs else None), ("205" if "205" in inputs else None)
    return Log(None, Schema(features, labels, user=user, item=item), files=tables)


def _prepared(folder: Path, *stems: str) -> Path | None:
    """A table by one of these names: a folder or a file."""
    names = [stem + end for stem in stems for end in ("", ".parquet", ".csv", ".csv.gz")]
    return next((folder / name for name in names if (folder / name).exists()), None)


def _first(folder: Path, *names: str) -> Path | None:
    return next((file for name in names for file in (folder / name,) if file.is_file()), None)


def _must(folder: Path, *names: str) -> Path:
    file = _first(folder, *names)
    if file is None:
        raise UserError(f"{folder}: has no {names[0]}")
    return file


def _read(places: Sequence[Path], name: str) -> pd.DataFrame:
    file = next((place / name for place in places if (place / name).is_file()), None)
    if file is None:
        raise UserError(f"{places[0]}: has no {name}")
    return pd.read_csv(file)
