"""Run a function on several gloo ranks of this machine; what it asserts there fails the test here."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

PRELOADED = [
    *("crosslayer.training.trainer", "crosslayer.eval.api", "transformers.models.qwen3.modeling_qwen3"),
    *("hypothesis", "pytest", "rich.progress", "torch.testing"),
]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _enter(rank: int, ranks: int, port: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    from crosslayer import parallel

    parallel.start()
    work(*args)
    parallel.stop()


def run_on(ranks: int, work: Callable[..., None], *args: Any) -> None:
    """Call `work(*args)` on so many ranks, each a process forked from one that has imported everything."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(_enter, (ranks, free_port(), work, args), nprocs=ranks, start_method="forkserver")
