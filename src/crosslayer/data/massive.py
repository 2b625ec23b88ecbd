"""Massive activations: the few tokens whose norms are far above those of all others.

Sun et al. 2024 (arXiv:2402.17762) find them in most language models, on delimiters beyond the first position too. They
carry most of the squared error and say little about other tokens, so training, calibration and the headline metrics
leave them out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MASSIVE = 10.0
"""A token is massive if its norm exceeds this multiple of a layer's median."""


def massive(norm_BL: Float[Tensor, "B L"], median_L: Float[Tensor, " L"]) -> Bool[Tensor, " B"]:
    """Return which tokens are massive: those whose norm at any layer exceeds `MASSIVE` times the layer's median."""
    return (norm_BL > MASSIVE * median_L).any(dim=1)


def norms(a_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L"]:
    """Return the norm of each token at each layer, in float32 or wider."""
    return torch.linalg.vector_norm(a_BLD, dim=2, dtype=torch.promote_types(a_BLD.dtype, torch.float32))


class Typical(NamedTuple):
    """Median norms of MLP inputs and outputs by layer."""

    x_L: Float[Tensor, " L"]
    y_L: Float[Tensor, " L"]

    @classmethod
    def of(cls, batches: Iterable[tuple[Tensor, Tensor]]) -> Typical:
        """Return the medians over batches of MLP inputs and outputs."""
        x, y = zip(*((norms(x_BLD), norms(y_BLD)) for x_BLD, y_BLD in batches), strict=True)
        return cls(torch.cat(x).median(dim=0).values, torch.cat(y).median(dim=0).values)

    def to(self, device: str) -> Typical:
        return Typical(self.x_L.to(device), self.y_L.to(device))

    def massive(self, x_BLD: Float[Tensor, "B L D"], y_BLD: Float[Tensor, "B L D"]) -> Bool[Tensor, " B"]:
        """Return which tokens are massive in their MLP inputs or outputs."""
        return massive(norms(x_BLD), self.x_L) | massive(norms(y_BLD), self.y_L)
