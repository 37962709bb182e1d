"""The published checkpoint format of Time-MoE: a folder with config.json and safetensors or bin files.

Experts are tensors of their own there and stacked here; everything else has another name only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
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
FIXED = {"input_size": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6}
"""Settings that have one value in every published checkpoint, and here."""
NAMES = [
    (r"model\.embed_layer\.(emb|gate)_layer\.weight", r"embed.\1.weight"),
    (r"model\.norm\.weight", "norm.weight"),
    (r"lm_heads\.(\d+)\.out_layer\.weight", r"heads.\1.weight"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"blocks.\1.norm1.weight"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"blocks.\1.norm2.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", r"blocks.\1.attention.query.\2"),
    (r"model\.layers\.(\d+)\.self_attn\.k_proj\.(weight|bias)", r"blocks.\1.attention.key.\2"),
    (r"model\.layers\.(\d+)\.self_attn\.v_proj\.(weight|bias)", r"blocks.\1.attention.value.\2"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight", r"blocks.\1.attention.out.weight"),
    (r"model\.layers\.(\d+)\.ffn_layer\.gate\.weight", r"blocks.\1.ffn.router.score.weight"),
    (r"model\.layers\.(\d+)\.ffn_layer\.shared_expert_gate\.weight", r"blocks.\1.ffn.shared.gate.weight"),
]
"""Pattern of a published tensor's name -> our name. Expert matrices and dense FFNs are in `_ffn_name`."""


def read_folder(folder: Path) -> tuple[TimeMoEConfig, dict[str, Tensor]]:
    """Settings and weights by our names.

    Raises:
        UserError: if something is missing, damaged, superfluous or of another shape.
    """
    config = _read_config(folder / "config.json")
    published = _read_tensors(folder)
    return config, to_ours(published, config, folder)


def _read_config(file: Path) -> TimeMoEConfig:
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"pretrained={file.parent}: no config.json there; give a folder in the published format"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, dict) or "hidden_size" not in values:
        raise UserError(f"{file}: not the settings of a Time-MoE model (no hidden_size)")
    for name, only in FIXED.items():
        if values.get(name, only) != only:
            raise UserError(f"{file}: {name}={values[name]!r} is not supported; published checkpoints have {only!r}")
    own = {ours: values[theirs] for theirs, ours in FIELDS.items() if theirs in values}
    own["horizons"] = tuple(own.get("horizons", (1,)))
    if values.get("use_dense", False):
        own["num_experts"] = 0
    if not values.get("apply_aux_loss", True):
        own["aux_loss"] = 0.0
    try:
        return TimeMoEConfig(**own)
    except ConfigError as error:
        raise UserError(f"{file}: {error}") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whether in one file or in shards."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in _read_file(folder / shard).items()}
        if single.is_file():
            return _read_file(single)
    raise UserError(f"pretrained={folder}: no model.safetensors and no pytorch_model.bin there")


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return load_plain(file)
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file, but the index names it") from None
    except Exception as error:  # of safetensors, which has its own
        raise UserError(f"{file}: damaged ({error})") from None


def to_ours(published: Mapping[str, Tensor], config: TimeMoEConfig, source: object = "weights") -> dict[str, Tensor]:
    """Published tensors by our names, experts stacked.

    Raises:
        UserError: names the first tensor that is missing, superfluous or of another shape.
    """
    state: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in published.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # computed, and in some files all the same
        ours, expert = _our_name(name, config)
        if ours is None:
            raise UserError(f"{source}: {name} belongs to no Time-MoE model of these settings")
        if expert is None:
            state[ours] = tensor
        else:
            stacks.setdefault(ours, {})[expert] = tensor
    for name, parts in stacks.items():
        if len({part.shape for part in parts.values()}) == 1:
            state[name] = torch.stack([parts[i] for i in sorted(parts)])
        else:
            raise UserError(f"{source}: experts of {name} differ in shape")
    _check(state, config, source)
    return state


def _our_name(name: str, config: TimeMoEConfig) -> tuple[str | None, int | None]:
    """Our name, and the number of the expert where it is a slice of a stack."""
    for pattern, ours in NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours), None
    prefix, matrix = r"model\.layers\.(\d+)\.ffn_layer\.", r"(gate|up|down)_proj\.weight"
    if match := re.fullmatch(prefix + r"experts\.(\d+)\." + matrix, name):
        return f"blocks.{match[1]}.ffn.experts.{match[3]}", int(match[2])
    if match := re.fullmatch(prefix + r"shared_expert\." + matrix, name):
        return f"blocks.{match[1]}.ffn.shared.bank.{match[2]}", 0
    if config.num_experts == 0 and (match := re.fullmatch(prefix + matrix, name)):
        return f"blocks.{match[1]}.ffn.{match[2]}.weight", None
    return None, None


def _check(state: Mapping[str, Tensor], config: TimeMoEConfig, source: object) -> None:
    from apps.timeseries.models.timemoe import TimeMoE  # which imports this module

    with torch.device("meta"):
        wanted = TimeMoE(config).state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise UserError(f"{source}: no tensor for {name}; are config.json and weights of one model?")
        if state[name].shape != tensor.shape:
            shapes = f"{list(state[name].shape)}, config.json asks for {list(tensor.shape)}"
            raise UserError(f"{source}: {name} has shape {shapes}")
    extra = sorted(state.keys() - wanted.keys())
    if extra:
        raise UserError(f"{source}: {extra[0]} is not part of the model that config.json describes")


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by published names, one per expert."""
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.ffn\.experts\.(gate|up|down)", name):
            prefix = f"model.layers.{match[1]}.ffn_layer.experts"
            published |= {f"{prefix}.{i}.{match[2]}_proj.weight": part for i, part in enumerate(tensor)}
        else:
            published[_published_name(name)] = tensor[0] if ".shared.bank." in name else tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in published.items()}


def _published_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "embed":
        return f"model.embed_layer.{parts[1]}_layer.weight"
    if parts[0] == "norm":
        return "model.norm.weight"
    if parts[0] == "heads":
        return f"lm_heads.{parts[1]}.out_layer.weight"
    layer, rest = f"model.layers.{parts[1]}", ".".join(parts[2:])
    if parts[2] == "attention":
        short = {"query": "q", "key": "k", "value": "v", "out": "o"}[parts[3]]
        return f"{layer}.self_attn.{short}_proj.{parts[4]}"
    return (
        layer
        + {
            "norm1.weight": ".input_layernorm.weight",
            "norm2.weight": ".post_attention_layernorm.weight",
            "ffn.router.score.weight": ".ffn_layer.gate.weight",
            "ffn.shared.gate.weight": ".ffn_layer.shared_expert_gate.weight",
            **{f"ffn.shared.bank.{m}": f".ffn_layer.shared_expert.{m}_proj.weight" for m in ("gate", "up", "down")},
            **{f"ffn.{m}.weight": f".ffn_layer.{m}_proj.weight" for m in ("gate", "up", "down")},
        }[rest]
    )


def write_folder(folder: Path, config: TimeMoEConfig, state: Mapping[str, Tensor]) -> Path:
    """Write config.json and model.safetensors, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(to_published(state), temporary, metadata={"format": "pt"})
    write_atomic(folder / "config.json", json.dumps(_published_config(config, state), indent=2) + "\n")
    return folder


def _published_config(config: TimeMoEConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    values: dict[str, Any] = {"model_type": "time_moe", "architectures": ["TimeMoeForPrediction"], **FIXED}
    values |= {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    values["horizon_lengths"] = list(config.horizons)
    values["num_key_value_heads"] = config.num_kv_heads or config.num_heads
    values |= {"use_dense": config.num_experts == 0, "apply_aux_loss": config.aux_loss > 0}
    if config.num_experts == 0:
        values["num_experts"] = 1
    return values | {
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": str(state["norm.weight"].dtype).removeprefix("torch."),
    }
