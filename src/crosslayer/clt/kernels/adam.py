"""Adam with stochastic rounding, in one pass over weight, gradient and moments."""

# Triton converts Python numbers to kernel constants.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosslayer.clt.kernels.dtypes import wide


def adam(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    t: int,
    scale: float,
    seed: int,
    first: int,
) -> None:
    """Update weights and moments in place; bfloat16 weights are rounded stochastically.

    Args:
        t: step number, from 1.
        scale: factor of the gradient.
        seed, first: random numbers depend on the seed and on the element's index, counted from `first`.
    """
    n, block = weight.numel(), 1024
    _adam[(triton.cdiv(n, block),)](
        weight,
        grad,
        mean,
        square,
        n,
        lr / (1 - beta1**t),
        1 / (1 - beta2**t),
        beta1,
        beta2,
        eps,
        scale,
        seed % (1 << 31),
        first,
        WIDE=wide(weight.dtype),
        ROUND=weight.dtype == torch.bfloat16,
        BLOCK=block,
    )


@triton.jit
@no_type_check
def _adam(
    weight,
    grad,
    mean,
    square,
    n,
    rate: tl.float64,
    correction: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    scale: tl.float64,
    seed,
    first,
    WIDE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    g = tl.load(grad + i, mask=here, other=0.0).to(WIDE) * tl.full((), scale, WIDE)
    m = tl.load(mean + i, mask=here, other=0.0)
    v = tl.load(square + i, mask=here, other=0.0)
    m += (g - m) * tl.full((), 1 - beta1, WIDE)
    v = v * tl.full((), beta2, WIDE) + g * g * tl.full((), 1 - beta2, WIDE)
    tl.store(mean + i, m, mask=here)
    tl.store(square + i, v, mask=here)
    step = tl.full((), rate, WIDE) * m / (tl.sqrt(v * tl.full((), correction, WIDE)) + tl.full((), eps, WIDE))
    new = tl.load(weight + i, mask=here, other=0.0).to(WIDE) - step
    if ROUND:
        noise = (tl.randint(seed, (first + i).to(tl.int32)) & 0xFFFF).to(tl.int32)
        bits = (new.to(tl.int32, bitcast=True) + noise) & -65536
        # Values that are not finite stay so.
        new = tl.where(tl.abs(new) < float("inf"), bits.to(tl.float32, bitcast=True), new)
    tl.store(weight + i, new.to(weight.dtype.element_ty), mask=here)
