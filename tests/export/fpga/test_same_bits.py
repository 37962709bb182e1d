"""The C++ and the simulator give the same bits, layer by layer; g++ watches for undefined behaviour meanwhile."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from export.errors import ExportError
from export.fpga.bundle import run_bundle, write_bundle
from export.fpga.manifest import checksum
from export.fpga.ops import OPS
from tests.export.fpga.random_layers import random_program

STRICT = "-std=c++14 -O0 -Wall -Wextra -Werror -Wno-unknown-pragmas -fsanitize=undefined -fno-sanitize-recover"


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", STRICT)


@pytest.mark.usefixtures("strict")
def test_random_layers_of_every_kind_with_extreme_values(tmp_path):
    program, inputs = random_program(0, 5)
    assert {layer.op.kind for layer in program.layers} == set(OPS)
    figures = write_bundle(program, [inputs], tmp_path / "bundle")
    assert figures["golden_overflows"] > 300  # saturation and wrap are met, not avoided
    last = run_bundle(tmp_path / "bundle").splitlines()[-1]
    assert last.startswith(f"PASSED: {len(program.layers)} layers, 1 runs, ")
    assert f" 0 mismatches, {figures['golden_overflows']:.0f} overflows" in last


def test_one_wrong_bit_is_found_and_named(tmp_path):
    program, inputs = random_program(1, 1)
    program.layers = [layer for layer in program.layers if layer.op.kind in ("linear", "experts")]
    program.outputs["last"] = program.layers[-1].outputs[0]
    folder = tmp_path / "bundle"
    write_bundle(program, [inputs], folder)
    golden = folder / "golden" / "run_0" / "layer_0001_0.bin"
    codes = np.frombuffer(golden.read_bytes(), "<i4").copy()
    codes[-1] ^= 1
    sums = folder / "SHA256SUMS"
    before = checksum(golden.read_bytes())
    golden.write_bytes(codes.tobytes())
    if shutil.which("sha256sum"):
        with pytest.raises(ExportError, match=r"layer_0001_0\.bin: FAILED"):
            run_bundle(folder)
    line = f"{{}}  {golden.relative_to(folder)}"
    sums.write_text(sums.read_text().replace(line.format(before), line.format(checksum(golden.read_bytes()))))
    with pytest.raises(ExportError, match=r"the testbench failed: FAILED: 2 layers, 1 runs, \d+ values, 1 mismatches"):
        run_bundle(folder)
    (folder / "model.cpp").write_text("#error broken\n")
    with pytest.raises(ExportError, match="error: #error broken"):
        run_bundle(folder)
