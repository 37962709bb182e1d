"""Vision transformers by name: small ones of ours for small images, and all of timm's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import timm
from jaxtyping import Float
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

import moecore
from apps.errors import ConfigError, UserError
from apps.runs import load_plain
from apps.vision.settings import ModelConfig
from moecore.config import MoEConfig
from moecore.errors import require

SMALL: dict[str, dict[str, Any]] = {
    "vit_micro": {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0},
    "vit_mini": {"embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0},
    "vit_midi": {"embed_dim": 192, "depth": 9, "num_heads": 6, "mlp_ratio": 4.0},
}
"""Sizes of ours, for small images: a convolutional stem, global average pooling, a patch size that suits the image."""


SETTINGS = {
    "layers": "model.moe_layers",
    "schedule": "model.experts_schedule",
    "experts": "model.experts_schedule",
    "share_router": "model.share_router",
    "model": "model.backbone",
}
"""Settings by the names that moecore gives what they set; all others are those of `model.moe`."""


class ConvStem(nn.Module):
    """Patches by a few 3x3 convolutions instead of one large one: trains in far fewer images.

    "Early convolutions help transformers see better", arXiv 2106.14881, for small images. Channels double where the
    image is halved, up to the width of the tokens.

    Args:
        img_size: height and width, or the side of a square.
        patch_size: a power of two; the stem halves the image that often.
        in_chans: input channels.
        embed_dim: D.
    """

    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, in_chans: int = 3, embed_dim: int = 128, **_: Any
    ) -> None:
        super().__init__()
        halvings = _halvings(patch_size)
        require(halvings > 0, "model.patch_size", patch_size, "must be 2, 4, 8, ... for a conv stem; or use stem=patch")
        steps = [(embed_dim >> i, 2) for i in reversed(range(halvings))]  # width and stride of each convolution
        if len(steps) == 1:
            steps.insert(0, (embed_dim // 2, 1))  # one convolution alone would be little more than a patch projection
        layers: list[nn.Module] = []
        before = in_chans
        for width, stride in ((max(8, width), stride) for width, stride in steps):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
            before = width
        self.net = nn.Sequential(*layers, nn.Conv2d(before, embed_dim, 1))
        self.patch_size, self.img_size = (patch_size, patch_size), _pair(img_size)
        self.grid_size = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """[B, C, H, W] -> [B, N, D]."""
        return self.net(x).flatten(2).transpose(1, 2)


def make_backbone(
    config: ModelConfig, channels: int, image_size: int | tuple[int, int], num_classes: int
) -> VisionTransformer:
    """A ViT for these images (a side, or height and width), without MoE.

    Raises:
        ConfigError: for a name that is no ViT, or sizes that do not fit.
    """
    _check_numbers(config)
    given = {"patch_size": config.patch_size, "embed_dim": config.embed_dim, "depth": config.depth}
    given |= {"num_heads": config.num_heads, "mlp_ratio": config.mlp_ratio}
    options = {name: value for name, value in given.items() if value is not None}
    common = {"img_size": image_size, "in_chans": channels, "num_classes": num_classes}
    common |= {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    if config.backbone in SMALL:
        sizes = SMALL[config.backbone] | options
        sizes.setdefault("patch_size", fitting_patch(image_size))
        _check_sizes(sizes, image_size)
        if config.stem == "conv" or (config.stem == "auto" and _halvings(sizes["patch_size"])):
            sizes["embed_layer"] = ConvStem
        model = VisionTransformer(**sizes, **common, class_token=False, global_pool="avg")
        _load_pretrained(model, config, channels)
        return model
    return _timm_vit(config, options, common)


def put_moe_layers(backbone: nn.Module, config: ModelConfig, moe: MoEConfig) -> list[str]:
    """Replace the FFNs that are to be MoE; returns their names.

    Args:
        backbone: is changed.
        config: says which, and how experts start.
        moe: what to put there.

    Raises:
        ConfigError: for settings that do not fit the backbone or each other.
    """
    try:
        count = len(moecore.place(config.moe_layers, len(moecore.find_ffns(backbone))))
        if not count:
            return []
        return moecore.replace_ffn(
            backbone,
            config.moe_layers,
            moe,
            init=config.moe_init,
            experts=moecore.schedule(config.experts_schedule, count, moe.top_k, moe.num_experts),
            share_router=config.share_router,
        )
    except ConfigError as error:  # names it as moecore knows it; here it is a setting
        name = SETTINGS.get(error.field, f"model.moe.{error.field}")
        raise ConfigError(name, error.value, error.remedy) from None


def _timm_vit(config: ModelConfig, options: dict[str, Any], common: dict[str, Any]) -> VisionTransformer:
    name = config.backbone
    if name.split(".")[0] not in timm.list_models():
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:4])
        raise ConfigError("model.backbone", name, f"no such model in timm{f'; near: {close}' if close else ''}")
    try:
        model = timm.create_model(name, pretrained=config.pretrained == "timm", **options, **common)
    except TypeError as error:
        raise ConfigError("model.backbone", name, "is no vision transformer that takes an image size") from error
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError("model.backbone", name, f"timm says: {str(error).splitlines()[0]}") from error
    except OSError as error:  # the hub cannot be reached
        raise UserError(f"model.pretrained=timm: {error}; give a file instead") from error
    require(hasattr(model, "blocks"), "model.backbone", name, "is no vision transformer with blocks")
    _load_pretrained(model, config, common["in_chans"])
    return model


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _halvings(patch_size: int) -> int:
    """How often a power of two halves; 0 for any other number."""
    power = patch_size >= 2 and patch_size & (patch_size - 1) == 0
    return patch_size.bit_length() - 1 if power else 0


def fitting_patch(image_size: int | tuple[int, int]) -> int:
    """A patch size that divides the image: about 4x4 patches for tiny images, 8x8 for small ones, else 16x16."""
    height, width = _pair(image_size)
    side = min(height, width)
    wanted = side / (4 if side <= 16 else 8 if side <= 64 else 16)
    divisors = [p for p in range(1, side // 2 + 1) if height % p == width % p == 0]
    # The nearest by ratio; of equals the power of two, which a convolutional stem can make.
    return min(divisors, key=lambda p: (abs(math.log2(p / wanted)) - 0.5 * (_halvings(p) > 0), p))


def _check_numbers(config: ModelConfig) -> None:
    for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"):
        value = getattr(config, name)
        require(value is None or value > 0, f"model.{name}", value, "must be positive, or null for the backbone's own")
    for name in ("drop_rate", "drop_path_rate"):
        require(0 <= getattr(config, name) < 1, f"model.{name}", getattr(config, name), "must lie in [0, 1)")


def _check_sizes(sizes: dict[str, Any], image_size: int | tuple[int, int]) -> None:
    width, heads, patch = sizes["embed_dim"], sizes["num_heads"], sizes["patch_size"]
    require(width % heads == 0, "model.num_heads", heads, f"must divide embed_dim={width}")
    height, width = _pair(image_size)
    fits = 1 <= patch <= min(height, width) and height % patch == width % patch == 0
    named = height if height == width else f"{height} x {width}"
    require(fits, "model.patch_size", patch, f"must divide the image size {named}")


def _load_pretrained(model: VisionTransformer, config: ModelConfig, channels: int) -> None:
    """Weights of a plain timm ViT from a file, fitted to channels and image size; another classifier is left out."""
    if config.pretrained in (None, "timm"):
        return
    path = Path(config.pretrained)
    if not path.is_file():
        raise UserError(f"model.pretrained={path}: no such file (`timm` downloads the backbone's weights)")
    state = read_state(path)
    projection = state.get("patch_embed.proj.weight")
    if projection is not None and projection.shape[1] == 3 != channels:
        state["patch_embed.proj.weight"] = adapt_input_conv(channels, projection)
    state = checkpoint_filter_fn(state, model)
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    missing = [k for k in own if k not in fitting and not k.startswith("head.")]
    if missing:
        raise UserError(
            f"model.pretrained={path}: of another architecture than {config.backbone} "
            f"({len(missing)} tensors missing or of another shape, first {missing[0]})"
        )
    model.load_state_dict(fitting, strict=False)


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors or a torch file, without executing anything."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"model.pretrained={path}: not a safetensors file, or damaged ({error})") from None
    state = load_plain(path)
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.pretrained={path}: holds no state_dict")
    return dict(state)
