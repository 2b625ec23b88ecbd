"""JumpReLU with a straight-through estimator for its threshold; the kernel is K(u) = 1[|u| < 1/2].

    df/dz = 1[z > theta]        df/dtheta = -(theta / eps) K((z - theta) / eps)

The functions are elementwise: they take a matrix with one threshold per column, or a list of entries.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
    """Return K((z - theta) / eps): the entries that give a gradient to the threshold."""
    return (z - theta).abs() < eps / 2


def jumprelu(z: Float[Tensor, ...], theta: Float[Tensor, ...], eps: float) -> Float[Tensor, ...]:
    """Apply JumpReLU, with a straight-through estimator of width `eps`; `theta` broadcasts."""
    return _JumpReLU.apply(z, theta, eps)  # type: ignore[return-value]


def step(z: Float[Tensor, ...], theta: Float[Tensor, ...], eps: float) -> Float[Tensor, ...]:
    """Return 1 for active entries and 0 for others, differentiable in the threshold only."""
    return _Step.apply(z, theta, eps)  # type: ignore[return-value]
