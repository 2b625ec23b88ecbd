"""Training units: activations normalised to mean norm sqrt(D), inputs rotated to their principal axes.

One factor per layer brings the mean norm of inputs and outputs to sqrt(D). Inputs are then rotated, layer by layer, to
the eigenvectors of their second moment. The rotation does not change the loss, but it changes Adam: its per-coordinate
step sizes follow the curvature along the axes of the data instead of the host's arbitrary axes (Vyas et al. 2024,
arXiv:2409.11321). Both are folded exactly into the weights on saving (`crosslayer.clt.fold`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.core.errors import HostError
from crosslayer.data.stream import collect_activations
from crosslayer.host.host import Host

MASSIVE = 20.0
"""Tokens whose norm exceeds this multiple of the batch median are massive activations (Sun et al. 2024): left out."""


class Units(NamedTuple):
    """Conversion from the host's units to training units."""

    x_L: Float[Tensor, " L"]
    """Scale factors of MLP inputs."""
    y_L: Float[Tensor, " L"]
    """Scale factors of MLP outputs."""
    axes_LDD: Float[Tensor, "L D D"]
    """Principal axes of each layer's MLP inputs, as columns."""

    def inputs(self, x_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return MLP inputs in training units, float32."""
        scaled_LBD = (x_BLD.to(self.x_L.device).float() * self.x_L[:, None]).transpose(0, 1)
        return (scaled_LBD @ self.axes_LDD).transpose(0, 1)

    def outputs(self, y_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return MLP outputs in training units, float32."""
        return y_BLD.to(self.y_L.device).float() * self.y_L[:, None]

    def to(self, device: str) -> Units:
        return Units(*(t.to(device) for t in self))


class Moments:
    """Running means of norms and second moments by layer, without first positions and massive activations."""

    def __init__(self, host: Host) -> None:
        self.sum_2L = torch.zeros(2, host.n_layers, dtype=torch.float64)
        self.count_2L = torch.zeros(2, host.n_layers, dtype=torch.float64)
        self.second_LDD = torch.zeros(host.n_layers, host.d_model, host.d_model, dtype=torch.float64)
        self.d_model = host.d_model

    def add(self, x_BLD: Float[Tensor, "B L D"], y_BLD: Float[Tensor, "B L D"]) -> None:
        """Accumulate the moments of these tokens."""
        for i, a_BLD in enumerate((x_BLD, y_BLD)):
            norm_BL = torch.linalg.vector_norm(a_BLD, dim=2, dtype=torch.float32)
            usual_BL = norm_BL <= MASSIVE * norm_BL.median(dim=0).values
            self.sum_2L[i] += (norm_BL * usual_BL).sum(0).double().cpu()
            self.count_2L[i] += usual_BL.sum(0).double().cpu()
            if i == 0:
                x_LBD = (a_BLD.float() * usual_BL[:, :, None]).transpose(0, 1)
                self.second_LDD += (x_LBD.mT @ x_LBD).double().cpu()

    def units(self) -> Units:
        """Return the scale factors and principal axes of the accumulated tokens.

        Raises:
            HostError: if the activations of a layer are zero or not finite.
        """
        mean_2L = self.sum_2L / self.count_2L
        usable_L = (mean_2L.isfinite() & (mean_2L > 0)).all(0)
        if not usable_L.all():
            layer = int((~usable_L).nonzero()[0])
            raise HostError(
                f"the MLP of layer {layer} reads or writes zeros or infinities; the model cannot be transcoded"
            )
        factor_2L = math.sqrt(self.d_model) / mean_2L
        axes_LDD = torch.linalg.eigh(self.second_LDD).eigenvectors
        return Units(factor_2L[0].float(), factor_2L[1].float(), axes_LDD.float())


def estimate_units(
    host: Host, rows: Callable[[int], Tensor], n_tokens: int, rows_at_once: int, on_progress: Callable[[int], None]
) -> Units:
    """Estimate units from `n_tokens` tokens of the rows that `rows(n)` returns."""
    moments, done = Moments(host), 0
    while done < n_tokens:
        batch = collect_activations(host, rows(rows_at_once))
        moments.add(batch.x_BLD, batch.y_BLD)
        done += batch.x_BLD.shape[0]
        on_progress(done)
    return moments.units()
