"""Published checkpoints, against the published model written out from its names and shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from apps.errors import UserError
from apps.timeseries.models.base import Windows
from apps.timeseries.models.moirai_published import from_pretrained, load_published
from apps.timeseries.models.moirai_tokens import make_grid

D, FF, LAYERS, EXPERTS, P, HEADS = 128, 8, 2, 6, 16, 2
OUTPUTS = {
    "0.df": 1, "0.loc": 1, "0.scale": 1, "1.loc": 1, "2.total_count": 1, "2.logits": 1, "3.loc": 1, "3.scale": 1,
}  # fmt: skip
CONFIG = {
    "attn_dropout_p": 0.0,
    "d_ff": FF,
    "d_model": D,
    "distr_output": {
        "_target_": "uni2ts.distribution.mixture.MixtureOutput",
        "components": [
            {"_target_": "uni2ts.distribution.student_t.StudentTOutput"},
            {"_target_": "uni2ts.distribution.normal.NormalFixedScaleOutput", "scale": 0.001},
            {"_target_": "uni2ts.distribution.negative_binomial.NegativeBinomialOutput"},
            {"_target_": "uni2ts.distribution.log_normal.LogNormalOutput"},
        ],
    },
    "dropout_p": 0.0,
    "max_seq_len": 512,
    "num_layers": LAYERS,
    "patch_sizes": [P],
    "scaling": True,
}


def published_state() -> dict[str, Tensor]:
    """Weights by their published names, small enough that hidden states stay moderate."""
    shapes: dict[str, tuple[int, ...]] = {"encoder.norm.weight": (D,)}
    for name, size in (("in_proj", P), ("res_proj", P), ("feat_proj", D)):
        shapes |= {f"{name}.weight": (1, D, size), f"{name}.bias": (1, D)}
    for i in range(LAYERS):
        attention = f"encoder.layers.{i}.self_attn"
        shapes |= {f"{attention}.{part}_proj.weight": (D, D) for part in ("q", "k", "v", "out")}
        shapes |= {f"{attention}.{part}_norm.weight": (D // HEADS,) for part in ("q", "k")}
        shapes |= {f"{attention}.var_attn_bias.emb.weight": (2, HEADS)}
        shapes |= {f"encoder.layers.{i}.{norm}.weight": (D,) for norm in ("norm1", "norm2")}
        for j in range(EXPERTS):
            expert = f"encoder.layers.{i}.ffn.experts.{j}"
            shapes |= {
                f"{expert}.fc1.weight": (FF, D),
                f"{expert}.fc_gate.weight": (FF, D),
                f"{expert}.fc2.weight": (D, FF),
            }
    for name, size in (("weights_logits", 4), *((f"components.{name}", size) for name, size in OUTPUTS.items())):
        shapes |= {f"param_proj.proj.{name}.weight": (1, size * P, D), f"param_proj.proj.{name}.bias": (1, size * P)}
    state = {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    state |= {name: 1 + weight for name, weight in state.items() if "norm" in name}
    return state | {"encoder.centroid": torch.randn(LAYERS, EXPERTS, D, dtype=torch.float64)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(published_state(), tmp_path / "model.safetensors")
    return tmp_path


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x: Tensor, time: Tensor) -> Tensor:
    """Rotary positions by complex numbers, in the first half of a head [N, 64]."""
    pairs = torch.view_as_complex(x[:, :32].reshape(len(x), 16, 2).contiguous())
    angle = time[:, None] / 10000 ** (torch.arange(16) / 16)
    return torch.cat([torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(1), x[:, 32:]], 1)


def published_forward(w: dict[str, Tensor], patches: Tensor, time: Tensor, variate: Tensor) -> Tensor:
    """One window, scaled and complete, [N, P] -> raw parameters [N, P, 12]."""
    x = F.silu(patches @ w["in_proj.weight"][0].T + w["in_proj.bias"][0])
    x = x @ w["feat_proj.weight"][0].T + w["feat_proj.bias"][0]
    x = x + patches @ w["res_proj.weight"][0].T + w["res_proj.bias"][0]
    for i in range(LAYERS):
        layer = {
            n.removeprefix(f"encoder.layers.{i}."): v for n, v in w.items() if n.startswith(f"encoder.layers.{i}.")
        }
        x = x + attention(layer, rms(x, layer["norm1.weight"]), time, variate)
        x = x + experts(layer, rms(x, layer["norm2.weight"]), w["encoder.centroid"][i].float())
    x = rms(x, w["encoder.norm.weight"])
    names = ["weights_logits", *(f"components.{name}" for name in OUTPUTS)]
    parts = [x @ w[f"param_proj.proj.{n}.weight"][0].T + w[f"param_proj.proj.{n}.bias"][0] for n in names]
    return torch.cat([part.view(len(x), -1, P).transpose(1, 2) for part in parts], -1)


def attention(layer: dict[str, Tensor], x: Tensor, time: Tensor, variate: Tensor) -> Tensor:
    heads = []
    for h in range(HEADS):
        rows = slice(64 * h, 64 * h + 64)
        q, k, v = (x @ layer[f"self_attn.{part}_proj.weight"][rows].T for part in "qkv")
        q = turned(rms(q, layer["self_attn.q_norm.weight"]), time)
        k = turned(rms(k, layer["self_attn.k_norm.weight"]), time)
        bias = layer["self_attn.var_attn_bias.emb.weight"][(variate[:, None] == variate).long(), h]
        score = (q @ k.T / 8 + bias).masked_fill(time > time[:, None], -torch.inf)
        heads.append(score.softmax(-1) @ v)
    return torch.cat(heads, -1) @ layer["self_attn.out_proj.weight"].T


def experts(layer: dict[str, Tensor], x: Tensor, centroids: Tensor) -> Tensor:
    distance, chosen = torch.topk((x[:, None] - centroids).norm(dim=-1), 2)
    rows = []
    for token, weights, pair in zip(x, distance.softmax(-1), chosen.tolist(), strict=True):
        row = torch.zeros(D)
        for weight, e in zip(weights, pair, strict=True):
            up, gate, down = (layer[f"ffn.experts.{e}.{part}.weight"] for part in ("fc1", "fc_gate", "fc2"))
            row += weight * (down @ (F.silu(gate @ token) * (up @ token)))
        rows.append(row)
    return torch.stack(rows)


def test_published_weights_compute_what_they_mean(folder):
    model = from_pretrained(folder)
    given = Windows(torch.randn(2, 48), torch.randn(2, 32), torch.randn(2, 80, 1), torch.randn(2, 48, 1))
    tokens = make_grid(given, P, ahead=False).tokens
    state = load_file(folder / "model.safetensors")
    with torch.no_grad():
        ours = model.head(model.encoder(tokens)).raw
    for row in range(2):
        theirs = published_forward(state, tokens.values[row], tokens.time, tokens.variate)
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=2e-4)


def test_sizes_come_from_the_folder(folder):
    model = from_pretrained(folder, num_samples=7)
    assert (model.config.num_experts, model.config.num_heads, model.config.num_samples) == (EXPERTS, HEADS, 7)
    assert model.max_context == 512 * P
    assert model.config.prefer == "farthest"
    assert not model.config.known_ahead
    assert not model.training
    assert model.forecast(Windows(torch.randn(2, 50)), 20, (0.1, 0.9)).quantiles.isfinite().all()


def test_missing_values_add_nothing_of_their_own(folder):
    assert not from_pretrained(folder).encoder.embed.missing.weight.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.layers.1.norm1.weight"), "encoder.layers.1.norm1.weight is missing"),
        (lambda s: s.pop("encoder.centroid"), "encoder.centroid.0 is missing (and 1 more)"),
        (lambda s: s.update({"mask_encoding.weight": torch.ones(1, D)}), "mask_encoding.weight is no weight"),
        (lambda s: s.update({"in_proj.bias": torch.ones(5, D)}), f"in_proj.bias has shape (5, {D})"),
    ],
)
def test_wrong_weights_are_one_line_and_change_nothing(folder, change, message):
    model = from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = published_state()
    change(state)
    with pytest.raises(UserError) as caught:
        load_published(model, state)
    assert str(caught.value).startswith(f"published weights: {message}")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_sizes": [8, 16]}, "not a Moirai-MoE"),
        ({"d_ff": None}, "not a Moirai-MoE"),
        ({"scaling": False}, "scaling=false"),
        ({"distr_output": {"components": CONFIG["distr_output"]["components"][:1]}}, "only student_t, normal"),
        ({"d_model": 130}, "published weights|config.json"),
    ],
)
def test_wrong_settings_are_one_line(folder, changes, message):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(UserError, match=message) as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json and model\.safetensors to read"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"no config\.json and model\.safetensors to read"):
        from_pretrained(tmp_path)
