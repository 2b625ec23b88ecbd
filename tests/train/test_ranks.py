"""Two ranks give one process's gradients."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.multiprocessing as mp

from clt.test_transcoder import inputs, make
from crosslayer import dist
from train.test_losses import config, gradients, terms


def work(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    torch.set_num_threads(1)
    dist.start()
    clt, x, y = make(), inputs(40), inputs(80)[40:]
    mine = slice(rank * 20, rank * 20 + 20)
    terms(clt, x[mine], y[mine], config(), dead=True).total.backward()
    dist.mean_gradients(list(clt.parameters()))
    assert dist.gather_objects(rank) == [0, 1]
    assert dist.any_(rank == 1)
    assert dist.mean([float(rank)]) == [0.5]
    torch.save(gradients(clt), f"{folder}/{rank}.pt")
    dist.stop()


def test_two_gloo_ranks_give_one_processs_gradients(tmp_path: Path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    clt = make()
    terms(clt, inputs(40), inputs(80)[40:], config(), dead=True).total.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, grad in gradients(clt).items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-8)
