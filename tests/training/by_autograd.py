"""Reference implementation of a step: the losses on dense features, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from crosslayer.clt.transcoder import CLT
from crosslayer.training import losses
from crosslayer.training.config import TrainConfig
from crosslayer.training.gradients import Gradients
from crosslayer.training.objective import Terms, compute

PENALTY, L0 = 0.7, 4.0


def plainly(
    clt: CLT,
    x: Tensor,
    y: Tensor,
    c: TrainConfig,
    dead_LF: Tensor,
    l0: float,
) -> dict[str, Tensor]:
    """Return the total loss and its parts; gradients are left in the parameters."""
    n, kind = len(x), clt.config
    clt.zero_grad()
    f = clt.encode(x, l0 / (1 if c.scope == "all" else kind.n_layers) if kind.ranks else None)
    yhat = clt.decode(f, x)
    fit, sparsity, revival = losses.reconstruction(yhat, y), torch.zeros(()), torch.zeros(())
    for i in range(kind.n_layers if not kind.ranks else 0):
        sparsity = sparsity + torch.tanh(c.sparsity_c * clt.decoder_norm(i) * f[i]).sum() / n
    scores = [f_BF.detach() * clt.decoder_norm(i).detach() for i, f_BF in enumerate(f)]
    least = min((score[score > 0].min() for score in scores if (score > 0).any()), default=torch.zeros(()))
    for i, dead in enumerate(dead_LF):
        pre, norm = clt.pre(x[:, i], i)[:, dead], clt.decoder_norm(i).detach()[dead]
        theta = clt.theta(i)
        theta = theta[dead] if theta is not None else least * kind.ranks / norm
        revival = revival + c.revive * losses.preactivation(pre, theta, norm)
    total = fit + PENALTY * sparsity + revival
    total.backward()
    return {"total": total, "reconstruction": fit, "sparsity": sparsity, "revival": revival}


def by_parts(
    clt: CLT,
    x: Tensor,
    y: Tensor,
    c: TrainConfig,
    dead_LF: Tensor,
    sparse: bool | list[bool],
    share: float = 1.0,
    into: Gradients | None = None,
    l0: float = L0,
) -> tuple[Terms, dict[str, Tensor]]:
    """Return the losses of `compute`, and its gradients by parameter name."""
    into = into or Gradients()
    sparse_L = [sparse] * clt.config.n_layers if isinstance(sparse, bool) else sparse
    ranks = clt.config.ranks
    terms = compute(
        clt,
        x,
        y,
        c,
        into,
        dead_LF=dead_LF,
        sparse_L=sparse_L,
        penalty=0.0 if ranks else PENALTY,
        l0=l0 if ranks else None,
        share=share,
    )
    return terms, {name: into.of(p) for name, p in clt.named_parameters()}
