"""The losses: pure functions, each a mean over tokens, in units where activations have norm sqrt(D).

Losses on feature activations take a dense matrix or a list of entries; both are divided by `n_tokens`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def reconstruction(yhat_BLD: Float[Tensor, "B L D"], y_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, ""]:
    """Return the sum over layers of ||yhat - y||^2."""
    wide = torch.promote_types(yhat_BLD.dtype, torch.float32)
    return (yhat_BLD.to(wide) - y_BLD.to(wide)).square().sum() / y_BLD.shape[0]


def tanh_sparsity(f: Float[Tensor, ...], norm: Float[Tensor, ...], c: float, n_tokens: int) -> Float[Tensor, ""]:
    """Return the sum over features of tanh(c ||W_dec|| f) (Ameisen et al. 2025)."""
    return torch.tanh(c * norm * f).sum() / n_tokens


def l0_target(fired: Float[Tensor, ...], running_l0: float, target: float, n_tokens: int) -> Float[Tensor, ""]:
    """Return a loss whose straight-through gradient is that of (2 / L0*) (L0 - L0*)^2.

    Args:
        fired: `activations.step` of one layer's features, entries or matrix.
        running_l0: running mean of the L0 summed over layers; replaces L0 in the outer factor, as a constant.
        target: L0*.
    """
    return (4.0 / target) * (running_l0 - target) * fired.sum() / n_tokens


def preactivation(
    pre_BF: Float[Tensor, "B F"], theta_F: Float[Tensor, " F"], norm_F: Float[Tensor, " F"]
) -> Float[Tensor, ""]:
    """Return the sum over the given dead features of ReLU(theta - pre) ||W_dec||, which revives them."""
    return ((theta_F - pre_BF).relu() * norm_F).sum() / pre_BF.shape[0]
