"""The benchmark: fair timing, the skew it claims, rows that can be read back."""

from __future__ import annotations

import functools
import json
import time

import pytest
import torch

import moecore
from moecore.benchmark.__main__ import main
from moecore.benchmark.peers import peers
from moecore.benchmark.shapes import SHAPES, Shape, build, skewed
from moecore.benchmark.timing import SLOW_ROUNDS, interleave, peak_memory

TINY = Shape("tiny", tokens=256, width=16, hidden=32, experts=4, top_k=2, shared=16)


def busy(seconds: float):
    def call() -> None:
        calls.append(seconds)
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    calls: list[float] = []
    return call, calls


def test_ratios_are_to_the_first_and_slow_contenders_stop_early():
    (base, _), (twice, calls), (slow, few) = busy(2e-3), busy(4e-3), busy(4e-2)
    timings = interleave({"base": base, "twice": twice, "slow": slow}, rounds=8, warmup=1)
    assert timings["base"].ratio == 1.0
    assert timings["twice"].ratio == pytest.approx(2.0, rel=0.2)
    assert timings["slow"].ratio == pytest.approx(20.0, rel=0.2)
    assert len(calls) == 8 + 1
    assert len(few) == SLOW_ROUNDS + 1


@pytest.mark.parametrize("shape", [TINY, *SHAPES.values()], ids=lambda shape: shape.name)
def test_dense_counterpart_has_the_active_multiply_adds_of_the_experts(shape):
    router = shape.width * shape.experts
    few = Shape(shape.name, 8, shape.width, shape.hidden, shape.experts, shape.top_k, shape.shared)
    x = few.input()
    moe, dense = moecore.count_cost(few.moe("sorted"), x), moecore.count_cost(few.dense(), x)
    assert moe.macs == dense.macs + len(x) * router


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_skewed_sends_the_share_it_says_to_one_expert(share):
    x = TINY.input()
    layer = skewed(TINY.moe("sorted"), x, share)
    assert layer.router(x).assignment.load()[0] / len(x) == pytest.approx(share, abs=0.02)


def test_rows_are_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "recsys", TINY)
    rows = main(["--shapes", "recsys", "--rounds", "3", "--no-memory", "--json", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    names = ["dense FFN", "moecore sorted", "moecore grouped_mm", "moecore sorted, skewed"]
    assert [row["layer"] for row in rows] == names
    assert rows[0]["forward_ratio"] == 1.0
    assert all(row["forward_ms"] > 0 and row["training_ms"] > row["forward_ms"] for row in rows)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_peers_take_the_shape():
    """Whatever peer is installed gives [T, D] from [T, D]."""
    found = dict(peers(TINY))
    if not found:
        pytest.skip("no peer is installed (transformers, st-moe-pytorch, tutel)")
    for layer in found.values():
        assert layer(torch.randn(8, TINY.width)).shape == (8, TINY.width)


def test_peak_memory_is_that_of_forward_and_backward():
    """An FFN keeps its hidden units for backward: at least gate, up and their product."""
    shape = Shape("large", tokens=4096, width=64, hidden=512, experts=2, top_k=2)
    peak = peak_memory(functools.partial(build, shape, None))
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    hidden = shape.tokens * shape.dense_hidden * 4
    assert 3 * hidden < peak < 10 * hidden
