"""Adam's moments in 8 bits each, a quarter of float32's memory.

Each row of the last axis has a scale, its largest absolute value, and codes relative to it: the first moment a signed
square root, so that values are told apart down to a 16,000th of the largest; the second, which is squared already and
must never come out as zero where it was not, an unsigned fourth root. (Blockwise scales as in Dettmers et al. 2022,
arXiv:2110.02861; roots in place of their tables, which need none.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """First and second moments of some rows, float32."""

    mean: Tensor
    square: Tensor


def empty(like: Tensor) -> dict[str, Tensor]:
    """Zero moments of a tensor with two axes or more, as an optimiser's state holds them."""
    most = like.shape[:-1]
    return {
        "exp_avg": torch.zeros(like.shape, dtype=torch.int8, device=like.device),
        "exp_avg_most": torch.zeros(most, dtype=torch.float32, device=like.device),
        "exp_avg_sq": torch.zeros(like.shape, dtype=torch.uint8, device=like.device),
        "exp_avg_sq_most": torch.zeros(most, dtype=torch.float32, device=like.device),
    }


def decode(state: dict[str, Tensor], rows: slice) -> Moments:
    """The moments of some rows."""
    root = state["exp_avg"][rows].float() / 127
    mean = root * root.abs() * state["exp_avg_most"][rows, ..., None]
    square = (state["exp_avg_sq"][rows].float() / 255).pow_(4) * state["exp_avg_sq_most"][rows, ..., None]
    return Moments(mean, square)


def encode(state: dict[str, Tensor], rows: slice, moments: Moments) -> None:
    """Put moments of some rows back."""
    mean, square = moments
    most = mean.abs().amax(-1)
    root = (mean / most.clamp(min=1e-38)[..., None]).abs_().sqrt_().mul_(127).round_()
    state["exp_avg"][rows] = root.copysign_(mean).to(torch.int8)
    state["exp_avg_most"][rows] = most
    most = square.amax(-1)
    root = (square / most.clamp(min=1e-38)[..., None]).sqrt_().sqrt_().mul_(255).round_()
    state["exp_avg_sq"][rows] = torch.where(square > 0, root.clamp_(min=1), root).to(torch.uint8)
    state["exp_avg_sq_most"][rows] = most
