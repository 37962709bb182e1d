"""What a device's host computes, and what is left for the device, are together the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps import exporting
from apps.errors import UserError
from apps.recsys.deploy import for_device, host_features
from apps.recsys.model_settings import ModelConfig
from export.exportable import in_torch
from export.measure import session_of
from tests.apps.recsys.deployed import ready

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("untyped")


@pytest.mark.parametrize("vectors", [False, True])
def test_host_and_device_are_the_model(vectors, monkeypatch):
    trained, one = ready(ModelConfig(name="mmoe"), monkeypatch)
    device = for_device(one, trained, vectors)
    host = session_of(host_features(one, trained, vectors))
    names = [found.name.removeprefix("encoded/") for found in host.get_outputs()]
    assert sorted(names) == sorted(device.inputs)
    assert set(names) == ({"features"} if vectors else {"numbers", "sequence.seen", "sparse"})
    for sample, own in zip(one.samples, device.samples, strict=True):
        encoded = dict(zip(names, host.run(None, dict(sample.feed)), strict=True))
        for name, tensor in zip(device.inputs, own.tensors, strict=True):
            np.testing.assert_allclose(encoded[name], tensor, atol=1e-5)
            assert np.isfinite(encoded[name]).all()
        np.testing.assert_allclose(in_torch(device.module)(own)[0], in_torch(one.module)(sample)[0], atol=1e-6)
    assert {tuple(tensor.shape[1:]) for tensor in device.example} == {t.shape[1:] for t in device.single().tensors}
    assert len(device.calibration) == len(one.calibration)
    assert device.metadata["tasks"] == ["click", "buy"]
    assert "inputs" not in device.metadata  # raw features are the host's


def test_models_of_more_than_one_vector_are_refused(monkeypatch):
    trained, one = ready(ModelConfig(name="aw_moe"), monkeypatch)
    with pytest.raises(UserError, match=r"^export: AW-MoE looks at sequences value by value, .*; use format=fpga$"):
        for_device(one, trained, vectors=True)
    assert for_device(one, trained, vectors=False).inputs == one.inputs


def test_the_verb_writes_what_the_host_computes(rec, home_run, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(exporting, "_write", lambda one, args, path: given.append(one) or {"layers": 3.0})
    done = rec("export", "--ckpt_path", home_run, "--format", "fpga", "--output", tmp_path / "net.fpga")
    assert (done.code, done.err) == (0, "")
    assert f"host: {tmp_path}/net.fpga.host.onnx" in done.out
    (one,) = given
    session = session_of(tmp_path / "net.fpga.host.onnx")
    assert {found.name for found in session.get_outputs()} == {f"encoded/{name}" for name in one.inputs}
    assert "inputs" in session.get_modelmeta().custom_metadata_map
    assert all(tensor.dtype in (torch.int64, torch.float32) for tensor in one.single().tensors)
