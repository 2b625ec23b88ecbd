"""A whole training step (forward, backward, clip, Adam) against a plain dense step, alternating in one run.

    python benchmarks/bench_train.py [--quick] [--json FILE]
    python benchmarks/bench_train.py --reference --device cuda --json benchmarks/results/train-h200.json

The first is at the shape at which other tools were measured: 12 layers x 256, 4,096 features per layer, random
activations, an L0 of 64 in total. The plain step is a standard implementation: dense products, `topk` or JumpReLU on
matrices, one product per layer for all layers written. Peak memory is measured in a process that does nothing else.
Both multiply in float32 unless the machine has bfloat16 in hardware; then ours uses bfloat16 to find candidates
(`encoder_share` is of the float32 product). The second is at the reference's shape, 28 x 20,480 x 1024 in bfloat16,
sparse only (--dense measures the dense path at an L0 of 115).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crosslayer.clt.init import cut_for_density, initialise
from crosslayer.clt.transcoder import CLT
from crosslayer.training.config import Moments, TrainConfig
from crosslayer.training.gradients import FusedUpdate
from crosslayer.training.objective import SPARSE_BELOW, compute
from crosslayer.training.optimiser import Adam

PEERS = (12, 256, 4096)
REFERENCE = (28, 1024, 20_480)
L0, CLIP = 64, 1.0
FASTEST_PEER = {"jumprelu": 188 / 163, "topk": 188 / 190, "batchtopk": 188 / 190}
"""Tokens per second of the fastest peer relative to the plain dense step, in a table measured on another machine."""


def ours(
    shape: tuple[int, int, int],
    activation: str,
    tokens: int,
    l0: float,
    device: str,
    dtype: torch.dtype,
    sparse: bool | None = None,
    moments: Moments = "fp32",
) -> Callable[[], Any]:
    """Make one of our steps, on the same batch each time.

    By default it is sparse or dense by density, as in training.
    """
    n_layers, width, n_features = shape
    config = TrainConfig(
        text=("none",), n_features=n_features, activation=activation, l0=l0, batch=tokens, tokens=tokens
    )
    clt = CLT(config.clt(n_layers, width), dtype=dtype, device=device)
    initialise(clt, seed=0)
    x_BLD, y_BLD = torch.randn(2, tokens, n_layers, width, device=device)
    tau = cut_for_density(clt, x_BLD[:2048], l0 / (n_layers * n_features)) if activation == "jumprelu" else 0.0
    optimiser = Adam(
        [{"params": [p for p in clt.parameters() if p.requires_grad], "lr": 1e-6}], (0.9, 0.99), 0, moments
    )
    dead_LF = torch.zeros(n_layers, n_features, dtype=torch.bool, device=device)
    sparse_L = [l0 / (n_layers * n_features) < SPARSE_BELOW[device] if sparse is None else sparse] * n_layers
    norm = 1.0

    def step() -> Any:
        nonlocal norm
        if tau:
            clt.set_cut(tau)
        scale = lambda: min(1.0, CLIP / norm)  # noqa: E731
        gradients = FusedUpdate(lambda p, blocks: optimiser.update(p, blocks, scale()))
        terms = compute(
            clt,
            x_BLD,
            y_BLD,
            config,
            gradients,
            dead_LF=dead_LF,
            sparse_L=sparse_L,
            l0=l0 if clt.config.ranks else None,
        )
        norm = float(gradients.norm(clt))
        return terms

    return step


class _Plain(torch.nn.Module):
    """A dense cross-layer transcoder without optimisations."""

    def __init__(self, shape: tuple[int, int, int], activation: str, l0: float) -> None:
        super().__init__()
        n_layers, width, n_features = shape
        self.activation, self.l0 = activation, l0
        make = lambda *size: torch.nn.Parameter(torch.randn(*size) / width**0.5)  # noqa: E731
        self.W_enc = torch.nn.ParameterList([make(n_features, width) for _ in range(n_layers)])
        self.W_dec = torch.nn.ParameterList([make(n_features, (n_layers - i) * width) for i in range(n_layers)])
        self.b_enc = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(n_features)) for _ in range(n_layers)])
        self.theta = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.full((n_features,), 3.0)) for _ in range(n_layers)]
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        n_layers, width = x_BLD.shape[1:]
        pre = [F.linear(x_BLD[:, i], self.W_enc[i], self.b_enc[i]) for i in range(n_layers)]
        if self.activation == "jumprelu":
            f = [_jump(z, theta) for z, theta in zip(pre, self.theta, strict=True)]
        else:
            z = torch.cat(pre, 1)
            if self.activation == "topk":
                values, index = z.topk(round(self.l0), dim=1)
                z = torch.zeros_like(z).scatter(1, index, values.relu())
            else:
                flat = z.flatten()
                values, index = flat.topk(round(self.l0 * len(z)))
                z = torch.zeros_like(flat).scatter(0, index, values.relu()).view_as(z)
            f = z.split(pre[0].shape[1], dim=1)
        y = [x_BLD.new_zeros(len(x_BLD), width) for _ in range(n_layers)]
        for i, f_BF in enumerate(f):
            for slot, part in enumerate((f_BF @ self.W_dec[i]).split(width, dim=1)):
                y[i + slot] = y[i + slot] + part
        return torch.stack(y, 1)


def _jump(z: Tensor, theta: Tensor) -> Tensor:
    """Compute JumpReLU with the rectangle's straight-through gradient, with plain operations."""
    fires = (z > theta).float()
    window = ((z - theta).abs() < 0.25).float()
    through = -(theta.detach() / 0.5) * window * theta
    return z * fires + through - through.detach()


def plain(shape: tuple[int, int, int], activation: str, tokens: int, l0: float) -> Callable[[], Any]:
    """Make the plain dense step."""
    torch.manual_seed(0)
    model = _Plain(shape, activation, l0)
    x_BLD, y_BLD = torch.randn(2, tokens, *shape[:2])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-6)

    def step() -> None:
        ((model(x_BLD) - y_BLD).square().sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()

    return step


def encoder_s(shape: tuple[int, int, int], tokens: int, device: str, dtype: torch.dtype) -> float:
    """Measure the seconds of the encoder's products alone."""
    n_layers, width, n_features = shape
    x_LBD = torch.randn(n_layers, tokens, width, device=device, dtype=dtype)
    W_FD = torch.randn(n_features, width, device=device, dtype=dtype)
    return median(timed(lambda: [F.linear(x, W_FD) for x in x_LBD], device) for _ in range(5))


def timed(work: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_mib(which: str, activation: str, tokens: int) -> float:
    """Measure the peak memory of a process with two steps, minus that of one with the same imports."""
    command = [sys.executable, __file__, "--peak", which, activation, str(tokens)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _peak(which: str, activation: str, tokens: int) -> None:
    before = _highest_kib()
    step = (
        plain(PEERS, activation, tokens, L0)
        if which == "plain"
        else ours(PEERS, activation, tokens, L0, "cpu", torch.float32)
    )
    for _ in range(2):
        step()
    print((_highest_kib() - before) / 1024)


def _highest_kib() -> int:
    """Return this process's peak resident size; `ru_maxrss` would be that of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def compare(activation: str, tokens: int, repeats: int) -> dict[str, float]:
    """Measure tokens per second of both steps, alternating."""
    both = {
        "ours": ours(PEERS, activation, tokens, L0, "cpu", torch.float32),
        "plain": plain(PEERS, activation, tokens, L0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in both}
    entries = 0.0
    both["ours"]()
    for turn in range(repeats + 1):
        for name, step in both.items():
            # Our step takes a tenth of the time of the other, so a single one would measure noise.
            for _ in range(3 if name == "ours" else 1):
                began = time.perf_counter()
                terms = step()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
            entries = float(terms.fired_LF.sum()) / tokens if name == "ours" else entries
    del both
    ours_s, plain_s = (median(seconds[name]) for name in ("ours", "plain"))
    return {
        "entries_a_token": entries,
        "ours_tokens_per_s": tokens / ours_s,
        "plain_tokens_per_s": tokens / plain_s,
        "ratio": plain_s / ours_s,
        "ratio_to_fastest_peer": plain_s / ours_s / FASTEST_PEER[activation],
        "encoder_share": encoder_s(PEERS, tokens, "cpu", torch.float32) / ours_s,
        "ours_peak_mib": peak_mib("ours", activation, tokens),
        "plain_peak_mib": peak_mib("plain", activation, tokens),
    }


def reference(device: str, tokens: int, dense: bool, moments: Moments) -> dict[str, Any]:
    """Measure steps at the reference's shape, at an L0 of 115 in total and of 115 per layer."""
    found = {}
    for name, l0 in (("115 in all", 115), ("115 a layer", 115 * REFERENCE[0])):
        step = ours(REFERENCE, "jumprelu", tokens, l0, device, torch.bfloat16, not dense, moments)
        step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step_s = median([timed(step, device) for _ in range(6)][1:])
        found[name] = {
            "tokens_per_s": tokens / step_s,
            "hours_for_750M": 750e6 * step_s / tokens / 3600,
            "encoder_share": encoder_s(REFERENCE, tokens, device, torch.bfloat16) / step_s,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        }
        del step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="512 tokens and two repeats")
    parser.add_argument("--reference", action="store_true", help="the reference's shape; needs a large GPU")
    parser.add_argument("--dense", action="store_true", help="with --reference: the dense path")
    parser.add_argument("--moments", choices=("fp32", "8bit"), default="fp32", help="with --reference")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="with --reference: tokens per step")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        _peak(args.peak[0], args.peak[1], int(args.peak[2]))
        return
    machine = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor()}, {os.cpu_count()} cores"
    )
    rows: dict[str, Any] = {}
    if args.reference:
        rows = reference(args.device, args.tokens, args.dense, args.moments)
    else:
        for tokens in (512,) if args.quick else (512, 4096):
            for activation in ("topk", "batchtopk", "jumprelu"):
                rows[f"{activation}, {tokens} tokens"] = compare(
                    activation, tokens, 2 if args.quick or tokens > 512 else 5
                )
                print(
                    f"{activation}, {tokens} tokens:",
                    {k: round(v, 3) for k, v in rows[f"{activation}, {tokens} tokens"].items()},
                    flush=True,
                )
    result = {"machine": machine, "torch": torch.__version__, "rows": rows}
    if args.reference:
        print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
