"""Published Moirai-MoE checkpoints: a folder with `config.json` and `model.safetensors`, in uni2ts's names.

What differs from a model trained here: experts are those of the farthest centroids, and covariates known in the future
are seen only up to the patch before the one predicted (`known_ahead=False`). Published inference fills gaps by the mean
of what came before and adds 1e-5 to variances; here gaps enter at the mean of the context, and nothing is added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from apps.errors import ConfigError, UserError
from apps.timeseries.model_settings import MoiraiMoEConfig
from apps.timeseries.models.distributions import COMPONENTS, FIXED_SCALE
from apps.timeseries.models.moirai_moe import MoiraiMoE

HEAD_WIDTH = 64
"""Of every published model; `config.json` does not say."""
TOP_K = 2
"""Of every published model; `config.json` does not say."""
_OUTPUTS = (
    ("student_t.StudentTOutput", ("df", "loc", "scale")),
    ("normal.NormalFixedScaleOutput", ("loc",)),
    ("negative_binomial.NegativeBinomialOutput", ("total_count", "logits")),
    ("log_normal.LogNormalOutput", ("loc", "scale")),
)
"""Components by their published names, with the parameters of each in the order of our head."""
_EMBEDDING = {"in_proj": "inner", "feat_proj": "outer", "res_proj": "residual"}
_ATTENTION = {
    "q_proj.weight": "query.weight",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "out_proj.weight": "out.weight",
    "q_norm.weight": "query_norm.weight",
    "k_norm.weight": "key_norm.weight",
    "var_attn_bias.emb.weight": "variate_bias",
}
_EXPERT = {"fc1": "up", "fc_gate": "gate", "fc2": "down"}


def from_pretrained(folder: str | Path, num_samples: int = 100) -> MoiraiMoE:
    """A published model, ready to forecast or to be trained further.

    Args:
        folder: with `config.json` and `model.safetensors`.
        num_samples: sample paths per forecast.

    Raises:
        UserError: if the folder does not hold such a model.
    """
    folder = Path(folder)
    try:
        published = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"pretrained={folder}: no config.json and model.safetensors to read: {reason}") from None
    try:
        model = MoiraiMoE(published_config(published, state, num_samples))
    except ConfigError as error:
        raise UserError(f"pretrained={folder}: config.json has {error}") from None
    load_published(model, state)
    return model.eval()


def published_config(published: Mapping, state: Mapping[str, Tensor], num_samples: int = 100) -> MoiraiMoEConfig:
    """Sizes of a published model; the number of experts is that of its centroids.

    Raises:
        UserError: if it is no Moirai-MoE, or of a kind that no published model is of.
    """
    try:
        (patch_size,) = published["patch_sizes"]
        sizes = {name: int(published[name]) for name in ("d_model", "d_ff", "num_layers")}
        tokens, outputs = int(published["max_seq_len"]), published["distr_output"]["components"]
        names = [output["_target_"].removeprefix("uni2ts.distribution.") for output in outputs]
        num_experts = state["encoder.centroid"].shape[1]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"pretrained: not a Moirai-MoE: {type(error).__name__}: {error}") from None
    if names != [name for name, _ in _OUTPUTS] or outputs[1].get("scale", FIXED_SCALE) != FIXED_SCALE:
        raise UserError(f"config.json: distr_output={names}: only {', '.join(COMPONENTS)} can be loaded")
    if not published.get("scaling", True):
        raise UserError("config.json: scaling=false: only models that scale their input can be loaded")
    return MoiraiMoEConfig(
        patch_size=patch_size,
        **sizes,
        num_heads=max(1, sizes["d_model"] // HEAD_WIDTH),
        num_experts=num_experts,
        top_k=TOP_K,
        prefer="farthest",
        known_ahead=False,
        max_context=tokens * patch_size,
        num_samples=num_samples,
        dropout=published.get("dropout_p", 0.0),
    )


@torch.no_grad()
def load_published(model: MoiraiMoE, state: Mapping[str, Tensor]) -> None:
    """Copy published weights into a model of the same sizes.

    Raises:
        UserError: for a weight that is missing, unexpected or of another shape; the model is then as it was.
    """
    views, state = _published_views(model), dict(state)
    for i, centroids in enumerate(state.pop("encoder.centroid", ())):
        state[f"encoder.centroid.{i}"] = centroids
    for problem, names in (
        ("is missing", [name for name in views if name not in state]),
        ("is no weight of this model", [name for name in state if name not in views]),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"published weights: {names[0]} {problem}{more}")
    for name, view in views.items():
        if state[name].shape != view.shape:
            theirs, ours = tuple(state[name].shape), tuple(view.shape)
            raise UserError(f"published weights: {name} has shape {theirs}, where this model takes {ours}")
    for name, view in views.items():
        view.copy_(state[name])
    model.encoder.embed.missing.weight.zero_()  # the published model does not tell what is missing


def _published_views(model: MoiraiMoE) -> dict[str, Tensor]:
    """Published name -> view of the model's own weight in the published layout, to copy into.

    Centroids, published as one tensor, go by `encoder.centroid.LAYER`.
    """
    views = {"encoder.norm.weight": model.encoder.norm.weight}
    for theirs, ours in _EMBEDDING.items():
        linear = model.encoder.embed.get_submodule(ours)
        views |= {f"{theirs}.weight": linear.weight[None], f"{theirs}.bias": linear.bias[None]}
    for i, block in enumerate(model.encoder.blocks):
        own, layer = dict(block.named_parameters()), f"encoder.layers.{i}"
        views |= {f"{layer}.{norm}.weight": own[f"{norm}.weight"] for norm in ("norm1", "norm2")}
        views |= {f"{layer}.self_attn.{theirs}": own[f"attention.{ours}"] for theirs, ours in _ATTENTION.items()}
        for theirs, ours in _EXPERT.items():
            weights = own[f"ffn.experts.{ours}"]
            views |= {f"{layer}.ffn.experts.{j}.{theirs}.weight": weight for j, weight in enumerate(weights)}
        views[f"encoder.centroid.{i}"] = block.ffn.router.score.centroids
    return views | _head_views(model)


def _head_views(model: MoiraiMoE) -> dict[str, Tensor]:
    """The head's projections, which are separate as published: one for weights, one for every parameter."""
    names, sizes = ["weights_logits"], [len(COMPONENTS)]
    for i, (_, parameters) in enumerate(_OUTPUTS):
        names += [f"components.{i}.{parameter}" for parameter in parameters]
        sizes += [1] * len(parameters)
    views, rows = {}, [size * model.config.patch_size for size in sizes]
    for part, value in model.head.project.named_parameters():
        for name, view in zip(names, value.split(rows), strict=True):
            views[f"param_proj.proj.{name}.{part}"] = view[None]
    return views
