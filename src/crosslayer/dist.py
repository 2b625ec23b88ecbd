"""Ranks. In one process every function here does nothing, so that no caller has a second code path.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; `start` joins the group they describe.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> None:
    """Join the process group that `torchrun` describes; without it, do nothing."""
    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Counts and flags travel as CPU tensors, gradients as they are.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over ranks, so that any number of ranks gives one process's gradients."""
    if not dist.is_initialized():
        return
    n = world_size()
    for p in parameters:
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad.div_(n)


def any_(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(sum_(torch.tensor(float(flag))).item()) if dist.is_initialized() else flag


def mean(values: list[float]) -> list[float]:
    """Mean of each value over ranks."""
    return (sum_(torch.tensor(values, dtype=torch.float64)) / world_size()).tolist()


def copy_from_first(parameters: Iterable[Tensor]) -> None:
    """Overwrite these tensors by rank 0's."""
    if dist.is_initialized():
        for p in parameters:
            dist.broadcast(p.data, src=0)


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
