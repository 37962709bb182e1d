"""What a trainer gets: batches that resume, parts in order, known best figures."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apps.errors import ConfigError
from apps.recsys.data import RecsysData
from apps.recsys.data_settings import DataConfig
from apps.recsys.sources import from_frame
from apps.recsys.transform import Transform
from tests.apps.recsys.conftest import small_log, small_schema


def trainer(ready: int = 0, limit: int | None = None, rank: int = 0, world: int = 1) -> SimpleNamespace:
    """What a data module asks of a trainer."""
    loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(ready=ready)))
    )
    return SimpleNamespace(
        fit_loop=loop,
        global_rank=rank,
        world_size=world,
        limit_train_batches=limit,
        max_epochs=2,
        max_steps=-1,
        val_check_interval=1.0,
        accumulate_grad_batches=1,
        check_val_every_n_epoch=1,
    )


@pytest.fixture
def make(tmp_path, parquet):
    """A data module of the small log, from files."""
    folder = parquet(small_log())
    (tmp_path / "schema.yaml").write_text(small_schema().yaml())

    def data(seed: int = 0, transform: Transform | None = None, **changes) -> RecsysData:
        given = {"source": folder, "schema": str(tmp_path / "schema.yaml"), "batch_size": 32, "eval_batch_size": 30}
        return RecsysData(DataConfig(**given | changes), seed, transform)

    return data


def rows(data: RecsysData, **state) -> list[list[float]]:
    data.trainer = trainer(**state)
    return [batch.dense[:, 0].tolist() for batch in data.train_dataloader()]


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_training_continues_with_the_batch_it_has_reached(make, streaming):
    data = make(streaming=streaming, buffer_rows=96)
    first, second = rows(data), rows(data, ready=10)
    assert len(first) == len(second) == data.training_steps() // 2 == 10
    assert first != second
    for ready in range(20):
        resumed = make(streaming=streaming, buffer_rows=96)
        assert rows(resumed, ready=ready) == (first + second)[ready : ready // 10 * 10 + 10]
    assert rows(make(seed=1, streaming=streaming)) != first


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_processes_share_batches_and_limits_hold(make, streaming):
    data = make(streaming=streaming)
    parts = [rows(data, rank=rank, world=2) for rank in (0, 1)]
    assert [len(part) for part in parts] == [5, 5]
    assert len({row for part in parts for batch in part for row in batch}) == 320
    assert len(rows(data, limit=3)) == 3


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_evaluation_sees_every_row_once_and_in_order(make, streaming):
    data = make(streaming=streaming)
    for part, loader in (("val", data.val_dataloader), ("test", data.test_dataloader)):
        found = torch.cat([batch.dense[:, 0] for batch in loader()])
        assert found.tolist() == data.frame(part)["row"].tolist() == data.encoded(part).dense[:, 0].tolist()
    data.trainer = trainer(world=2, rank=1)
    assert len(data.val_dataloader()) == 1


def test_only_training_rows_are_learned_from(make):
    data = make()
    train = data.frame("train")
    assert data.spec.dense[0].mean == pytest.approx(train["row"].mean())
    later = make(transform=Transform.from_plain(data.transform.plain()), shares=(0.1, 0.1, 0.8), schema=None)
    assert later.spec == data.spec
    assert later.schema == data.schema


def test_notes_are_printed_once(make, tmp_path, capsys):
    small_log().assign(buy=0).to_parquet(tmp_path / "x.parquet")
    data = make(source=str(tmp_path / "x.parquet"))
    data.check()
    _ = data.spec
    assert capsys.readouterr().out == (
        "note: labels.buy: only 0 among the training rows of the task; its AUC is undefined\n"
    )


def test_the_best_possible_is_known_of_the_generated_log(make):
    data = RecsysData(DataConfig(rows=4000), seed=0)
    chances, labels = data.bayes("test"), data.encoded("test").labels.numpy()
    assert chances.shape == labels.shape
    assert np.abs(chances.mean(0) - labels.mean(0)).max() < 0.06
    assert np.corrcoef(chances[:, 0], labels[:, 0])[0, 1] > 0.3
    assert make().bayes("test") is None


def test_frames_in_memory_need_no_file():
    log, config = small_log(), DataConfig(batch_size=32, split="user")
    data = RecsysData(config, 0, source=from_frame(log.sample(frac=1, random_state=0), config, small_schema()))
    assert sum(len(part) for part in data.parts.values()) == 400
    assert len(rows(data)) == len(data.parts["train"]) // 32
    guessed = from_frame(log.rename(columns={"click": 3, "user": "user_id"}), DataConfig(split="random"))
    assert list(guessed.schema.labels) == ["buy"]
    assert guessed.schema.features["3"].kind == "sparse"  # no name says that it is a label


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shares": (0.5, 0.5, 0.5)}, "shares=(0.5, 0.5, 0.5): must add up to 1"),
        ({"shares": (0.5, 0.5)}, "shares=(0.5, 0.5): must be three positive numbers"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"split": "half"}, "split='half': choose one of"),
        ({"rows": 3}, "rows=3: must be at least 100"),
    ],
)
def test_settings_that_cannot_work(changes, words):
    with pytest.raises(ConfigError) as error:
        DataConfig(**changes)
    assert words in str(error.value)
