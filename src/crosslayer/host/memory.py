"""Memory of a device, and the check that a computation fits before it allocates."""

from __future__ import annotations

import torch

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
