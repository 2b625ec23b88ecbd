"""Two ranks give one process's gradients, train, and go on bit-equal after being killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from clt.test_transcoder import inputs, make
from crosslayer import dist
from train.test_losses import config, gradients, terms


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def work(rank: int, folder: str, port: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
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
    mp.spawn(work, (str(tmp_path), free_port()), nprocs=2)
    clt = make()
    terms(clt, inputs(40), inputs(80)[40:], config(), dead=True).total.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, grad in gradients(clt).items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-8)


def torchrun(*args: str | Path, expect: int = 0, kill_after: str | None = None) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "crosslayer", "train"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)  # fmt: skip
    if kill_after is not None:
        while not list(Path(kill_after).glob("step-*")) and process.poll() is None:
            time.sleep(0.02)
        # The launcher first, so that it restarts nothing; its workers have sessions of their own.
        for victim in [launcher := psutil.Process(process.pid), *launcher.children(recursive=True)]:
            victim.kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == expect, err


def test_two_ranks_killed_and_resumed_end_bit_equal(host_folder: Path, text_folder: Path, tmp_path: Path):
    settings = [
        *("--model", host_folder, "--text", text_folder, "--tokens", "8000", "--batch", "100", "--n-features", "64", "--l0-per-layer", "4"),
        *("--context", "33", "--ring", "512", "--rows-per-harvest", "8", "--scale-tokens", "500", "--calibration-tokens", "2000"),
        *("--eval-tokens", "500", "--checkpoint-every", "10"),
    ]  # fmt: skip
    torchrun(*settings, "--out", tmp_path / "whole")
    torchrun(*settings, "--out", tmp_path / "cut", expect=-9, kill_after=str(tmp_path / "cut" / "checkpoints"))
    assert not (tmp_path / "cut" / "clt").exists()
    torchrun("--resume", tmp_path / "cut")
    for file in sorted((tmp_path / "whole" / "clt").glob("*.safetensors")):
        one, other = load_file(file), load_file(tmp_path / "cut" / "clt" / file.name)
        assert all(torch.equal(one[name], other[name]) for name in one), file.name
