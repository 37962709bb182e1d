"""`torch.compile` and `torch.export` take layers whole.

Shape checks cannot be traced, so the tests proper, in `compile_cases.py`, run in a process that does without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("compile_cases.py")
ROOT = Path(__file__).parents[2]


def run_cases(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(CASES), *arguments]
    env = {**os.environ, "MOECORE_TEST_SHAPES": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_compile_and_export():
    run_cases()


@pytest.mark.slow
def test_inductor():
    """Minutes where no compiled kernel is cached."""
    run_cases("-m", "slow")
