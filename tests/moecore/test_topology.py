"""Which layers carry MoE, and how MoE gets into models that other people wrote."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from timm.layers import SwiGLU
from torch import nn
from torch.nn import functional as F

import moecore

D, H = 16, 32
SMALL = moecore.MoEConfig(num_experts=4, top_k=2, hidden=H)
"""Experts as wide as the FFNs below: upcycled, every layer equals the FFN it replaces."""


def timm_vit(**options) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=D, depth=3, num_heads=2, mlp_ratio=2, num_classes=5, **options
    )


def torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=D, mlp_dim=H, num_classes=5
    )
    nn.init.normal_(model.heads.head.weight)  # it starts at zero
    return model


def torch_encoder(dropout: float = 0.0, **options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 2, H, dropout, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


class LlamaMLP(nn.Module):
    """As in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.down_proj, self.act_fn = nn.Linear(H, D, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": LlamaMLP()}) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["mlp"](F.rms_norm(x, x.shape[-1:]))
        return x


IMAGES, TOKENS = (2, 3, 16, 16), (2, 5, D)
MODELS = {
    "timm_vit": (timm_vit, IMAGES, "blocks.{}.mlp"),
    "timm_swiglu": (lambda: timm_vit(mlp_layer=SwiGLU), IMAGES, "blocks.{}.mlp"),
    "torchvision_vit": (torchvision_vit, IMAGES, "encoder.layers.encoder_layer_{}.mlp"),
    "torch_encoder": (torch_encoder, TOKENS, "layers.{}.linear1"),
    "torch_encoder_gelu": (lambda: torch_encoder(activation="gelu", norm_first=True), TOKENS, "layers.{}.linear1"),
    "llama": (Llama, TOKENS, "layers.{}.mlp"),
}


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("none", []),
        ("last-1", [5]),
        ("last-4", [2, 3, 4, 5]),
        ("first-2", [0, 1]),
        ("every-2", [1, 3, 5]),
        ("every-4", [3]),
        ("every-6", [5]),
        ("1,3", [1, 3]),
        ("3, 1,1", [1, 3]),
        ("-1", [5]),
        ("0,-2", [0, 4]),
        ([4, 0, -1], [0, 4, 5]),
        ([], []),
    ],
)
def test_place_names_layers(layers, numbers):
    assert moecore.place(layers, 6) == numbers


@pytest.mark.parametrize("layers", ["last", "last-0", "last-7", "middle-2", "last-x", "", "1;2", "one"])
def test_place_refuses_what_it_does_not_know(layers):
    with pytest.raises(moecore.ConfigError, match=rf"^layers='{layers}': use all, none, last-N, .*N in 1\.\.6"):
        moecore.place(layers, 6)


@pytest.mark.parametrize("layers", ["6", "0,-7", [6]])
def test_place_refuses_layers_the_model_lacks(layers):
    with pytest.raises(moecore.ConfigError, match=r"^layers=.*: the model has layers 0 to 5"):
        moecore.place(layers, 6)


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("constant", [8, 8, 8, 8, 8]),
        ("ascending", [2, 4, 5, 7, 8]),
        ("descending", [8, 7, 5, 4, 2]),
        ("pyramid", [2, 5, 8, 5, 2]),
        ("wave", [2, 8, 2, 8, 2]),
    ],
)
def test_schedules_vary_with_depth(kind, counts):
    assert moecore.schedule(kind, 5, 2, 8) == counts
    assert all(2 <= n <= 8 for n in moecore.schedule(kind, 1, 2, 8))
    assert moecore.schedule(kind, 4, 3, 3) == [3] * 4
    assert moecore.schedule(kind, 0, 2, 8) == []


@pytest.mark.parametrize(
    ("depth", "counts"),
    [(1, [8]), (2, [8, 8]), (3, [2, 8, 2]), (4, [2, 8, 8, 2]), (6, [2, 5, 8, 8, 5, 2]), (7, [2, 4, 6, 8, 6, 4, 2])],
)
def test_pyramid_is_highest_in_the_middle_whatever_the_depth(depth, counts):
    assert moecore.schedule("pyramid", depth, 2, 8) == counts


def test_schedule_refuses_what_it_does_not_know():
    with pytest.raises(moecore.ConfigError, match=r"^schedule='zigzag': choose one of constant, "):
        moecore.schedule("zigzag", 4, 2, 8)
    with pytest.raises(moecore.ConfigError, match=r"^low=9: must lie between 1 and high=8"):
        moecore.schedule("wave", 4, 9, 8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_ffn_is_found_replaced_once_and_upcycled_exactly(name, training):
    build, shape, where = MODELS[name]
    model, x = build().train(training), torch.randn(shape)
    before = model(x)
    expected = [where.format(n) for n in range(3)]
    assert [ffn.name for ffn in moecore.find_ffns(model)] == expected
    assert moecore.replace_ffn(model, "all", SMALL) == expected
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert [n for n, m in model.named_modules() if isinstance(m, moecore.MoE)] == expected
    assert moecore.find_ffns(model) == []
    with moecore.record(model) as recording:
        model(x).square().sum().backward()
    assert [r.name for r in recording] == expected
    for n in expected:
        assert model.get_submodule(n).experts.down.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_replaced_models_copy_and_reload(name):
    build, shape, _ = MODELS[name]
    model, x = build(), torch.randn(shape)
    moecore.replace_ffn(model, "every-2", SMALL)
    fresh = build()
    moecore.replace_ffn(fresh, "every-2", SMALL, init="random")
    fresh.load_state_dict(model.state_dict())
    expected = model.eval()(x)
    torch.testing.assert_close(fresh.eval()(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)


def test_encoder_with_padding_mask_in_eval_with_and_without_gradients():
    model, x = torch_encoder().eval(), torch.randn(TOKENS)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model.train()(x, src_key_padding_mask=mask)
    moecore.replace_ffn(model, "all", SMALL)
    model.eval()
    torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        y = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(y.clone()[~mask], expected[~mask], rtol=1e-5, atol=1e-5)


def test_decoder_layers_are_known_too():
    model = nn.TransformerDecoderLayer(D, 2, H, dropout=0.0, batch_first=True)
    x, memory = torch.randn(TOKENS), torch.randn(TOKENS)
    expected = model(x, memory)
    assert moecore.replace_ffn(model, "all", SMALL) == ["linear1"]
    torch.testing.assert_close(model(x, memory), expected, rtol=1e-5, atol=1e-5)


def test_experts_inherit_the_kind_of_the_ffn():
    gelu, glu = timm_vit(), Llama()
    moecore.replace_ffn(gelu, "last-1", moecore.MoEConfig(num_experts=4, top_k=2))
    moecore.replace_ffn(glu, [0], moecore.MoEConfig(num_experts=4, top_k=2))
    mlp, llama = gelu.blocks[-1].mlp.experts, glu.layers[0]["mlp"].experts
    assert (type(mlp), mlp.activation_name, mlp.hidden) == (moecore.MLPBank, "gelu", H // 2)
    assert mlp.up_bias is not None
    assert (type(llama), llama.activation_name, llama.hidden) == (moecore.GLUBank, "silu", H // 2)
    assert llama.up_bias is None


WITH_DROPOUT = {
    "timm_vit": lambda p: timm_vit(proj_drop_rate=p),
    "timm_swiglu": lambda p: timm_vit(proj_drop_rate=p, mlp_layer=SwiGLU),
    "older_timm": lambda p: nn.Sequential(Odd("plain", drop=nn.Dropout(p))),
    "torchvision_vit": lambda p: nn.Sequential(torchvision.models.vision_transformer.MLPBlock(D, H, p)),
    "torch_encoder": lambda p: torch_encoder(dropout=p),
    "no_dropout": lambda p: nn.Sequential(Odd("plain")),
}


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_experts_inherit_the_dropout_on_hidden_units(name):
    inherited = 0.0 if name == "no_dropout" else 0.25
    for config, expected in ((SMALL, inherited), (replace(SMALL, dropout=0.1), 0.1), (replace(SMALL, dropout=0.0), 0)):
        model = WITH_DROPOUT[name](0.25)
        assert moecore.find_ffns(model)[0].dropout == inherited
        moecore.replace_ffn(model, "all", replace(config, shared_hidden=8, hidden=H - 8))
        layers = [m for m in model.modules() if isinstance(m, moecore.MoE)]
        assert {bank.dropout for m in layers for bank in (m.experts, m.shared.bank)} == {expected}
        x = torch.ones(64, D)
        y = layers[0].train()(x)
        assert (y.std(0).max() > 1e-3) == (expected > 0)  # equal tokens differ by what was dropped


def test_dropout_elsewhere_is_not_taken_for_one_on_hidden_units():
    drop = nn.Dropout(0.25)
    ffn = nn.Sequential(drop, nn.Linear(D, H), drop, nn.GELU(), nn.Identity(), nn.Linear(H, D), drop)
    assert moecore.find_ffns(nn.Sequential(ffn))[0].dropout == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_take_over_the_dtype_of_the_ffn(dtype):
    model = timm_vit().to(dtype)
    moecore.replace_ffn(model, "all", moecore.MoEConfig(num_experts=4, top_k=2, controller="loss_free"))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(IMAGES, dtype=dtype)).dtype == dtype


def test_only_chosen_layers_change_and_a_second_pass_takes_the_rest():
    model = timm_vit()
    assert moecore.replace_ffn(model, "1", SMALL) == ["blocks.1.mlp"]
    moe = model.blocks[1].mlp
    assert moecore.replace_ffn(model, "all", SMALL) == ["blocks.0.mlp", "blocks.2.mlp"]
    assert model.blocks[1].mlp is moe


def test_soft_moe_or_anything_else_can_take_the_place():
    model = timm_vit()
    seen = []

    def make(ffn: moecore.DenseFFN, number: int) -> nn.Module:
        seen.append((ffn.name, number, ffn.width, ffn.hidden))
        return moecore.SoftMoE(moecore.MLPBank(4, ffn.width, ffn.hidden), slots=2)

    moecore.replace_ffn(model, "last-2", make)
    assert seen == [("blocks.1.mlp", 0, D, H), ("blocks.2.mlp", 1, D, H)]
    assert isinstance(model.blocks[2].mlp, moecore.SoftMoE)
    assert model(torch.randn(IMAGES)).shape == (2, 5)
    assert moecore.find_ffns(model)[-1].name == "blocks.0.mlp"


def test_expert_counts_per_layer():
    model = timm_vit()
    moecore.replace_ffn(model, "all", SMALL, experts=moecore.schedule("ascending", 3, 2, 6))
    assert [block.mlp.experts.num_experts for block in model.blocks] == [2, 4, 6]
    assert [block.mlp.router.score.weight.shape[0] for block in model.blocks] == [2, 4, 6]


def test_share_router_gives_all_layers_the_same_one():
    model = timm_vit()
    moecore.replace_ffn(model, "all", SMALL, share_router=True)
    routers = {id(block.mlp.router) for block in model.blocks}
    assert len(routers) == 1
    assert sum("router" in name for name, _ in model.named_parameters()) == 1
    model(torch.randn(IMAGES)).square().sum().backward()
    assert model.blocks[0].mlp.router.score.weight.grad.abs().sum() > 0


def test_recurrent_routers_share_a_cell_and_hand_on_state_by_themselves():
    model, x = timm_vit(), torch.randn(IMAGES)
    config = moecore.MoEConfig(num_experts=4, top_k=2, hidden=H, score="recurrent", score_options={"hidden": 6})
    before = model.eval()(x)
    moecore.replace_ffn(model, "all", config)
    scores = [block.mlp.router.score for block in model.blocks]
    assert len({id(score.cell) for score in scores}) == 1
    assert [score.first for score in scores] == [True, False, False]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), before, rtol=1e-5, atol=1e-5)
    with moecore.record(model) as recording:
        model(x)
    recording[2].scores.sum().backward()
    assert scores[0].project.weight.grad.abs().sum() > 0  # the third layer's scores depend on the first router


def test_recurrent_routers_may_see_whole_segments():
    model, x = torch_encoder(), torch.randn(TOKENS)
    before = model(x)
    moecore.replace_ffn(model, "all", replace(SMALL, score="recurrent", unit=2, pool="flatten"))
    assert [layer.linear1.router.score.project.in_features for layer in model.layers] == [2 * D] * 3
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_names_that_are_numbers_in_any_container():
    def ffn() -> nn.Module:
        return nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))

    model = nn.ModuleList([nn.ModuleDict({"7": ffn()}), nn.Sequential(ffn())])
    assert moecore.replace_ffn(model, "all", SMALL) == ["0.7", "1.0"]
    assert all(isinstance(m, moecore.MoE) for m in (model[0]["7"], model[1][0]))


class Odd(nn.Module):
    """Looks like an FFN and is none that could become experts."""

    def __init__(self, kind: str, **parts: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)
        for name, part in parts.items():
            self.add_module(name, part)
        if kind == "norm":
            self.norm = nn.LayerNorm(H)
        if kind == "conv":
            self.fc1 = nn.Conv2d(D, H, 1)
        if kind == "packed":
            self.fc1 = nn.Linear(D, 2 * H)


@pytest.mark.parametrize("kind", ["norm", "conv", "packed"])
def test_what_cannot_become_experts_is_left_alone(kind):
    assert moecore.find_ffns(nn.Sequential(Odd(kind), nn.Linear(D, D))) == []
    assert [ffn.name for ffn in moecore.find_ffns(nn.Sequential(Odd("plain")))] == ["0"]


class CenteredNorm(nn.Module):
    """A norm that shares no base class with those of torch."""


class Renamed(nn.BatchNorm1d):
    """A norm by its base class only."""


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(H),
        nn.RMSNorm(H),
        nn.BatchNorm1d(H),
        nn.InstanceNorm1d(H),
        nn.GroupNorm(2, H),
        nn.LocalResponseNorm(2),
        CenteredNorm(),
        Renamed(H),
        nn.Sequential(nn.GELU(), nn.LayerNorm(H)),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_between_linear_maps_is_no_activation(norm):
    between = nn.Sequential(nn.Linear(D, H), norm, nn.Linear(H, D))
    assert moecore.find_ffns(nn.Sequential(between)) == []


def test_layers_that_share_a_router_need_tokens_of_one_width():
    narrow, wide = (nn.Sequential(nn.Linear(w, H), nn.GELU(), nn.Linear(H, w)) for w in (4, 8))
    with pytest.raises(moecore.ConfigError, match=r"^share_router=True: the layers differ in the width .*\[4, 8\]"):
        moecore.replace_ffn(nn.Sequential(narrow, wide), "all", SMALL, share_router=True)


def test_a_model_stays_as_it_was_when_one_layer_cannot_be_made():
    model = nn.Sequential(Odd("plain"), LlamaMLP())
    with pytest.raises(moecore.ConfigError, match=r"^glu=False: the FFN has a gate"):
        moecore.replace_ffn(model, "all", moecore.MoEConfig(glu=False))
    assert [type(m) for m in model] == [Odd, LlamaMLP]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(D, D), {}, "model='Linear': has no FFN that moecore.find_ffns recognises"),
        (LlamaMLP, {}, "model='LlamaMLP': is itself an FFN; replace it within the module that holds it"),
        (timm_vit, {"layers": "last-4"}, "layers='last-4': use all, none, "),
        (timm_vit, {"init": "copy"}, "init='copy': choose upcycle or random"),
        (timm_vit, {"experts": [4, 4]}, r"experts=\[4, 4\]: needs one number for each of the 3 layers"),
        (timm_vit, {"experts": [4, 4, 2], "share_router": True}, r"experts=\[4, 4, 2\]: layers that share a router"),
        (timm_vit, {"experts": [4, 4, 1]}, "top_k=2: must not exceed num_experts=1"),
        (timm_vit, {"make": moecore.MoEConfig(score="recurrent"), "share_router": True}, "share_router=True: rec"),
        (timm_vit, {"make": moecore.MoEConfig(bias=False)}, "bias=False: the FFN has biases; leave bias null, or use "),
        (timm_vit, {"make": moecore.MoEConfig(activation="relu")}, "activation='relu': the FFN uses gelu; leave activ"),
        (timm_vit, {"make": moecore.MoEConfig(glu=True)}, "glu=True: the FFN has no gate; leave glu null"),
        (Llama, {"make": moecore.MoEConfig(glu=False)}, "glu=False: the FFN has a gate; leave glu null"),
        (timm_vit, {"make": moecore.MoEConfig(shared_hidden=31)}, "shared_hidden=31: leaves 1 of the FFN's 32"),
    ],
)
def test_errors_say_what_to_do(make, options, message):
    with pytest.raises(moecore.ConfigError, match=f"^{message}"):
        moecore.replace_ffn(make(), **{"make": SMALL if "experts" in options else None, **options})
