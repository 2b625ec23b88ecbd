"""The dtypes that kernels compute in."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl


def wide(dtype: torch.dtype) -> Any:
    """Triton's dtype for sums of numbers of this one: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32
