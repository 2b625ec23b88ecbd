"""The losses: pure functions, each a mean over tokens, in units where activations have norm sqrt(D).

Losses on feature activations take a dense matrix or a list of entries; both are divided by `n_tokens`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


def reconstruction(yhat_BLD: Float[Tensor, "B L D"], y_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, ""]:
    """Return the sum over layers of ||yhat - y||^2."""
    wide = torch.promote_types(yhat_BLD.dtype, torch.float32)
    return (yhat_BLD.to(wide) - y_BLD.to(wide)).square().sum() / y_BLD.shape[0]


@runtime_checkable
class Activations(Protocol):
    """Activations of one layer, as a matrix or a list of entries."""

    f: Tensor

    def of(self, number_F: Tensor, /) -> Tensor:
        """Return per-feature numbers, broadcastable to `f`."""
        ...

    def total(self, number: Tensor, /) -> Tensor:
        """Return the sum over tokens, per feature, of numbers like `f`."""
        ...


def tanh_sparsity(
    features: Activations, norm_F: Float[Tensor, " F"], c: float, n_tokens: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ...], Float[Tensor, " F"]]:
    """Return the sum over features of tanh(c ||W_dec|| f) (Ameisen et al. 2025), and its gradients.

    The gradients are those by each active entry of f, and by the norm ||W_dec|| of each feature.
    """
    f, norm = features.f, features.of(norm_F)
    value = torch.tanh(c * norm * f)
    slope = (1.0 - value.square()) * (c / n_tokens) * (f > 0)
    return value.sum() / n_tokens, slope * norm, features.total(slope * f)


def preactivation(
    pre_BF: Float[Tensor, "B F"], theta_F: Float[Tensor, " F"], norm_F: Float[Tensor, " F"]
) -> Float[Tensor, ""]:
    """Return the sum over the given dead features of ReLU(theta - pre) ||W_dec||, which revives them."""
    return ((theta_F - pre_BF).relu() * norm_F).sum() / pre_BF.shape[0]
