"""Adam's moments in 8 bits each, a quarter of the memory of float32.

Each row of the last axis has a scale, its largest absolute value, and codes relative to it. The first moment is stored
as a signed square root, which resolves values down to 1/16,000 of the largest. The second moment is stored as an
unsigned fourth root, and a nonzero value never becomes zero. Scales are blockwise as in Dettmers et al. 2022
(arXiv:2110.02861), with roots instead of quantisation tables.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """First and second moments of a slice of rows, float32."""

    mean: Tensor
    square: Tensor


def empty(like: Tensor) -> dict[str, Tensor]:
    """Return the optimiser state of zero moments, for a tensor with at least two axes."""
    most = like.shape[:-1]
    return {
        "exp_avg": torch.zeros(like.shape, dtype=torch.int8, device=like.device),
        "exp_avg_most": torch.zeros(most, dtype=torch.float32, device=like.device),
        "exp_avg_sq": torch.zeros(like.shape, dtype=torch.uint8, device=like.device),
        "exp_avg_sq_most": torch.zeros(most, dtype=torch.float32, device=like.device),
    }


def decode(state: dict[str, Tensor], rows: slice) -> Moments:
    """Return the moments of a slice of rows."""
    root = state["exp_avg"][rows].float() / 127
    mean = root * root.abs() * state["exp_avg_most"][rows, ..., None]
    square = (state["exp_avg_sq"][rows].float() / 255).pow_(4) * state["exp_avg_sq_most"][rows, ..., None]
    return Moments(mean, square)


def encode(state: dict[str, Tensor], rows: slice, moments: Moments) -> None:
    """Store the moments of a slice of rows."""
    mean, square = moments
    most = mean.abs().amax(-1)
    root = (mean / most.clamp(min=1e-38)[..., None]).abs_().sqrt_().mul_(127).round_()
    state["exp_avg"][rows] = root.copysign_(mean).to(torch.int8)
    state["exp_avg_most"][rows] = most
    most = square.amax(-1)
    root = (square / most.clamp(min=1e-38)[..., None]).sqrt_().sqrt_().mul_(255).round_()
    state["exp_avg_sq"][rows] = torch.where(square > 0, root.clamp_(min=1), root).to(torch.uint8)
    state["exp_avg_sq_most"][rows] = most
