"""Reference implementation of a step: the losses on dense features, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from crosslayer.clt.activations.straight_through import step
from crosslayer.clt.ranking import top_mask
from crosslayer.clt.transcoder import CLT
from crosslayer.training import losses
from crosslayer.training.config import TrainConfig
from crosslayer.training.gradients import Gradients
from crosslayer.training.objective import Terms, compute

NUMBERS = {"coefficient": 0.7, "running_l0": 9.0, "asked_l0": 4.0}


def plainly(
    clt: CLT,
    x: Tensor,
    y: Tensor,
    c: TrainConfig,
    dead_LF: Tensor,
    *,
    coefficient: float,
    running_l0: float,
    asked_l0: float,
) -> dict[str, Tensor]:
    """Return the total loss and its parts; gradients are left in the parameters."""
    n, kind, eps = len(x), clt.config, c.eps
    clt.zero_grad()
    f = clt.encode(x, eps, asked_l0 / (1 if c.scope == "all" else kind.n_layers) if kind.ranks else None)
    yhat = clt.decode(f, x)
    fit, sparsity, revival = losses.reconstruction(yhat, y), torch.zeros(()), torch.zeros(())
    for i in range(kind.n_layers if not kind.ranks else 0):
        if c.sparsity == "tanh":
            sparsity = sparsity + losses.tanh_sparsity(f[i], clt.decoder_norm(i), c.sparsity_c, n)
        else:
            fired = step(clt.pre(x[:, i], i).detach(), clt.threshold[i], eps)
            sparsity = sparsity + losses.l0_target(fired, running_l0, asked_l0, n)
    if kind.activation == "jumprelu":
        for i, dead in enumerate(dead_LF):
            pre, norm = clt.pre(x[:, i], i)[:, dead], clt.decoder_norm(i).detach()[dead]
            revival = revival + c.revive * losses.preactivation(pre, clt.threshold[i].detach()[dead], norm)
    elif kind.ranks and dead_LF.any():
        dead_f = []
        for i, dead in enumerate(dead_LF):
            z = torch.where(dead, clt.pre(x[:, i], i), 0.0)
            dead_f.append(torch.where(top_mask(z.detach()[:, None], c.auxiliary_k)[:, 0], z, 0.0))
        auxiliary = clt.decode(dead_f, torch.zeros_like(x)) - torch.stack(list(clt.b_dec))
        revival = c.auxiliary * losses.reconstruction(auxiliary, (y - yhat).detach())
    total = fit + coefficient * sparsity + revival
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
    **numbers: float,
) -> tuple[Terms, dict[str, Tensor]]:
    """Return the losses of `compute`, and its gradients by parameter name."""
    into = into or Gradients()
    sparse_L = [sparse] * clt.config.n_layers if isinstance(sparse, bool) else sparse
    terms = compute(
        clt, x, y, c, into, eps=c.eps, dead_LF=dead_LF, sparse_L=sparse_L, share=share, **(NUMBERS | numbers)
    )
    return terms, {name: into.of(p) for name, p in clt.named_parameters()}
