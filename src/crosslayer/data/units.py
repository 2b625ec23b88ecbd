"""Training units: activations normalised to mean norm sqrt(D), inputs rotated to their principal axes.

One factor per layer brings the mean norm of inputs and outputs to sqrt(D), over tokens without massive activations.
Inputs are then rotated, layer by layer, to the eigenvectors of their second moment. The rotation does not change the
loss, but it changes Adam: its per-coordinate step sizes follow the curvature along the axes of the data instead of the
host's arbitrary axes (Vyas et al. 2024, arXiv:2409.11321). Both are folded exactly into the weights on saving
(`crosslayer.clt.fold`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.core.errors import HostError
from crosslayer.data.massive import Typical, norms
from crosslayer.data.stream import collect_activations
from crosslayer.host.host import Host

ONE_IN = 20
"""The estimate reads at most one in this many of the tokens that a run collects."""
TOKENS_PER_AXIS = 4
"""Tokens per dimension of the host that determine the principal axes."""
SAMPLE = 8_192
"""Tokens of the estimate whose MLP inputs are returned."""


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


class Means(NamedTuple):
    """Mean activations by layer, in the host's units."""

    x_LD: Float[Tensor, "L D"]
    y_LD: Float[Tensor, "L D"]


class Estimate(NamedTuple):
    """What the first tokens of a run's text determine."""

    units: Units
    typical: Typical
    """Median norms, of the first forward pass; they decide which tokens are left out of training."""
    mean: Means
    sample_BLD: Float[Tensor, "B L D"]
    """MLP inputs of some of the tokens, spread over all of them, in the host's units."""


class Moments:
    """Sums of activations, norms and second moments by layer."""

    def __init__(self, host: Host) -> None:
        self.sum_2L = torch.zeros(2, host.n_layers, dtype=torch.float64)
        self.sum_2LD = torch.zeros(2, host.n_layers, host.d_model, dtype=torch.float64)
        self.second_LDD = torch.zeros(host.n_layers, host.d_model, host.d_model, dtype=torch.float64)
        self.n_tokens = 0
        self.d_model = host.d_model

    def add(self, x_BLD: Float[Tensor, "B L D"], y_BLD: Float[Tensor, "B L D"]) -> None:
        """Accumulate the moments of these tokens."""
        for sum_L, sum_LD, a_BLD in zip(self.sum_2L, self.sum_2LD, (x_BLD, y_BLD), strict=True):
            sum_L += norms(a_BLD).sum(0).cpu()
            sum_LD += a_BLD.sum(0, dtype=torch.float32).cpu()
        for second_DD, x_BD in zip(self.second_LDD, x_BLD.unbind(1), strict=True):
            x_BD = x_BD.float()
            second_DD += (x_BD.T @ x_BD).cpu()
        self.n_tokens += len(x_BLD)

    def means(self) -> Means:
        """Return the mean activations of the accumulated tokens."""
        return Means(*(self.sum_2LD / self.n_tokens).float())

    def units(self) -> Units:
        """Return the scale factors and principal axes of the accumulated tokens.

        Raises:
            HostError: if the activations of a layer are zero or not finite.
        """
        mean_2L = self.sum_2L / self.n_tokens
        usable_L = (mean_2L.isfinite() & (mean_2L > 0)).all(0)
        if not usable_L.all():
            layer = int((~usable_L).nonzero()[0])
            raise HostError(
                f"the MLP of layer {layer} reads or writes zeros or infinities; the model cannot be transcoded"
            )
        factor_2L = math.sqrt(self.d_model) / mean_2L
        axes_LDD = torch.linalg.eigh(self.second_LDD).eigenvectors
        return Units(factor_2L[0].float(), factor_2L[1].float(), axes_LDD.float())


def estimate_tokens(limit: int, collected: int, d_model: int) -> int:
    """Return the number of tokens to estimate on: a twentieth of those that a run collects, enough for the axes.

    Args:
        limit: most tokens.
        collected: tokens that the run collects.
    """
    return min(limit, max(collected // ONE_IN, TOKENS_PER_AXIS * d_model))


def estimate(
    host: Host, rows: Callable[[int], Tensor], n_tokens: int, rows_at_once: int, on_progress: Callable[[int], None]
) -> Estimate:
    """Estimate units and median norms from `n_tokens` tokens of the rows that `rows(n)` returns.

    Raises:
        HostError: if the activations of a layer are zero or not finite.
    """
    moments, typical, sample, done = Moments(host), None, list[Tensor](), 0
    stride = -(-n_tokens // SAMPLE)
    while done < n_tokens:
        x_BLD, y_BLD = collect_activations(host, rows(rows_at_once))
        done += len(x_BLD)
        typical = typical or Typical.of([(x_BLD, y_BLD)])
        usual_B = ~typical.massive(x_BLD, y_BLD)
        x_BLD, y_BLD = x_BLD[usual_B], y_BLD[usual_B]
        moments.add(x_BLD, y_BLD)
        sample.append(x_BLD[::stride].clone())
        on_progress(done)
    assert typical is not None, "at least one token is read"
    return Estimate(moments.units(), typical, moments.means(), torch.cat(sample))
