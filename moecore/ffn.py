"""Find the feed-forward networks of a foreign model, read their weights, put something else in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from moecore.activations import resolve_activation
from moecore.build import FFNShape
from moecore.layer import MoE


@dataclass(frozen=True, eq=False)
class DenseFFN:
    """One feed-forward network as plain tensors: `down(act(up(x)))`, or `down(act(gate(x)) * up(x))`."""

    name: str
    """Where it is in the model."""
    up: Float[Tensor, "F D"]
    down: Float[Tensor, "O F"]
    gate: Float[Tensor, "F D"] | None
    up_bias: Float[Tensor, " F"] | None
    down_bias: Float[Tensor, " O"] | None
    gate_bias: Float[Tensor, " F"] | None
    activation: object
    """Name, module or function."""
    dropout: float = 0.0
    """Probability with which it drops hidden units in training."""

    @property
    def width(self) -> int:
        """D."""
        return self.up.shape[1]

    @property
    def hidden(self) -> int:
        """F."""
        return self.up.shape[0]

    def shape(self) -> FFNShape:
        """What experts in its place inherit."""
        name, function = resolve_activation(self.activation)
        bias = any(b is not None for b in (self.up_bias, self.gate_bias, self.down_bias))
        return FFNShape(self.hidden, self.gate is not None, name or function, bias, self.dropout)


def find_ffns(model: nn.Module) -> list[DenseFFN]:
    """The FFNs of a model in the order of its modules; those inside one another, or inside an MoE layer, left out.

    Known are the spellings of timm, torchvision, `torch.nn`'s transformer layers and transformers: see `READERS`.
    Weights are read, not copied. Dropout on an FFN's output is not read: only `torch.nn`'s layers keep it outside the
    FFN, where replacing leaves it.
    """
    found: list[DenseFFN] = []
    skip: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if skip and name.startswith(skip):
            continue
        if isinstance(module, MoE):
            skip += (f"{name}.",)
            continue
        for reader in READERS:
            ffn = reader(name, module)
            if ffn is not None:
                found.append(ffn)
                if ffn.name == name:  # it is this module as a whole: nothing inside is another
                    skip += (f"{name}.",)
                break
    return found


def put_module(model: nn.Module, ffn: DenseFFN, module: nn.Module) -> None:
    """Put `module` where `ffn` was found."""
    parent_name, _, leaf = ffn.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    model.set_submodule(ffn.name, module)
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) and leaf == "linear1":
        # The FFN of these is no module: its first linear map becomes the MoE, everything after it the identity.
        parent.linear2, parent.dropout, parent.activation = nn.Identity(), nn.Identity(), nn.Identity()
        parent.activation_relu_or_gelu = 0  # no fused kernel may take the place of these


def _from_linears(
    name: str,
    up: nn.Module,
    down: nn.Module,
    activation: object,
    gate: nn.Module | None = None,
    dropout: nn.Module | None = None,
) -> DenseFFN | None:
    """An FFN from its linear maps, if they are such and fit, and the dropout on its hidden units."""
    maps = [m for m in (up, down, gate) if m is not None]
    if not all(isinstance(m, nn.Linear) for m in maps) or down.in_features != up.out_features:
        return None
    return DenseFFN(
        name,
        up.weight.detach(),
        down.weight.detach(),
        None if gate is None else gate.weight.detach(),
        _bias(up),
        _bias(down),
        None if gate is None else _bias(gate),
        activation,
        dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
    )


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _plain(name: str, m: nn.Module) -> DenseFFN | None:
    """fc1 -> act -> fc2 (timm Mlp, transformers CLIP and ViT kin)."""
    activation = getattr(m, "act", None) or getattr(m, "activation_fn", None)
    if activation is None or not hasattr(m, "fc1") or not hasattr(m, "fc2") or _has_norm(m):
        return None
    return _from_linears(name, m.fc1, m.fc2, activation, dropout=_timm_dropout(m))


def _split_glu(name: str, m: nn.Module) -> DenseFFN | None:
    """fc1_g, fc1_x -> fc2 (timm SwiGLU)."""
    if not all(hasattr(m, part) for part in ("fc1_g", "fc1_x", "fc2", "act")) or _has_norm(m):
        return None
    return _from_linears(name, m.fc1_x, m.fc2, m.act, m.fc1_g, _timm_dropout(m))


def _timm_dropout(m: nn.Module) -> nn.Module | None:
    return getattr(m, "drop1", None) or getattr(m, "drop", None)  # newer and older releases of timm


def _llama(name: str, m: nn.Module) -> DenseFFN | None:
    """gate_proj, up_proj -> down_proj (Llama and kin in transformers)."""
    if not all(hasattr(m, part) for part in ("gate_proj", "up_proj", "down_proj")):
        return None
    activation = getattr(m, "act_fn", None) or getattr(m, "act", None)
    return None if activation is None else _from_linears(name, m.up_proj, m.down_proj, activation, m.gate_proj)


def _torch_layer(name: str, m: nn.Module) -> DenseFFN | None:
    """linear1 -> activation -> linear2 (torch.nn.TransformerEncoderLayer, TransformerDecoderLayer)."""
    if not isinstance(m, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return None
    name = f"{name}.linear1" if name else "linear1"
    return _from_linears(name, m.linear1, m.linear2, m.activation, dropout=m.dropout)


def _sequential(name: str, m: nn.Module) -> DenseFFN | None:
    """Linear, activation, Linear with dropouts between (torchvision MLPBlock)."""
    if not isinstance(m, nn.Sequential):
        return None
    parts = [part for part in m if not isinstance(part, (nn.Dropout, nn.Identity))]
    if len(parts) != 3 or isinstance(parts[1], nn.Linear) or _is_norm(parts[1]):
        return None
    between = list(m)[list(m).index(parts[1]) : list(m).index(parts[2])]
    dropout = next((part for part in between if isinstance(part, nn.Dropout)), None)
    ffn = _from_linears(name, parts[0], parts[2], parts[1], dropout=dropout)
    return ffn if ffn is not None and ffn.down.shape[0] == ffn.width else None


def _is_norm(m: nn.Module) -> bool:
    """Whether it or a part of it normalises, by class name: there is no base class, and every library has its own."""
    return any("norm" in cls.__name__.lower() for part in m.modules() for cls in type(part).__mro__)


def _has_norm(m: nn.Module) -> bool:
    """A norm between the linear maps cannot be carried into experts."""
    return not isinstance(getattr(m, "norm", None) or nn.Identity(), nn.Identity)


READERS: tuple[Callable[[str, nn.Module], DenseFFN | None], ...] = (
    _split_glu,
    _plain,
    _llama,
    _torch_layer,
    _sequential,
)
"""Each knows one way to write an FFN; add a function to teach `find_ffns` another."""
