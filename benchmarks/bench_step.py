"""A training step's losses, gradients and their norm: dense against sparse at several densities.

    python benchmarks/bench_step.py [--quick] [--json FILE]

Random activations; the two paths alternate in one run, and medians are compared.
`SPARSE_BELOW` in `training/objective.py` is chosen from these results.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median

import torch

from crosslayer.clt.init import cut_for_density, initialise
from crosslayer.clt.transcoder import CLT
from crosslayer.training.config import TrainConfig
from crosslayer.training.gradients import Gradients
from crosslayer.training.objective import compute

ACTIVATIONS: tuple[str, ...] = ("jumprelu", "batchtopk")
SHAPES = {"stdlib": (6, 192, 1536, 1024), "peers": (12, 256, 4096, 512)}
"""layers, width, features per layer, tokens; `peers` is the shape at which other tools were measured."""


def measure(shape: str, activation: str, density: float, repeats: int) -> dict[str, float]:
    """Tokens per second of both paths, and their ratio."""
    n_layers, d_model, n_features, batch = SHAPES[shape]
    l0 = density * n_layers * n_features
    config = TrainConfig(text=("none",), n_features=n_features, activation=activation, l0=l0, batch=batch, tokens=batch)
    clt = CLT(config.clt(n_layers, d_model))
    initialise(clt, seed=0)
    x_BLD, y_BLD = torch.randn(2, batch, n_layers, d_model)
    if activation == "jumprelu":
        clt.set_cut(cut_for_density(clt, x_BLD, density))
    dead_LF = torch.zeros(n_layers, n_features, dtype=torch.bool)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    entries = 0.0
    for _ in range(repeats + 1):
        for sparse in (True, False):
            began, gradients = time.perf_counter(), Gradients()
            terms = compute(
                clt,
                x_BLD,
                y_BLD,
                config,
                gradients,
                dead_LF=dead_LF,
                sparse_L=[sparse] * n_layers,
                l0=l0 if clt.config.ranks else None,
            )
            # A sparse gradient is computed when it is requested.
            gradients.norm(clt)
            entries = float(terms.fired_LF.sum()) / (batch * n_layers * n_features)
            seconds[sparse].append(time.perf_counter() - began)
    sparse_s, dense_s = (median(seconds[path][1:]) for path in (True, False))
    return {
        "entries": entries,
        "sparse_tokens_per_s": batch / sparse_s,
        "dense_tokens_per_s": batch / dense_s,
        "ratio": dense_s / sparse_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few repeats")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    rows = []
    print(
        f"{'shape':8} {'activation':10} {'fires':>8} {'entries':>8} {'sparse tok/s':>13} {'dense tok/s':>12}"
        f" {'ratio':>6}"
    )
    for shape in ["stdlib"] if args.quick else list(SHAPES):
        for activation in ACTIVATIONS:
            for density in (0.0013, 0.005, 0.02, 0.05, 0.1, 0.2):
                row = measure(shape, activation, density, 2 if args.quick else 5)
                rows.append({"shape": shape, "activation": activation, "density": density, **row})
                print(
                    f"{shape:8} {activation:10} {density:8.4f} {row['entries']:8.4f}"
                    f" {row['sparse_tokens_per_s']:13,.0f} {row['dense_tokens_per_s']:12,.0f} {row['ratio']:6.2f}",
                    flush=True,
                )
    if args.json:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        args.json.write_text(
            json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
