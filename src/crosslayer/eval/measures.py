"""Running sums that become the measures: FVU, L0, dead share, densities. One pass, float64 sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.clt.sparse import Active
from crosslayer.parallel import Group

DEAD_TOKENS = 100_000
DENSITY_EDGES = [-6.0 + 0.25 * i for i in range(25)]


class Reconstruction:
    """Squared errors and variances by layer, over any number of batches."""

    def __init__(self, n_layers: int, d_model: int) -> None:
        self.n_tokens = 0
        self.error_L = torch.zeros(n_layers, dtype=torch.float64)
        self.square_L = torch.zeros(n_layers, dtype=torch.float64)
        self.sum_LD = torch.zeros(n_layers, d_model, dtype=torch.float64)

    def add(self, yhat_BLD: Float[Tensor, "B L D"], y_BLD: Float[Tensor, "B L D"]) -> None:
        """Take these tokens in."""
        y = y_BLD.double()
        self.n_tokens += y.shape[0]
        self.error_L += (yhat_BLD.double() - y).square().sum((0, 2)).cpu()
        self.square_L += y.square().sum((0, 2)).cpu()
        self.sum_LD += y.sum(0).cpu()

    @property
    def variance_L(self) -> Float[Tensor, " L"]:
        """sum ||y - mean(y)||^2 with each layer's own mean over the tokens taken in."""
        return self.square_L - self.sum_LD.square().sum(1) / self.n_tokens

    def fvu_L(self) -> Float[Tensor, " L"]:
        """Fraction of variance unexplained of each layer."""
        return self.error_L / self.variance_L

    def fvu(self) -> float:
        """Pooled over layers in normalised units: each layer's sums divided by its mean squared norm."""
        return float((self.error_L / self.square_L).sum() / (self.variance_L / self.square_L).sum())


class Firing:
    """How often each feature fires."""

    def __init__(self, n_layers: int, n_features: int) -> None:
        self.n_tokens = 0
        self.count_LF = torch.zeros(n_layers, n_features, dtype=torch.int64)
        self.dead_tokens = 0
        self.alive_LF = torch.zeros(n_layers, n_features, dtype=torch.bool)

    def add(self, f: Sequence[Active]) -> None:
        """Take the activations of these tokens in."""
        n = f[0].shape[0]
        early = max(0, min(n, DEAD_TOKENS - self.dead_tokens))
        for i, active in enumerate(f):
            self.count_LF[i] += active.count().cpu()
            self.alive_LF[i, active.feature_K[(active.value_K > 0) & (active.token_K < early)].cpu()] = True
        self.n_tokens += n
        self.dead_tokens += early

    def joined(self, group: Group) -> Firing:
        """With the features that the other ranks of a group counted on the same tokens."""
        whole = Firing(*self.count_LF.shape)
        whole.n_tokens, whole.dead_tokens = self.n_tokens, self.dead_tokens
        whole.count_LF = group.cat(self.count_LF, dim=1)
        whole.alive_LF = group.cat(self.alive_LF, dim=1)
        return whole

    def l0_L(self) -> Float[Tensor, " L"]:
        """Mean number of features that fire on a token, by layer."""
        return self.count_LF.sum(1).double() / self.n_tokens

    def dead_L(self) -> Float[Tensor, " L"]:
        """Share of features that no token of the first `DEAD_TOKENS` made fire, by layer."""
        return 1.0 - self.alive_LF.double().mean(1)

    def density_histogram_L(self) -> list[list[int]]:
        """Counts of features by log10 density, between `DENSITY_EDGES`."""
        edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
        rows = []
        for count_F in self.count_LF:
            density = count_F[count_F > 0].double() / self.n_tokens
            bins = torch.bucketize(density.log10(), edges).sub(1).clamp(0, len(edges) - 2)
            rows.append(torch.bincount(bins, minlength=len(edges) - 1).tolist())
        return rows
