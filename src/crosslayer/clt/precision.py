"""Precision of computation, and whether bfloat16 is fast on a device."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]
NAMES: tuple[Precision, ...] = ("auto", "fp32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE, TURNS = 512, 6
FASTER = 1.2
"""Min speedup of a bfloat16 product over float32. Processors with bfloat16 reach 2 or more, others less than 0.6."""


def dtype_of(precision: str, device: str | torch.device) -> torch.dtype:
    """Return the dtype of a precision; `auto` is bfloat16 if the device is faster with it, else float32."""
    if precision == "auto":
        return torch.bfloat16 if bfloat16_is_fast(torch.device(device)) else torch.float32
    return DTYPES[precision]


@cache
def bfloat16_is_fast(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices faster than float32; measured once per process."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    best = dict.fromkeys(DTYPES.values(), float("inf"))
    matrices = {dtype: torch.ones(SIDE, SIDE, dtype=dtype, device=device) for dtype in best}
    for _ in range(TURNS):
        for dtype, a in matrices.items():
            began = time.perf_counter()
            (a @ a)[0, 0].item()
            best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] > FASTER * best[torch.bfloat16]
