"""Find active features: pre-activations in blocks of tokens, first in bfloat16 if that is faster.

Most of the encoder's product is discarded: only entries above a bound matter. If the device has bfloat16 hardware, the
product is computed in bfloat16, with a known error margin, and only entries that may exceed the bound are recomputed
exactly. The margin is SLACK times the standard deviation of a pre-activation for random directions of input and encoder
row. Rounding errors of 512 products stay well below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from crosslayer.clt.sparse import Entries, sampled_products, where

TOKENS_AT_ONCE = {"cpu": 512, "cuda": 4096, "mps": 4096}
"""Tokens per block of pre-activations of one layer; on CPU, a block fits the processor's cache."""
SLACK = 2.0**-5


class Looked(NamedTuple):
    """Pre-activations of one layer."""

    z_BF: Float[Tensor, "B F"]
    margin_F: Float[Tensor, " F"] | None
    """Error margin per feature; None if exact."""


class Found(NamedTuple):
    """Entries of one layer and their pre-activations."""

    entries: Entries
    z_K: Float[Tensor, " K"]

    def those(self, mask_K: Bool[Tensor, " K"]) -> Found:
        """Return the entries of a mask."""
        return Found(Entries(self.entries.token_K[mask_K], self.entries.feature_K[mask_K]), self.z_K[mask_K])


class Given:
    """Finder for pre-activations that are already computed.

    All finders have `look(layer, tokens)`, the pre-activations of some tokens; `exact(layer, entries)`, the exact
    pre-activations of some entries; and `chunks()`, the tokens split into blocks.
    """

    def __init__(self, pre: Sequence[Float[Tensor, "B F"]]) -> None:
        self.pre, self.n_layers, self.n_tokens = pre, len(pre), len(pre[0])

    def look(self, layer: int, tokens: slice) -> Looked:
        return Looked(self.pre[layer][tokens], None)

    def exact(self, layer: int, entries: Entries) -> Tensor:
        return self.pre[layer][entries]

    def chunks(self) -> list[slice]:
        return _chunks(self.n_tokens, self.pre[0].device)


class Exact:
    """Finder that computes exact pre-activations."""

    def __init__(self, pre: Callable[[Tensor, int], Tensor], x_LBD: Sequence[Tensor], *, at_once: bool) -> None:
        self.pre, self.x_LBD, self.at_once = pre, x_LBD, at_once
        self.n_layers, self.n_tokens = len(x_LBD), len(x_LBD[0])

    def look(self, layer: int, tokens: slice) -> Looked:
        return Looked(self.pre(self.x_LBD[layer][tokens], layer), None)

    def exact(self, layer: int, entries: Entries) -> Tensor:
        raise AssertionError("these pre-activations are already exact")

    def chunks(self) -> list[slice]:
        return [slice(0, self.n_tokens)] if self.at_once else _chunks(self.n_tokens, self.x_LBD[0].device)


class Coarse:
    """Finder that computes bfloat16 pre-activations of float32 inputs and weights, with a margin."""

    def __init__(self, x_LBD: Sequence[Tensor], W_enc: Sequence[Tensor], b_enc: Sequence[Tensor]) -> None:
        self.x_LBD, self.W_enc, self.b_enc = x_LBD, W_enc, b_enc
        self.n_layers, self.n_tokens = len(x_LBD), len(x_LBD[0])
        self._prepared: tuple[int, Tensor, Tensor, Tensor, Tensor] | None = None

    def look(self, layer: int, tokens: slice) -> Looked:
        x, W, b, margin = self._of(layer)
        return Looked(F.linear(x[tokens], W, b), margin)

    def exact(self, layer: int, entries: Entries) -> Tensor:
        W_FD = self.W_enc[layer]
        return sampled_products(self.x_LBD[layer], W_FD, *entries, len(W_FD)) + self.b_enc[layer][entries.feature_K]

    def chunks(self) -> list[slice]:
        return _chunks(self.n_tokens, self.x_LBD[0].device)

    def _of(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return inputs, weights, biases and margins of a layer; the last layer is cached."""
        if self._prepared is None or self._prepared[0] != layer:
            x_BD, W_FD, b_F = self.x_LBD[layer], self.W_enc[layer], self.b_enc[layer]
            length = torch.linalg.vector_norm(x_BD, dim=1).max() / W_FD.shape[1] ** 0.5
            margin_F = SLACK * length * torch.linalg.vector_norm(W_FD, dim=1) + 2.0**-8 * b_F.abs()
            half = torch.bfloat16
            self._prepared = (layer, x_BD.to(half), W_FD.to(half), b_F.to(half), margin_F)
        return self._prepared[1:]


class Fused(Exact):
    """Finder for CUDA, where one kernel multiplies, compares and compacts."""

    def __init__(
        self,
        pre: Callable[[Tensor, int], Tensor],
        x_LBD: Sequence[Tensor],
        W_enc: Sequence[Tensor],
        b_enc: Sequence[Tensor],
    ) -> None:
        super().__init__(pre, x_LBD, at_once=False)
        self.W_enc, self.b_enc = W_enc, b_enc

    def above(self, layer: int, bound_F: Tensor) -> Found:
        """Return the entries of a layer whose pre-activation exceeds the bound of its feature."""
        from crosslayer.clt import kernels

        token_K, feature_K, z_K = kernels.encode_above(self.x_LBD[layer], self.W_enc[layer], self.b_enc[layer], bound_F)
        return Found(Entries(token_K, feature_K), z_K)


Finder = Given | Exact | Coarse | Fused


def above(finder: Finder, layer: int, bound_F: Float[Tensor, " F"]) -> Found:
    """Return the entries of a layer whose pre-activation exceeds the bound of its feature."""
    found, exact = near(finder, layer, bound_F)
    return found if exact else found.those(found.z_K > bound_F[found.entries.feature_K])


def near(finder: Finder, layer: int, bound_F: Float[Tensor, " F"]) -> tuple[Found, bool]:
    """Return the entries of `above`, and perhaps some just below, with exact pre-activations; and whether exact."""
    if isinstance(finder, Fused):
        return finder.above(layer, bound_F), True
    found, values = list[Entries](), list[Tensor]()
    margin_F = None
    for tokens in finder.chunks():
        z_BF, margin_F = finder.look(layer, tokens)
        least_F = bound_F if margin_F is None else bound_F - margin_F - 2.0**-7 * bound_F.abs()
        entries = where(z_BF > least_F.to(z_BF.dtype))
        found.append(Entries(entries.token_K + tokens.start, entries.feature_K))
        if margin_F is None:
            values.append(z_BF[entries])
    entries = Entries(*(torch.cat(axis) for axis in zip(*found, strict=True)))
    return Found(entries, torch.cat(values) if values else finder.exact(layer, entries)), margin_F is None


def _chunks(n: int, device: torch.device) -> list[slice]:
    at_once = TOKENS_AT_ONCE[device.type]
    return [slice(a, min(a + at_once, n)) for a in range(0, n, at_once)]
