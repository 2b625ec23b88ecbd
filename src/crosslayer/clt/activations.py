"""Activation functions: pre-activations in, activations out, elementwise or by rank.

JumpReLU follows Rajamanoharan et al. 2024 (arXiv:2407.14435): f = z 1[z > theta], strictly, with straight-through
gradients for the threshold through the rectangle kernel K(u) = 1[|u| < 1/2]:

    df/dz = 1[z > theta]        df/dtheta = -(theta / eps) K((z - theta) / eps)

The functions are elementwise, so they serve a matrix with a threshold a column and a list of its entries alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslayer.clt.sparse import Entries, where
from crosslayer.dist import ALONE, Group, Mesh
from crosslayer.dist.select import kth_largest


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return torch.where(z > theta, z, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        z, theta = ctx.saved_tensors
        grad_theta = torch.where(in_window(z, theta, ctx.eps), grad * -(theta / ctx.eps), 0.0)
        return torch.where(z > theta, grad, 0.0), grad_theta.sum_to_size(theta.shape).to(theta.dtype), None


class _Step(torch.autograd.Function):
    """H(z - theta), with a gradient for the threshold only: dH/dtheta = -(1/eps) K((z - theta)/eps)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.eps = eps
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        z, theta = ctx.saved_tensors
        grad_theta = torch.where(in_window(z, theta, ctx.eps), grad / -ctx.eps, 0.0)
        return None, grad_theta.sum_to_size(theta.shape).to(theta.dtype), None


def in_window(z: Tensor, theta: Tensor, eps: float) -> Bool[Tensor, ...]:
    """K((z - theta) / eps): where the straight-through estimator lets gradients to the threshold."""
    return (z - theta).abs() < eps / 2


def jumprelu(z: Float[Tensor, ...], theta: Float[Tensor, ...], eps: float) -> Float[Tensor, ...]:
    """JumpReLU with the straight-through estimator of width `eps` for its threshold, which broadcasts."""
    return _JumpReLU.apply(z, theta, eps)  # type: ignore[return-value]


def step(z: Float[Tensor, ...], theta: Float[Tensor, ...], eps: float) -> Float[Tensor, ...]:
    """Whether each feature fires, as 0 or 1, differentiable in the threshold alone."""
    return _Step.apply(z, theta, eps)  # type: ignore[return-value]


def top_mask(score_XSF: Float[Tensor, "X S F"], k: int, group: Group = ALONE.features) -> Bool[Tensor, "X S F"]:
    """The `k` largest positive entries of each row, over its segments and over the ranks of a group, which hold other columns of each segment.

    Of equal scores the earlier segment's come first, then the lower rank's, then the earlier column's: the order in which
    one rank would hold them all.
    """
    flat = score_XSF.flatten(1)
    # One more than wanted, to see whether the last has its equals.
    best, index = flat.topk(min(k + 1, flat.shape[1]), dim=1)
    cut_X = kth_largest(best, k, group)
    kept = (best >= cut_X[:, None]) & (best > 0)
    if not (group.sum_(kept.sum(1)) > k).any():
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, index, kept).view_as(score_XSF)
    above = score_XSF > cut_X[:, None, None]
    tied = (score_XSF == cut_X[:, None, None]) & (cut_X > 0)[:, None, None]
    every_XSR = torch.stack(group.gather(tied.sum(2)), dim=2)
    before_XSR = (every_XSR.flatten(1).cumsum(1) - every_XSR.flatten(1)).view_as(every_XSR)
    left_X = k - group.sum_(above.sum((1, 2)))
    first_XS = (left_X[:, None] - before_XSR[:, :, group.rank]).clamp(min=0)
    return above | (tied & (tied.cumsum(2) <= first_XS[:, :, None]))


def batch_top(
    pre: Sequence[Float[Tensor, "B F"]],
    norms: Sequence[Float[Tensor, " F"]],
    k: float,
    exact: Callable[[int, Entries], Float[Tensor, " K"]] | None = None,
    mesh: Mesh = ALONE,
) -> list[Entries]:
    """BatchTopK (Bussmann et al. 2024, arXiv:2412.06410) over several layers: the `k` B largest positive scores of them all.

    One pass over the entries: the scores of some tokens tell a bound that about twice as many entries exceed as are wanted,
    and only those are ranked. Where the bound misled, everything positive is.

    Args:
        pre: pre-activations of each layer; coarse ones do, if `exact` is given.
        norms: what they are multiplied by to be ranked.
        k: entries a token, on average.
        exact: gives the pre-activations of some entries of a layer, to rank by.
        mesh: the ranks that hold other features, or other tokens of the batch; all are ranked together.
    """
    n_tokens = pre[0].shape[0]
    wanted = max(1, round(k * n_tokens * mesh.data.size))
    some = slice(None, None, max(1, n_tokens // 32))
    sample = torch.cat([(z[some] * norm).flatten() for z, norm in zip(pre, norms, strict=True)])
    rank = min(sample.numel(), 1 + round(2.0 * k * len(pre[0][some]) / mesh.features.size))
    smallest = torch.finfo(sample.dtype).tiny
    bound = mesh.world.least(sample.kthvalue(sample.numel() - rank + 1).values.clamp(min=smallest).item())
    entries, scores = list[Entries](), list[Tensor]()
    for least in (bound, smallest):
        entries = [where(z >= (least / norm).to(z.dtype)) for z, norm in zip(pre, norms, strict=True)]
        values = [exact(i, e) if exact else z[e] for i, (z, e) in enumerate(zip(pre, entries, strict=True))]
        scores = [v * norm[e.feature_K] for v, norm, e in zip(values, norms, entries, strict=True)]
        if mesh.world.total(sum(s.numel() for s in scores)) >= wanted:
            break
    cut = kth_largest(torch.cat(scores)[None], wanted, mesh.world)[0].clamp(min=smallest)
    return [Entries(*(axis[s >= cut] for axis in e)) for e, s in zip(entries, scores, strict=True)]
