"""The baseline without features: the best affine map from each MLP's own input to its output.

A transcoder whose FVU is not below this one's explains nothing that a matrix would not. The map of layer M reads x_M
alone, not the inputs of earlier layers. It is the closed-form least-squares solution with an intercept, from moments
summed in float64 over training text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RANK = 1e-9
"""Directions of standardised inputs whose variance is below this share of the largest are left out of the solution."""
CONSTANT = 1e-12
"""Coordinates whose variance is below this share of their mean square count as constant."""


class Affine(NamedTuple):
    """An affine map per layer, y = x W + b."""

    W_LDD: Float[Tensor, "L D D"]
    b_LD: Float[Tensor, "L D"]

    def __call__(self, x_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return the predicted MLP outputs of all layers."""
        x_LBD = x_BLD.to(self.W_LDD.dtype).transpose(0, 1)
        return (x_LBD @ self.W_LDD).transpose(0, 1) + self.b_LD

    def to(self, device: torch.device) -> Affine:
        return Affine(self.W_LDD.to(device), self.b_LD.to(device))


class AffineMoments:
    """Accumulates the moments of MLP inputs and outputs from which `Affine` is solved, in float64 on the CPU."""

    def __init__(self, n_layers: int, d_model: int) -> None:
        self.n_tokens = 0
        self.x_LD = torch.zeros(n_layers, d_model, dtype=torch.float64)
        self.y_LD = torch.zeros(n_layers, d_model, dtype=torch.float64)
        self.xx_LDD = torch.zeros(n_layers, d_model, d_model, dtype=torch.float64)
        self.xy_LDD = torch.zeros(n_layers, d_model, d_model, dtype=torch.float64)

    @staticmethod
    def size_bytes(n_layers: int, d_model: int) -> int:
        """Return the size of the moments in memory."""
        return 16 * n_layers * d_model * (d_model + 1)

    def add(self, x_BLD: Float[Tensor, "B L D"], y_BLD: Float[Tensor, "B L D"]) -> None:
        """Accumulate a batch of tokens, one layer at a time."""
        self.n_tokens += len(x_BLD)
        for i, (x_BD, y_BD) in enumerate(zip(x_BLD.unbind(1), y_BLD.unbind(1), strict=True)):
            x, y = x_BD.double(), y_BD.double()
            self.x_LD[i] += x.sum(0).cpu()
            self.y_LD[i] += y.sum(0).cpu()
            self.xx_LDD[i] += (x.mT @ x).cpu()
            self.xy_LDD[i] += (x.mT @ y).cpu()

    def solve(self) -> Affine:
        """Return the least-squares maps, float32; of minimum norm where inputs are linearly dependent."""
        pairs = [self._solve_layer(i) for i in range(len(self.x_LD))]
        return Affine(*(torch.stack(parts).float() for parts in zip(*pairs, strict=True)))

    def _solve_layer(self, i: int) -> tuple[Tensor, Tensor]:
        x_D, y_D = self.x_LD[i] / self.n_tokens, self.y_LD[i] / self.n_tokens
        xx_DD = self.xx_LDD[i] - self.n_tokens * torch.outer(x_D, x_D)
        xy_DD = self.xy_LDD[i] - self.n_tokens * torch.outer(x_D, y_D)
        # Standardised, since the variances of a residual stream's coordinates differ by orders of magnitude.
        # What is constant has no variance but rounding, and is left to the intercept.
        varies_D = xx_DD.diagonal() > CONSTANT * self.xx_LDD[i].diagonal()
        scale_D = torch.where(varies_D, xx_DD.diagonal().clamp(min=0.0).rsqrt(), 0.0)
        values_D, vectors_DD = torch.linalg.eigh(xx_DD * scale_D * scale_D[:, None])
        inverse_D = torch.where(values_D > RANK * values_D[-1], 1 / values_D, 0.0)
        W_DD = scale_D[:, None] * (vectors_DD * inverse_D) @ (vectors_DD.mT @ (xy_DD * scale_D[:, None]))
        return W_DD, y_D - x_D @ W_DD
