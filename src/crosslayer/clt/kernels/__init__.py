"""Triton kernels for CUDA: each does what a few lines of plain PyTorch do elsewhere, and passes the same tests.

    encode_above       x W^T + b > bound, compacted: the product is never written out          finding.above
    add_rows           a sparse matrix of compressed rows times a dense one, added            sparse.add_rows
    sampled_products   entries of a product                                                   sparse.sampled_products
    adam               Adam with stochastic rounding, one pass                                training.optimiser.adam

Sums are float32 (float64 for float64), whatever the weights are. None uses atomic additions of floating-point numbers,
so a step gives the same bits each time. Triton comes with PyTorch's CUDA builds; its interpreter (TRITON_INTERPRET=1)
runs all of this on CPU.
"""

from __future__ import annotations

from crosslayer.clt.kernels.adam import adam
from crosslayer.clt.kernels.encode import encode_above
from crosslayer.clt.kernels.products import add_rows, sampled_products

__all__ = ["adam", "add_rows", "encode_above", "sampled_products"]
