"""Triton kernels for CUDA; each replaces a few lines of PyTorch and passes the same tests.

    encode_above       x W^T + b > bound, compacted, without storing the product             finding.above
    add_rows           a sparse matrix of compressed rows times a dense one, added            sparse.add_rows
    sampled_products   entries of a product                                                   sparse.sampled_products
    adam               Adam with stochastic rounding, one pass                                training.optimiser.adam

Sums are float32 (float64 for float64), whatever the dtype of the weights. No kernel uses floating-point atomics, so
results are deterministic. Triton comes with PyTorch's CUDA builds; its interpreter (TRITON_INTERPRET=1) runs the
kernels on CPU.

Kernels are marked `@no_type_check`: Triton cannot compile a function that a run-time type checker has wrapped. Triton
passes Python floats as float32 unless they are annotated as `tl.float64`.
"""

from __future__ import annotations

from crosslayer.clt.kernels.adam import adam
from crosslayer.clt.kernels.encode import encode_above
from crosslayer.clt.kernels.products import add_rows, sampled_products

__all__ = ["adam", "add_rows", "encode_above", "sampled_products"]
