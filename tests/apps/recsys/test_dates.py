"""Dates as ids are the same dates whatever they come as, and in files that were exported."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from apps.recsys.data import RecsysData
from apps.recsys.deploy_inputs import describe, feed
from apps.recsys.schema import FeatureSpec, LabelSpec, Schema
from apps.recsys.settings import RecsysConfig
from apps.recsys.sources import from_frame
from apps.recsys.transform import Transform
from apps.recsys.vocabulary import Counter, Vocabulary, read_ids

DAYS = pd.Series(pd.to_datetime(["2024-02-29", "2025-01-01", None, "2024-02-29"]))
HOURS = pd.Series(pd.to_datetime(["2024-02-29", "2025-01-01 10:30:00.25", None, "2024-02-29"], format="ISO8601"))
OTHER_TYPES = {
    "nanoseconds": lambda times: times.astype("datetime64[ns]"),
    "UTC": lambda times: times.dt.tz_localize("UTC"),
    "a zone": lambda times: times.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"),
    "Arrow": lambda times: times.astype(pd.ArrowDtype(pa.timestamp("us"))),
    "Timestamps": lambda times: times.astype(object),
    "categories": lambda times: times.astype("category"),
    "as printed": lambda times: times.astype(str).where(times.notna()),
    "ISO": lambda times: times.map(lambda time: None if pd.isna(time) else time.isoformat()),
    "ISO with an offset": lambda times: times.map(
        lambda time: None if pd.isna(time) else time.tz_localize("UTC").tz_convert("Asia/Tokyo").isoformat()
    ),
    "times of NumPy": lambda times: pd.Series([None if pd.isna(t) else t.to_datetime64() for t in times], dtype=object),
}


def fitted(*parts: pd.Series, hashed: bool = False) -> Vocabulary:
    counter = Counter(hashed)
    for part in parts:
        counter.add(read_ids(part))
    return counter.vocabulary(1, 1000 if hashed else None)


@pytest.mark.parametrize("kind", OTHER_TYPES)
@pytest.mark.parametrize(
    ("times", "names"),
    [
        (DAYS, ["2024-02-29", "2025-01-01"]),
        (HOURS, ["2024-02-29T00:00:00", "2025-01-01T10:30:00.25"]),
    ],
)
def test_one_spelling_whatever_they_come_as(times, names, kind):
    other = OTHER_TYPES[kind](times)
    for learned in (fitted(times), fitted(other), fitted(times, other)):
        assert learned.values.to_pylist() == names
        for given in (times, other):
            assert learned.lookup(read_ids(given)).tolist() == [2, 3, 0, 2]
    hashed = fitted(times, hashed=True)
    assert np.array_equal(hashed.lookup(read_ids(other)), hashed.lookup(read_ids(times)))
    assert len(set(hashed.lookup(read_ids(times)))) == 3


def test_days_of_python_even_beside_times():
    days = pd.Series([datetime.date(2024, 2, 29), datetime.date(2025, 1, 1), None, datetime.date(2024, 2, 29)])
    assert fitted(DAYS).lookup(read_ids(days)).tolist() == [2, 3, 0, 2]
    mixed = pd.Series([datetime.date(2024, 2, 29), datetime.datetime(2025, 1, 1, 10), pd.NaT], dtype=object)
    assert fitted(mixed).values.to_pylist() == ["2024-02-29T00:00:00", "2025-01-01T10:00:00"]
    assert fitted(pd.Series([datetime.date(9999, 12, 31)])).values.to_pylist() == ["9999-12-31"]  # beyond nanoseconds


@pytest.mark.parametrize("hashed", [False, True])
def test_what_is_no_date_or_another_date_is_unknown(hashed):
    given = pd.Series(["2025-01-01 00:00:00", "soon", "2025-02-30", "20250101", None])
    found = fitted(DAYS, hashed=hashed).lookup(read_ids(given)).tolist()
    assert found[0] > 1
    assert found[1:] == [1, 1, 1, 0]
    assert fitted(DAYS).lookup(read_ids(pd.Series(["2025-01-01T07:00", "1999-01-01"]))).tolist() == [1, 1]


def test_text_that_is_not_all_dates_stays_as_it_is():
    assert fitted(pd.Series(["2025-01-01 00:00:00", "soon"])).values.to_pylist() == ["2025-01-01 00:00:00", "soon"]
    assert fitted(pd.Series(["2025-01-01"]), pd.Series(["2025-02-30"])).dates is None
    assert fitted(pd.Series(["2025-01-01"]), pd.Series([3])).dates is None


@pytest.fixture
def log() -> pd.DataFrame:
    """Users who signed up on a day, saw an item at a minute, and had been there on some days."""
    rng, start = np.random.default_rng(0), pd.Timestamp("2025-01-01")
    frame = pd.DataFrame({"user": rng.integers(0, 9, 200), "click": rng.integers(0, 2, 200)})
    frame["signup"] = start - pd.to_timedelta(frame["user"] * 37, unit="D")
    frame["seen"] = start + pd.to_timedelta(rng.integers(0, 50, 200), unit="min")
    frame["visits"] = [frame["signup"].sample(int(n), random_state=0).tolist() for n in rng.integers(0, 4, 200)]
    return frame


@pytest.fixture
def schema() -> Schema:
    """Of that log."""
    features = {"user": FeatureSpec(), "signup": FeatureSpec(), "seen": FeatureSpec()}
    return Schema(features | {"visits": FeatureSpec("sequence", share="signup")}, {"click": LabelSpec()})


def test_files_give_what_frames_give(log, schema, tmp_path):
    log.to_parquet(tmp_path / "log.parquet")
    listed = log["visits"].map(lambda times: ",".join(time.isoformat() for time in times))
    log.assign(visits=listed).to_csv(tmp_path / "log.csv", index=False)
    frames = [log, pd.read_parquet(tmp_path / "log.parquet"), pd.read_csv(tmp_path / "log.csv")]
    for learned_from in frames:
        transform = Transform.fit(schema, learned_from)
        torch.save(transform.plain(), tmp_path / "t.pt")
        transform = Transform.from_plain(torch.load(tmp_path / "t.pt", weights_only=True))
        batches = [transform.encode(frame) for frame in frames]
        assert (batches[0].sparse > 1).all()
        assert (batches[0].sequences["visits"] > 1).sum() == log["visits"].map(len).sum()
        for batch in batches[1:]:
            assert torch.equal(batch.sparse, batches[0].sparse)
            assert torch.equal(batch.sequences["visits"], batches[0].sequences["visits"])


@pytest.mark.usefixtures("untyped")
def test_exported_files_take_the_canonical_text(log, schema, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from apps.recsys.deploy import exportable
    from apps.recsys.loading import Trained
    from apps.recsys.models.build import build_model
    from export.deliver import traced
    from export.lowering import lower
    from export.onnx import save

    config = RecsysConfig()
    data = RecsysData(config.data, 0, source=from_frame(log, config.data, schema))
    trained = Trained(build_model(config.model, data.spec).eval(), config, data.transform, tmp_path)
    for weight in trained.model.encoder.tables.weights.values():
        torch.nn.init.normal_(weight, std=10)
    one = exportable(trained, data)
    save(one.finish(lower(traced(one), "sparse")), tmp_path / "m.onnx")
    forms = {one["name"]: one.get("format") for one in describe(data.transform)}
    assert forms == {
        "user": None,
        "signup": "YYYY-MM-DD",
        "seen": "YYYY-MM-DDTHH:MM:SS[.ffffff]",
        "visits": "YYYY-MM-DD",
    }
    given = feed(data.transform, log.assign(signup=log["signup"].astype(str) + " 00:00"))
    assert given["signup"][0] == log["signup"][0].date().isoformat()
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    expected = trained.score(data.transform.encode(log, labels=False))
    np.testing.assert_allclose(session.run(None, given)[0], expected, rtol=1e-4, atol=1e-6)
