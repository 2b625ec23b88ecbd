"""Accumulation dtypes of the kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl


def wide(dtype: torch.dtype) -> Any:
    """Return Triton's accumulation dtype: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32
