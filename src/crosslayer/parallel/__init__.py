"""Ranks, and the groups that they form. In one process everything here does nothing, so that no caller has a second
code path.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; `start` joins the group they describe, `lay_out` arranges it as a mesh
of data x feature ranks. May import `records` and `core`.
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
"""How long a rank waits for the others: the first writes a transcoder of many gigabytes alone. One that died is missed
at once.
"""


def start() -> None:
    """Join the process group that `torchrun` describes; without it, do nothing.

    Raises:
        RunError: for ranks of different versions.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Counts and flags travel as CPU tensors, gradients as they are.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        check_same_versions()


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_same_versions() -> None:
    """Refuse ranks that would not compute, or not save, the same.

    Raises:
        RunError: naming a package, two ranks and their versions.
    """
    found = gather_objects({"crosslayer": version("crosslayer"), "torch": torch.__version__})
    for number, theirs in enumerate(found):
        for package, said in theirs.items():
            if said != found[0][package]:
                raise RunError(
                    f"rank {number} has {package} {said} and rank 0 has {found[0][package]}; install the same version"
                    " on every node"
                )


def world() -> Group:
    """All ranks."""
    return Group(dist.group.WORLD) if dist.is_initialized() else Group()


def rank() -> int:
    return world().rank


def world_size() -> int:
    return world().size


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    world().barrier()


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, in order of rank."""
    return world().objects(value)
