"""Triton kernels for CUDA: each does what a few lines of plain PyTorch do elsewhere, and passes the same tests.

    encode_above       x W^T + b > bound, compacted: the product is never written out          finding.above
    add_rows           a sparse matrix of compressed rows times a dense one, added            sparse.add_rows
    sampled_products   entries of a product                                                   sparse.sampled_products
    adam               Adam with stochastic rounding, one pass                                optimiser.adam, round_at_random

Sums are float32 (float64 for float64), whatever the weights are. None uses atomic additions of floating-point numbers, so a step
gives the same bits each time. Triton comes with PyTorch's CUDA builds; its interpreter (TRITON_INTERPRET=1) runs all of this on CPU.
"""

# Triton turns numbers into constants of a kernel by itself.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Triton's interpreter takes the bits of bfloat16 for integers when it multiplies matrices of them."""


def add_rows(
    out_XD: Tensor, start_R1: Int[Tensor, " R1"], row_K: Int[Tensor, " K"], scale_K: Tensor, rows_YD: Tensor
) -> None:
    """out[x] += sum of scale * rows[row] over the entries from start[x] to start[x + 1]."""
    n_rows, width = out_XD.shape
    if not n_rows or not len(row_K):
        return
    block = min(1024, triton.next_power_of_2(width))
    _add_rows[(n_rows, triton.cdiv(width, block))](
        out_XD, start_R1, row_K, scale_K, rows_YD, width, out_XD.stride(0), rows_YD.stride(0),
        WIDE=_wide(out_XD.dtype), BLOCK=block,
    )  # fmt: skip


@triton.jit
def _add_rows(out, start, row, scale, rows, width, out_stride, rows_stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    total = tl.zeros((BLOCK,), WIDE)
    for k in range(tl.load(start + x), tl.load(start + x + 1)):
        values = tl.load(rows + tl.load(row + k).to(tl.int64) * rows_stride + column, mask=here, other=0.0)
        total += tl.load(scale + k).to(WIDE) * values.to(WIDE)
    at = out + x * out_stride + column
    tl.store(at, (tl.load(at, mask=here, other=0.0).to(WIDE) + total).to(out.dtype.element_ty), mask=here)


def sampled_products(
    a_BD: Tensor, b_FD: Tensor, token_K: Int[Tensor, " K"], feature_K: Int[Tensor, " K"]
) -> Float[Tensor, " K"]:
    """<a[token], b[feature]> for each entry, in the wider of float32 and the two dtypes."""
    wide = torch.promote_types(torch.promote_types(a_BD.dtype, b_FD.dtype), torch.float32)
    out_K = torch.empty(len(token_K), dtype=wide, device=a_BD.device)
    if len(token_K):
        width = a_BD.shape[1]
        entries, block = 16, min(128, triton.next_power_of_2(width))
        _sampled_products[(triton.cdiv(len(token_K), entries),)](
            out_K, a_BD, b_FD, token_K, feature_K, len(token_K), width, a_BD.stride(0), b_FD.stride(0),
            WIDE=_wide(wide), ENTRIES=entries, BLOCK=block,
        )  # fmt: skip
    return out_K


@triton.jit
def _sampled_products(
    out, a, b, token, feature, n, width, a_stride, b_stride, WIDE: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    k = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    there = k < n
    a_row = a + tl.load(token + k, mask=there, other=0).to(tl.int64)[:, None] * a_stride
    b_row = b + tl.load(feature + k, mask=there, other=0).to(tl.int64)[:, None] * b_stride
    total = tl.zeros((ENTRIES, BLOCK), WIDE)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        here = there[:, None] & (column < width)
        x = tl.load(a_row + column, mask=here, other=0.0).to(WIDE)
        y = tl.load(b_row + column, mask=here, other=0.0).to(WIDE)
        total += x * y
    tl.store(out + k, tl.sum(total, 1), mask=there)


def encode_above(
    x_BD: Float[Tensor, "B D"], W_FD: Float[Tensor, "F D"], b_F: Float[Tensor, " F"], bound_F: Float[Tensor, " F"]
) -> tuple[Int[Tensor, " K"], Int[Tensor, " K"], Float[Tensor, " K"]]:
    """Tokens, features and pre-activations where x W^T + b exceeds its feature's bound, in order of token then feature."""
    n_tokens, width = x_BD.shape
    n_features = len(W_FD)
    size, capacity = 64, max(1024, n_tokens * n_features // 64)
    while True:
        place_K = torch.empty(capacity, dtype=torch.int64, device=x_BD.device)
        z_K = torch.empty(capacity, dtype=torch.float32, device=x_BD.device)
        count = torch.zeros(1, dtype=torch.int64, device=x_BD.device)
        _encode_above[(triton.cdiv(n_tokens, size), triton.cdiv(n_features, size))](
            place_K, z_K, count, x_BD, W_FD, b_F, bound_F, n_tokens, n_features, width, capacity,
            x_BD.stride(0), W_FD.stride(0), EXACT=x_BD.dtype == torch.float32, WIDEN=INTERPRETED, SIZE=size, BLOCK=32,
        )  # fmt: skip
        found = int(count)
        if found <= capacity:
            break
        capacity = found
    # Blocks come to an end in no order of their own.
    place_K, order = place_K[:found].sort()
    token_K = place_K // n_features
    return token_K, place_K - token_K * n_features, z_K[:found][order]


@triton.jit
def _encode_above(
    place, z_out, count, x, W, b, bound, n_tokens, n_features, width, capacity, x_stride, W_stride,
    EXACT: tl.constexpr, WIDEN: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    feature = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    in_token, in_feature = token < n_tokens, feature < n_features
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        in_width = column < width
        x_tile = tl.load(
            x + token.to(tl.int64)[:, None] * x_stride + column[None, :], mask=in_token[:, None] & in_width[None, :], other=0.0
        )  # fmt: skip
        W_tile = tl.load(
            W + feature.to(tl.int64)[None, :] * W_stride + column[:, None], mask=in_feature[None, :] & in_width[:, None], other=0.0
        )  # fmt: skip
        if WIDEN:
            x_tile, W_tile = x_tile.to(tl.float32), W_tile.to(tl.float32)
        if EXACT:
            total += tl.dot(x_tile, W_tile, input_precision="ieee")
        else:
            total += tl.dot(x_tile, W_tile)
    z = total + tl.load(b + feature, mask=in_feature, other=0.0).to(tl.float32)[None, :]
    least = tl.load(bound + feature, mask=in_feature, other=0.0).to(tl.float32)
    passes = (z > least[None, :]) & in_token[:, None] & in_feature[None, :]
    passes = tl.reshape(passes.to(tl.int32), (SIZE * SIZE,))
    before = tl.cumsum(passes, 0) - passes
    at = tl.atomic_add(count, tl.sum(passes, 0).to(tl.int64)) + before
    there = (passes > 0) & (at < capacity)
    where = tl.reshape(token.to(tl.int64)[:, None] * n_features + feature[None, :], (SIZE * SIZE,))
    tl.store(place + at, where, mask=there)
    tl.store(z_out + at, tl.reshape(z, (SIZE * SIZE,)), mask=there)


def adam(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *,
    lr: float, beta1: float, beta2: float, eps: float, t: int, scale: float, seed: int, first: int,
) -> None:  # fmt: skip
    """Update weights and moments in place; a bfloat16 weight is rounded at random.

    Args:
        t: number of the step, from 1.
        scale: what the gradient is multiplied by.
        seed, first: what is drawn depends on the seed and on the number's place, counted from `first`.
    """
    n, block = weight.numel(), 1024
    _adam[(triton.cdiv(n, block),)](
        weight, grad, mean, square, n, lr / (1 - beta1**t), 1 / (1 - beta2**t), beta1, beta2, eps, scale, seed % (1 << 31), first,
        WIDE=_wide(weight.dtype), ROUND=weight.dtype == torch.bfloat16, BLOCK=block,
    )  # fmt: skip


@triton.jit
def _adam(
    weight, grad, mean, square, n, rate, correction, beta1, beta2, eps, scale, seed, first,
    WIDE: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    g = tl.load(grad + i, mask=here, other=0.0).to(WIDE) * scale
    m = tl.load(mean + i, mask=here, other=0.0)
    v = tl.load(square + i, mask=here, other=0.0)
    m += (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    tl.store(mean + i, m, mask=here)
    tl.store(square + i, v, mask=here)
    new = tl.load(weight + i, mask=here, other=0.0).to(WIDE) - rate * m / (tl.sqrt(v * correction) + eps)
    if ROUND:
        noise = (tl.randint(seed, (first + i).to(tl.int32)) & 0xFFFF).to(tl.int32)
        bits = (new.to(tl.int32, bitcast=True) + noise) & -65536
        # What is not finite must stay so.
        new = tl.where(tl.abs(new) < float("inf"), bits.to(tl.float32, bitcast=True), new)
    tl.store(weight + i, new.to(weight.dtype.element_ty), mask=here)


def _wide(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32
