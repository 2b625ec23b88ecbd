"""Sparse arithmetic over active features: gather, scale, add; and its exact gradients.

An encoding of B tokens is K triples (token, feature, value), in order of token. Decoding adds the value-scaled decoder
rows of each token; the gradient of a value is the product of one row with one token's gradient, that of a row the sum
over the tokens on which its feature fires. None of the three needs a B x F or F x D product.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

ENTRIES_AT_ONCE = 1 << 18
"""Entries whose rows are gathered together where there is no sampled product."""


class Entries(NamedTuple):
    """Places in a (B, F) matrix, in order of token then feature."""

    token_K: Int[Tensor, " K"]
    feature_K: Int[Tensor, " K"]


class Active(NamedTuple):
    """Features that a decoder or a gradient must see, of one layer on B tokens, in order of token then feature."""

    token_K: Int[Tensor, " K"]
    feature_K: Int[Tensor, " K"]
    value_K: Float[Tensor, " K"]
    shape: tuple[int, int]
    """(B, F)"""

    def dense(self) -> Float[Tensor, "B F"]:
        """The same as a matrix."""
        zeros = self.value_K.new_zeros(self.shape)
        return zeros.index_put((self.token_K, self.feature_K), self.value_K)

    def count(self) -> Int[Tensor, " F"]:
        """How many tokens each feature is active on."""
        return torch.bincount(self.feature_K[self.value_K > 0], minlength=self.shape[1])


def where(mask_BF: Bool[Tensor, "B F"]) -> Entries:
    """The true entries of a mask."""
    return Entries(*mask_BF.nonzero(as_tuple=True))


def sparse_pre(
    x_BD: Float[Tensor, "B D"],
    W_FD: Float[Tensor, "F D"],
    b_F: Float[Tensor, " F"],
    entries: Entries,
    pre_BF: Float[Tensor, "B F"] | None = None,
) -> Float[Tensor, " K"]:
    """These entries of the pre-activation x W^T + b, with gradients that touch them alone; read off `pre_BF` if it is given."""
    return _SparsePre.apply(x_BD, W_FD, b_F, pre_BF, *entries)  # type: ignore[return-value]


def sparse_decode(active: Active, W_FD: Float[Tensor, "F D"]) -> Float[Tensor, "B D"]:
    """Sum of the decoder rows of each token's active features, scaled by their values."""
    return _SparseDecode.apply(active.value_K, W_FD, active.token_K, active.feature_K, active.shape[0])  # type: ignore[return-value]


def sum_rows(
    into: int, at_K: Int[Tensor, " K"], row_K: Int[Tensor, " K"], rows: Tensor, scale_K: Tensor, *, ordered: bool
) -> Tensor:
    """out[a] = sum of scale * rows[row] over entries whose `at` is a, for a < into; `ordered` says that `at_K` ascends."""
    if not ordered:
        order = at_K.argsort(stable=True)
        row_K, scale_K = row_K[order], scale_K[order]
    offsets = F.pad(torch.bincount(at_K, minlength=into).cumsum(0), (1, 0))[:-1]
    return F.embedding_bag(row_K, rows.contiguous(), offsets, mode="sum", per_sample_weights=scale_K.to(rows.dtype))


def sampled_products(
    a_BD: Tensor, b_FD: Tensor, token_K: Int[Tensor, " K"], feature_K: Int[Tensor, " K"], n_features: int
) -> Tensor:
    """<a[token], b[feature]> for each entry, in order of token."""
    if a_BD.is_cuda or a_BD.dtype not in (torch.float32, torch.float64):
        parts = zip(token_K.split(ENTRIES_AT_ONCE), feature_K.split(ENTRIES_AT_ONCE), strict=True)
        return torch.cat([torch.linalg.vecdot(a_BD[token], b_FD[feature]) for token, feature in parts])
    rows = F.pad(torch.bincount(token_K, minlength=a_BD.shape[0]).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")
        shape = (a_BD.shape[0], n_features)
        where = torch.sparse_csr_tensor(rows, feature_K, a_BD.new_zeros(len(feature_K)), shape, check_invariants=False)
        return torch.sparse.sampled_addmm(where, a_BD.contiguous(), b_FD.contiguous().T).values()


class _SparsePre(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor, pre: Tensor | None, token: Tensor, feature: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, W, token, feature)
        if pre is not None:
            return pre[token, feature]
        return sampled_products(x, W, token, feature, W.shape[0]) + b[feature]

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
