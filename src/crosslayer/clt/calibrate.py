"""Threshold calibration: convert any activation to JumpReLU at a target mean L0.

TopK and BatchTopK rank features by f * ||W_dec||. The equivalent JumpReLU is active where that score exceeds one cut,
so the threshold of a feature is the cut divided by its norm. The cut is a quantile of the scores of many tokens, chosen
to give the target L0. There is one cut for all layers, or one per layer, like the ranking. A JumpReLU transcoder is
calibrated in the same way: its thresholds are scaled by one factor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosslayer.clt.activations import JUMPRELU
from crosslayer.clt.transcoder import CLT
from crosslayer.clt.weights import Weights
from crosslayer.parallel import Group
from crosslayer.parallel.select import kth_largest


class Calibrated(NamedTuple):
    """A JumpReLU transcoder with calibrated thresholds."""

    clt: CLT
    l0_before: float | None
    """Mean L0 on the same inputs with the thresholds as they were, summed over layers; None if there were none."""


@torch.no_grad()
def to_jumprelu(clt: CLT, batches: Iterable[Float[Tensor, "B L D"]], l0: float, keep_within: float = 0.0) -> Calibrated:
    """Return a JumpReLU copy of a transcoder with mean L0 `l0` on these inputs, summed over layers.

    Args:
        clt: transcoder with any activation; if features are sharded, each rank converts its own with a shared cut.
        batches: MLP inputs in the transcoder's units; about 10,000 tokens give the mean L0 within 1 %.
        l0: target L0 per token, summed over layers; with a ranking per layer, divided evenly.
        keep_within: JumpReLU thresholds are kept if their L0 on these inputs is off by no more than this share.
    """
    c = clt.config
    if c.kind.thresholds:
        unit = [theta.detach().float().clamp(min=1e-8) for theta in clt.threshold]
    else:
        unit = [1.0 / clt.rank_norm(i).clamp(min=1e-8) for i in range(c.n_layers)]
    per_layer = c.ranks and c.scope == "layer"
    n_largest = 4.0 * l0 / (c.n_layers if per_layer else 1)
    largest: list[list[Tensor]] = [[] for _ in range(c.n_layers)]
    n_tokens = n_active = 0
    for x_BLD in batches:
        scores = [clt.pre(x_BD, i).float() / unit[i] for i, x_BD in enumerate(x_BLD.unbind(1))]
        n_active += sum(int((s > 1).sum()) for s in scores)
        n = x_BLD.shape[0]
        if per_layer:
            largest = [[*old, _largest(s, n_largest * n)] for old, s in zip(largest, scores, strict=True)]
        else:
            largest[0].append(_largest(torch.cat([s.flatten() for s in scores]), n_largest * n))
        n_tokens += n
    assert n_tokens, "calibration needs at least one batch"
    groups = [torch.cat(group) for group in (largest if per_layer else largest[:1])]
    cuts = [_cut(group, l0 * n_tokens / len(groups), clt.mesh.features) for group in groups]
    out = CLT(replace(c, activation=JUMPRELU.name, k=None, k_per_batch=False), dtype=clt.dtype, device="meta")
    out.mesh = clt.mesh
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
        setattr(out, name, copy.deepcopy(getattr(clt, name)))
    before = clt.mesh.features.total(n_active) / n_tokens if c.kind.thresholds else None
    if before is not None and abs(before - l0) <= keep_within * l0:
        cuts = [1.0]
    thresholds = [u * cuts[i if per_layer else 0] for i, u in enumerate(unit)]
    out.threshold = Weights(nn.Parameter(t) for t in thresholds)
    return Calibrated(out, before)


def _largest(score: Tensor, n: float) -> Tensor:
    """Return the `n` largest positive scores, unsorted."""
    positive = score[score > 0]
    return positive if positive.numel() <= n else positive.topk(int(n), sorted=False).values


def _cut(score: Tensor, wanted: float, group: Group) -> float:
    """Return the value that `wanted` scores exceed, over all ranks of the group."""
    n_scores = int(group.total(score.numel()))
    return kth_largest(score[None], min(round(wanted) + 1, n_scores), group).item() if n_scores else 0.0
