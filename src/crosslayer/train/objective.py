"""One micro-batch: encode, decode, the losses, and what is counted along the way.

Layers whose features are few and far between go through the sparse path, the others through matrix products; the two
give the same numbers, so the choice is one of speed alone, made by the density measured at the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.clt.activations import step, top_mask
from crosslayer.clt.sparse import Active, Entries, sparse_pre, where
from crosslayer.clt.transcoder import CLT
from crosslayer.train import losses
from crosslayer.train.config import TrainConfig

SPARSE_BELOW = {"cpu": 0.1, "cuda": 0.006}
"""Density of features under which the sparse path is the faster one (benchmarks/bench_step.py)."""


class Terms(NamedTuple):
    """The losses of a micro-batch, each a mean over its tokens, and what was counted.

    Where features are shared out, `sparsity`, JumpReLU's `revival`, `fired_LF` and `entries` are those of the features held here.
    """

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    error_L: Float[Tensor, " L"]
    """Its parts, by layer written."""
    sparsity: Float[Tensor, ""]
    revival: Float[Tensor, ""]
    fired_LF: Int[Tensor, "L F"]
    """Tokens on which each feature fired."""
    entries: int
    """Entries that the sparse path has, or would have: those that fire, and those inside the straight-through window."""


def compute(
    clt: CLT,
    x_BLD: Float[Tensor, "B L D"],
    y_BLD: Float[Tensor, "B L D"],
    config: TrainConfig,
    *,
    coefficient: float,
    running_l0: float,
    asked_l0: float,
    dead_LF: Tensor,
    sparse: bool,
) -> Terms:
    """The losses on normalised activations.

    Args:
        coefficient: lambda of the sparsity term; JumpReLU and ReLU only.
        running_l0, asked_l0: for the penalty on L0 itself; the second is also what top-k keeps.
        dead_LF: which features count as dead.
        sparse: take the sparse path.
    """
    x_BLD = x_BLD.to(clt.dtype)
    k = asked_l0 / (1 if config.scope == "all" else clt.config.n_layers) if clt.config.ranks else None
    f: Sequence[Tensor | Active]
    if sparse:
        active = clt.encode_sparse(x_BLD, config.eps, k)
        entries, f = sum(len(a.value_K) for a in active), active
    else:
        pre = [clt.pre(x_BD, i) for i, x_BD in enumerate(x_BLD.unbind(1))]
        entries, f = clt.count_entries(pre, config.eps, k), clt.activate(pre, config.eps, k)
    yhat_BLD = clt.decode(f, x_BLD)
    fit = losses.reconstruction(yhat_BLD, y_BLD)
    sparsity = revival = fit.new_zeros(())
    if not clt.config.ranks:
        sparsity = _sparsity(clt, f, x_BLD, config, running_l0, asked_l0)
    if clt.config.activation == "jumprelu":
        if dead_LF.any():
            revival = config.revive * _preactivation(clt, x_BLD, dead_LF)
    # Ranks that share the features reconstruct by dead ones together, or not at all.
    elif clt.config.ranks and config.auxiliary and clt.mesh.features.any_(bool(dead_LF.any())):
        revival = config.auxiliary * _auxiliary(clt, x_BLD, (y_BLD - yhat_BLD).detach(), dead_LF, config.auxiliary_k)
    with torch.no_grad():
        error_L = (yhat_BLD.float() - y_BLD.float()).square().sum(dim=(0, 2)) / len(y_BLD)
        fired_LF = torch.stack([a.count() if isinstance(a, Active) else (a > 0).sum(0) for a in f])
    return Terms(
        fit + coefficient * sparsity + revival,
        fit.detach(),
        error_L,
        sparsity.detach(),
        revival.detach(),
        fired_LF,
        entries,
    )


def _sparsity(
    clt: CLT, f: Sequence[Tensor | Active], x_BLD: Tensor, config: TrainConfig, running_l0: float, asked: float
) -> Tensor:
    n_tokens = x_BLD.shape[0]
    total = x_BLD.new_zeros((), dtype=torch.float32)
    for i, a in enumerate(f):
        if config.sparsity == "tanh" or clt.config.activation == "relu":
            norm_F = clt.decoder_norm(i)
            value, norm = (a.value_K, norm_F[a.feature_K]) if isinstance(a, Active) else (a, norm_F)
            total = total + losses.tanh_sparsity(value.to(norm.dtype), norm, config.sparsity_c, n_tokens)
        else:
            with torch.no_grad():
                z_BF = clt.pre(x_BLD[:, i], i)
                theta = clt.threshold[i].to(z_BF.dtype)
                token_K, feature_K = where(z_BF > theta - config.eps / 2)
            fired_K = step(z_BF[token_K, feature_K], clt.threshold[i][feature_K], config.eps)
            total = total + losses.l0_target(fired_K, running_l0, asked, n_tokens)
    return total


def _preactivation(clt: CLT, x_BLD: Tensor, dead_LF: Tensor) -> Tensor:
    total = x_BLD.new_zeros((), dtype=torch.float32)
    for i, dead_F in enumerate(dead_LF):
        which = dead_F.nonzero()[:, 0]
        if len(which):
            W_FD = clt.W_enc[i][which]
            pre_BF = F.linear(x_BLD[:, i], W_FD) + clt.b_enc[i][which]
            norm_F = clt.W_dec[i].detach()[which].flatten(1).to(pre_BF.dtype).norm(dim=1)
            total = total + losses.preactivation(pre_BF, clt.threshold[i].detach()[which], norm_F)
    return total


def _auxiliary(clt: CLT, x_BLD: Tensor, residual_BLD: Tensor, dead_LF: Tensor, k: int) -> Tensor:
    """Reconstruction of what is left by the `k` most active dead features of each layer (Gao et al. 2024, arXiv:2406.04093)."""
    left: list[Tensor] = list(torch.zeros_like(residual_BLD).unbind(1))
    for i, dead_F in enumerate(dead_LF):
        which = dead_F.nonzero()[:, 0]
        if not clt.mesh.features.any_(len(which) > 0):
            continue
        x_BD = x_BLD[:, i]
        with torch.no_grad():
            pre_BF = F.linear(x_BD, clt.W_enc[i][which]) + clt.b_enc[i][which]
            token_K, row_K = where(top_mask(pre_BF[:, None], k, clt.mesh.features)[:, 0])
            entries = Entries(token_K, which[row_K])
        value_K = sparse_pre(x_BD, clt.W_enc[i], clt.b_enc[i], entries)
        active = Active(*entries, value_K, (x_BD.shape[0], clt.config.n_features))
        for slot, part_BD in enumerate(clt.decode_layer(active, i).unbind(1)):
            left[i + slot] = left[i + slot] + part_BD
    return losses.reconstruction(clt.mesh.features.sum(torch.stack(left, dim=1)), residual_BLD)
