"""Training from the command line: what it writes, that it learns, and that it repeats."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apps import tree
from apps.cli import make_parser
from apps.curves import read_curves
from apps.vision import APP
from apps.vision.settings import VisionConfig

METRICS = ("max_violation", "load_entropy", "router_entropy", "dead_experts", "experts_per_token", "drop_rate")
LAYERS = ("backbone.blocks.0.mlp", "backbone.blocks.1.mlp")


def settings(run) -> VisionConfig:
    return tree.build(VisionConfig, yaml.safe_load((run / "config.yaml").read_text()))


def column(run, name: str) -> list[float]:
    return [row[name] for row in read_curves(run / "metrics.csv") if name in row]


def test_a_run_folder_holds_what_a_run_is(tiny_run):
    names = {str(path.relative_to(tiny_run)) for path in tiny_run.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("tensorboard/")}
    assert events
    assert names - events == {
        "config.yaml",
        "metrics.csv",
        "test.json",
        "report.html",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
    }


def test_its_config_trains_the_same_again(tiny_run):
    values = make_parser(APP, "train").parse_args(["-c", str(tiny_run / "config.yaml")]).as_dict()
    config = tree.build(VisionConfig, values)
    assert config == settings(tiny_run)
    assert config.trainer.accelerator == "cpu"
    assert (config.model.embed_dim, config.trainer.max_epochs) == (32, 2)


def test_curves_have_every_routing_metric_of_every_layer(tiny_run):
    rows = read_curves(tiny_run / "metrics.csv")
    names = {name for row in rows for name in row}
    assert names >= {"train/loss", "train/balance_loss", "train/lr", "val/loss", "val/accuracy"}
    for layer in LAYERS:
        assert names >= {f"routing/{layer}/{metric}" for metric in METRICS}
        assert names >= {f"load/{layer}/{expert}" for expert in range(4)}
        for row in rows:
            loads = [row[f"load/{layer}/{expert}"] for expert in range(4) if f"load/{layer}/{expert}" in row]
            assert not loads or math.isclose(sum(loads), 1, rel_tol=1e-5)
    assert [row["step"] for row in rows] == [1, 3, 5, 7, 9, 11]  # every second step; validation after 6 and 12
    assert [row["step"] for row in rows if "val/accuracy" in row] == [5, 11]


def test_tensorboard_has_the_same_curves(tiny_run):
    events = EventAccumulator(str(tiny_run / "tensorboard"))
    events.Reload()
    for name in ("train/loss", "val/accuracy", f"routing/{LAYERS[0]}/load_entropy"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx(column(tiny_run, name), rel=1e-5)


def test_checkpoints_are_plain_data_that_say_what_they_are(tiny_run, load):
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = load(tiny_run, name)
        assert checkpoint["app"] == "vision"
        assert tree.restore(VisionConfig, checkpoint["config"]) == settings(tiny_run)
        assert checkpoint["images"]["classes"] == [str(i) for i in range(10)]
    assert load(tiny_run)["global_step"] == 12
    best = max(column(tiny_run, "val/accuracy"))
    (state,) = (state for name, state in load(tiny_run)["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert float(state["best_model_score"]) == pytest.approx(best)


def test_figures_have_flat_names_and_finite_values(tiny_run):
    figures = json.loads((tiny_run / "test.json").read_text())
    assert {"accuracy", "macro_f1", "log_loss", "calibration_error", "params_total", "params_active"} <= set(figures)
    assert {f"routing/{layer}/{metric}" for layer in LAYERS for metric in (*METRICS, "specialisation")} <= set(figures)
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in figures.values())
    assert figures["images"] == 359
    assert figures["params_active"] < figures["params_total"]
    assert figures["multiply_adds"] < figures["multiply_adds_all_experts"]


def test_it_learns(train, tmp_path):
    run = train(
        tmp_path,
        model__stem="auto",
        model__embed_dim=32,
        optim__lr=0.005,
        trainer__max_epochs=2,
        trainer__limit_train_batches=40,
        label_smoothing=0.0,
    )
    loss = column(run, "train/loss")
    assert sum(loss[-5:]) < 0.6 * sum(loss[:5])
    assert json.loads((run / "test.json").read_text())["accuracy"] > 0.5  # of ten classes


def test_the_same_seed_gives_the_same_weights_and_another_others(train, tmp_path, same_state, load):
    # Everything that draws numbers is on: dropout, depth, noise, augmentation and mixing.
    options = {
        "model__drop_rate": 0.1,
        "model__drop_path_rate": 0.1,
        "model__moe__score": "noisy",
        "data__rand_augment": 1,
        "data__random_erasing": 0.5,
        "data__mixup": 0.5,
        "data__cutmix": 0.5,
        "run__name": "same",
    }
    first = train(tmp_path, **options)
    torch.rand(100)
    second = train(tmp_path, **options)
    other = train(tmp_path, **options, run__seed=1)
    assert [run.name for run in (first, second, other)] == ["same", "same-2", "same-3"]
    same_state(first, second)
    name = "model.backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(load(first)["state_dict"][name], load(other)["state_dict"][name])
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()


def test_every_augmentation_trains(train, tmp_path, draw):
    for number, name in enumerate(["cat", "dog"]):
        draw(tmp_path / "images" / name, 20, number, sizes=[(40, 30), (30, 40)])
    run = train(
        tmp_path,
        data__dataset="folder",
        data__root=tmp_path / "images",
        data__image_size=16,
        data__rand_augment=2,
        data__random_erasing=0.5,
        data__mixup=0.2,
        data__cutmix=1.0,
        data__num_workers=0,
        data__batch_size=8,
        label_smoothing=0.1,
        trainer__max_epochs=2,
    )
    assert all(math.isfinite(value) for value in column(run, "train/loss"))
    assert column(run, "train/accuracy") == []  # labels of mixed images are none to count


def test_the_average_is_what_is_evaluated_and_saved(train, tmp_path, load):
    run = train(tmp_path, optim__ema_decay=0.9)
    checkpoint = load(run, "best.ckpt")
    name = "model.backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])
    assert int(checkpoint["averaging_state"]["n_averaged"]) == 3


def test_early_stopping_stops(train, tmp_path):
    run = train(
        tmp_path,
        optim__lr=1e-9,
        trainer__max_epochs=50,
        trainer__limit_train_batches=1,
        run__early_stop__patience=2,
    )
    assert len(column(run, "val/accuracy")) == 3


@pytest.mark.parametrize(
    ("options", "steps", "batches"),
    [
        ({"trainer__max_steps": 2}, 2, 2),
        ({"trainer__max_steps": 5, "trainer__max_epochs": -1}, 5, 5),
        ({"trainer__accumulate_grad_batches": 2, "trainer__max_epochs": 2}, 4, 6),
    ],
)
def test_training_takes_as_many_steps_as_asked(train, tmp_path, load, options, steps, batches):
    checkpoint = load(train(tmp_path, **options))
    assert checkpoint["global_step"] == steps
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert progress["completed"] == batches
    assert checkpoint["lr_schedulers"][0]["_last_lr"][0] == pytest.approx(0, abs=1e-9)  # the cosine has reached its end


def test_accumulating_is_a_larger_batch(train, tmp_path, load):
    options = {
        "optim__warmup": 0,
        "trainer__gradient_clip_val": "null",
        "model__moe__aux_loss": "{}",
        "data__crop_padding": 0,
    }
    small = load(
        train(
            tmp_path, data__batch_size=16, trainer__accumulate_grad_batches=4, trainer__limit_train_batches=4, **options
        )
    )
    large = load(train(tmp_path, data__batch_size=64, trainer__limit_train_batches=1, **options))
    for name, weight in large["state_dict"].items():
        # Adam's first step is lr in every direction: only near-zero gradients may come out otherwise.
        assert (small["state_dict"][name] - weight).abs().max() <= 2.1 * 0.002, name
    moments = [checkpoint["optimizer_states"][0]["state"][0]["exp_avg"] for checkpoint in (small, large)]
    assert torch.allclose(*moments, rtol=1e-3, atol=1e-6)


def test_without_validation_the_last_state_is_tested(train, tmp_path):
    run = train(tmp_path, trainer__limit_val_batches=0)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt"]
    assert (run / "test.json").is_file()


def test_a_dense_model_trains_like_any(train, tmp_path):
    run = train(tmp_path, model__moe_layers="none", run__report="true")
    figures = json.loads((run / "test.json").read_text())
    assert figures["params_active"] == figures["params_total"]
    assert not any(name.startswith("routing/") for name in figures)


def test_balance_controllers_move_and_are_kept(train, tmp_path, load):
    run = train(tmp_path, model__moe__controller="loss_free", model__moe__weight="sigmoid")
    biases = [value for name, value in load(run)["state_dict"].items() if "balance" in name or "controller" in name]
    assert biases
    assert any(value.abs().max() > 0 for value in biases)


def test_the_number_of_threads_is_the_one_asked_for(train, tmp_path):
    train(tmp_path, run__threads=2, trainer__max_steps=1)
    assert torch.get_num_threads() == 2
