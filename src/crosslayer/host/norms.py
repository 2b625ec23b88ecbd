"""The norms of a language model, as linear maps once their scales are frozen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosslayer.host.families import Family


class Norm(NamedTuple):
    """An RMS or layer norm: `gain * scale(x) * (x - mean(x) if centred else x) + bias`."""

    module: nn.Module | None
    """None where a family has no norm: gain and scale are 1."""
    gain_D: Float[Tensor, " D"]
    bias_D: Float[Tensor, " D"] | None
    centred: bool
    eps: float

    def scale(self, x_TD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
        """Return the scale of each position."""
        if self.module is None:
            return torch.ones_like(x_TD[..., 0], dtype=torch.promote_types(x_TD.dtype, torch.float32))
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        if self.centred:
            x_TD = x_TD - x_TD.mean(-1, keepdim=True)
        return (x_TD.square().mean(-1) + self.eps).rsqrt()

    def apply(self, x_TD: Float[Tensor, "... T D"], scale_T: Float[Tensor, "... T"]) -> Float[Tensor, "... T D"]:
        """Apply the norm with frozen scales."""
        x = x_TD - x_TD.mean(-1, keepdim=True) if self.centred else x_TD
        y = x * scale_T[..., None] * self.gain_D
        return (y if self.bias_D is None else y + self.bias_D).to(x_TD.dtype)

    def pull(self, g_ND: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Return gradients at the input, given those at the output, for a scale of one."""
        g_ND = g_ND * self.gain_D.to(g_ND.dtype)
        return g_ND - g_ND.mean(-1, keepdim=True) if self.centred else g_ND

    def plain(self) -> Norm:
        """Return the norm without gain and bias."""
        return self._replace(gain_D=torch.ones_like(self.gain_D), bias_D=None)


def no_norm(d_model: int, like: Tensor) -> Norm:
    """Return the identity, for families without a norm here; dtype and device are those of `like`."""
    return Norm(None, like.new_ones(d_model), None, False, 0.0)


def norm_of(module: Any, family: Family) -> Norm:
    """Return the norm of a model's module."""
    gain_D = module.weight.detach()
    if isinstance(module, nn.LayerNorm):
        return Norm(module, gain_D, module.bias.detach(), True, module.eps)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    if family.gain_plus_one:
        # The model adds in float32; in bfloat16 the sum would lose the lower bits of the weight.
        gain_D = gain_D.to(torch.promote_types(gain_D.dtype, torch.float32)) + 1
    return Norm(module, gain_D, None, False, eps)
