"""Memory of a device, the check that a computation fits before it allocates, and transfers to the machine's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crosslayer.core import memory
from crosslayer.core.errors import ResourceError


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; what PyTorch keeps for reuse counts as free."""
    if device.type != "cuda":
        return memory.free_bytes()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def total_bytes(device: torch.device) -> int:
    """Return the memory of a device."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory.total_bytes()


def require(needed: float, device: torch.device, what: str, remedy: str) -> None:
    """Raise an error unless so many bytes are free.

    Raises:
        ResourceError: names what needs them, and the remedy.
    """
    free = free_bytes(device)
    if needed > free:
        where = " on the GPU" if device.type == "cuda" else ""
        raise ResourceError(
            f"{what} take about {needed / 2**30:.1f} GiB of memory but {free / 2**30:.1f} GiB are free{where}; {remedy}"
        )


def fetch(*tensors: Tensor) -> list[np.ndarray]:
    """Copy tensors to the machine's memory, all with one synchronisation."""
    if not any(t.is_cuda for t in tensors):
        return [t.numpy() for t in tensors]
    here = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for to, tensor in zip(here, tensors, strict=True):
        to.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return [t.numpy() for t in here]
