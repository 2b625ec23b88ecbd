"""Adam, with stochastic rounding where weights are bfloat16.

A bfloat16 weight has 8 bits: an update under 1/256 of it would round away. Rounding up or down at random, with the
chance that makes the mean right, keeps it. Moments are float32 (Kingma & Ba 2015; Zamirai et al. 2020, arXiv:2010.06192).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def make_optimiser(groups: list[dict[str, Any]], betas: tuple[float, float], seed: int) -> torch.optim.Optimizer:
    """PyTorch's fused Adam where every weight is float32, ours where some are bfloat16."""
    if any(p.dtype == torch.bfloat16 for g in groups for p in g["params"]):
        return StochasticAdam(groups, betas, seed)
    return torch.optim.Adam(groups, betas=betas, fused=True)


class StochasticAdam(torch.optim.Optimizer):
    """Adam whose bfloat16 weights are rounded at random; the draw depends on seed, step and tensor alone."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], seed: int, eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps, "seed": seed})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is not None:
                    self._update(p, group, number)

    def _update(self, p: Parameter, group: dict[str, Any], number: int) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] += 1
        t = int(state["step"])
        beta1, beta2 = group["betas"]
        grad = p.grad.float()  # type: ignore[union-attr]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
        new = p.float() - group["lr"] * (state["exp_avg"] / (1 - beta1**t)) / scale
        if p.dtype == torch.bfloat16:
            generator = torch.Generator(p.device).manual_seed(hash((group["seed"], t, number)) & (2**62 - 1))
            new = round_at_random(new, generator)
        p.copy_(new)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # PyTorch casts the state to the weights' dtype, which would round float32 moments away.
        saved = state_dict["state"]
        for number, p in enumerate(p for g in self.param_groups for p in g["params"]):
            if number in saved:
                self.state[p] = {k: v.clone().to(p.device if k != "step" else "cpu") for k, v in saved[number].items()}


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the chance that makes the mean exact."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
