"""Thresholds from data: any activation to JumpReLU at a chosen mean L0, exactly what the published format can hold.

TopK and BatchTopK rank features by f * ||W_dec||. The JumpReLU that agrees with them fires where that score exceeds one
cut, so each feature's threshold is the cut over its own norm. The cut is the quantile of the scores of many tokens at
which the mean L0 is the one asked for: a cut for all layers together, or one a layer, as the ranking was. A JumpReLU
transcoder is calibrated in the same way, its thresholds scaled by one factor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosslayer.clt.activations import JUMPRELU
from crosslayer.clt.transcoder import CLT
from crosslayer.clt.weights import Weights
from crosslayer.parallel import Group
from crosslayer.parallel.select import kth_largest


@torch.no_grad()
def to_jumprelu(clt: CLT, batches: Iterable[Float[Tensor, "B L D"]], l0: float) -> CLT:
    """A JumpReLU copy of a transcoder whose mean L0, summed over layers, is `l0` on these inputs.

    Args:
        clt: of any activation; of one whose features are shared out, each rank converts its own, by one cut for all.
        batches: MLP inputs in the units that it takes; some ten thousand tokens put the mean L0 within 1 %.
        l0: mean number of features with f > 0 per token, all layers together; with a ranking per layer, shared evenly.
    """
    c = clt.config
    if c.kind.thresholds:
        unit = [theta.detach().float().clamp(min=1e-8) for theta in clt.threshold]
    else:
        unit = [1.0 / clt.rank_norm(i).clamp(min=1e-8) for i in range(c.n_layers)]
    apart = c.ranks and c.scope == "layer"
    keep = 4.0 * l0 / (c.n_layers if apart else 1)
    kept: list[list[Tensor]] = [[] for _ in range(c.n_layers)]
    n_tokens = 0
    for x_BLD in batches:
        scores = [clt.pre(x_BD, i).float() / unit[i] for i, x_BD in enumerate(x_BLD.unbind(1))]
        n = x_BLD.shape[0]
        if apart:
            kept = [[*old, _largest(s, keep * n)] for old, s in zip(kept, scores, strict=True)]
        else:
            kept[0].append(_largest(torch.cat([s.flatten() for s in scores]), keep * n))
        n_tokens += n
    assert n_tokens, "calibrating a threshold needs at least one batch"
    groups = [torch.cat(group) for group in (kept if apart else kept[:1])]
    cuts = [_cut(group, l0 * n_tokens / len(groups), clt.mesh.features) for group in groups]
    out = CLT(replace(c, activation=JUMPRELU.name, k=None, k_per_batch=False), dtype=clt.dtype, device="meta")
    out.mesh = clt.mesh
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
        setattr(out, name, copy.deepcopy(getattr(clt, name)))
    thresholds = [u * cuts[i if apart else 0] for i, u in enumerate(unit)]
    out.threshold = Weights(nn.Parameter(t) for t in thresholds)
    return out


def _largest(score: Tensor, n: float) -> Tensor:
    """The `n` largest positive scores, in no order."""
    positive = score[score > 0]
    return positive if positive.numel() <= n else positive.topk(int(n), sorted=False).values


def _cut(score: Tensor, wanted: float, group: Group) -> float:
    """The value that `wanted` of the scores exceed, those of all ranks of the group together."""
    there_are = int(group.total(score.numel()))
    return kth_largest(score[None], min(round(wanted) + 1, there_are), group).item() if there_are else 0.0
