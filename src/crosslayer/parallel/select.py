"""Exact k-th largest of numbers on several ranks, by radix selection: ranks exchange counts, not numbers.

The bit patterns of positive floating-point numbers have the order of the numbers. The k-th largest is found eight bits
at a time: each round counts, on every rank, how many numbers reach each of 255 thresholds, and sums the counts over
ranks. It takes four rounds for float32 and eight for float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.parallel.group import Group

BITS = 8


def kth_largest(score_XY: Float[Tensor, "X Y"], k: int, group: Group) -> Float[Tensor, " X"]:
    """Return the `k`-th largest positive number per row, over the columns of all ranks; 0 if there are fewer.

    Numbers that are not positive count as 0. Ranks may have different numbers of columns.
    """
    assert k > 0
    if group.size == 1:
        n = score_XY.shape[1]
        enough = n >= k
        return score_XY.kthvalue(n - k + 1, dim=1).values.clamp(min=0) if enough else score_XY.new_zeros(len(score_XY))
    integers = torch.int64 if score_XY.dtype == torch.float64 else torch.int32
    wide_XY = score_XY.to(torch.promote_types(score_XY.dtype, torch.float32)).clamp(min=0)
    key_XY = wide_XY.contiguous().view(integers).to(torch.int64).sort(dim=1).values
    cut_X = key_XY.new_zeros(len(key_XY))
    n_bits = 63 if integers == torch.int64 else 31
    for shift in reversed(range(0, n_bits, BITS)):
        digits = torch.arange(1, 1 << min(BITS, n_bits - shift), device=key_XY.device)
        step_XY = cut_X[:, None] + (digits << shift)
        count_XY = key_XY.shape[1] - torch.searchsorted(key_XY, step_XY, out_int32=True)
        cut_X += (group.sum_(count_XY) >= k).sum(1) << shift
    return cut_X.to(integers).view(wide_XY.dtype).to(score_XY.dtype)
