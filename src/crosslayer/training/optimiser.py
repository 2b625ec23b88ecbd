"""Adam over blocks of rows, with stochastic rounding of bfloat16 weights.

A step passes once over weights, moments and gradient, block by block (Kingma & Ba 2015). A bfloat16 weight has 8
significant bits, so updates below 1/256 of it are lost to rounding. Stochastic rounding preserves them on average.
Moments are float32 (Zamirai et al. 2020, arXiv:2010.06192) or 8 bits each (`moments.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from crosslayer.clt.sparse import by_kernels
from crosslayer.training import moments
from crosslayer.training.gradients import Gradients

EPS = 1e-8


class Adam:
    """Adam; the random numbers for rounding depend only on seed, step and tensor.

    Args:
        groups: parameter groups with `params` and `lr`; `lr` may change between steps.
        betas: decay rates of the two moments.
        seed: seed of stochastic rounding.
        precision: precision of the moments; those of vectors are always float32.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        seed: int,
        precision: Literal["fp32", "8bit"] = "fp32",
    ) -> None:
        self.param_groups, self.betas, self.seed, self.precision = groups, betas, seed, precision
        self.state: dict[Parameter, dict[str, Tensor]] = {}
        self._number = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
        self._group = {p: group for group in groups for p in group["params"]}

    def step(self, gradients: Gradients, scale: float = 1.0) -> None:
        """Update every parameter with its gradient times `scale`; frees the gradients."""
        for p in self._number:
            self.update(p, gradients.measured(p), scale)
            gradients.forget(p)

    @torch.no_grad()
    def update(self, p: Parameter, blocks: Iterable[tuple[slice, Tensor]], scale: float = 1.0) -> None:
        """Update one parameter with its gradient in blocks of rows; overwrites the blocks."""
        state = self.state.setdefault(p, {}) or self._begin(p)
        state["step"] += 1
        seed = hash((self.seed, int(state["step"]), self._number[p])) & (2**62 - 1)
        generator = torch.Generator(p.device).manual_seed(seed) if p.dtype == torch.bfloat16 else None
        for rows, grad in blocks:
            grad = grad.view(-1, *p.shape[1:])
            if by_kernels(p) and "exp_avg_most" not in state:
                self._by_kernel(p, state, rows, grad, scale, seed)
            else:
                self._update(p, state, rows, grad, scale, generator)

    def _begin(self, p: Parameter) -> dict[str, Tensor]:
        wide = torch.promote_types(p.dtype, torch.float32)
        state = {"step": torch.zeros((), dtype=torch.float32)}
        if self.precision == "8bit" and p.dim() > 1:
            state |= moments.empty(p)
        else:
            state |= {name: torch.zeros_like(p, dtype=wide) for name in ("exp_avg", "exp_avg_sq")}
        self.state[p] = state
        return state

    def _update(
        self,
        p: Parameter,
        state: dict[str, Tensor],
        rows: slice,
        grad: Tensor,
        scale: float,
        generator: torch.Generator | None,
    ) -> None:
        beta1, beta2 = self.betas
        lr, t, compact = self._group[p]["lr"], int(state["step"]), "exp_avg_most" in state
        weight = p.detach()[rows]
        if compact:
            mean, square = moments.decode(state, rows)
        else:
            mean, square = state["exp_avg"][rows], state["exp_avg_sq"][rows]
        if grad.dtype == weight.dtype == mean.dtype:
            torch._fused_adam_(
                [weight],
                [grad],
                [mean],
                [square],
                [],
                [state["step"].to(p.device)],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=EPS,
                amsgrad=False,
                maximize=False,
                grad_scale=torch.tensor(1.0 / scale, dtype=torch.float32, device=p.device) if scale != 1.0 else None,
            )
        else:
            new = adam(weight.to(mean.dtype), grad.to(mean.dtype).mul_(scale), mean, square, lr, beta1, beta2, t)
            weight.copy_(round_at_random(new, generator) if generator else new)
        if compact:
            moments.encode(state, rows, moments.Moments(mean, square))

    def _by_kernel(
        self, p: Parameter, state: dict[str, Tensor], rows: slice, grad: Tensor, scale: float, seed: int
    ) -> None:
        from crosslayer.clt import kernels

        kernels.adam(
            p.detach()[rows],
            grad,
            state["exp_avg"][rows],
            state["exp_avg_sq"][rows],
            lr=self._group[p]["lr"],
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=EPS,
            t=int(state["step"]),
            scale=scale,
            seed=seed,
            first=rows.start * (p.numel() // len(p)),
        )


def adam(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, lr: float, beta1: float, beta2: float, t: int
) -> Tensor:
    """Return new weights and update the moments in place; reference implementation, all of one dtype."""
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    scale = (square / (1 - beta2**t)).sqrt_().add_(EPS)
    return weight - lr * (mean / (1 - beta1**t)) / scale


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 stochastically, so that the expectation is exact."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
