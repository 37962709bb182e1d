"""The published checkpoint format of Time-MoE: a folder with config.json and safetensors or bin files.

Experts are tensors of their own there and stacked here; everything else has another name only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from apps.errors import ConfigError, UserError
from apps.runs import load_plain
from apps.timeseries.model_settings import TimeMoEConfig
from moecore.files import atomic_path, write_atomic

FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "horizon_lengths": "horizons",
    "max_position_embeddings": "max_positions",
    "rope_theta": "rope_theta",
    "router_aux_loss_factor": "aux_loss",
    "attention_dropout": "attention_dropout",
}
"""Published name of a setting -> ours."""
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "horizon_lengths")
"""Settings without which a folder is not of a Time-MoE; the published defaults of the others are ours."""
FIXED = {"input_size": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6}
"""Settings that have one value in every published checkpoint, and here."""
CODE = "Maple728/TimeMoE-50M"
"""Where transformers finds the classes that read the format."""
_BLOCK = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.query.bias": "self_attn.q_proj.bias",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.key.bias": "self_attn.k_proj.bias",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.value.bias": "self_attn.v_proj.bias",
    "attention.out.weight": "self_attn.o_proj.weight",
    "ffn.router.score.weight": "ffn_layer.gate.weight",
    "ffn.shared.gate.weight": "ffn_layer.shared_expert_gate.weight",
    **{f"ffn.shared.bank.{part}": f"ffn_layer.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")},
    **{f"ffn.{part}.weight": f"ffn_layer.{part}_proj.weight" for part in ("gate", "up", "down")},
}
"""Our name within a block -> the published one."""


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names -> views of them by published names, one per expert."""
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match name.split(".", 2):
            case ["blocks", layer, rest] if rest in _BLOCK:
                published[f"model.layers.{layer}.{_BLOCK[rest]}"] = tensor[0] if ".shared.bank." in name else tensor
            case ["blocks", layer, rest]:  # ffn.experts.PART
                prefix, part = f"model.layers.{layer}.ffn_layer.experts", rest.rpartition(".")[2]
                published |= {f"{prefix}.{i}.{part}_proj.weight": weight for i, weight in enumerate(tensor)}
            case ["embed", part, _]:
                published[f"model.embed_layer.{part}_layer.weight"] = tensor
            case ["heads", number, _]:
                published[f"lm_heads.{number}.out_layer.weight"] = tensor
            case _:
                published["model.norm.weight"] = tensor
    return published


def read_folder(folder: Path) -> tuple[TimeMoEConfig, dict[str, Tensor]]:
    """Settings and weights by our names.

    Raises:
        UserError: if something is missing, damaged, superfluous or of another shape.
    """
    config = read_config(folder)
    return config, to_ours(_read_tensors(folder), config, folder)


def read_config(folder: Path) -> TimeMoEConfig:
    """Settings of a folder.

    Raises:
        UserError: if there are none, or they are of another kind of model.
    """
    file = folder / "config.json"
    values = _read_json(file)
    for name in REQUIRED:
        if name not in values:
            raise UserError(f"{file}: no {name}; these are not the settings of a Time-MoE")
    for name, only in FIXED.items():
        if values.get(name, only) != only:
            raise UserError(f"{file}: {name}={values[name]!r} is not supported; published checkpoints have {only!r}")
    own = {ours: values[theirs] for theirs, ours in FIELDS.items() if values.get(theirs) is not None}
    if values.get("use_dense"):
        own |= {"num_experts": 0, "aux_loss": 0.0}
    if not values.get("apply_aux_loss", True):
        own["aux_loss"] = 0.0
    try:
        horizons = own["horizons"]
        own["horizons"] = (horizons,) if isinstance(horizons, int) else tuple(horizons)
        return TimeMoEConfig(**own)
    except (ConfigError, TypeError) as error:
        raise UserError(f"{file}: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"pretrained={file.parent}: no {file.name} there; give a folder in the published format"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: not an object of names and values")
    return values


def to_ours(stored: Mapping[str, Tensor], config: TimeMoEConfig, source: object = "weights") -> dict[str, Tensor]:
    """Tensors by published names -> by our names, experts stacked, in the dtype of the final norm.

    Raises:
        UserError: names the first tensor that is missing, superfluous or of another shape.
    """
    from apps.timeseries.models.timemoe import TimeMoE  # which imports this module

    try:
        with torch.device("meta"):
            ours = TimeMoE(config).state_dict()
    except ConfigError as error:
        raise UserError(f"{source}: config.json has {error}") from None
    wanted = to_published(ours)
    for name, view in wanted.items():
        if name not in stored:
            raise UserError(f"{source}: no tensor {name}; are config.json and weights of one model?")
        if stored[name].shape != view.shape:
            has, needs = list(stored[name].shape), list(view.shape)
            raise UserError(f"{source}: {name} has shape {has}; config.json asks for {needs}")
    extra = sorted(stored.keys() - wanted.keys())
    if extra:
        raise UserError(f"{source}: {extra[0]} is not part of the model that config.json describes")
    dtype = stored["model.norm.weight"].dtype
    state = {name: torch.empty_like(tensor, device="cpu", dtype=dtype) for name, tensor in ours.items()}
    for name, view in to_published(state).items():
        view.copy_(stored[name])
    return state


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from the first kind of file that it has; as transformers looks for them."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise UserError(f"{index}: no weight_map; it should say which file has which tensor")
            files = [folder / shard for shard in sorted(set(shards.values()))]
            return {name: tensor for file in files for name, tensor in _read_file(file).items()}
    raise UserError(f"pretrained={folder}: no model.safetensors and no pytorch_model.bin there")


def _read_file(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"{file}: no such file, but the index names it")
    try:
        stored = load_file(file) if file.suffix == ".safetensors" else load_plain(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged ({' '.join(str(error).split())})") from None
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise UserError(f"{file}: not a state dict of tensors by name")
    return {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}  # computed


def write_folder(folder: Path, config: TimeMoEConfig, state: Mapping[str, Tensor]) -> Path:
    """Write config.json and model.safetensors, each whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in to_published(state).items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    values = json.dumps(_published_config(config, state["norm.weight"].dtype), indent=2)
    write_atomic(folder / "config.json", values + "\n")
    return folder


def _published_config(config: TimeMoEConfig, dtype: torch.dtype) -> dict[str, Any]:
    dense = config.num_experts == 0
    values = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    values |= {
        "horizon_lengths": list(config.horizons),
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "num_experts": config.num_experts or 1,  # the published default, not looked at in dense models
        "use_dense": dense,
        "apply_aux_loss": not dense,  # the published code insists on one of the two
    }
    classes = {"AutoConfig": "configuration_time_moe.TimeMoeConfig"}
    classes["AutoModelForCausalLM"] = "modeling_time_moe.TimeMoeForPrediction"
    return {
        "model_type": "time_moe",
        "architectures": ["TimeMoeForPrediction"],
        "auto_map": {auto: f"{CODE}--{name}" for auto, name in classes.items()},
        **FIXED,
        **values,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
