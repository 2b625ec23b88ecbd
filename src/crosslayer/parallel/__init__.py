"""Groups of ranks; in a single process every operation is a no-op, so callers have one code path.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK. `start` joins the process group, and `lay_out` arranges it as a mesh of
data x feature ranks. May import `schemas` and `core`.
"""

from __future__ import annotations

import os
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from crosslayer.core.errors import RunError
from crosslayer.parallel.group import ALONE, Group, LostRank, Mesh, lay_out

__all__ = [
    "ALONE",
    "Group",
    "LostRank",
    "Mesh",
    "barrier",
    "gather_objects",
    "is_first",
    "lay_out",
    "rank",
    "start",
    "stop",
    "world",
    "world_size",
]

PATIENCE = timedelta(hours=1)
"""Timeout of collectives: rank 0 alone writes many gigabytes. A rank that dies is noticed at once."""


def start() -> None:
    """Join the process group of `torchrun`; without `torchrun`, do nothing.

    Raises:
        RunError: if ranks have different package versions.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Counts and flags are CPU tensors; gradients stay on their device.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        check_same_versions()


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_same_versions() -> None:
    """Refuse ranks with different package versions.

    Raises:
        RunError: with the package, two ranks and their versions.
    """
    found = gather_objects({"crosslayer": version("crosslayer"), "torch": torch.__version__})
    for number, versions in enumerate(found):
        for package, installed in versions.items():
            if installed != found[0][package]:
                raise RunError(
                    f"rank {number} has {package} {installed} and rank 0 has {found[0][package]}; install the same"
                    " version on every node"
                )


def world() -> Group:
    """Return the group of all ranks."""
    return Group(dist.group.WORLD) if dist.is_initialized() else Group()


def rank() -> int:
    return world().rank


def world_size() -> int:
    return world().size


def is_first() -> bool:
    """Return whether this is rank 0, which writes files and prints."""
    return rank() == 0


def barrier() -> None:
    world().barrier()


def gather_objects(value: Any) -> list[Any]:
    """Return the value of every rank, in order of rank."""
    return world().objects(value)
