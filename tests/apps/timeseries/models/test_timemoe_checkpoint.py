"""Time-MoE in the published format: what is read and written, and what is said of folders that are not right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apps.errors import UserError
from apps.timeseries.model_settings import TimeMoEConfig
from apps.timeseries.models.timemoe import TimeMoE
from apps.timeseries.models.timemoe_checkpoint import to_published

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
GATE = "model.layers.1.ffn_layer.experts.3.gate_proj.weight"


@pytest.fixture(params=[4, 0], ids=["moe", "dense"])
def model(request) -> TimeMoE:
    return TimeMoE(TimeMoEConfig(**SIZES, num_experts=request.param, normalize="none")).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    return TimeMoE(TimeMoEConfig(**SIZES, num_experts=4)).save_pretrained(tmp_path / "model")


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in {**json.loads(file.read_text()), **changes}.items() if v != "gone"}))


def same(a: TimeMoE, b: TimeMoE) -> bool:
    theirs = b.state_dict()
    return a.state_dict().keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in a.state_dict().items())


def test_round_trip(model, tmp_path):
    again = TimeMoE.from_pretrained(model.save_pretrained(tmp_path / "new" / "model"))
    assert same(model, again)
    assert again.config == model.config or model.config.num_experts == 0
    assert not again.training
    context = torch.randn(2, 30)
    assert torch.equal(model.forecast(context, 100), again.forecast(context, 100))
    assert sorted(p.name for p in (tmp_path / "new" / "model").iterdir()) == ["config.json", "model.safetensors"]
    for parameter in again.parameters():
        assert parameter.requires_grad
        parameter.data.add_(1)  # ours to change: no view of a file


def test_names_and_shapes_are_the_published_ones(folder):
    stored = load_file(folder / "model.safetensors")
    assert len(stored) == 2 + 2 * (7 + 2 + 1 + 4 * 3 + 3 + 1) + 1 + 4
    assert stored["model.embed_layer.emb_layer.weight"].shape == (16, 1)
    assert stored["model.layers.0.self_attn.k_proj.bias"].shape == (8,)
    assert stored["model.layers.0.ffn_layer.gate.weight"].shape == (4, 16)
    assert stored[GATE].shape == (16, 16)
    assert stored["model.layers.1.ffn_layer.shared_expert.down_proj.weight"].shape == (16, 32)
    assert stored["lm_heads.3.out_layer.weight"].shape == (64, 16)
    dense = to_published(TimeMoE(TimeMoEConfig(**SIZES, num_experts=0)).state_dict())
    assert dense["model.layers.0.ffn_layer.up_proj.weight"].shape == (32, 16)


def test_the_published_50m_has_463_tensors():
    with torch.device("meta"):
        assert len(to_published(TimeMoE(TimeMoEConfig(preset="50m")).state_dict())) == 463


def test_settings_as_published(model, tmp_path):
    values = json.loads((model.save_pretrained(tmp_path) / "config.json").read_text())
    dense = model.config.num_experts == 0
    assert values["use_dense"] is dense
    assert values["apply_aux_loss"] is not dense  # the published code refuses both and neither
    assert values["horizon_lengths"] == [1, 8, 32, 64]
    assert values["num_key_value_heads"] == 2
    assert values["torch_dtype"] == "float32"
    assert values["auto_map"]["AutoModelForCausalLM"].endswith("--modeling_time_moe.TimeMoeForPrediction")


def shard(folder: Path, kind: str) -> None:
    """The same weights in two files and an index, or in a bin file."""
    stored = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    if kind == "bin":
        torch.save(stored, folder / "pytorch_model.bin")
        return
    stem, suffix = kind.split("*")
    names = sorted(stored)
    where = {}
    for i, part in enumerate((names[:20], names[20:])):
        file = f"{stem}-0000{i + 1}-of-00002{suffix}"
        tensors = {name: stored[name] for name in part}
        save_file(tensors, folder / file) if suffix == ".safetensors" else torch.save(tensors, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("kind", ["bin", "model*.safetensors", "pytorch_model*.bin"])
def test_other_files_of_weights(folder, kind):
    model = TimeMoE.from_pretrained(folder)
    shard(folder, kind)
    assert same(TimeMoE.from_pretrained(folder), model)
    model.save_pretrained(folder)  # the newer whole file counts, not the old index beside it
    changed = TimeMoE.from_pretrained(folder)
    changed.norm.weight.data.add_(1)
    changed.save_pretrained(folder)
    assert same(TimeMoE.from_pretrained(folder), changed)


def test_half_precision_is_read_as_float32_unless_asked(folder):
    stored = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors")
    model = TimeMoE.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.blocks[1].ffn.experts.gate[3], stored[GATE].float())
    half = TimeMoE.from_pretrained(folder, dtype=None)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    again = load_file(half.save_pretrained(folder) / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_settings_that_may_be_left_out_or_written_otherwise(folder):
    first = TimeMoE.from_pretrained(folder)
    edit_config(folder, rope_theta="gone", attention_dropout="gone", max_position_embeddings="gone", extra=1)
    assert TimeMoE.from_pretrained(folder).config == first.config
    edit_config(folder, apply_aux_loss=False)
    assert TimeMoE.from_pretrained(folder).config.aux_loss == 0


def test_settings_beside_a_published_model(folder):
    config = TimeMoEConfig(pretrained=str(folder), aux_loss=0.5, attention_dropout=0.25, hidden_size=64)
    model = TimeMoE.from_config(config)
    assert same(model, TimeMoE.from_pretrained(folder))
    assert (model.config.normalize, model.config.aux_loss, model.config.hidden_size) == ("instance", 0.5, 16)
    assert {block.attention.dropout for block in model.blocks} == {0.25}
    twin = TimeMoE.from_config(config, dense=True).config
    assert (twin.hidden_size, twin.intermediate_size, twin.num_experts) == (16, 64, 0)


def without(folder: Path, name: str) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored[name]
    save_file(stored, folder / "model.safetensors")


def with_tensor(folder: Path, name: str, *shape: int) -> None:
    save_file({**load_file(folder / "model.safetensors"), name: torch.ones(shape)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.remove(f / "config.json"), "no config.json there"),
        (lambda f: (f / "config.json").write_text("{"), r"config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), r"config.json: not an object"),
        (lambda f: edit_config(f, hidden_size="gone"), "no hidden_size"),
        (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (lambda f: edit_config(f, num_attention_heads=3), "hidden_size=16: must be a multiple of 3 heads"),
        (lambda f: edit_config(f, hidden_size="wide"), "config.json: "),
        (lambda f: edit_config(f, intermediate_size=1), "config.json has hidden=0"),
        (
            lambda f: edit_config(f, intermediate_size=64),
            r"experts.0.\w+.weight has shape \[16, 16\].*\[32, 16\]",
        ),
        (lambda f: edit_config(f, num_experts=5), r"ffn_layer.gate.weight has shape \[4, 16\].*\[5, 16\]"),
        (lambda f: edit_config(f, num_hidden_layers=1), r"model.layers.1.\S+ is not part of the model"),
        (lambda f: without(f, GATE), f"no tensor {GATE}"),
        (lambda f: with_tensor(f, GATE, 16, 15), rf"{GATE} has shape \[16, 15\]"),
        (lambda f: with_tensor(f, "lm_heads.4.out_layer.weight", 2), "lm_heads.4.out_layer.weight is not part of"),
        (lambda f: os.remove(f / "model.safetensors"), "no model.safetensors and no pytorch_model.bin"),
        (lambda f: (f / "model.safetensors").write_bytes(b"123"), "model.safetensors: damaged"),
    ],
)
def test_wrong_folders_are_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        TimeMoE.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_wrong_indices_are_one_line(folder):
    shard(folder, "model*.safetensors")
    os.remove(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: no such file, but the index names it"):
        TimeMoE.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        TimeMoE.from_pretrained(folder)


def test_a_bin_file_runs_no_code(folder):
    shard(folder, "bin")

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch ran",))

    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="refused"):
        TimeMoE.from_pretrained(folder)


def test_a_failed_save_leaves_the_old_weights(folder, monkeypatch):
    before = TimeMoE.from_pretrained(folder)
    model = TimeMoE.from_pretrained(folder)
    model.norm.weight.data.add_(1)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert same(TimeMoE.from_pretrained(folder), before)
    assert not list(folder.glob(".*"))
