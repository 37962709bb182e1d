"""The report has what its model has, and says what stands out."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

import moecore
from apps.recsys import pictures
from apps.recsys.health import findings
from apps.recsys.health_sparse import SparseStats, sparse_findings
from apps.recsys.metrics import calibration
from moecore import ExpertStack, GateStats, MultiGate
from moecore.multigate_bank import StackBank
from moecore.multigate_sparse import SparseMultiGate


@pytest.fixture(scope="module")
def page(rec, home_run, tmp_path_factory) -> str:
    target = tmp_path_factory.mktemp("report") / "deep" / "r.html"
    done = rec("report", "--ckpt_path", home_run, "--output", target)
    assert (done.code, done.err) == (0, "")
    assert f"report: {target}" in done.out
    return target.read_text()


def test_home_has_every_section(page):
    titles = re.findall(r"<h2[^>]*>([^<]*)", page)
    for part in ("Accuracy", "Users with short", "Calibration", "Learning curves", "Do tasks agree?"):
        assert any(title.startswith(part) for title in titles), (part, titles)
    assert sum(title.startswith("Experts and gates") for title in titles) == 2  # the meta level and that of tasks
    assert "best possible" in page
    assert "weight on own experts" in page
    assert "http" not in re.sub(r"http://www.w3.org\S*", "", re.sub(r'src="[^"]*"', "", page))


@pytest.mark.parametrize(("name", "levels"), [("mmoe", 1), ("ple", 2), ("shared_bottom", 0)])
def test_models_without_gates_have_the_other_sections(rec, small, tmp_path, name, levels):
    flags = small(tmp_path, model__name=name, run__name=name, data__rows=1000)
    done = rec("train", *flags, "--run.report=true")
    assert (done.code, done.err) == (0, "")
    page = (tmp_path / "recsys" / name / "report.html").read_text()
    assert len(re.findall(r"<h2[^>]*>Experts and gates", page)) == levels
    assert "Calibration" in page


@pytest.mark.parametrize(
    ("name", "levels", "changes"),
    [
        ("mmoe", 1, {"mmoe__num_experts": 4}),
        ("ple", 2, {}),
        ("home", 2, {"home__self_gate": "false", "home__feature_gate": "none"}),
    ],
)
def test_sparse_gates_have_their_section(rec, small, tmp_path, name, levels, changes):
    changes = {f"model__{key}": value for key, value in changes.items()} | {
        f"model__{name}__top_k": 1,
        "data__rows": 1000,
    }
    done = rec("train", *small(tmp_path, model__name=name, run__name=name, **changes), "--run.report=true")
    assert (done.code, done.err) == (0, "")
    page = (tmp_path / "recsys" / name / "report.html").read_text()
    assert len(re.findall(r"<h2[^>]*>Experts and gates", page)) == levels
    assert page.count("<figcaption>Share of rows that every gate sends to every expert; each row goes to 1.") == levels
    for group in ("short", "long"):
        assert page.count(f"<figcaption>The same, rows with {group} history.") == levels
    shares = [float(row) for row in re.findall(r"<tr><td>[\w.]+</td><td class=number>([\d.e-]+)</td>", page)]
    assert sum(shares) == pytest.approx(levels, abs=0.01)


def sparse_level():
    """Two gates of two experts each: one shared, one of its own; rows choose by the sign of their value."""
    banks = {name: StackBank(1, 1, [4]) for name in ("shared", "a", "b")}
    level = SparseMultiGate(banks, {"a": ["shared", "a"], "b": ["b", "shared"]}, 1, top_k=1)
    with torch.no_grad():
        for gate, scale in (("a", 5.0), ("b", 0.0)):
            (weight,) = [p for p in level.gates[gate].parameters() if p.dim() == 2]
            weight.copy_(torch.tensor([[scale], [-scale]]).view_as(weight))
    return level


def test_sparse_gates_are_counted_by_gate_and_expert():
    level = sparse_level()
    stats, group = SparseStats(level), SparseStats(level)
    for values in ([1.0, 2.0, -1.0], [3.0]):  # batches
        x = torch.tensor(values)[:, None]
        with moecore.record(level) as recording:
            level(x)
        stats.update(recording)
        group.update(recording, x[:, 0] < 0)
    (found,), (part,) = stats.health().values(), group.health().values()
    assert (found.gates, found.experts, found.top_k) == (("a", "b"), ("shared", "a", "b"), 1)
    assert found.visible.tolist() == [[True, True, False], [True, False, True]]
    assert found.sent.tolist()[0] == [0.75, 0.25, 0.0]
    assert part.sent.tolist()[0] == [0.0, 1.0, 0.0]
    assert sorted(found.sent.tolist()[1]) == [0.0, 0.0, 1.0]  # a tie, always to the same
    assert found.mass[0].sum() <= 1
    assert (found.mass > 0).tolist() == (found.sent > 0).tolist()
    assert found.dead() in ([], ["b"])
    dead = dataclasses.replace(found, sent=torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert (dead.dead(), dead.owner(0), dead.owner(1)) == (["a"], ("a", 1.0), ("none", 0.0))
    assert sparse_findings(dead) == [
        "Dead: no gate sends a row to a; raise the balance loss (balance), or take fewer experts.",
        "Degradation: shared belongs to a, which sends 100% of its rows.",
        "Collapse: a sends nearly all rows to shared; it chooses nothing.",
        "Collapse: b sends nearly all rows to b; it chooses nothing.",
    ]
    even = dataclasses.replace(found, sent=torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]))
    assert sparse_findings(even) == []


def health_of(change):
    torch.manual_seed(0)
    experts = {name: ExpertStack(count, 6, [4]) for name, count in {"shared": 2, "a": 1, "b": 1}.items()}
    level = MultiGate(experts, {"a": ["shared", "a"], "b": ["shared", "b"]}, 6, bias=True)
    with torch.no_grad():
        change(level)
    stats = GateStats()
    with moecore.record(level) as recording:
        level(torch.randn(200, 6))
    stats.update(recording.gates)
    return next(iter(stats.health().values()))


def owned(level):
    level.gates["a"].bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    level.gates["b"].bias.copy_(torch.tensor([-9.0, 0.0, 0.0]))


def starved(level):
    level.gates["a"].bias.copy_(torch.tensor([0.0, 0.0, -9.0]))


def loud(level):
    level.experts["shared"].weights[0][0].mul_(30)


def dead(level):
    level.experts["b"].biases[0].fill_(-99.0)


def even(level):
    level.gates["a"].weight.zero_()
    level.gates["a"].bias.zero_()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (owned, r"Degradation: shared.0 belongs to a, which has 100% of its mass\."),
        (starved, r"Under-fitting: a puts 0% of its weight on experts of its own; an even spread is 33%\."),
        (loud, r"Collapse: the outputs of shared.0 vary \d+\.\d times as much as those of \S+ .*"),
        (dead, r"Collapse: 100% of the activations of b are near zero; .*"),
        (even, r"Undifferentiated: a weights all its experts alike \(entropy 1.00 of 1\)\."),
    ],
)
def test_what_stands_out_is_a_sentence(change, sentence):
    found = findings(health_of(change))
    assert any(re.fullmatch(sentence, one) for one in found), found
    before = findings(health_of(lambda level: None))
    assert not any(re.fullmatch(sentence, one) for one in before), before


@pytest.mark.parametrize("name", ["click", "_click"])
@pytest.mark.parametrize("labels", [np.zeros(50), np.arange(50.0) % 2])
def test_calibration_is_drawn_without_a_warning(name, labels):
    curve = calibration(np.linspace(0, 1, 50), labels)
    (axes,) = pictures.calibration({name: curve}).axes
    assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == [name]


def test_a_value_that_is_none_is_written_as_a_word():
    (axes,) = pictures.matrix(np.array([[0.25, np.nan]]), ["a"], ["b", "c"], signed=True).axes
    assert [text.get_text() for text in axes.texts] == ["0.25", "undefined"]
