"""From frames to batches: fitted on training rows, the same everywhere, clear about what cannot work."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from apps.errors import UserError
from apps.recsys.batch import Batch, TaskSpec, concat
from apps.recsys.columns import Moments
from apps.recsys.schema import FeatureSpec, LabelSpec, Schema
from apps.recsys.transform import Transform
from tests.apps.recsys.conftest import small_schema


def equal(a: Batch, b: Batch) -> bool:
    def same(x, y):
        return (x is None and y is None) or torch.equal(torch.nan_to_num(x, -9), torch.nan_to_num(y, -9))

    tensors = all(same(getattr(a, name), getattr(b, name)) for name in ("sparse", "dense", "labels", "user"))
    return tensors and all(same(a.sequences[name], b.sequences[name]) for name in a.sequences | b.sequences)


@pytest.fixture
def fitted(schema, log) -> Transform:
    return Transform.fit(schema, log, embed_dim=16)


def test_batches_hold_what_the_frame_says(fitted, log):
    batch = fitted.encode(log)
    assert np.allclose(batch.dense[:, 0], log["row"])
    assert np.allclose(batch.dense[:, 1], log["price"], equal_nan=True)
    assert np.array_equal(batch.labels, log[["click", "buy"]])
    assert np.array_equal(batch.user, log["user"])
    items = np.sort(pd.unique(np.concatenate([log["item"], *log["seen"]])))
    assert np.array_equal(items[batch.sparse[:, 1] - 2], log["item"])
    cities = np.array([None, None, "lima", "oslo", "rome"], object)
    assert cities[batch.sparse[:, 2]].tolist() == [None if pd.isna(city) else city for city in log["city"]]
    for ids, values in zip(batch.sequences["seen"].tolist(), log["seen"], strict=True):
        latest = (np.searchsorted(items, values[-3:]) + 2).tolist()
        assert ids == latest + [0] * (3 - len(latest))


def test_models_are_told_the_tables_and_tasks(fitted, log):
    spec = fitted.spec
    assert [(table.name, table.rows, table.dim) for table in spec.tables] == [
        ("user", 22, 16),
        ("item", 42, 4),
        ("city", 5, 4),  # no wider than there are rows
    ]
    assert [(one.name, one.table, one.max_len) for one in spec.sequences] == [("seen", "item", 3)]
    bought = log["buy"][log["click"] == 1].mean()  # of those it is possible for
    assert spec.tasks[1] == TaskSpec("buy", "all", "click", 1.0, pytest.approx(bought))
    row = spec.dense[0]
    assert (row.encode, row.edges) == ("standard", ())
    assert (row.mean, row.std) == pytest.approx((log["row"].mean(), log["row"].std(ddof=0)))
    price = spec.dense[1]
    assert (price.encode, len(price.edges)) == ("piecewise", 5)
    assert price.edges == pytest.approx(log["price"].quantile([0, 0.25, 0.5, 0.75, 1]).tolist(), rel=0.05)


def test_pieces_give_what_the_whole_gives(schema, fitted, log):
    parts = [log.iloc[start : start + 90] for start in range(0, 400, 90)]
    other = Transform.fit(schema, parts)
    assert other.spec.tables == fitted.spec.tables
    assert other.spec.dense[1].mean == pytest.approx(fitted.spec.dense[1].mean)
    assert other.spec.dense[1].std == pytest.approx(fitted.spec.dense[1].std)
    assert equal(concat([other.encode(part) for part in parts]), fitted.encode(log))


def test_a_checkpoint_brings_back_the_same(fitted, log, tmp_path):
    torch.save(fitted.plain(), tmp_path / "t.pt")
    back = Transform.from_plain(torch.load(tmp_path / "t.pt", weights_only=True))
    assert (back.schema, back.spec) == (fitted.schema, fitted.spec)
    assert equal(back.encode(log), fitted.encode(log))


def test_files_give_what_frames_give(fitted, log, tmp_path):
    text = log.assign(seen=log["seen"].map(lambda values: ", ".join(map(str, values))))
    text.to_csv(tmp_path / "log.csv", index=False)
    assert equal(fitted.encode(pd.read_csv(tmp_path / "log.csv")), fitted.encode(log))
    log.to_csv(tmp_path / "printed.csv", index=False)  # lists as Python prints them
    assert equal(fitted.encode(pd.read_csv(tmp_path / "printed.csv")), fitted.encode(log))
    log.to_parquet(tmp_path / "log.parquet")
    assert equal(fitted.encode(pd.read_parquet(tmp_path / "log.parquet")), fitted.encode(log))
    shuffled = log.sample(frac=1, random_state=0)
    assert equal(fitted.encode(shuffled), fitted.encode(log)[torch.tensor(shuffled.index.tolist())])


def test_unseen_ids_do_no_harm(fitted, log):
    strange = log.head(2).assign(user=["nobody", -1], item=[10**12, None], city=["paris", ""], seen=[[1, 105], None])
    batch = fitted.encode(strange)
    assert batch.sparse.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.sequences["seen"].tolist() == [[1, 7, 0], [0, 0, 0]]


def test_rows_to_predict_need_no_labels(fitted, log):
    batch = fitted.encode(log.drop(columns=["click", "buy", "when"]), labels=False)
    assert batch.labels is None
    assert torch.equal(batch.sparse, fitted.encode(log).sparse)


def test_missing_values_in_lists_are_left_out(schema, log):
    frame = log.assign(seen=[[None, 101, None, 102], [], None, [float("nan")]] * 100)
    assert Transform.fit(schema, frame).encode(frame.head(4)).sequences["seen"][:, 0].tolist()[1:] == [0, 0, 0]
    assert (Transform.fit(schema, frame).encode(frame.head(1)).sequences["seen"] > 0).sum() == 2


def test_lists_are_no_longer_than_those_of_training(log):
    schema = small_schema(features={"seen": FeatureSpec("sequence", max_len=50)})
    assert Transform.fit(schema, log).spec.sequences[0].max_len == 5


def test_frequent_numbers_are_edges_of_their_own():
    values = np.concatenate([np.zeros(900), np.arange(1, 101)])[:, None]
    moments = Moments([False])
    moments.add(values)
    edges = moments.edges(0, 8)
    assert edges[:2].tolist() == [0, 1]
    assert len(edges) == 9
    assert (np.diff(edges) > 5).sum() >= 7  # the rest is cut evenly


def test_quantiles_of_more_rows_than_are_kept(monkeypatch):
    monkeypatch.setattr(Moments, "SAMPLE", 1000)
    moments, values = Moments([True]), np.random.default_rng(0).lognormal(5, 2, (20_000, 1))
    for part in np.array_split(values, 37):
        moments.add(part)
    assert sum(map(len, moments._sample)) <= 1000 + 20_000 // 37
    assert moments.edges(0, 4)[1:-1] == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]), rel=0.3)
    assert moments.mean[0] == pytest.approx(np.log1p(values).mean())
    assert moments.std[0] == pytest.approx(np.log1p(values).std())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"click": [0, 1, 2, 1]}, "labels.click: column 'click', row 2: 2 is neither 0 nor 1"),
        ({"click": ["no", "1", "0", "1"]}, "labels.click: column 'click', row 0: 'no' is no number"),
        ({"price": [1, 2, "cheap", 3]}, "features.price: column 'price', row 2: 'cheap' is no number"),
        ({"price": np.nan}, "features.price: column 'price' has no value in the 400 training rows"),
        ({"city": None}, "features.city: column 'city' has no value in the 400 training rows"),
        ({"seen": None}, "features.seen: column 'seen' has no value"),
        ({"city": [[1], [2], [], [3]]}, "column 'city': holds lists or records; make it a sequence in the schema"),
    ],
)
def test_what_cannot_be_trained_on(schema, log, change, words):
    (name, value), *_ = change.items()
    frame = log.assign(**{name: value * 100 if isinstance(value, list) else value})
    with pytest.raises(UserError) as error:
        Transform.fit(schema, frame)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["user", "click", "price", "when"])
def test_columns_that_are_not_there(schema, fitted, log, column):
    with pytest.raises(UserError, match=f"^the table: no column '{column}'; it has row, "):
        Transform.fit(schema, log.drop(columns=column))
    if column != "when":
        with pytest.raises(UserError, match=f"^the table: no column '{column}'"):
            fitted.encode(log.drop(columns=column))


def test_a_column_that_is_there_twice(fitted, log):
    with pytest.raises(UserError, match=r"^the table: two columns are called 'user'; rename one$"):
        fitted.encode(pd.concat([log, log[["user"]]], axis=1))


def test_a_task_with_one_class_is_noted(schema, log):
    fitted = Transform.fit(schema, log.assign(click=0, buy=0))
    assert fitted.notes == (
        "labels.click: only 0 among the training rows of the task; its AUC is undefined",
        "labels.buy: no row among the training rows of the task; its AUC is undefined",
    )
    assert all(0 < task.prior < 1 for task in fitted.spec.tasks)
    assert Transform.fit(schema, log).notes == ()


def test_a_positive_without_its_condition_is_noted(schema, log):
    fitted = Transform.fit(schema, log.assign(buy=1))
    assert fitted.notes[-1] == (
        f"labels.buy: 1 in {(log['click'] == 0).sum()} training rows where click is not, though given=click"
    )


def test_labels_may_be_missing(log):
    frame = log.assign(click=log["click"].where(log["row"] % 4 > 0).astype("Int64"))
    schema = Schema({"user": FeatureSpec()}, {"click": LabelSpec()})
    fitted = Transform.fit(schema, frame)
    assert torch.isnan(fitted.encode(frame).labels[::4]).all()
    assert fitted.spec.tasks[0].prior == pytest.approx(frame["click"].mean())


def test_users_have_numbers_whatever_they_are_called(schema, log):
    named = log.assign(user="u" + log["user"].astype(str))
    numbers = Transform.fit(schema, named).encode(named).user
    pairs = set(zip(named["user"], numbers.tolist(), strict=True))
    assert len(pairs) == named["user"].nunique() == len(set(numbers.tolist()))


def test_rows_whose_lists_are_all_empty_are_encoded(log, schema):
    """New users: nobody in the batch has a history."""
    transform = Transform.fit(schema, log)
    fresh = log.head(3).assign(seen=pd.Series([[], [], []], dtype=object))
    assert (transform.encode(fresh, labels=False).sequences["seen"] == 0).all()
