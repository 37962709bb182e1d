"""Every verb on a trained run of several tasks."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import moecore
from apps import search_settings
from apps.errors import UserError
from apps.vision import APP
from apps.vision.multitask.data import MultiTaskData
from apps.vision.multitask.loading import load_trained
from apps.vision.multitask.prediction import predict_image

TASKS = ("semseg", "depth", "normals", "edges", "classification")
QUIET = "--trainer.enable_progress_bar=false"


def figures_of(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def trained(scenes_run):
    return load_trained(scenes_run / "checkpoints" / "best.ckpt")


@pytest.fixture(scope="module")
def data(trained):
    return MultiTaskData(trained.config.data, TASKS, spec=trained.model.spec)


@pytest.fixture(scope="module")
def held_out(data):
    return data.images("test").plain(list(range(16)))


def test_evaluation_repeats_the_test_of_training(cli, scenes_run, tmp_path):
    done = cli("evaluate", "--ckpt_path", scenes_run, "--json", tmp_path / "e.json")
    assert (done.code, done.err) == (0, "")
    found, kept = figures_of(tmp_path / "e.json"), figures_of(scenes_run / "test.json")
    for values in (found, kept):
        assert values.pop("images_per_second") > 0
    assert found == kept


@torch.no_grad()
def test_evaluation_counts_right(scenes_run, trained, held_out):
    """Against sums over the images, one by one."""
    images, labels = held_out
    figures = figures_of(scenes_run / "test.json")
    predictions = [trained.model(image[None]) for image in images]
    depth = torch.cat([p["depth"][:, 0] for p in predictions])
    assert figures["depth/rmse"] == pytest.approx(float((depth - labels["depth"]).square().mean().sqrt()), rel=1e-4)
    unit = torch.nn.functional.normalize(torch.cat([p["normals"] for p in predictions]), dim=1)
    angle = torch.rad2deg(torch.acos((unit * labels["normals"]).sum(1).clamp(-1, 1)))
    assert figures["normals/mean_angle"] == pytest.approx(float(angle.mean()), rel=1e-3)
    found = torch.cat([p["semseg"].argmax(1) for p in predictions])
    truth, ious = labels["semseg"], []
    for number in range(len(trained.model.spec.task("semseg").classes)):
        union = ((found == number) | (truth == number)).sum()
        if union:
            ious.append(float(((found == number) & (truth == number)).sum() / union))
    assert figures["semseg/miou"] == pytest.approx(sum(ious) / len(ious), rel=1e-4)
    right = torch.cat([p["classification"].argmax(1) for p in predictions]) == labels["classification"]
    assert figures["classification/accuracy"] == pytest.approx(float(right.float().mean()))
    assert 0 <= figures["edges/odsf"] <= 1


@torch.no_grad()
def test_use_of_experts_is_counted_per_task(scenes_run, trained, held_out):
    from apps.vision.multitask.evaluation import evaluate

    evaluation = evaluate(trained.model, [held_out], progress=False)
    with moecore.record(trained.model) as recording:
        trained.model(held_out[0], ["edges"])
    for routing in recording:
        load = routing.assignment.load().double()
        torch.testing.assert_close(evaluation.use[routing.name][3].double(), load / load.sum(), atol=1e-6, rtol=0)
        assert torch.equal(evaluation.maps["edges"][routing.name].long(), moecore.token_map(routing)[:6].long())
    name = "routing/backbone.blocks.1.mlp/task_specialisation"
    figures = figures_of(scenes_run / "test.json")
    assert figures[name] == pytest.approx(moecore.specialisation(evaluation.use["backbone.blocks.1.mlp"]), abs=1e-5)


def test_delta_m_against_single_task_runs(cli, scenes_run, tmp_path):
    """Baselines are runs in a folder; their figures stand for runs of one task each."""
    figures = figures_of(scenes_run / "test.json")
    judged = {"semseg": "miou", "depth": "rmse", "normals": "mean_angle", "edges": "odsf", "classification": "accuracy"}
    better = {"depth": -1, "normals": -1}
    changes = {task: 0.1 * (i + 1) for i, task in enumerate(TASKS)}
    for task, metric in judged.items():
        single = figures[f"{task}/{metric}"] or 0.5
        folder = tmp_path / "singles" / task
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps({f"{task}/{metric}": single * (1 + changes[task]), "images": 16}))
    shutil.copytree(scenes_run, tmp_path / "singles" / "all")
    done = cli(
        "evaluate",
        "--ckpt_path",
        scenes_run,
        f"--tasks.baselines={tmp_path / 'singles'}",
        "--json",
        tmp_path / "e.json",
        QUIET,
    )
    assert done.code == 0, done.err
    found = figures_of(tmp_path / "e.json")
    expected = {}
    for task, metric in judged.items():
        single = (figures[f"{task}/{metric}"] or 0.5) * (1 + changes[task])
        expected[task] = 100 * better.get(task, 1) * (figures[f"{task}/{metric}"] - single) / single
        assert found[f"delta/{task}"] == pytest.approx(expected[task], abs=1e-6)
    assert found["delta_m"] == pytest.approx(sum(expected.values()) / 5, abs=1e-6)
    (tmp_path / "empty").mkdir()
    line = cli("evaluate", "--ckpt_path", scenes_run, f"--tasks.baselines={tmp_path / 'empty'}", QUIET).line
    assert line.startswith(f"tasks.baselines={tmp_path / 'empty'}: no figures of single-task runs")


@pytest.mark.parametrize("size", [(40, 60), (31, 47)])
def test_predictions_are_written_at_the_size_of_the_image(cli, scenes_run, trained, data, tmp_path, size):
    pixels = (data.images("test").plain([0])[0][0].permute(1, 2, 0) * 255).round().byte().numpy()
    (tmp_path / "in" / "below").mkdir(parents=True)
    Image.fromarray(pixels).resize(size[::-1]).save(tmp_path / "in" / "below" / "room.png")
    done = cli("predict", "--ckpt_path", scenes_run, "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    folder = tmp_path / "out" / "below" / "room"
    for task in TASKS[:-1]:
        with Image.open(folder / f"{task}.png") as drawn:
            assert drawn.size == size[::-1]
        assert np.load(folder / f"{task}.npy").shape == ((3, *size) if task == "normals" else size)
    (row,) = figures_of(tmp_path / "out" / "predictions.json")
    with Image.open(tmp_path / "in" / "below" / "room.png") as drawn:
        image = torch.from_numpy(np.asarray(drawn).copy()).permute(2, 0, 1) / 255
    found = predict_image(trained.model, image)
    assert row["classification"] == trained.model.spec.task("classification").classes[int(found["classification"])]
    assert row["folder"] == "below/room"
    np.testing.assert_array_equal(np.load(folder / "depth.npy"), found["depth"].numpy())
    np.testing.assert_allclose(np.linalg.norm(np.load(folder / "normals.npy"), axis=0), 1, atol=1e-4)


def test_images_that_differ_in_their_suffix_alone_have_folders_of_their_own(cli, scenes_run, draw, tmp_path):
    draw(tmp_path / "in", 1)
    draw(tmp_path / "in", 1, number=1, suffix=".jpg")
    assert cli("predict", "--ckpt_path", scenes_run, "--input", tmp_path / "in", "--output", tmp_path / "out").code == 0
    assert [row["folder"] for row in figures_of(tmp_path / "out" / "predictions.json")] == ["0.jpg", "0.png"]
    depths = [np.load(tmp_path / "out" / name / "depth.npy") for name in ("0.jpg", "0.png")]
    assert not np.array_equal(*depths)


def test_the_size_of_training_is_predicted_as_it_is_evaluated(trained, held_out):
    images, _ = held_out
    with torch.no_grad():
        whole = trained.model(images[:1])
    found = predict_image(trained.model, images[0])
    torch.testing.assert_close(found["depth"], whole["depth"][0, 0])


@pytest.mark.parametrize("task", ["semseg", "edges"])
def test_a_model_for_one_task_is_written_and_used_by_every_verb(cli, scenes_run, trained, held_out, tmp_path, task):
    target = tmp_path / "runs" / f"{task}.ckpt"
    done = cli(
        "export",
        "--ckpt_path",
        scenes_run,
        "--format=task",
        f"--task={task}",
        "--output",
        target,
        "--json",
        tmp_path / "x.json",
        QUIET,
    )
    assert (done.code, done.err) == (0, "")
    figures = figures_of(tmp_path / "x.json")
    assert figures["max_difference_inside"] <= 1e-6
    assert figures["file_bytes"] == target.stat().st_size
    small = load_trained(target).model
    assert figures["params_total"] == sum(p.numel() for p in small.parameters())
    images, _ = held_out
    with torch.no_grad():
        ours, theirs = small(images)[task], trained.model(images, [task])[task]
    assert float((ours - theirs).abs().max()) == pytest.approx(figures["max_difference"], abs=1e-7)
    done = cli("evaluate", "--ckpt_path", target, "--json", tmp_path / "e.json", QUIET)
    assert done.code == 0, done.err
    kept = figures_of(scenes_run / "test.json")
    found = figures_of(tmp_path / "e.json")
    assert {name.split("/")[0] for name in found if "/" in name} == {task, "routing"}
    metric = {"semseg": "semseg/miou", "edges": "edges/odsf"}[task]
    if figures["max_difference"] == 0:
        assert found[metric] == pytest.approx(kept[metric])
    assert cli("report", "--ckpt_path", target, "--output", tmp_path / "r.html", QUIET).code == 0
    assert "Predictions beside truth" in (tmp_path / "r.html").read_text()
    again = cli("export", "--ckpt_path", target, "--format=task", f"--task={task}", QUIET).line
    assert again == f"ckpt_path={target}: holds {task} alone; give the run of all tasks"


def test_weights_on_disk_shrink_with_what_is_left_out(cli, scenes_run, trained, tmp_path):
    """Bytes beside the weights are settings: a few kilobytes."""
    for share in ("0", "0.3"):
        target = tmp_path / f"{share}.ckpt"
        options = ["--format=task", "--task=depth", f"--min_share={share}", "--output", target]
        assert cli("export", "--ckpt_path", scenes_run, *options, QUIET).code == 0
        weights = 4 * sum(p.numel() for p in load_trained(target).model.parameters())
        assert weights < target.stat().st_size < weights + 60_000
    assert (tmp_path / "0.3.ckpt").stat().st_size < (tmp_path / "0.ckpt").stat().st_size


@pytest.mark.parametrize("task", [None, "normals"])
def test_onnx_gives_what_the_model_gives(untyped, cli, scenes_run, trained, held_out, tmp_path, task):
    target = tmp_path / "m.onnx"
    named = [] if task is None else [f"--task={task}"]
    done = cli("export", "--ckpt_path", scenes_run, "--output", target, "--json", tmp_path / "x.json", *named, QUIET)
    assert (done.code, done.err) == (0, "")
    assert figures_of(tmp_path / "x.json")["max_relative_error"] < 1e-4
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == ([*TASKS] if task is None else [task])
    images = held_out[0][:3]
    with torch.no_grad():
        expected = trained.model(images, names)
    for name, value in zip(names, session.run(None, {"images": images.numpy()}), strict=True):
        np.testing.assert_allclose(value, expected[name].numpy(), atol=1e-4)


def test_benchmark_compares_all_tasks_with_one(cli, scenes_run, tmp_path):
    done = cli("benchmark", "--ckpt_path", scenes_run, "--batch_sizes=2", "--rounds=2", "--json", tmp_path / "b.json")
    assert (done.code, done.err) == (0, "")
    rows = {row["model"]: row for row in figures_of(tmp_path / "b.json")}
    assert rows["all tasks, a pass each"]["multiply_adds_ratio"] == 1
    assert rows["all tasks, shared prefix"]["multiply_adds_ratio"] < 1
    for task in TASKS:
        assert rows[f"{task}, cut out"]["multiply_adds_ratio"] <= 0.25
        assert rows[f"{task}, cut out"]["params"] <= rows[f"{task}, whole model"]["params"]


def test_conflict_is_measured_kept_and_reported(cli, scenes_run, tmp_path):
    run = tmp_path / "vision" / "moe"
    shutil.copytree(scenes_run, run)
    missing = cli("report", "--ckpt_path", run, "--beside", scenes_run, QUIET).line
    assert missing.startswith(f"beside={scenes_run}: no conflict was measured there")
    options = ["--conflict=true", "--conflict_batches=2", "--json", tmp_path / "e.json", QUIET]
    done = cli("evaluate", "--ckpt_path", run, *options)
    assert (done.code, done.err) == (0, "")
    assert -1 <= figures_of(tmp_path / "e.json")["ffn_cosine"] <= 1
    dense = ["--model.moe_layers=none", "--run.name=dense", f"--run.root={tmp_path}", "--run.report=false"]
    recipe = Path(__file__).parents[4] / "configs" / "vision" / "tiny_m3vit.yaml"
    assert cli("train", "-c", recipe, *dense, QUIET).code == 0
    assert cli("evaluate", "--ckpt_path", tmp_path / "vision" / "dense", *options).code == 0
    done = cli("report", "--ckpt_path", run, "--beside", tmp_path / "vision" / "dense", QUIET)
    assert (done.code, done.err) == (0, "")
    page = (run / "report.html").read_text()
    assert "Do tasks pull in different directions?" in page
    assert "within experts" in page


def test_the_report_has_its_sections(scenes_run):
    page = (scenes_run / "report.html").read_text()
    for title in (
        "Predictions beside truth",
        "Tasks and experts",
        "Which expert takes which patch",
        "Models for one task",
        "Learning curves",
        "Expert load",
    ):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<img") >= 6


def test_search_tries_settings_of_several_tasks(cli, tiny_tasks, tmp_path):
    (tmp_path / "space.yaml").write_text("optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\n")
    options = ["--space", tmp_path / "space.yaml", "--num_trials=2", "--json", tmp_path / "s.json"]
    done = cli("search", *tiny_tasks(tmp_path), *options)
    assert done.code == 0, done.err
    assert figures_of(tmp_path / "s.json")["best"]["trial"] in (0, 1)
    folder = tmp_path / "vision" / "search-scenes"
    with open(folder / "trials.csv", newline="") as text:
        values = {int(row["trial"]): float(row["value"]) for row in csv.DictReader(text)}
    assert figures_of(tmp_path / "s.json")["best"]["trial"] == min(values, key=values.__getitem__)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--tasks.names=semseg,colours"], "tasks.names=colours: "),
        (["--tasks.names=parts"], "tasks.names=parts: scenes has semseg, depth, normals, edges, classification"),
        (["--tasks.names=depth,depth"], "tasks.names='depth,depth': has depth twice"),
        (["--tasks.weights={semseg: 1}"], "tasks.weights={'semseg': 1.0}: no weight for depth"),
        (["--tasks.weights.semseg=-1"], "tasks.weights.semseg=-1"),
        (["--model.name=vimoe"], "data.dataset='scenes': needs model.name=m3vit"),
        (["--data.dataset=digits"], "model.name='m3vit': needs data.dataset scenes"),
        (["--tasks.specialise=1", "--model.moe.score=linear"], "tasks.specialise=1.0: needs gates that know the task"),
        (["--data.image_size=20"], "model.patch_size=8: must divide the image size 20 x 24"),
        (["--data.dataset=nyud"], "data.root=None: give the folder of images"),
        (["--data.dataset=nyud", "--data.root=/nowhere"], "data.root=/nowhere: "),
        (["--model.m3vit.decoder=task_expert", "--model.m3vit.decoder_layers=9"], "model.m3vit.decoder_layers=9: "),
    ],
)
def test_wrong_settings_are_one_line(cli, tiny_tasks, tmp_path, argv, line):
    assert cli("train", *tiny_tasks(tmp_path), *argv).line.startswith(line)
    assert not (tmp_path / "vision").exists()


@pytest.mark.parametrize(
    ("verb", "argv", "line"),
    [
        ("evaluate", ["--data.image_width=64"], "data.image_width=64: the model is of 48; leave it as it was"),
        ("evaluate", ["--tasks.names=depth"], "tasks.names=['depth']: the model is of []; leave it as it was"),
        ("train", ["--tasks.names=depth,edges"], "tasks.names=['depth', 'edges']: the run was started with []"),
        ("train", ["--tasks.weighting=dwa"], "tasks.weighting=dwa: the run was started with fixed"),
        ("report", ["--beside=/nowhere"], "beside=/nowhere: no such run folder"),
    ],
)
def test_what_a_run_was_trained_with_stays(cli, scenes_run, verb, argv, line):
    assert cli(verb, "--ckpt_path", scenes_run, *argv, QUIET).line.startswith(line)


def test_a_model_for_one_task_never_takes_the_place_of_a_run(cli, scenes_run):
    best = scenes_run / "checkpoints" / "best.ckpt"
    before = best.read_bytes()
    line = cli("export", "--ckpt_path", scenes_run, "--format=task", "--task=depth", "--output", best, QUIET).line
    assert line == f"output={best}: is where whole runs are kept; give another file"
    assert best.read_bytes() == before


def test_verbs_of_one_model_refuse_the_other(cli, scenes_run, tiny_run):
    assert cli("evaluate", "--ckpt_path", tiny_run, "--conflict=true").line.startswith("conflict=True: a classifier")
    assert cli("export", "--ckpt_path", tiny_run, "--task=depth").line.startswith("task='depth': a classifier")
    assert cli("export", "--ckpt_path", scenes_run, "--format=task").line.startswith("task=None: say which task")
    assert cli("export", "--ckpt_path", scenes_run, "--format=task", "--task=parts", QUIET).line == (
        "task=parts: this model has semseg, depth, normals, edges, classification"
    )


def test_what_does_nothing_is_known(scenes_run):
    """Of the settings of classifiers those that augment maps too count; a search may vary them."""
    config = load_trained(scenes_run / "checkpoints" / "best.ckpt").config
    search_settings.refuse_idle({"data.flip": {"choices": [True, False]}, "data.zoom": {}}, config, APP.unused)
    with pytest.raises(UserError, match=r"^space: data\.mixup: does nothing with these settings; give --model\.name"):
        search_settings.refuse_idle({"data.mixup": {"low": 0.0, "high": 1.0}}, config, APP.unused)
