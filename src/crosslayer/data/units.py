"""The units in which a transcoder is trained: mean norm sqrt(D), inputs along their principal axes.

One factor a layer brings the mean norm of inputs and outputs to sqrt(D). Inputs are then turned, layer by layer, onto
the eigenvectors of their second moment. A rotation changes no loss, but it changes Adam: its step sizes, one a
coordinate, fit the curvature along the axes of the data and not along the host's arbitrary ones (Vyas et al. 2024,
arXiv:2409.11321). Both are folded away exactly when the transcoder is saved (`crosslayer.clt.fold`).
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
"""Tokens whose norm exceeds this many times the median of their harvest are massive activations (Sun et al. 2024) and
left out.
"""


class Units(NamedTuple):
    """From the host's units to those of training."""

    x_L: Float[Tensor, " L"]
    """Factors of MLP inputs."""
    y_L: Float[Tensor, " L"]
    """Factors of MLP outputs."""
    axes_LDD: Float[Tensor, "L D D"]
    """Principal axes of each layer's MLP inputs, as columns."""

    def inputs(self, x_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """MLP inputs in the units of training, float32."""
        scaled_LBD = (x_BLD.to(self.x_L.device).float() * self.x_L[:, None]).transpose(0, 1)
        return (scaled_LBD @ self.axes_LDD).transpose(0, 1)

    def outputs(self, y_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """MLP outputs in the units of training, float32."""
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
        """Take these tokens into account."""
        for side, a_BLD in enumerate((x_BLD, y_BLD)):
            norm_BL = torch.linalg.vector_norm(a_BLD, dim=2, dtype=torch.float32)
            usual_BL = norm_BL <= MASSIVE * norm_BL.median(dim=0).values
            self.sum_2L[side] += (norm_BL * usual_BL).sum(0).double().cpu()
            self.count_2L[side] += usual_BL.sum(0).double().cpu()
            if side == 0:
                x_LBD = (a_BLD.float() * usual_BL[:, :, None]).transpose(0, 1)
                self.second_LDD += (x_LBD.mT @ x_LBD).double().cpu()

    def units(self) -> Units:
        """What brings the mean norms to sqrt(D) and the inputs onto their axes.

        Raises:
            HostError: for a layer whose activations are zero or not finite.
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
    """Units from `n_tokens` tokens of the rows that `rows(n)` gives."""
    moments, done = Moments(host), 0
    while done < n_tokens:
        taken = collect_activations(host, rows(rows_at_once))
        moments.add(taken.x_BLD, taken.y_BLD)
        done += taken.x_BLD.shape[0]
        on_progress(done)
    return moments.units()
