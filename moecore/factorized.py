"""Features of which some are rows of small tables: a linear map takes each row once, however many samples share it.

Linear algebra over normalised data (Chen, Kumar, Naughton and Patel, VLDB 2017). A linear map of F features of d
dimensions costs `B F d O` multiply-adds; of their tables, `V d O`, and sums of `B F` rows of O.

B rows, F features in tables, V rows of their tables, R further columns, D width of all, O of an output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class FactorizedInput:
    """`[B, D]` that is not laid out: first the features in tables, then the others.

    Example:
        >>> import torch
        >>> from moecore.factorized import FactorizedInput
        >>> colour, size = torch.randn(3, 4), torch.randn(2, 4)
        >>> x = FactorizedInput((colour, size), torch.tensor([[0, 3], [2, 4]]), torch.randn(2, 5))
        >>> weight = torch.randn(7, 13)
        >>> torch.allclose(x.linear(weight), x.dense() @ weight.T, atol=1e-5)
        True
    """

    tables: tuple[Float[Tensor, "_ _"], ...]
    """Of each feature, `[rows, width]`."""
    ids: Int[Tensor, "B F"]
    """Row of each feature, counted through all tables as if they stood on top of each other."""
    rest: Float[Tensor, "B R"]

    def linear(self, weight: Float[Tensor, "O D"], bias: Float[Tensor, " O"] | None = None) -> Float[Tensor, "B O"]:
        """As `torch.nn.functional.linear` of what this stands for."""
        widths = [table.shape[1] for table in self.tables]
        own, other = weight.split([sum(widths), self.rest.shape[1]], 1)
        mapped = [table @ part.t() for table, part in zip(self.tables, own.split(widths, 1), strict=True)]
        if bias is not None:
            mapped[0] = mapped[0] + bias  # each sample has one row of the first table
        return torch.addmm(F.embedding_bag(self.ids, torch.cat(mapped), mode="sum"), self.rest, other.t())

    def dense(self) -> Float[Tensor, "B D"]:
        """Laid out."""
        parts, start = [], 0
        for table, ids in zip(self.tables, self.ids.unbind(1), strict=True):
            parts.append(table.index_select(0, ids - start))
            start += len(table)
        return torch.cat([*parts, self.rest], 1)

    def beside(self, *more: Float[Tensor, "B _"]) -> FactorizedInput:
        """With further columns at the end."""
        return FactorizedInput(self.tables, self.ids, torch.cat([self.rest, *more], 1))


Features = Float[Tensor, "B D"] | FactorizedInput
"""`[B, D]`, laid out or not."""


def linear(x: Features, weight: Float[Tensor, "O D"], bias: Float[Tensor, " O"] | None = None) -> Float[Tensor, "B O"]:
    """`x W' + b`."""
    return F.linear(x, weight, bias) if isinstance(x, Tensor) else x.linear(weight, bias)


def dense(x: Features) -> Float[Tensor, "B D"]:
    """Laid out."""
    return x if isinstance(x, Tensor) else x.dense()


def beside(x: Features, *more: Float[Tensor, "B _"]) -> Float[Tensor, "B _"] | FactorizedInput:
    """With further columns at the end."""
    return torch.cat([x, *more], 1) if isinstance(x, Tensor) else x.beside(*more)
