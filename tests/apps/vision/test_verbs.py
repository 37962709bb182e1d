"""evaluate, predict, export and benchmark on a trained run, and which run they mean."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from apps.vision.data import VisionData
from apps.vision.loading import load_trained

QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture
def digit_files(tiny_run, tmp_path) -> Path:
    """A folder of test images as files, one of them in a folder below."""
    trained = load_trained(tiny_run / "checkpoints" / "best.ckpt")
    pixels = VisionData(trained.config.data).images("test").pixels
    (tmp_path / "digits" / "below").mkdir(parents=True)
    for i in range(5):
        name = f"digits/{i}.png" if i else "digits/below/0.png"
        Image.fromarray(pixels[i, 0].numpy()).save(tmp_path / name)
    return tmp_path / "digits"


def expected(tiny_run: Path, count: int = 5) -> torch.Tensor:
    """Probabilities that the model itself gives for the first test images."""
    trained = load_trained(tiny_run / "checkpoints" / "best.ckpt")
    images = VisionData(trained.config.data).images("test").plain(list(range(count)))[0]
    with torch.no_grad():
        return trained.model(images).softmax(-1)


def test_evaluation_repeats_the_test_of_training(cli, tiny_run, tmp_path):
    done = cli("evaluate", "--ckpt_path", tiny_run, "--json", tmp_path / "e.json")
    assert (done.code, done.err) == (0, "")
    found = json.loads((tmp_path / "e.json").read_text())
    trained = json.loads((tiny_run / "test.json").read_text())
    assert found.keys() == trained.keys()
    for values in (found, trained):
        assert values.pop("images_per_second") > 0
    assert found == trained
    assert f"accuracy  {trained['accuracy']:.4g}" in " ".join(done.out.split()).replace("accuracy ", "accuracy  ")


def test_evaluation_counts_right(tiny_run):
    """Accuracy, log loss and loads against sums over the images, one by one."""
    trained = load_trained(tiny_run / "checkpoints" / "best.ckpt")
    images, labels = VisionData(trained.config.data).images("test").plain(list(range(359)))
    with torch.no_grad():
        scores = torch.cat([trained.model(image[None]) for image in images])
    figures = json.loads((tiny_run / "test.json").read_text())
    assert figures["accuracy"] == pytest.approx((scores.argmax(1) == labels).float().mean().item())
    picked = scores.log_softmax(1)[torch.arange(359), labels]
    assert figures["log_loss"] == pytest.approx(-picked.mean().item(), rel=1e-5)
    top5 = (scores.topk(5, 1).indices == labels[:, None]).any(1)
    assert figures["top5_accuracy"] == pytest.approx(top5.float().mean().item())
    assert all(figures[f"routing/backbone.blocks.{i}.mlp/experts_per_token"] == 2 for i in (0, 1))


@pytest.mark.parametrize("change", [["--data.batch_size=7"], ["--run.seed=5"]])
def test_evaluation_depends_on_no_setting_of_the_training(cli, tiny_run, tmp_path, change):
    cli("evaluate", "--ckpt_path", tiny_run, "--json", tmp_path / "e.json", *change)
    found = json.loads((tmp_path / "e.json").read_text())
    for name, value in json.loads((tiny_run / "test.json").read_text()).items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6) or name == "images_per_second"


def test_other_data_are_measured_when_asked_for(cli, tiny_run, digit_files, tmp_path):
    for name in ("3", "7"):
        shutil.copytree(digit_files, tmp_path / "other" / "test" / name)
        shutil.copytree(digit_files, tmp_path / "other" / "train" / name)
    options = ["--data.dataset=folder", f"--data.root={tmp_path / 'other'}", "--json", tmp_path / "e.json"]
    done = cli("evaluate", "--ckpt_path", tiny_run, *options)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "e.json").read_text())["images"] == 10
    (tmp_path / "other" / "test" / "3").rename(tmp_path / "other" / "test" / "zebra")
    assert cli("evaluate", "--ckpt_path", tiny_run, *options).line.startswith("class 'zebra' (")


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_predictions_are_those_of_the_model(cli, tiny_run, digit_files, tmp_path, ending):
    output = tmp_path / f"deep/p.{ending}"
    done = cli("predict", "--ckpt_path", tiny_run, "--input", digit_files, "--output", output, "--data.batch_size=2")
    assert (done.code, done.err) == (0, "")
    assert re.search(rf"^5 prediction.*{re.escape(str(output))}", done.out)
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file)) if ending == "csv" else json.load(file)
    files = [digit_files / f"{i}.png" for i in range(1, 5)] + [digit_files / "below/0.png"]
    assert [row["file"] for row in rows] == [str(file) for file in sorted(files)]
    by_file = {row["file"]: row for row in rows}
    for i, probabilities in enumerate(expected(tiny_run)):
        row = by_file[str(digit_files / (f"{i}.png" if i else "below/0.png"))]
        best = probabilities.topk(3)
        assert [row["class"], row["class_2"], row["class_3"]] == [str(c) for c in best.indices.tolist()]
        given = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert given == pytest.approx(best.values.tolist(), abs=2e-6)


def test_one_file_is_predicted_alone(cli, tiny_run, digit_files, tmp_path):
    done = cli("predict", "--ckpt_path", tiny_run, "--input", digit_files / "3.png", "--output", tmp_path / "p.json")
    assert done.code == 0
    (row,) = json.loads((tmp_path / "p.json").read_text())
    assert row["class"] == str(expected(tiny_run)[3].argmax().item())


def test_images_of_other_sizes_and_modes_are_predicted_as_they_would_be_evaluated(cli, train, draw, tmp_path):
    """Trained on crops of photographs: what predict sees of a file is what evaluate sees of it."""
    sizes = [(40, 30), (30, 44), (16, 16), (50, 50)]
    for number, name in enumerate(["cat", "dog"]):
        draw(tmp_path / "images" / "train" / name, 6, number, sizes=sizes)
        draw(tmp_path / "images" / "val" / name, 4, number, sizes=sizes)
        draw(tmp_path / "images" / "test" / name, 4, number, sizes=sizes, mode="P")
    options = {"data__dataset": "folder", "data__root": tmp_path / "images", "data__image_size": 16}
    run = train(tmp_path, data__num_workers=0, **options)
    done = cli("predict", "--ckpt_path", run, "--input", tmp_path / "images/test", "--output", tmp_path / "p.json")
    assert done.code == 0, done.err
    trained = load_trained(run / "checkpoints" / "best.ckpt")
    images = VisionData(trained.config.data, spec=trained.model.images).images("test")
    with torch.no_grad():
        probabilities = trained.model(images.plain(list(range(8)))[0]).softmax(-1)
    for row, name, scores in zip(
        json.loads((tmp_path / "p.json").read_text()), images.table.names, probabilities, strict=True
    ):
        assert row["file"] == name
        assert {row["class"], row["class_2"]} == {"cat", "dog"}
        assert row["probability"] == pytest.approx(scores.max().item(), abs=2e-6)


def test_unreadable_images_end_predictions_or_are_skipped_and_counted(cli, tiny_run, digit_files, tmp_path):
    (digit_files / "2.png").write_bytes((digit_files / "2.png").read_bytes()[:50])
    (digit_files / "folder.png").mkdir()  # no image, whatever its name says
    argv = ["predict", "--ckpt_path", tiny_run, "--input", digit_files, "--output", tmp_path / "p.csv"]
    line = cli(*argv).line
    assert line.startswith(f"{digit_files}/2.png: unreadable image (")
    assert not (tmp_path / "p.csv").exists()
    done = cli(*argv, "--data.on_error", "skip")
    assert done.code == 0
    assert done.out.startswith("4 prediction")
    assert re.search(r"\b1 unreadable .*skipped", done.out)
    assert (tmp_path / "p.csv").read_text().count("\n") == 5


@pytest.mark.parametrize(
    ("make", "line"), [(lambda path: None, "no such file or folder"), (lambda path: path.mkdir(), "no images in it (")]
)
def test_nothing_to_predict_is_said(cli, tiny_run, tmp_path, make, line):
    make(tmp_path / "in")
    done = cli("predict", "--ckpt_path", tiny_run, "--input", tmp_path / "in")
    assert done.line.startswith(f"input={tmp_path}/in: {line}")


@pytest.fixture(scope="module")
def exported(cli, tiny_run, tmp_path_factory, unchecked_module) -> Path:
    """The folder with model.onnx and figures of its comparison."""
    folder = tmp_path_factory.mktemp("export")
    done = cli("export", "--ckpt_path", tiny_run, "--output", folder / "model.onnx", "--json", folder / "x.json")
    assert (done.code, done.err) == (0, "")
    return folder


@pytest.fixture(scope="module")
def unchecked_module():
    """Shape checks, which cannot be traced, off."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("batch", [1, 7])
def test_the_exported_file_gives_the_scores_of_the_model(exported, tiny_run, batch):
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    trained = load_trained(tiny_run / "checkpoints" / "best.ckpt")
    images = torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    (scores,) = session.run(["scores"], {"images": images.numpy()})
    with torch.no_grad():
        assert np.allclose(scores, trained.model(images).numpy(), atol=1e-5)


def test_the_exported_file_says_what_it_is(exported):
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == [str(i) for i in range(10)]
    assert about["task"] == "image classification"
    assert about["input"] == "[batch, 1, 8, 8], pixels in [0, 1]"
    (given,) = session.get_inputs()
    assert (given.name, given.shape[1:]) == ("images", [1, 8, 8])
    onnx.checker.check_model(onnx.load(exported / "model.onnx"), full_check=True)


def test_the_comparison_is_reported(exported):
    figures = json.loads((exported / "x.json").read_text())
    assert figures["rows"] == 359
    assert figures["decision_agreement"] == 1
    assert 0 <= figures["max_relative_error"] < 1e-5
    assert figures["file_bytes"] == (exported / "model.onnx").stat().st_size


def test_an_export_that_differs_is_refused_and_keeps_the_file_of_before(
    cli, tiny_run, tmp_path, monkeypatch, unchecked_module
):
    target = tmp_path / "model.onnx"
    target.write_text("the good one of before")
    monkeypatch.setattr("export.verify.TOLERANCE", -1.0)
    line = cli("export", "--ckpt_path", tiny_run, "--output", target).line
    assert line.startswith("export: outputs differ from PyTorch by ")
    assert target.read_text() == "the good one of before"
    assert list(tmp_path.iterdir()) == [target]


def test_eight_bits_keep_the_figure_and_the_routing(cli, tiny_run, tmp_path, unchecked_module):
    target, figures = tmp_path / "model.onnx", tmp_path / "x.json"
    small, data = tmp_path / "small.onnx", tmp_path / "small.json"
    cli("export", "--ckpt_path", tiny_run, "--output", target, "--json", figures)
    cli("export", "--ckpt_path", tiny_run, "--format", "onnx-int8", "--output", small, "--json", data)
    whole, eight = json.loads(figures.read_text()), json.loads(data.read_text())
    assert abs(eight["accuracy_export"] - eight["accuracy_torch"]) <= 0.01
    assert eight["routing_agreement"] >= 0.97
    assert 1e-4 < eight["max_relative_error"] < 0.3
    assert eight["file_bytes"] < whole["file_bytes"]
    assert set(json.loads((tmp_path / "export.json").read_text())) == {"model.onnx", "small.onnx"}


def test_a_bundle_for_fpgas_gives_the_same_classes(cli, tiny_run, tmp_path, unchecked_module):
    bundle, data = tmp_path / "bundle", tmp_path / "x.json"
    cli(
        "export",
        "--ckpt_path",
        tiny_run,
        "--format",
        "fpga",
        "--output",
        bundle,
        "--json",
        data,
        "--fpga.compared",
        200,
    )
    figures = json.loads(data.read_text())
    assert figures["rows"] == 200
    assert figures["overflows"] == 0
    assert abs(figures["accuracy_export"] - figures["accuracy_torch"]) <= 0.003
    assert " 0 mismatches" in (bundle / "testbench.log").read_text()
    assert not re.search(r"/\w+/\w+", (bundle / "testbench.log").read_text())  # no paths of this machine


@pytest.mark.parametrize("form", ["task", "edge-moe"])
def test_forms_of_several_tasks_are_refused_for_classifiers(cli, tiny_run, form):
    line = cli("export", "--ckpt_path", tiny_run, "--format", form, *(("--task", "depth") * (form == "task"))).line
    assert "give a run of model.name=m3vit" in line


def test_models_that_route_by_the_batch_are_not_exported(cli, train, tmp_path):
    run = train(tmp_path, model__moe__select="expert_choice", model__moe__select_options="{eval_sees_batch: true}")
    line = cli("export", "--ckpt_path", run).line
    assert line.startswith(
        "export: backbone.blocks.0.mlp.router.select: eval_sees_batch=True: routes by the whole batch"
    )
    assert not (run / "model.onnx").exists()


def test_last_means_the_newest_run_of_the_name_or_of_any(cli, train, tmp_path):
    older = train(tmp_path, run__name="older", model__moe__num_experts=2)
    newer = train(tmp_path, run__name="newer")
    os.utime(older / "checkpoints" / "last.ckpt", (1e9, 1e9))
    for name, run in ((None, newer), ("older", older), ("newer", newer)):
        argv = ["evaluate", "--ckpt_path", "last", "--run.root", tmp_path, QUIET]
        done = cli(*argv, *([] if name is None else ["--run.name", name]))
        assert done.code == 0, done.err
        assert f"test: {run}/checkpoints/best.ckpt" in done.out
    (tmp_path / "mine.yaml").write_text(f"run: {{name: older, root: {tmp_path}}}\n")
    assert f"test: {older}/" in cli("evaluate", "--ckpt_path", "last", "-c", tmp_path / "mine.yaml", QUIET).out
    (tmp_path / "older.yaml").write_text(f"run: {{root: {tmp_path}}}\n")
    assert f"test: {older}/" in cli("evaluate", "--ckpt_path", "last", "-c", tmp_path / "older.yaml", QUIET).out


def test_settings_over_those_of_a_checkpoint_must_fit_its_weights(cli, tiny_run):
    line = cli("evaluate", "--ckpt_path", tiny_run, "--model.moe.num_experts=8").line
    assert "of another architecture" in line
    assert "use the settings it was trained with" in line


ROW = {"model", "batch", "latency_ms", "images_per_s", "latency_ratio", "training_ms", "training_ratio"}


@pytest.mark.parametrize("trained", [True, False])
def test_benchmark_measures_the_model_beside_its_twins(cli, tiny, tiny_run, tmp_path, trained):
    argv = ["--ckpt_path", tiny_run] if trained else tiny(tmp_path)
    done = cli("benchmark", *argv, "--rounds=2", "--batch_sizes=[1,3]", "--json", tmp_path / "b.json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads((tmp_path / "b.json").read_text())
    names = ["dense", "moe", "moe, all experts"]
    assert [(row["batch"], row["model"]) for row in rows] == [(batch, name) for batch in (1, 3) for name in names]
    for row in rows:
        assert row.keys() >= ROW
        assert all(row[name] > 0 and math.isfinite(row[name]) for name in ROW - {"model"})
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["latency_ms"])
    dense, moe, every = rows[:3]
    assert dense["latency_ratio"] == dense["training_ratio"] == 1
    assert dense["params_total"] == dense["params_active"] < moe["params_total"]
    assert moe["multiply_adds"] < every["multiply_adds"]
    assert "benchmark: MoE beside the dense twin" in done.out


@pytest.mark.slow
def test_benchmark_measures_memory(cli, tiny, tmp_path):
    """Each model in a process of its own."""
    done = cli("benchmark", *tiny(tmp_path), "--rounds=1", "--batch_sizes=[64]", "--json", tmp_path / "b.json")
    assert done.code == 0, done.err
    peaks = [row["training_peak_mib"] for row in json.loads((tmp_path / "b.json").read_text())]
    assert all(0 < peak < 500 for peak in peaks)
