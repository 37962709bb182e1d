"""Cycles against loops that are counted and schedules that are simulated; published latencies."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from export.fpga.latency import MEMORY_EFFICIENCY, PIPELINE_DEPTH, estimate
from export.fpga.resources import Design, load_device
from export.fpga.workload import Attention, Conv, Elementwise, Experts, Linear, Matmul, Workload, vit

ZCU102 = load_device("zcu102")
FAST = replace(ZCU102, bandwidth_gb_s=1e9)
"""Never waits for memory, given a port wide enough."""
WIDE = 10**9


def edge_moe(tokens):
    """The network of Edge-MoE (arXiv 2305.18691): M3ViT-tiny."""
    return vit(
        "m3vit",
        tokens=tokens,
        width=192,
        heads=3,
        depth=12,
        hidden=768,
        moe_layers=range(1, 12, 2),
        num_experts=16,
        top_k=2,
        expert_hidden=384,
    )


EDGE_MOE = Design(residency="weights", weight_bits=16, activation_bits=32, port_bits=256, clock_mhz=300)
"""16 x 16 multipliers, attention 4 x 8, formats <32,10> and <16,2>, a port of 256 bits at 300 MHz."""


def cycles(stage, device=FAST, **design):
    """Of one stage, without its pipeline's depth."""
    found = estimate(Workload("one", (stage,)), device, Design(**{"port_bits": WIDE, **design}))
    return found.cycles - PIPELINE_DEPTH


def count(*loops):
    """Iterations of a nest of loops, each (size, step)."""
    return sum(1 for _ in itertools.product(*(range(0, size, step) for size, step in loops)))


def test_linear_counts_the_loops():
    for to, ti, units in ((4, 8, 1), (7, 3, 2), (16, 16, 4)):
        stage = Linear("fc", 13, 50, 30)
        expected = count((13, units), (30, to), (50, ti))
        assert cycles(stage, out_tile=to, in_tile=ti, row_units=units) == expected
        assert cycles(stage, out_tile=to, in_tile=ti, row_units=units, initiation_interval=2) == 2 * expected


def test_conv_counts_the_loops_of_each_group():
    stage = Conv("c", 5, 6, channels=8, outputs=12, kernel_height=3, kernel_width=3, groups=4)
    assert cycles(stage, out_tile=2, in_tile=8, row_units=4) == count((30, 4), (4, 1), (3, 2), (18, 8))
    depthwise = Conv("c", 5, 6, channels=8, outputs=8, kernel_height=3, kernel_width=3, groups=8)
    assert cycles(depthwise, out_tile=2, in_tile=8) == count((30, 1), (8, 1), (1, 2), (9, 8))


def test_attention_streams_skewed_queries():
    # groups of 4 of 22 + 3 queries, each over 22 keys, over 48 / 8 products; scores, then values
    assert cycles(Attention("a", 22, 3, 48), query_tile=4, width_tile=8) == 2 * 7 * 22 * 6
    # few products a score: exponentials are what takes longest
    assert cycles(Attention("a", 22, 24, 48), query_tile=2, width_tile=48) == 24 * 22 * 22 // 2


def test_matmul_leaves_the_fewest_multipliers_idle():
    assert cycles(Matmul("s", 3, 22, 16, 22), query_tile=4, width_tile=8) == 3 * 7 * 22 * 2
    assert cycles(Matmul("v", 3, 22, 22, 16), query_tile=4, width_tile=8) == 3 * 7 * 22 * 2


def test_elementwise_lanes():
    assert cycles(Elementwise("n", "norm", 1000, 2), out_tile=16) == 2 * 63
    assert cycles(Elementwise("s", "softmax", 1000, 3), query_tile=8) == 3 * 125


def simulated(loads, computes):
    """End of the last computation: one port, one array, two buffers."""
    loaded, computed = [0.0], [0.0, 0.0]
    for load, compute in zip(loads, computes, strict=True):
        start = max(loaded[-1], computed[-2])  # the port is free, and the buffer before last has been used up
        loaded.append(start + load)
        computed.append(max(loaded[-1], computed[-1]) + compute)
    return computed[-1]


@pytest.mark.parametrize(("tokens", "port"), [(4, 64), (32, 64), (256, 64), (64, 512)])
def test_experts_are_double_buffered(tokens, port):
    """Against a simulation of the schedule; both where loading and where computing takes longer."""
    stage = Experts("m", tokens, 2, 8, 64, 32, 48)
    design = Design(out_tile=8, in_tile=8, residency="weights", port_bits=port, weight_bits=16)
    found = estimate(Workload("m", (stage,)), FAST, replace(design, activation_bits=1)).cycles - PIPELINE_DEPTH
    load = stage.expert_weights * 2 * 8 / port
    compute = tokens * 2 / 8 * (4 * 8 + 6 * 4)
    moved = (stage.reads + stage.writes) / 8 * 8 / port  # activations of one expert, with those loads
    expected = simulated([load] + [load + moved] * 7, [compute] * 8)
    assert found == pytest.approx(expected, rel=0.002)


def test_expert_rows_are_shared_out_evenly():
    # 10 slots over 4 experts: 3, 3, 2, 2 rows; two units take 2, 2, 1, 1 steps
    stage = Experts("m", 5, 2, 4, 8, 8, 8, gated=True)
    found = estimate(Workload("m", (stage,)), FAST, Design(out_tile=8, in_tile=8, row_units=2, port_bits=WIDE))
    assert found.stages[0].compute_cycles == 6 * 3


def test_memory_bound_step():
    """One token: every weight is used once, so the port decides."""
    stage = Linear("fc", 1, 1024, 1024)
    z7020 = load_device("z7020")
    found = estimate(Workload("step", (stage,)), z7020, Design(port_bits=256, clock_mhz=100))
    seconds = stage.weights * 2 / (2.1e9 * MEMORY_EFFICIENCY)
    assert found.milliseconds == pytest.approx(1e3 * seconds, rel=1e-3)
    assert found.stages[0].bound == "memory"
    narrow = estimate(Workload("step", (stage,)), z7020, Design(port_bits=32, clock_mhz=100))
    assert narrow.milliseconds == pytest.approx(1e3 * stage.weights * 2 / 4 / 100e6, rel=1e-3)


def test_traffic_of_each_residency():
    stage = Linear("fc", 10, 64, 96)
    moved = {}
    for residency in ("activations", "weights", "tiles"):
        design = Design(port_bits=8, residency=residency, activation_bits=12, out_tile=16)
        moved[residency] = estimate(Workload("w", (stage,)), FAST, design).stages[0].memory_cycles
    weights = 65 * 96 * 2
    assert moved == {
        "activations": weights,
        "weights": weights + 10 * (64 + 96) * 2,
        "tiles": weights + 10 * (6 * 64 + 96) * 2,
    }


def test_tiles_move_hidden_values_of_experts():
    stage = Experts("m", 6, 2, 4, 64, 32, 48)
    design = Design(port_bits=8, residency="tiles", activation_bits=8, weight_bits=8, out_tile=16)
    found = estimate(Workload("w", (stage,)), FAST, design).stages[0].memory_cycles
    tokens = 12 * 64 * 2  # for both tiles of hidden values
    hidden = 12 * 32 * (1 + 3)  # written once, read for each of three tiles of outputs
    assert found == stage.weights + tokens + hidden + stage.writes


def test_latency_adds_up_and_units_overlap():
    workload = edge_moe(197)
    found = estimate(workload, ZCU102, EDGE_MOE)
    linear, attention = found.kernel_cycles("linear"), found.kernel_cycles("attention")
    assert found.cycles == linear + attention == sum(stage.cycles for stage in found.stages)
    assert found.interval_cycles == max(linear, attention, sum(stage.memory_cycles for stage in found.stages))
    assert found.per_second == pytest.approx(300e6 / found.interval_cycles)
    assert [stage.name for stage in found.stages] == [stage.name for stage in workload.stages]
    assert 0 < found.efficiency < 1
    assert found.efficiency == pytest.approx(workload.macs / ((256 + 32) * found.cycles))


def test_no_stage_beats_its_multipliers():
    for stage in edge_moe(50).stages:
        for design in (Design(), Design(out_tile=12, in_tile=24, row_units=2, query_tile=6, width_tile=16)):
            macs = design.attention_macs if stage.kernel == "attention" else design.linear_macs
            assert cycles(stage, **{**vars(design), "port_bits": WIDE}) >= math.floor(stage.macs / macs)


def test_plain_data():
    data = estimate(edge_moe(129), ZCU102, EDGE_MOE).as_dict()
    assert data["latency_ms"] == pytest.approx(data["cycles"] / 300e3)
    assert data["utilisation"]["dsp"] == data["resources"]["dsp"] / 2520
    assert data["stages"][0]["op"] == "linear"
    assert data["stages"][0]["bound"] == "compute"


def test_published_latency_of_edge_moe():
    """34.64 ms at 300 MHz on a ZCU102 (2.5 G operations, hence 197 tokens): the model says 1.9% less."""
    found = estimate(edge_moe(197), ZCU102, EDGE_MOE)
    assert found.milliseconds / 34.64 - 1 == pytest.approx(-0.019, abs=0.002)
    assert found.resources.within(ZCU102.budget())


def test_formula_at_129_tokens():
    """17.2 ms by the stages' formulae alone; norms, exposed loads and traffic of activations add 6.9%."""
    found = estimate(edge_moe(129), ZCU102, EDGE_MOE)
    assert found.milliseconds / 17.2 - 1 == pytest.approx(0.069, abs=0.002)
    linear = 12 * 129 * (36 + 12) * 12 + 6 * 2 * 129 * 48 * 12 + 128 * 12 * 48
    attention = 12 * 2 * 33 * 129 * 24
    experts = 6 * (max(2 * 2 * 129 * 24 * 12, 16 * 2 * 192 * 384 * 16 // 256) + 129 * 12)
    assert (linear + attention + experts) / 300e3 == pytest.approx(17.2, rel=0.02)
