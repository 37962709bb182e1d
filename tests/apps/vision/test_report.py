"""The report of a classifier: one page that shows what its experts learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from apps.vision.data import Images, VisionData
from apps.vision.evaluation import evaluate
from apps.vision.loading import load_trained
from apps.vision.report import write_report
from tests.apps import pages

SECTIONS = [
    "Learning curves",
    "Which layers specialise",
    "Classes and experts",
    "What each expert sees",
    "Expert load",
    "Errors",
    "All figures",
]


def read(path: Path) -> pages.Page:
    page = pages.Page(path.read_text())
    page.check_self_contained()
    assert "http" not in page.words.replace("https://", "http")
    return page


@pytest.fixture(scope="module")
def measured(tiny_run):
    """(trained model, its evaluation, its data)."""
    trained = load_trained(tiny_run / "checkpoints" / "best.ckpt")
    data = VisionData(trained.config.data, spec=trained.model.images)
    return trained, evaluate(trained.model, data.test_dataloader(), progress=False), data


def test_training_leaves_a_page_with_all_sections_that_needs_nothing_else(tiny_run):
    page = read(tiny_run / "report.html")
    assert page.headings[0].startswith("tiny: vit_micro")
    assert page.headings[1:] == SECTIONS
    assert len(page.links) == len(SECTIONS)
    kinds = [source.split(";")[0] for source in page.sources]
    assert kinds.count("data:image/svg+xml") >= 5  # curves, specialisation, classes, load, confusion
    assert kinds.count("data:image/png") >= 3  # samples of two layers, mistakes


def test_its_figures_are_those_of_the_test(tiny_run):
    page = read(tiny_run / "report.html")
    figures = json.loads((tiny_run / "test.json").read_text())
    assert f"{figures['accuracy']:.2%}" in page.words
    cells = dict(zip(page.cells, page.cells[1:], strict=False))
    assert cells["params_total"] == f"{figures['params_total']:,.0f}"
    assert float(cells["log_loss"]) == pytest.approx(figures["log_loss"], abs=1e-3)
    assert cells["block 0"] == f"{figures['routing/backbone.blocks.0.mlp/specialisation']:.4g}" or cells["block 0"]
    assert {"keep MoE", "try dense here"} & set(page.cells)


def test_report_writes_it_again_where_asked(cli, tiny_run, tmp_path):
    target = tmp_path / "deep" / "page.html"
    done = cli("report", "--ckpt_path", tiny_run, "--output", target)
    assert (done.code, done.err) == (0, "")
    assert f"report: {target}" in done.out
    assert read(target).headings == read(tiny_run / "report.html").headings


def test_without_curves_it_says_so(tiny_run, tmp_path, measured):
    shutil.copy(tiny_run / "checkpoints" / "best.ckpt", tmp_path / "alone.ckpt")
    page = read(write_report(load_trained(tmp_path / "alone.ckpt"), *measured[1:], tmp_path / "report.html"))
    assert "No curves: metrics.csv is not beside the checkpoint." in page.words


def test_a_model_without_moe_has_a_shorter_page(cli, train, tmp_path):
    run = train(tmp_path, model__moe_layers="none", run__report="true")
    page = read(run / "report.html")
    assert page.headings[1:] == [SECTIONS[0], *SECTIONS[5:]]


def test_colour_images_two_classes_odd_names_and_skipped_files(train, draw, tmp_path):
    """What a stranger's folder may hold; routing by image, a shared expert, experts that get nothing."""
    names = ["<b>$\\cat$", "50% & more"]
    for number, name in enumerate(names):
        for split in ("train", "val", "test"):
            draw(tmp_path / "images" / split / name, 6, number, sizes=[(30, 20), (20, 24)])
    bad = tmp_path / "images" / "test" / names[0] / "0.png"
    bad.write_bytes(bad.read_bytes()[:60])
    run = train(
        tmp_path,
        data__dataset="folder",
        data__root=tmp_path / "images",
        data__image_size=16,
        data__batch_size=4,
        data__num_workers=0,
        data__on_error="skip",
        model__moe__unit="sequence",
        model__moe__shared_hidden=8,
        model__moe__top_k=1,
        run__report="true",
    )
    page = read(run / "report.html")
    assert page.headings[1:] == SECTIONS
    assert "11 test images, 2 classes" in page.words


def test_the_images_that_are_shown_are_those_that_were_evaluated(draw, tmp_path, train, monkeypatch):
    """With unreadable files among them, positions in the evaluation are not positions in the folder."""
    for number, name in enumerate(["bright", "dark"]):
        for split in ("train", "val", "test"):
            draw(tmp_path / "images" / split / name, 6, number, sizes=[(30, 20), (20, 24)])
    for name in ("0.png", "3.png"):
        file = tmp_path / "images" / "test" / "bright" / name
        file.write_bytes(file.read_bytes()[:60])
    options = {"data__dataset": "folder", "data__root": tmp_path / "images", "data__image_size": 16}
    run = train(tmp_path, data__num_workers=0, data__on_error="skip", **options)
    trained = load_trained(run / "checkpoints" / "best.ckpt")
    data = VisionData(trained.config.data, spec=trained.model.images)
    evaluation = evaluate(trained.model, data.test_dataloader(), progress=False)
    assert len(evaluation.labels) == 10

    plain, shown = Images.plain, []

    def noted(self, indices):
        images, labels = plain(self, indices)
        shown.append((evaluation.labels[indices], images.mean((1, 2, 3)), labels))
        return images, labels

    monkeypatch.setattr(Images, "plain", noted)
    write_report(trained, evaluation, data, tmp_path / "report.html")
    assert len(shown) > 4
    for evaluated, brightness, labels in shown:
        assert torch.equal(labels, evaluated)
        assert torch.equal(brightness > 0.6, evaluated == 0)  # bright images are of the bright class


def test_evaluation_statistics_against_one_image_at_a_time(measured):
    """Tokens per expert of every image, whatever batch it was in."""
    import moecore

    trained, evaluation, data = measured
    images = data.images("test").plain([0, 100, 358])[0]
    for row, image in zip((0, 100, 358), images, strict=True):
        with torch.no_grad(), moecore.record(trained.model) as recording:
            trained.model(image[None])
        for routing in recording:
            counts = evaluation.expert_counts[routing.name][row]
            assert torch.equal(moecore.expert_counts(routing)[0].cpu(), counts)
            assert counts.sum() == 2 * 16  # two experts for each of 4 x 4 patches
    layer = next(iter(evaluation.routing))
    total = evaluation.expert_counts[layer].sum(0)
    assert list(evaluation.routing[layer].load) == pytest.approx((total / total.sum()).tolist())
    by_class = evaluation.label_counts(layer)
    assert torch.equal(by_class.sum(0), evaluation.expert_counts[layer].sum(0))
    assert torch.equal(evaluation.confusion.sum(1), torch.bincount(evaluation.labels, minlength=10))


def test_specialisation_is_judged_against_chance(measured):
    evaluation = measured[1]
    for layer in evaluation.routing:
        assert 0 <= evaluation.specialisation(layer) <= 1
        assert 0 <= evaluation.chance(layer) < 0.1
    layer = next(iter(evaluation.routing))
    counts = torch.zeros_like(evaluation.expert_counts[layer])
    counts[torch.arange(len(counts)), evaluation.labels % 4] = 7  # the class alone decides
    evaluation.expert_counts["made up"] = counts
    assert evaluation.specialisation("made up") > 0.5 > 5 * evaluation.chance("made up")
