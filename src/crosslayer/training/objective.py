"""Forward and backward pass of one micro-batch: encode, decode, losses and gradients.

Both passes process one layer at a time, so features of all layers are never held in one tensor:

    forward     find the active features of layer L; add what they write to the reconstruction
    residual    the gradient of the reconstruction loss, for all layers written
    backward    gradient of each activation through W_dec; penalties; gradients of the layer's weights

The features of a layer are either `Points` (sparse: each entry costs one decoder row) or a `Matrix` (dense products;
pre-activations are recomputed in the backward pass). Both give the same numbers. The faster one is chosen by the
density of the previous step. All gradients are written out. Thresholds are constants: they follow from one cut on
f ||W_dec|| (`schedule.Cut`), which no gradient moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.clt.finding import Found
from crosslayer.clt.sparse import Active, sampled_products, starts
from crosslayer.clt.transcoder import CLT
from crosslayer.training import losses
from crosslayer.training.config import TrainConfig
from crosslayer.training.gradients import Gradients, Outer, Scaled, Some
from crosslayer.training.schedule import STEP

SPARSE_BELOW = {"cpu": 0.1, "cuda": 0.006, "mps": 0.006}
"""Density of a layer below which the sparse path is faster (benchmarks/bench_step.py)."""


class Terms(NamedTuple):
    """Losses of a micro-batch, each a mean over its tokens, and activation counts.

    If features are sharded, `sparsity`, `revival`, `fired_LF` and `above` cover the features of this rank.
    """

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    error_L: Float[Tensor, " L"]
    """Reconstruction loss per layer written."""
    sparsity: Float[Tensor, ""]
    revival: Float[Tensor, ""]
    fired_LF: Int[Tensor, "L F"]
    """Number of tokens on which each feature is active."""
    above: float
    """Active entries of JumpReLU more than `schedule.STEP` above their threshold, on a logarithmic scale."""


class Points:
    """Active entries of one layer, and their activations."""

    def __init__(self, found: Found, n_tokens: int, n_features: int) -> None:
        (self.entries, self.f), self.shape = found, (n_tokens, n_features)

    def of(self, number_F: Tensor) -> Tensor:
        """Return per-feature numbers, indexed by entry."""
        return number_F[self.entries.feature_K]

    def active(self) -> Active:
        return Active(*self.entries, self.f, self.shape)

    def grad(self, grad_BX: Tensor, rows_FX: Tensor) -> Tensor:
        """Return the gradient of each activation, given the gradient of the reconstruction."""
        return sampled_products(grad_BX, rows_FX, *self.entries, self.shape[1])

    def outer(self, scale_K: Tensor, by_BX: Tensor) -> Outer:
        """Return a weight gradient: sum over entries of scale x the token's row of `by`."""
        start_R1, token_K, order_K = self._by_feature
        return Outer(start_R1, token_K, scale_K[order_K], by_BX)

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entries sorted by feature: start of each feature, tokens, and previous positions."""
        token_K, feature_K = self.entries
        # Sorting int32 is faster.
        order_K = feature_K.to(torch.int32).argsort(stable=True)
        return starts(feature_K, self.shape[1]), token_K[order_K], order_K

    def total(self, number_K: Tensor) -> Tensor:
        """Return the sum over tokens, per feature."""
        return number_K.new_zeros(self.shape[1]).index_add_(0, self.entries.feature_K, number_K)

    def fired(self) -> Int[Tensor, " F"]:
        """Return the number of tokens on which each feature is active."""
        return torch.bincount(self.entries.feature_K, minlength=self.shape[1])


class Matrix:
    """Dense activations of one layer; weight gradients are in the dtype of the weights."""

    def __init__(self, f_BF: Tensor, kind: torch.dtype) -> None:
        self.f, self.kind = f_BF, kind

    def of(self, number_F: Tensor) -> Tensor:
        return number_F

    def active(self) -> Tensor:
        return self.f

    def grad(self, grad_BX: Tensor, rows_FX: Tensor) -> Tensor:
        return ((grad_BX.to(rows_FX.dtype) @ rows_FX.T).to(self.f.dtype)).mul_(self.f > 0)

    def outer(self, scale_BF: Tensor, by_BX: Tensor) -> Tensor:
        return scale_BF.to(self.kind).T @ by_BX.to(self.kind)

    def total(self, number_BF: Tensor) -> Tensor:
        return number_BF.sum(0)

    def fired(self) -> Int[Tensor, " F"]:
        return (self.f > 0).sum(0)


@torch.no_grad()
def compute(
    clt: CLT,
    x_BLD: Float[Tensor, "B L D"],
    y_BLD: Float[Tensor, "B L D"],
    config: TrainConfig,
    into: Gradients,
    *,
    dead_LF: Tensor,
    sparse_L: Sequence[bool],
    penalty: float = 0.0,
    l0: float | None = None,
    share: float = 1.0,
) -> Terms:
    """Compute the losses on normalised activations, and their gradients.

    Args:
        into: receives the gradients, multiplied by `share`.
        dead_LF: mask of dead features.
        sparse_L: layers that use the sparse path.
        penalty: coefficient of the tanh penalty; not for TopK and BatchTopK.
        l0: active features per token over all layers; TopK and BatchTopK only.
        share: weight of this micro-batch in the step.
    """
    c, n_tokens = clt.config, len(x_BLD)
    x_LBD = [x_BD.to(clt.dtype).contiguous() for x_BD in x_BLD.unbind(1)]
    k = None if l0 is None else l0 / (1 if c.scope == "all" else c.n_layers)
    together = clt.find(x_LBD, k) if c.ranks and c.scope == "all" else None
    points_L: list[Points | None] = []

    # Forward.
    residual_BLD = torch.zeros(y_BLD.shape, dtype=torch.promote_types(clt.dtype, torch.float32), device=y_BLD.device)
    fired_L, above_L = list[Tensor](), list[Tensor]()
    for i, x_BD in enumerate(x_LBD):
        here = together[i] if together else clt.find_layer(x_BD, i, k) if sparse_L[i] or c.ranks else None
        points_L.append(Points(here, n_tokens, c.n_features) if here else None)
        features = _as_points_or_matrix(clt, x_BD, i, points_L[i], sparse_L[i])
        clt.add_written(clt.columns(residual_BLD, i), features.active(), i)
        fired_L.append(features.fired())
        if c.kind.thresholds:
            above_L.append((features.f > features.of(clt.threshold[i] * math.exp(STEP))).sum())
        del features
    clt.mesh.features.sum_(residual_BLD)
    residual_BLD += torch.stack(list(clt.b_dec))
    for i, x_BD in enumerate(x_LBD if c.skip else []):
        residual_BLD[:, i] += clt.skip(x_BD, i)
    residual_BLD -= y_BLD
    error_L = torch.linalg.vector_norm(residual_BLD, dim=(0, 2)).square() / n_tokens
    grad_BLD = residual_BLD.mul_(2.0 * share / n_tokens)

    # Backward.
    sparsity, revival = error_L.new_zeros(()), error_L.new_zeros(())
    revive = bool(config.revive) and clt.mesh.world.any_(bool(dead_LF.any()))
    least = _least_score(clt, points_L) if revive and c.ranks else 0.0
    for i, x_BD in enumerate(x_LBD):
        features = _as_points_or_matrix(clt, x_BD, i, points_L[i], sparse_L[i])
        points_L[i] = None
        grad_BX, W_dec = clt.columns(grad_BLD, i), clt.W_dec[i]
        slope = features.grad(grad_BX, W_dec.detach().view(c.n_features, -1))
        if penalty:
            norm_F = clt.decoder_norm(i).detach()
            value, by_f, by_norm_F = losses.tanh_sparsity(features, norm_F, config.sparsity_c, n_tokens)
            sparsity += value
            slope += share * penalty * by_f
            into.add(W_dec, Scaled(share * penalty * torch.where(norm_F > 0, by_norm_F / norm_F, 0.0)))
        into.add(W_dec, features.outer(features.f, grad_BX))
        into.add(clt.W_enc[i], features.outer(slope, x_BD))
        into.add(clt.b_enc[i], features.total(slope).to(clt.b_enc[i].dtype))
        if revive and dead_LF[i].any():
            revival += _preactivation(clt, x_BD, i, dead_LF[i], least, config.revive, share, into)
        into.add(clt.b_dec[i], grad_BLD[:, i].sum(0).to(clt.b_dec[i].dtype))
        if c.skip:
            into.add(clt.W_skip[i], x_BD.T @ grad_BLD[:, i].to(x_BD.dtype))
        del features, slope
        into.final(p for name, p in clt.named_parameters() if name.endswith(f".{i}") and p.requires_grad)

    fit = error_L.sum()
    return Terms(
        fit + penalty * sparsity + revival, fit, error_L, sparsity, revival, torch.stack(fired_L), float(sum(above_L))
    )


def _as_points_or_matrix(clt: CLT, x_BD: Tensor, layer: int, points: Points | None, sparse: bool) -> Points | Matrix:
    if points is None:
        return Matrix(clt.config.kind.apply(clt.pre(x_BD, layer), clt.theta(layer)), clt.dtype)
    return points if sparse else Matrix(points.active().dense(), clt.dtype)


def _least_score(clt: CLT, points_L: Sequence[Points | None]) -> float:
    """Return the least score f ||W_dec|| of the active entries of all ranks: the cut of TopK and BatchTopK."""
    scores = [p.f * p.of(clt.decoder_norm(i).detach()) for i, p in enumerate(points_L) if p is not None]
    return clt.mesh.world.least(min((s.min().item() for s in scores if len(s)), default=math.inf))


def _preactivation(
    clt: CLT, x_BD: Tensor, layer: int, dead_F: Tensor, least: float, weight: float, share: float, into: Gradients
) -> Tensor:
    """Add gradients of the pre-activation loss, which revives a layer's dead features, and return the loss.

    Args:
        least: score at which a feature fires, for activations without thresholds.
    """
    which = dead_F.nonzero()[:, 0]
    W_KD, b_K, theta_F = clt.W_enc[layer].detach()[which], clt.b_enc[layer].detach()[which], clt.theta(layer)
    pre_BK = F.linear(x_BD, W_KD) + b_K
    norm_K = torch.linalg.vector_norm(clt.W_dec[layer].detach()[which].flatten(1), dim=1, dtype=pre_BK.dtype)
    theta_K = theta_F[which].to(norm_K.dtype) if theta_F is not None else least / norm_K.clamp(min=1e-8)
    slope_BK = (pre_BK < theta_K) * (norm_K * (-share * weight / len(x_BD)))
    into.add(clt.W_enc[layer], Some(which, (slope_BK.to(x_BD.dtype).T @ x_BD)))
    grad_F = torch.zeros_like(clt.b_enc[layer])
    into.add(clt.b_enc[layer], grad_F.index_put_((which,), slope_BK.sum(0).to(grad_F.dtype)))
    return weight * losses.preactivation(pre_BK, theta_K, norm_K)
