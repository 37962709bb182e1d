"""Activations by name, and foreign ones recognised by what they compute."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moecore
from moecore.activations import resolve_activation

X = torch.linspace(-5, 5, 41)
FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", moecore.ACTIVATIONS)
def test_names_mean_their_formulas(name):
    resolved, function = resolve_activation(name)
    assert resolved == name
    torch.testing.assert_close(function(X), FORMULAS[name](X), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("foreign", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.ReLU(inplace=True), "relu"),
        (F.relu, "relu"),
        (torch.tanh, "tanh"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Identity(), "identity"),
        (lambda x: F.relu(x) ** 2, "relu2"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (nn.LeakyReLU(0.1), None),
        (nn.ELU(), None),
        (nn.PReLU(), None),
        (lambda x: x * torch.sigmoid(1.702 * x), None),
    ],
    ids=[
        "GELU",
        "GELU-tanh",
        "partial-gelu-tanh",
        "SiLU",
        "ReLU",
        "F.relu",
        "torch.tanh",
        "Sigmoid",
        "Identity",
        "squared-relu-lambda",
        "silu-lambda",
        "LeakyReLU",
        "ELU",
        "PReLU",
        "quick-gelu-lambda",
    ],
)
def test_foreign_activations_are_known_by_their_values(foreign, name):
    resolved, function = resolve_activation(foreign)
    assert resolved == name
    with torch.no_grad():
        torch.testing.assert_close(function(X.clone()), foreign(X.clone()), rtol=0, atol=2e-6)


def test_an_activation_with_parameters_is_never_replaced():
    """Whatever values it has now, it may learn others."""
    prelu = nn.PReLU(init=0.0)  # the same as ReLU today
    assert resolve_activation(prelu) == (None, prelu)


@pytest.mark.parametrize("name", moecore.ACTIVATIONS)
def test_banks_with_any_activation_pickle(name):
    bank = moecore.MLPBank(2, 4, 6, activation=name)
    again = pickle.loads(pickle.dumps(bank))  # noqa: S301
    torch.testing.assert_close(again.activation(X), bank.activation(X))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(moecore.ConfigError, match=r"^activation='swish': choose one of gelu, gelu_tanh, identity, "):
        moecore.MLPBank(2, 4, 6, activation="swish")
