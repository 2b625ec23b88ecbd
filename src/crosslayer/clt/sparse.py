"""Sparse operations on active features, with exact gradients.

An encoding of B tokens is K triples (token, feature, value), sorted by token. Decoding sums the decoder rows of each
token, scaled by value. The gradient of a value is the dot product of a decoder row and a token's gradient. The gradient
of a row is a sum over the tokens on which its feature is active. All three are a sparse-dense product or a product
sampled at entries; none needs a dense B x F or F x D product. On CPU they use PyTorch's CSR operations, on CUDA Triton
(`crosslayer.clt.kernels`).
"""

from __future__ import annotations

import warnings
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

ENTRIES_AT_ONCE = 1 << 18
"""Entries whose rows are gathered at once if there is no sampled product."""
NUMBERS_AT_ONCE = 1 << 22
"""Elements of a matrix that are copied at once."""


def by_kernels(tensor: Tensor) -> bool:
    """Return whether Triton kernels handle this tensor."""
    return tensor.is_cuda


def by_compressed_rows(tensor: Tensor) -> bool:
    """Whether PyTorch has products over compressed rows for this tensor; elsewhere rows are gathered."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


class Entries(NamedTuple):
    """Entries of a (B, F) matrix, sorted by token, then feature."""

    token_K: Int[Tensor, " K"]
    feature_K: Int[Tensor, " K"]


class Active(NamedTuple):
    """Sparse activations of one layer on B tokens, sorted by token, then feature."""

    token_K: Int[Tensor, " K"]
    feature_K: Int[Tensor, " K"]
    value_K: Float[Tensor, " K"]
    shape: tuple[int, int]
    """(B, F)"""

    def dense(self) -> Float[Tensor, "B F"]:
        """Return the activations as a dense matrix."""
        zeros = self.value_K.new_zeros(self.shape)
        return zeros.index_put((self.token_K, self.feature_K), self.value_K)

    def count(self) -> Int[Tensor, " F"]:
        """Return the number of tokens on which each feature is active."""
        return torch.bincount(self.feature_K[self.value_K > 0], minlength=self.shape[1])


def where(mask_BF: Bool[Tensor, "B F"]) -> Entries:
    """Return the true entries of a sparse mask, tested eight at a time."""
    n_features = mask_BF.shape[1]
    if by_kernels(mask_BF) or not n_features or n_features % 8 or not mask_BF.is_contiguous():
        return Entries(*mask_BF.nonzero(as_tuple=True))
    word_W = mask_BF.view(torch.int64).view(-1).nonzero()[:, 0]
    at_K, bit_K = mask_BF.view(-1, 8)[word_W].nonzero(as_tuple=True)
    flat_K = word_W[at_K] * 8 + bit_K
    token_K = flat_K // n_features
    return Entries(token_K, flat_K - token_K * n_features)


def sparse_pre(
    x_BD: Float[Tensor, "B D"],
    W_FD: Float[Tensor, "F D"],
    b_F: Float[Tensor, " F"],
    entries: Entries,
    z_K: Float[Tensor, " K"],
) -> Float[Tensor, " K"]:
    """Return `z_K`, the given entries of x W^T + b, with their sparse gradients."""
    return _SparsePre.apply(x_BD, W_FD, b_F, z_K, *entries)  # type: ignore[return-value]


def sparse_decode(active: Active, W_FD: Float[Tensor, "F D"]) -> Float[Tensor, "B D"]:
    """Return the sum of the decoder rows of each token's active features, scaled by their values."""
    return _SparseDecode.apply(active.value_K, W_FD, active.token_K, active.feature_K, active.shape[0])  # type: ignore[return-value]


def starts(at_K: Int[Tensor, " K"], n: int) -> Int[Tensor, " R1"]:
    """Return the CSR row offsets of entries sorted by row."""
    return F.pad(torch.bincount(at_K, minlength=n).cumsum(0), (1, 0))


def add_rows(
    out_XD: Tensor, start_R1: Int[Tensor, " R1"], row_K: Int[Tensor, " K"], scale_K: Tensor, rows_YD: Tensor
) -> None:
    """Add the sum of scale * rows[row] over entries start[x] to start[x + 1] to out[x], in the dtype of `out`.

    Both matrices may be column slices of wider ones.
    """
    if by_kernels(out_XD):
        from crosslayer.clt import kernels

        kernels.add_rows(out_XD, start_R1, row_K, scale_K, rows_YD)
        return
    if not len(row_K):
        return
    if not by_compressed_rows(out_XD):
        at_K = torch.repeat_interleave(torch.arange(len(out_XD), device=out_XD.device), start_R1.diff())
        for at, row, scale in zip(*(t.split(ENTRIES_AT_ONCE) for t in (at_K, row_K, scale_K)), strict=True):
            out_XD.index_add_(0, at, (rows_YD[row].to(out_XD.dtype) * scale[:, None]).to(out_XD.dtype))
        return
    if rows_YD.dtype != out_XD.dtype:
        used, row_K = row_K.unique(return_inverse=True)
        rows_YD = rows_YD[used].to(out_XD.dtype)
    by_row = _compressed(start_R1, row_K, scale_K.to(out_XD.dtype), (len(out_XD), len(rows_YD)))
    torch.addmm(out_XD, by_row, rows_YD, out=out_XD)


def sum_rows(
    into: int, at_K: Int[Tensor, " K"], row_K: Int[Tensor, " K"], rows: Tensor, scale_K: Tensor, *, ordered: bool
) -> Tensor:
    """Return out[a] = sum of scale * rows[row] over entries with `at` a < into; `ordered` if `at_K` is sorted."""
    start = starts(at_K, into)
    if not ordered:
        order = at_K.argsort(stable=True)
        row_K, scale_K = row_K[order], scale_K[order]
    out = rows.new_zeros(into, rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    add_rows(out, start, row_K, scale_K, rows)
    return out.to(rows.dtype)


def sampled_products(
    a_BD: Tensor, b_FD: Tensor, token_K: Int[Tensor, " K"], feature_K: Int[Tensor, " K"], n_features: int
) -> Tensor:
    """Return <a[token], b[feature]> for each entry; entries are sorted by token."""
    if by_kernels(a_BD):
        from crosslayer.clt import kernels

        return kernels.sampled_products(a_BD, b_FD, token_K, feature_K)
    wide = torch.promote_types(a_BD.dtype, b_FD.dtype)
    if not by_compressed_rows(a_BD) or a_BD.dtype != b_FD.dtype:
        parts = zip(token_K.split(ENTRIES_AT_ONCE), feature_K.split(ENTRIES_AT_ONCE), strict=True)
        return torch.cat(
            [torch.linalg.vecdot(a_BD[token].to(wide), b_FD[feature].to(wide)) for token, feature in parts]
        )
    start = starts(token_K, len(a_BD))
    # A matrix that is not contiguous is copied, a few rows at a time.
    at_once = len(a_BD) if a_BD.is_contiguous() else max(1, NUMBERS_AT_ONCE // a_BD.shape[1])
    bounds = [*start[:-1:at_once].tolist(), len(token_K)]
    b_DF, products = b_FD.contiguous().T, []
    for i, (first, last) in enumerate(pairwise(bounds)):
        rows = slice(i * at_once, (i + 1) * at_once)
        part = a_BD[rows].contiguous()
        zeros = part.new_zeros(last - first)
        where = _compressed(
            start[rows.start : rows.stop + 1] - first, feature_K[first:last], zeros, (len(part), n_features)
        )
        products.append(torch.sparse.sampled_addmm(where, part, b_DF).values())
    return torch.cat(products) if products else a_BD.new_zeros(0)


def _compressed(start: Tensor, column_K: Tensor, value_K: Tensor, shape: tuple[int, int]) -> Tensor:
    _silence_warnings()
    return torch.sparse_csr_tensor(start, column_K, value_K, shape, check_invariants=False)


@cache
def _silence_warnings() -> None:
    """Silence what PyTorch warns of once: CSR tensors are in beta and, in 2.11 despite the argument, unchecked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant checks are implicitly disabled)")
        none = torch.zeros(0, dtype=torch.int64)
        torch.sparse_csr_tensor(F.pad(none, (2, 0)), none, none.float(), (1, 1), check_invariants=False)


class _SparsePre(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, z: Tensor, token: Tensor, feature: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, token, feature)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_K,) = grads
        x, W, token, feature = ctx.saved_tensors
        grad_x = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = sum_rows(x.shape[0], token, feature, W, grad_K, ordered=True).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_W = sum_rows(W.shape[0], feature, token, x, grad_K, ordered=False).to(W.dtype)
        if ctx.needs_input_grad[2]:
            grad_b = torch.zeros(W.shape[0], dtype=grad_K.dtype, device=W.device).index_add_(0, feature, grad_K)
        return grad_x, grad_W, grad_b, None, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, W: Tensor, token: Tensor, feature: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(value, W, token, feature)
        return sum_rows(n_tokens, token, feature, W, value, ordered=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BD,) = grads
        value, W, token, feature = ctx.saved_tensors
        grad_value = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_value = sampled_products(grad_BD, W, token, feature, W.shape[0]).to(value.dtype)
        if ctx.needs_input_grad[1]:
            grad_W = sum_rows(W.shape[0], feature, token, grad_BD, value, ordered=False)
        return grad_value, grad_W, None, None, None
