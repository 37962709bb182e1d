"""The report has what its model has, and says what stands out."""

from __future__ import annotations

import re

import pytest
import torch

import moecore
from apps.recsys.health import findings
from moecore import ExpertStack, GateStats, MultiGate


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
