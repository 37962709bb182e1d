"""Accuracy by width: what is compared, how it falls, how it is shown."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import moecore
from export.fpga.precision import Precision, as_table, plot, sweep
from export.trace import trace

D = 12


def model(routed: bool) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(D, D), nn.GELU()]
    if routed:
        layers.append(moecore.MoE.build(D, num_experts=6, top_k=2, hidden=8, activation="relu"))
        nn.init.normal_(layers[-1].router.score.weight)
    net = nn.Sequential(*layers, nn.Linear(D, 5)).eval()
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(8, D)).astype(np.float32)} for _ in range(12)]
    return trace(net, torch.from_numpy(feeds[0]["x"]), ["x"], ["y"]), feeds


def test_every_bit_halves_the_error_until_tables_bound_it():
    proto, feeds = model(routed=True)
    rows = sweep(proto, feeds[:6], feeds[6:], (8, 12, 16, 20, 24))
    errors = [row.error for row in rows]
    assert [(row.weight_width, row.activation_width) for row in rows] == [(w, w) for w in (8, 12, 16, 20, 24)]
    assert all(later < earlier / 4 for earlier, later in itertools.pairwise(errors[:3]))
    assert errors[0] > 3e-3
    assert errors[-1] < 2e-5
    assert (rows[-1].decisions, rows[-1].routing, rows[-1].overflows) == (1.0, 1.0, 0)
    assert 0.8 < rows[0].routing < 1.0  # 8 bits send some tokens elsewhere


def test_what_is_not_varied_stays():
    proto, feeds = model(routed=False)
    for varied, fixed, value in (("weights", "activation_width", 24), ("activations", "weight_width", 16)):
        rows = sweep(proto, feeds[:3], feeds[3:5], (8, 20), varied)
        assert [getattr(row, fixed) for row in rows] == [value, value]
        assert rows[1].error < rows[0].error / 4
        assert rows[0].routing is None


def test_agreement_is_counted_as_defined(monkeypatch):
    """With the float graph's own outputs in place of the simulator's, except for one row."""
    from export.fpga import precision
    from export.fpga.calibrate import FloatGraph
    from export.fpga.simulate import Simulation

    proto, feeds = model(routed=False)
    float_outputs = FloatGraph(proto).run(feeds[3])["y"].astype(np.float64)
    changed = float_outputs.copy()
    changed[2] = -changed[2]
    monkeypatch.setattr(precision, "simulate", lambda *args, **named: Simulation({"y": changed}, {"y": 3}))
    (row,) = sweep(proto, feeds[:3], [feeds[3]], (16,))
    assert row.decisions == 7 / 8
    assert row.overflows == 3
    assert row.error == pytest.approx(2 * np.linalg.norm(float_outputs[2]) / np.linalg.norm(float_outputs))


ROWS = [Precision(8, 8, 0.0123, 0.975, None, 4), Precision(16, 24, 1.5e-5, 1.0, 0.5, 0)]


def test_the_table():
    lines = as_table(ROWS).splitlines()
    assert lines[2] == "| 8 | 8 | 1.23e-02 | 97.50% | - | 4 |"
    assert lines[3] == "| 16 | 24 | 1.50e-05 | 100.00% | 50.00% | 0 |"
    assert ROWS[0].scalars() == {
        "weight_width": 8.0,
        "activation_width": 8.0,
        "error": 0.0123,
        "decisions": 0.975,
        "overflows": 4.0,
    }


def test_the_plot_is_a_picture(tmp_path):
    path = plot({"both": ROWS, "weights": ROWS}, tmp_path / "sub" / "precision.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [one.name for one in path.parent.iterdir()] == ["precision.png"]
