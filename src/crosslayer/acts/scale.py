"""One factor a layer that brings the mean norm of its activations to sqrt(D)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.acts.stream import harvest
from crosslayer.core.errors import HostError
from crosslayer.host.host import Host

MASSIVE = 20.0
"""Tokens whose norm exceeds this many times the median of their row are massive activations (Sun et al. 2024) and left out."""


class Scale(NamedTuple):
    """Factors for each layer's MLP inputs and outputs."""

    x_L: Float[Tensor, " L"]
    y_L: Float[Tensor, " L"]


class Norms:
    """Running means of norms by layer, without first positions and massive activations."""

    def __init__(self, host: Host) -> None:
        self.sum_2L = torch.zeros(2, host.n_layers, dtype=torch.float64)
        self.count_2L = torch.zeros(2, host.n_layers, dtype=torch.float64)
        self.d_model = host.d_model

    def add(self, x_BLD: Float[Tensor, "B L D"], y_BLD: Float[Tensor, "B L D"]) -> None:
        """Take the norms of these tokens into account."""
        for side, a_BLD in enumerate((x_BLD, y_BLD)):
            norm_BL = torch.linalg.vector_norm(a_BLD, dim=2, dtype=torch.float32)
            usual = norm_BL <= MASSIVE * norm_BL.median(dim=0).values
            self.sum_2L[side] += (norm_BL * usual).sum(0).double().cpu()
            self.count_2L[side] += usual.sum(0).double().cpu()

    def scale(self) -> Scale:
        """Factors that bring the mean norms to sqrt(D).

        Raises:
            HostError: for a layer whose activations are zero or not finite.
        """
        mean_2L = self.sum_2L / self.count_2L
        factor_2L = math.sqrt(self.d_model) / mean_2L
        if not (mean_2L.isfinite() & (mean_2L > 0)).all():
            layer = int((~(mean_2L.isfinite() & (mean_2L > 0))).any(0).nonzero()[0])
            raise HostError(
                f"the MLP of layer {layer} reads or writes zeros or infinities; the model cannot be transcoded"
            )
        return Scale(factor_2L[0].float(), factor_2L[1].float())


def estimate_scale(
    host: Host, rows: Callable[[int], Tensor], n_tokens: int, rows_at_once: int, on_progress: Callable[[int], None]
) -> Scale:
    """Factors from `n_tokens` tokens of the rows that `rows(n)` gives."""
    norms, done = Norms(host), 0
    while done < n_tokens:
        taken = harvest(host, rows(rows_at_once))
        norms.add(taken.x_BLD, taken.y_BLD)
        done += taken.x_BLD.shape[0]
        on_progress(done)
    return norms.scale()
