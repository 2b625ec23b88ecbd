"""Forward and backward pass of one micro-batch: encode, decode, losses and gradients.

Both passes process one layer at a time, so features of all layers are never held in one tensor:

    forward     find the active features of layer L; add what they write to the reconstruction
    residual    the gradient of the reconstruction loss, for all layers written
    backward    gradient of each activation through W_dec; penalties; gradients of the layer's weights

The features of a layer are either `Points` (sparse: each entry costs one decoder row) or a `Matrix` (dense products;
pre-activations are recomputed in the backward pass). Both give the same numbers. The faster one is chosen by the
density of the previous step. Autograd differentiates only elementwise functions: activations with their
straight-through estimator, and penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.clt.activations.straight_through import step
from crosslayer.clt.finding import Found, Given
from crosslayer.clt.ranking import token_top
from crosslayer.clt.sparse import Active, sampled_products, starts
from crosslayer.clt.transcoder import CLT
from crosslayer.training import losses
from crosslayer.training.config import TrainConfig
from crosslayer.training.gradients import Gradients, Outer, Scaled, Some

SPARSE_BELOW = {"cpu": 0.1, "cuda": 0.006, "mps": 0.006}
"""Density of a layer below which the sparse path is faster (benchmarks/bench_step.py)."""


class Terms(NamedTuple):
    """Losses of a micro-batch, each a mean over its tokens, and activation counts.

    If features are sharded, `sparsity`, JumpReLU's `revival`, `fired_LF` and `entries_L` cover the features of this
    rank.
    """

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    error_L: Float[Tensor, " L"]
    """Reconstruction loss per layer written."""
    sparsity: Float[Tensor, ""]
    revival: Float[Tensor, ""]
    fired_LF: Int[Tensor, "L F"]
    """Number of tokens on which each feature is active."""
    entries_L: Float[Tensor, " L"]
    """Entries of the sparse path: active ones, and those inside the straight-through window."""


class Points:
    """Sparse features of one layer: entries that are active or inside the straight-through window."""

    def __init__(self, found: Found, n_tokens: int, n_features: int) -> None:
        (self.entries, self._z_K), self.shape = found, (n_tokens, n_features)

    def z(self) -> Tensor:
        return self._z_K

    def of(self, number_F: Tensor) -> Tensor:
        """Return per-feature numbers, indexed by entry."""
        return number_F[self.entries.feature_K]

    def fired(self, f_K: Tensor) -> Active:
        """Return the active entries; call it before `outer`, which covers only these."""
        self._fired_K = fired_K = f_K > 0
        self._all = bool(fired_K.all())
        if self._all:
            return Active(*self.entries, f_K, self.shape)
        return Active(self.entries.token_K[fired_K], self.entries.feature_K[fired_K], f_K[fired_K], self.shape)

    def activation_grad(self, grad_BX: Tensor, rows_FX: Tensor) -> Tensor:
        """Return the gradient of each activation, given the gradient of the reconstruction."""
        return sampled_products(grad_BX, rows_FX, *self.entries, self.shape[1])

    def outer(self, scale_K: Tensor, by_BX: Tensor) -> Outer:
        """Return a weight gradient: sum over entries of scale x the token's row of `by`."""
        start_R1, token_K, order_K = self._by_feature
        return Outer(start_R1, token_K, (scale_K if self._all else scale_K[self._fired_K])[order_K], by_BX)

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """Active entries sorted by feature: start of each feature, tokens, and previous positions."""
        token_K, feature_K = self.entries
        if not self._all:
            token_K, feature_K = token_K[self._fired_K], feature_K[self._fired_K]
        # Sorting int32 is faster.
        order_K = feature_K.to(torch.int32).argsort(stable=True)
        return starts(feature_K, self.shape[1]), token_K[order_K], order_K

    def total(self, number_K: Tensor) -> Tensor:
        """Return the sum over tokens, per feature."""
        return number_K.new_zeros(self.shape[1]).index_add_(0, self.entries.feature_K, number_K)


class Matrix:
    """Dense features of one layer."""

    def __init__(self, z_BF: Tensor, kind: torch.dtype) -> None:
        self._z_BF, self.kind = z_BF, kind

    def z(self) -> Tensor:
        return self._z_BF

    def of(self, number_F: Tensor) -> Tensor:
        return number_F

    def fired(self, f_BF: Tensor) -> Tensor:
        return f_BF

    def activation_grad(self, grad_BX: Tensor, rows_FX: Tensor) -> Tensor:
        return (grad_BX.to(rows_FX.dtype) @ rows_FX.T).to(self._z_BF.dtype)

    def outer(self, scale_BF: Tensor, by_BX: Tensor) -> Tensor:
        # In the dtype of the weights, because a dense gradient of the whole layer is stored.
        return scale_BF.to(self.kind).T @ by_BX.to(self.kind)

    def total(self, number_BF: Tensor) -> Tensor:
        return number_BF.sum(0)


@torch.no_grad()
def compute(
    clt: CLT,
    x_BLD: Float[Tensor, "B L D"],
    y_BLD: Float[Tensor, "B L D"],
    config: TrainConfig,
    into: Gradients,
    *,
    coefficient: float,
    running_l0: float,
    asked_l0: float,
    eps: float,
    dead_LF: Tensor,
    sparse_L: Sequence[bool],
    share: float = 1.0,
) -> Terms:
    """Compute the losses on normalised activations, and their gradients.

    Args:
        into: receives the gradients, multiplied by `share`.
        coefficient: lambda, the sparsity coefficient; JumpReLU and ReLU only.
        running_l0, asked_l0: running mean and requested L0, for the L0 penalty; `asked_l0` is also k of TopK.
        eps: width of the straight-through window.
        dead_LF: mask of dead features.
        sparse_L: layers that use the sparse path.
        share: weight of this micro-batch in the step.
    """
    c, n_tokens = clt.config, len(x_BLD)
    x_LBD = [x_BD.to(clt.dtype).contiguous() for x_BD in x_BLD.unbind(1)]
    k = asked_l0 / (1 if config.scope == "all" else c.n_layers) if c.ranks else None
    window = eps if c.kind.thresholds else 0.0
    together = clt.find(x_LBD, 0.0, k) if c.ranks and c.scope == "all" else None
    points_L: list[Points | None] = []

    # Forward.
    residual_BLD = torch.zeros(y_BLD.shape, dtype=torch.promote_types(clt.dtype, torch.float32), device=y_BLD.device)
    fired_L, entries_L = list[Tensor](), list[float]()
    for i, x_BD in enumerate(x_LBD):
        here = together[i] if together else clt.find_layer(x_BD, i, window, k) if sparse_L[i] or c.ranks else None
        points_L.append(Points(here, n_tokens, c.n_features) if here else None)
        features = _as_points_or_matrix(clt, x_BD, i, points_L[i], sparse_L[i])
        z, theta_F = features.z(), _threshold(clt, i)
        f = c.kind.apply(z, None if theta_F is None else features.of(theta_F), eps)
        clt.add_written(clt.columns(residual_BLD, i), features.fired(f), i)
        fired_L.append(features.total((f > 0).to(torch.int64)))
        least_F = c.kind.bound(theta_F, clt.b_enc[i], window)
        entries_L.append(float(len(here.z_K) if here else (z > least_F).sum()))
        del z, f, features
    clt.mesh.features.sum_(residual_BLD)
    residual_BLD += torch.stack(list(clt.b_dec))
    for i, x_BD in enumerate(x_LBD if c.skip else []):
        residual_BLD[:, i] += clt.skip(x_BD, i)
    residual_BLD -= y_BLD
    error_L = torch.linalg.vector_norm(residual_BLD, dim=(0, 2)).square() / n_tokens
    dead_features, revival = None, error_L.new_zeros(())
    if c.ranks and config.auxiliary and clt.mesh.features.any_(bool(dead_LF.any())):
        # Feature ranks compute the auxiliary loss together, or not at all.
        dead_features = _auxiliary(clt, x_LBD, residual_BLD, dead_LF, config, share)
        revival = dead_features.loss
    grad_BLD = residual_BLD.mul_(2.0 * share / n_tokens)

    # Backward.
    sparsity = error_L.new_zeros(())
    for i, x_BD in enumerate(x_LBD):
        features = _as_points_or_matrix(clt, x_BD, i, points_L[i], sparse_L[i])
        points_L[i] = None
        grad_BX, W_dec = clt.columns(grad_BLD, i), clt.W_dec[i]
        rows_FX = W_dec.detach().view(c.n_features, -1)
        penalised = config.sparsity if not c.ranks else None
        norm_F = clt.decoder_norm(i).detach() if penalised == "tanh" else None
        grad_f = features.activation_grad(grad_BX, rows_FX)
        theta_F = _threshold(clt, i)
        with torch.enable_grad():
            z, leaves = features.z().detach().requires_grad_(), dict[str, Tensor]()
            leaves["z"] = z
            if theta_F is not None:
                leaves["theta"] = theta_F = theta_F.requires_grad_()
            f = c.kind.apply(z, None if theta_F is None else features.of(theta_F), eps)
            loss = penalty = None
            if norm_F is not None:
                leaves["norm"] = norm_F.requires_grad_()
                penalty = losses.tanh_sparsity(f.to(norm_F.dtype), features.of(norm_F), config.sparsity_c, n_tokens)
            elif penalised == "l0":
                assert theta_F is not None
                penalty = losses.l0_target(step(z, features.of(theta_F), eps), running_l0, asked_l0, n_tokens)
            loss = (f * grad_f).sum()
            if penalty is not None:
                loss = loss + share * coefficient * penalty
                sparsity = sparsity + penalty.detach()
            slopes = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        into.add(W_dec, features.outer(f.detach(), grad_BX))
        if "norm" in slopes:
            into.add(W_dec, Scaled(torch.where(leaves["norm"] > 0, slopes["norm"] / leaves["norm"], 0.0).detach()))
        into.add(clt.W_enc[i], features.outer(slopes["z"], x_BD))
        into.add(clt.b_enc[i], features.total(slopes["z"]).to(clt.b_enc[i].dtype))
        if theta_F is not None:
            into.add(clt.threshold[i], slopes["theta"])
            if dead_LF[i].any():
                revival = revival + _preactivation(clt, x_BD, i, dead_LF[i], config.revive, share, into)
        into.add(clt.b_dec[i], grad_BLD[:, i].sum(0).to(clt.b_dec[i].dtype))
        if c.skip:
            into.add(clt.W_skip[i], x_BD.T @ grad_BLD[:, i].to(x_BD.dtype))
        if dead_features is not None:
            dead_features.add_to(into, clt, x_BD, i)
        del features, z, f, loss, slopes, leaves, grad_f
        into.final(p for name, p in clt.named_parameters() if name.endswith(f".{i}"))

    fit = error_L.sum()
    return Terms(
        fit + coefficient * sparsity + revival,
        fit,
        error_L,
        sparsity,
        revival,
        torch.stack(fired_L),
        torch.tensor(entries_L, dtype=torch.float64),
    )


def _threshold(clt: CLT, layer: int) -> Tensor | None:
    return clt.threshold[layer].detach() if len(clt.threshold) else None


def _as_points_or_matrix(clt: CLT, x_BD: Tensor, layer: int, points: Points | None, sparse: bool) -> Points | Matrix:
    if points is None:
        return Matrix(clt.pre(x_BD, layer), clt.dtype)
    return points if sparse else Matrix(Active(*points.entries, points.z(), points.shape).dense(), clt.dtype)


def _preactivation(
    clt: CLT, x_BD: Tensor, layer: int, dead_F: Tensor, weight: float, share: float, into: Gradients
) -> Tensor:
    """Add gradients of the pre-activation loss, which revives a layer's dead features, and return the loss."""
    which = dead_F.nonzero()[:, 0]
    with torch.enable_grad():
        W_KD = clt.W_enc[layer].detach()[which].requires_grad_()
        b_K = clt.b_enc[layer].detach()[which].requires_grad_()
        pre_BK = F.linear(x_BD, W_KD) + b_K
        norm_K = torch.linalg.vector_norm(clt.W_dec[layer].detach()[which].flatten(1), dim=1, dtype=pre_BK.dtype)
        loss = weight * losses.preactivation(pre_BK, clt.threshold[layer].detach()[which], norm_K)
        grad_KD, grad_K = torch.autograd.grad(share * loss, [W_KD, b_K])
    into.add(clt.W_enc[layer], Some(which, grad_KD))
    into.add(
        clt.b_enc[layer], torch.zeros_like(clt.b_enc[layer]).index_put_((which,), grad_K.to(clt.b_enc[layer].dtype))
    )
    return loss.detach()


class _DeadFeatures(NamedTuple):
    """Auxiliary loss: a reconstruction of the residual by dead features."""

    loss: Tensor
    found: list[Found | None]
    grad_BLD: Tensor

    def add_to(self, into: Gradients, clt: CLT, x_BD: Tensor, layer: int) -> None:
        """Add the gradients of one layer's weights."""
        if (found := self.found[layer]) is None:
            return
        points, grad_BX = Points(found, len(x_BD), clt.config.n_features), clt.columns(self.grad_BLD, layer)
        points.fired(points.z())
        grad_K = points.activation_grad(grad_BX, clt.W_dec[layer].detach().view(clt.config.n_features, -1))
        into.add(clt.W_dec[layer], points.outer(points.z(), grad_BX))
        into.add(clt.W_enc[layer], points.outer(grad_K, x_BD))
        into.add(clt.b_enc[layer], points.total(grad_K).to(clt.b_enc[layer].dtype))


def _auxiliary(
    clt: CLT, x_LBD: list[Tensor], residual_BLD: Tensor, dead_LF: Tensor, config: TrainConfig, share: float
) -> _DeadFeatures:
    """Reconstruct the residual from the top k dead features of each layer (Gao et al. 2024, arXiv:2406.04093)."""
    c, n_tokens = clt.config, len(x_LBD[0])
    left_BLD, found = torch.zeros_like(residual_BLD), list[Found | None]()
    for i, (x_BD, dead_F) in enumerate(zip(x_LBD, dead_LF, strict=True)):
        which = dead_F.nonzero()[:, 0]
        found.append(None)
        if not clt.mesh.features.any_(len(which) > 0):
            continue
        pre_BK = F.linear(x_BD, clt.W_enc[i].detach()[which]) + clt.b_enc[i].detach()[which]
        ((entries, z_K),) = token_top(
            Given([pre_BK]), [torch.ones_like(pre_BK[0])], config.auxiliary_k, clt.mesh.features
        )
        entries = entries._replace(feature_K=which[entries.feature_K])
        found[i] = Found(entries, z_K)
        clt.add_written(clt.columns(left_BLD, i), Active(*entries, z_K, (n_tokens, c.n_features)), i)
    clt.mesh.features.sum_(left_BLD)
    left_BLD += residual_BLD
    loss = config.auxiliary * left_BLD.square().sum() / n_tokens
    return _DeadFeatures(loss, found, left_BLD.mul_(2.0 * config.auxiliary * share / n_tokens))
