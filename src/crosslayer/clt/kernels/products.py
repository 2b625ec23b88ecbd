"""Product of a CSR matrix with a dense one, and a product sampled at entries."""

# Triton converts Python numbers to kernel constants.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.clt.kernels.dtypes import wide


def add_rows(
    out_XD: Tensor, start_R1: Int[Tensor, " R1"], row_K: Int[Tensor, " K"], scale_K: Tensor, rows_YD: Tensor
) -> None:
    """Add the sum of scale * rows[row] over entries start[x] to start[x + 1] to out[x]."""
    n_rows, width = out_XD.shape
    if not n_rows or not len(row_K):
        return
    block = min(1024, triton.next_power_of_2(width))
    _add_rows[(n_rows, triton.cdiv(width, block))](
        out_XD,
        start_R1,
        row_K,
        scale_K,
        rows_YD,
        width,
        out_XD.stride(0),
        rows_YD.stride(0),
        WIDE=wide(out_XD.dtype),
        BLOCK=block,
    )


@triton.jit
@no_type_check
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
    """Return <a[token], b[feature]> per entry, in the wider of float32 and the two dtypes."""
    kind = torch.promote_types(torch.promote_types(a_BD.dtype, b_FD.dtype), torch.float32)
    out_K = torch.empty(len(token_K), dtype=kind, device=a_BD.device)
    if len(token_K):
        width = a_BD.shape[1]
        entries, block = 16, min(128, triton.next_power_of_2(width))
        _sampled_products[(triton.cdiv(len(token_K), entries),)](
            out_K,
            a_BD,
            b_FD,
            token_K,
            feature_K,
            len(token_K),
            width,
            a_BD.stride(0),
            b_FD.stride(0),
            WIDE=wide(kind),
            ENTRIES=entries,
            BLOCK=block,
        )
    return out_K


@triton.jit
@no_type_check
def _sampled_products(
    out,
    a,
    b,
    token,
    feature,
    n,
    width,
    a_stride,
    b_stride,
    WIDE: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
