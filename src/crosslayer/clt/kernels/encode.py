"""Encoder product and comparison with a bound; only entries above it are stored."""

# Triton converts Python numbers to kernel constants.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether the interpreter runs, which treats bfloat16 bits as integers in matrix products."""


def encode_above(
    x_BD: Float[Tensor, "B D"], W_FD: Float[Tensor, "F D"], b_F: Float[Tensor, " F"], bound_F: Float[Tensor, " F"]
) -> tuple[Int[Tensor, " K"], Int[Tensor, " K"], Float[Tensor, " K"]]:
    """Return token, feature and pre-activation where x W^T + b exceeds the bound, sorted by token, then feature."""
    n_tokens, width = x_BD.shape
    n_features = len(W_FD)
    size, capacity = 64, max(1024, n_tokens * n_features // 64)
    while True:
        place_K = torch.empty(capacity, dtype=torch.int64, device=x_BD.device)
        z_K = torch.empty(capacity, dtype=torch.float32, device=x_BD.device)
        count = torch.zeros(1, dtype=torch.int64, device=x_BD.device)
        _encode_above[(triton.cdiv(n_tokens, size), triton.cdiv(n_features, size))](
            place_K,
            z_K,
            count,
            x_BD,
            W_FD,
            b_F,
            bound_F,
            n_tokens,
            n_features,
            width,
            capacity,
            x_BD.stride(0),
            W_FD.stride(0),
            EXACT=x_BD.dtype == torch.float32,
            WIDEN=INTERPRETED,
            SIZE=size,
            BLOCK=32,
        )
        found = int(count)
        if found <= capacity:
            break
        capacity = found
    # Blocks finish in any order.
    place_K, order = place_K[:found].sort()
    token_K = place_K // n_features
    return token_K, place_K - token_K * n_features, z_K[:found][order]


@triton.jit
@no_type_check
def _encode_above(
    place,
    z_out,
    count,
    x,
    W,
    b,
    bound,
    n_tokens,
    n_features,
    width,
    capacity,
    x_stride,
    W_stride,
    EXACT: tl.constexpr,
    WIDEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    feature = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    in_token, in_feature = token < n_tokens, feature < n_features
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        in_width = column < width
        x_tile = tl.load(
            x + token.to(tl.int64)[:, None] * x_stride + column[None, :],
            mask=in_token[:, None] & in_width[None, :],
            other=0.0,
        )
        W_tile = tl.load(
            W + feature.to(tl.int64)[None, :] * W_stride + column[:, None],
            mask=in_feature[None, :] & in_width[:, None],
            other=0.0,
        )
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
