"""Resource counts against datasheets' shapes and hand-computed sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import yaml

from export.fpga.resources import (
    DEVICES,
    Buffer,
    Design,
    Resources,
    accumulator_bits,
    block_rams,
    buffers,
    load_device,
    multiplier_dsps,
    resources,
    ultra_rams,
)
from export.fpga.workload import Attention, Conv, Experts, Linear, Workload
from moecore.errors import ConfigError

NAMES = sorted(path.stem for path in DEVICES.glob("*.yaml"))
SMALL = Workload("small", (Linear("fc", 100, 64, 96), Attention("a", 100, 2, 64), Experts("m", 100, 2, 8, 64, 32, 64)))


def used(device, workload=SMALL, **design):
    return resources(workload, Design(**design), load_device(device))


def test_device_files_are_complete_and_cite_their_sources():
    assert NAMES == ["u280", "z7020", "zcu102", "zcu104"]
    for name in NAMES:
        device = load_device(name)
        assert device.dsp > 0
        assert device.bram36 > 0
        # every slice of these families has two flip-flops for each LUT
        assert device.ff == 2 * device.lut
        text = (DEVICES / f"{name}.yaml").read_text()
        assert all(source in text for source in ("DS", "UG"))


def test_devices_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    values = yaml.safe_load((DEVICES / "zcu104.yaml").read_text())
    path.write_text(yaml.safe_dump({**values, "dsp": 5}))
    assert load_device(path) == replace(load_device("zcu104"), name="mine", dsp=5)
    path.write_text(yaml.safe_dump({**values, "dsps": 5}))
    with pytest.raises(ConfigError, match=r"dsps.*unknown"):
        load_device(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="fields of a device"):
        load_device(path)


@pytest.mark.parametrize(("name", "message"), [("zcu103", "zcu102, zcu104"), ("no.yaml", "no such file")])
def test_unknown_device(name, message):
    with pytest.raises(ConfigError, match=message):
        load_device(name)


@pytest.mark.parametrize(
    ("device", "a", "b", "slices"),
    [
        ("zcu102", 16, 16, 1),
        ("zcu102", 27, 18, 1),
        ("zcu102", 18, 27, 1),
        ("zcu102", 24, 16, 1),
        ("zcu102", 24, 24, 2),
        ("zcu102", 32, 16, 2),
        ("zcu102", 32, 32, 4),
        ("z7020", 25, 18, 1),
        ("z7020", 26, 18, 2),
        ("z7020", 24, 24, 2),
        # 18 bits with a sign and 17 without are 35
        ("zcu102", 35, 27, 2),
        ("zcu102", 36, 27, 3),
    ],
)
def test_wide_products_take_several_slices(device, a, b, slices):
    assert multiplier_dsps(a, b, load_device(device)) == slices


@pytest.mark.parametrize(
    ("depth", "width", "brams"),
    [
        (512, 36, 0.5),
        (512, 72, 1),
        (1024, 18, 0.5),
        (1024, 36, 1),
        (2048, 18, 1),
        (16384, 1, 0.5),
        (32768, 1, 1),
        (513, 36, 1),
        (512, 37, 1),
        (576, 4096, 114),
    ],
)
def test_block_ram_shapes(depth, width, brams):
    assert block_rams(depth, width) == brams


def test_block_rams_hold_their_bits():
    for depth in (65, 100, 1000, 5000, 40000):
        for width in (1, 9, 24, 100, 4096):
            assert block_rams(depth, width) * 36 * 1024 >= depth * width


def test_ultra_ram_shape():
    assert [ultra_rams(4096, 72), ultra_rams(4097, 72), ultra_rams(10, 73)] == [1, 2, 2]


def test_array_takes_a_slice_a_product():
    lone = Workload("fc", (Linear("fc", 8, 64, 64),))
    base = used("zcu102", lone, out_tile=8, in_tile=8)
    assert used("zcu102", lone, out_tile=8, in_tile=16).dsp - base.dsp == 64
    assert used("zcu102", lone, out_tile=8, in_tile=8, row_units=3).dsp - base.dsp == 128
    # no stage runs on the attention unit, so there is none
    assert used("zcu102", lone, out_tile=8, in_tile=8, query_tile=32) == base


def test_attention_multiplies_two_activations():
    narrow = used("zcu102", query_tile=4, width_tile=8, weight_bits=8, activation_bits=24)
    wide = used("zcu102", query_tile=4, width_tile=16, weight_bits=8, activation_bits=24)
    assert wide.dsp - narrow.dsp == 2 * 32  # 24 x 24 bits: two slices


def test_packing_needs_eight_bits_and_a_device_that_can():
    lone = Workload("fc", (Linear("fc", 8, 64, 64),))
    sizes = {"out_tile": 16, "in_tile": 14, "weight_bits": 8}
    for device, bits, saved in (("zcu102", 8, 96), ("zcu102", 9, 0), ("z7020", 8, 0)):
        plain = used(device, lone, activation_bits=bits, **sizes)
        packed = used(device, lone, activation_bits=bits, pack_int8=True, **sizes)
        assert plain.dsp - packed.dsp == saved  # 224 products: 112 slices, and 16 to part the sums


def test_accumulator_holds_the_longest_sum():
    design = Design(weight_bits=8, activation_bits=12)
    longest = Workload("w", (Linear("a", 1, 1000, 2), Conv("c", 2, 2, 512, 2, 3, 3), Linear("b", 1, 8, 2)))
    bits = accumulator_bits(longest, design)
    assert 2 ** (bits - 1) > 512 * 9 * 2**7 * 2**11
    assert bits == 8 + 12 + 13


def test_buffers_of_each_residency():
    design = Design(out_tile=16, in_tile=8, query_tile=2, width_tile=4, activation_bits=16, weight_bits=8)
    found = {name: buffers(SMALL, replace(design, residency=name)) for name in ("activations", "weights", "tiles")}
    whole = {buffer.name: buffer for buffer in found["weights"]}
    # the linear layer has 6 x 8 tiles, an expert 2 x 8 and 4 x 4
    assert whole["weights"] == Buffer("weights", 48, 16 * 8 * 8, copies=2)
    assert whole["keys and values"] == Buffer("keys and values", 100 * 32 // 4, 64, copies=4)
    assert whole["queues"] == Buffer("queues", 800, 7 + 16)
    assert whole["hidden"].depth == 2
    resident = {buffer.name: buffer for buffer in found["activations"]}
    assert resident["weights"].depth == 8
    assert resident["activations"] == Buffer("activations", 100 * 192 // 16, 256, copies=3)  # queries, keys, values
    assert resident["hidden"].depth == 100 * 2
    assert resident["outputs"].depth == 100 * 4
    neither = {buffer.name for buffer in found["tiles"]}
    assert neither == {"weights", "rows", "keys and values", "scores", "queues"}


def test_full_block_ram_spills_to_ultra_ram():
    large = Workload("large", (Linear("fc", 1024, 512, 512),))
    plain, spilled = used("zcu102", large), used("zcu104", large)
    assert plain.bram36 > load_device("zcu104").bram36
    assert plain.uram == 0
    # three copies of 32768 words of 256 bits: 8 x 4 UltraRAMs each, and two fewer suffice
    assert spilled.uram == 64
    assert plain.bram36 - spilled.bram36 == 2 * block_rams(32768, 256)
    assert spilled.bram36 <= load_device("zcu104").bram36
    small = used("zcu104")
    assert small.uram == 0


def test_wider_operands_never_take_less():
    for field in ("weight_bits", "activation_bits"):
        counts = [used("zcu102", **{field: bits}) for bits in range(8, 33, 2)]
        for narrow, wide in itertools.pairwise(counts):
            assert narrow.within(wide)


def test_shares_and_budgets():
    device = load_device("zcu104")
    assert Resources(864, 78, 0, 0, 0).share(device) == {"dsp": 0.5, "bram36": 0.25, "uram": 0, "lut": 0, "ff": 0}
    assert load_device("zcu102").budget(0.5) == Resources(1260, 456, 0, 137040, 274080)
    for ceiling in (0, 1.1):
        with pytest.raises(ConfigError, match="ceiling"):
            device.budget(ceiling)


@pytest.mark.parametrize("field", ["out_tile", "row_units", "weight_bits", "clock_mhz"])
def test_design_refuses_what_is_not_positive(field):
    with pytest.raises(ConfigError, match=f"{field}=0"):
        Design(**{field: 0})


def test_design_refuses_an_unknown_residency():
    with pytest.raises(ConfigError, match="activations, tiles, weights"):
        Design(residency="all")
