"""Under `torchrun`: a run whose rank is killed prints how to resume, and resumes bitwise identical."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file


def torchrun(*args: str | Path, expect: int = 0, kill_one_after: Path | None = None) -> str:
    """Return stderr of `crosslayer train` on two ranks; optionally kill rank 1 after the first checkpoint."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "crosslayer",
        "train",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    if kill_one_after is not None:
        while not list(kill_one_after.glob("step-*")) and process.poll() is None:
            time.sleep(0.02)
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        ranks[0].kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == expect, err
    return err


def test_a_killed_rank_is_reported_and_the_resumed_run_is_bitwise_identical(
    host_folder: Path, text_folder: Path, tmp_path: Path
):
    settings = [
        *(
            "--model",
            host_folder,
            "--text",
            text_folder,
            "--tokens",
            "8000",
            "--batch",
            "100",
            "--n-features",
            "64",
            "--l0-per-layer",
            "4",
        ),
        *(
            "--context",
            "33",
            "--buffer-tokens",
            "512",
            "--rows-per-forward",
            "8",
            "--scale-tokens",
            "500",
            "--calibration-tokens",
            "2000",
        ),
        *("--eval-tokens", "500", "--checkpoint-every", "10", "--feature-ranks", "2"),
    ]
    torchrun(*settings, "--out", tmp_path / "whole")
    error = torchrun(*settings, "--out", tmp_path / "cut", expect=1, kill_one_after=tmp_path / "cut" / "checkpoints")
    assert "crosslayer: rank 0 lost another rank, which ended or cannot be reached" in error
    assert f"with --resume {tmp_path / 'cut'}, on any number of ranks" in error
    assert not (tmp_path / "cut" / "clt").exists()
    torchrun("--resume", tmp_path / "cut")
    for file in sorted((tmp_path / "whole" / "clt").glob("*.safetensors")):
        one, other = load_file(file), load_file(tmp_path / "cut" / "clt" / file.name)
        assert all(torch.equal(one[name], other[name]) for name in one), file.name
