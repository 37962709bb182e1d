"""Shared fixtures. Shapes in moecore's signatures are checked at run time here, and only here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.environ.get("MOECORE_TEST_SHAPES", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("moecore", "beartype.beartype")

import torch

DATA = Path(os.environ.get("MOECORE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Real data and reference outputs for the tests that need them; they skip where it is missing."""


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def untyped() -> Iterator[None]:
    """Shape checks, which cannot be traced, are off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def shared_data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"no reference data at {DATA} (set MOECORE_TEST_DATA)")
    return DATA
