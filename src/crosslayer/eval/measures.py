"""Metrics as running float64 sums in one pass: FVU, L0, dead features, densities."""

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
    """Accumulates squared errors and variances per layer."""

    def __init__(self, n_layers: int, d_model: int) -> None:
        self.n_tokens = 0
        self.error_L = torch.zeros(n_layers, dtype=torch.float64)
        self.square_L = torch.zeros(n_layers, dtype=torch.float64)
        self.sum_LD = torch.zeros(n_layers, d_model, dtype=torch.float64)

    def add(self, yhat_BLD: Float[Tensor, "B L D"], y_BLD: Float[Tensor, "B L D"]) -> None:
        """Accumulate a batch of tokens."""
        self.n_tokens += len(y_BLD)
        for i, (yhat_BD, y_BD) in enumerate(zip(yhat_BLD.unbind(1), y_BLD.unbind(1), strict=True)):
            y = y_BD.double()
            self.error_L[i] += (yhat_BD.double() - y).square().sum().cpu()
            self.square_L[i] += y.square().sum().cpu()
            self.sum_LD[i] += y.sum(0).cpu()

    def __add__(self, other: Reconstruction) -> Reconstruction:
        """Return the sums over the tokens of both."""
        both = Reconstruction(*self.sum_LD.shape)
        both.n_tokens = self.n_tokens + other.n_tokens
        both.error_L, both.square_L = self.error_L + other.error_L, self.square_L + other.square_L
        both.sum_LD = self.sum_LD + other.sum_LD
        return both

    @property
    def variance_L(self) -> Float[Tensor, " L"]:
        """Sum of ||y - mean(y)||^2, with each layer's mean over the accumulated tokens."""
        return self.square_L - self.sum_LD.square().sum(1) / self.n_tokens

    def fvu_L(self) -> Float[Tensor, " L"]:
        """Return the fraction of variance unexplained per layer."""
        return self.error_L / self.variance_L

    def fvu(self) -> float:
        """Return the FVU pooled over layers; each layer is divided by its mean squared norm."""
        return float((self.error_L / self.square_L).sum() / (self.variance_L / self.square_L).sum())


class Firing:
    """Accumulates activation counts per feature."""

    def __init__(self, n_layers: int, n_features: int) -> None:
        self.n_tokens = 0
        self.count_LF = torch.zeros(n_layers, n_features, dtype=torch.int64)
        self.dead_tokens = 0
        self.alive_LF = torch.zeros(n_layers, n_features, dtype=torch.bool)

    def add(self, f: Sequence[Active]) -> None:
        """Accumulate the activations of a batch of tokens."""
        n = f[0].shape[0]
        early = max(0, min(n, DEAD_TOKENS - self.dead_tokens))
        for i, active in enumerate(f):
            self.count_LF[i] += active.count().cpu()
            self.alive_LF[i, active.feature_K[(active.value_K > 0) & (active.token_K < early)].cpu()] = True
        self.n_tokens += n
        self.dead_tokens += early

    def joined(self, group: Group) -> Firing:
        """Return the counts of all features, gathered over the ranks of a group."""
        whole = Firing(*self.count_LF.shape)
        whole.n_tokens, whole.dead_tokens = self.n_tokens, self.dead_tokens
        whole.count_LF = group.cat(self.count_LF, dim=1)
        whole.alive_LF = group.cat(self.alive_LF, dim=1)
        return whole

    def l0_L(self) -> Float[Tensor, " L"]:
        """Return the L0 per layer: the mean number of active features per token."""
        return self.count_LF.sum(1).double() / self.n_tokens

    def dead_L(self) -> Float[Tensor, " L"]:
        """Return the fraction of features without activation on the first `DEAD_TOKENS` tokens, per layer."""
        return 1.0 - self.alive_LF.double().mean(1)

    def density_histogram_L(self) -> list[list[int]]:
        """Return the histogram of log10 densities per layer, with bins `DENSITY_EDGES`."""
        edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
        rows = []
        for count_F in self.count_LF:
            density = count_F[count_F > 0].double() / self.n_tokens
            bins = torch.bucketize(density.log10(), edges).sub(1).clamp(0, len(edges) - 2)
            rows.append(torch.bincount(bins, minlength=len(edges) - 1).tolist())
        return rows
