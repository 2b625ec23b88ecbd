"""Train many transcoders on the same activations, one for each setting, and log how well each does.

    python benchmarks/sweep_settings.py --host NAME --text FILE --tokens 300000 --grid grid.json --log FILE.jsonl

`grid.json` is a list of objects of settings, such as {"lr": 0.005, "l0_ramp": 0.8}; others are chosen by budget.
`--data FILE` keeps the activations in a file, for several processes (`--part I/N`) to share. The activations of all
tokens are held in memory on the device, so a run costs its training steps only. Each line of the log has the settings,
FVU, L0 and dead share on held-out text after conversion to JumpReLU at the target L0, the L0 in training, and seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crosslayer.clt.calibrate import to_jumprelu
from crosslayer.clt.init import centre, cut_for_density, initialise
from crosslayer.clt.transcoder import CLT
from crosslayer.data.massive import Typical
from crosslayer.data.rows import Documents, RowStream, held_out_rows
from crosslayer.data.sources import open_sources
from crosslayer.data.stream import Activations, collect_activations
from crosslayer.data.units import Moments, Units
from crosslayer.eval.measures import Reconstruction
from crosslayer.host.host import Host, load_host
from crosslayer.parallel import ALONE
from crosslayer.training.config import TrainConfig
from crosslayer.training.settings import Budget, by_budget
from crosslayer.training.setup import empty_state
from crosslayer.training.trainer import Trainer


class Data(NamedTuple):
    """Activations in the host's units."""

    train: Activations
    held_out: Activations
    units: Units


class Shuffled:
    """Activations in memory, in random order, `reuse` times each."""

    def __init__(self, data: Activations, seed: int) -> None:
        self.data, self.generator, self.order, self.at = (
            data,
            torch.Generator().manual_seed(seed),
            torch.empty(0).long(),
            0,
        )

    def batch(self, n: int) -> Activations:
        if self.at + n > len(self.order):
            self.order, self.at = torch.randperm(len(self.data.x_BLD), generator=self.generator), 0
        slots = self.order[self.at : self.at + n].to(self.data.x_BLD.device)
        self.at += n
        return Activations(self.data.x_BLD[slots], self.data.y_BLD[slots])


class Sweep(Trainer):
    """The trainer's steps on activations in memory, without a run folder."""

    def __init__(
        self, config: TrainConfig, host: Host, data: Data, device: str, init: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        self.config, self.host, self.device, self.mesh = config, host, device, ALONE
        self.whole = config.clt(host.n_layers, host.d_model)
        self.state = empty_state(config, self.whole, ALONE, device)
        self.target = config.target_l0(host.n_layers)
        self.error_L = self.variance_L = torch.zeros(host.n_layers, dtype=torch.float64)
        self.state.units = data.units
        initialise(self.state.clt, config.seed)
        some = slice(None, 65536, 4)
        means = (data.units.inputs(data.train.x_BLD[some]), data.units.outputs(data.train.y_BLD[some]))
        centre(self.state.clt, *(a_BLD.mean(0) for a_BLD in means))
        for weights, scale in ((self.state.clt.W_enc, init[0]), (self.state.clt.W_dec, init[1])):
            for w in weights:
                w.data.mul_(scale)
        if self.whole.kind.thresholds:
            share = config.first_l0(host.n_layers) / (host.n_layers * config.n_features)
            cut = cut_for_density(self.state.clt, data.units.inputs(data.train.x_BLD[:65536:16]), share)
            self.state.cut.log_tau = torch.tensor(cut).log().item()
        self.stream = Shuffled(data.train, config.seed)


def collected(host: Host, rows: Any, n_tokens: int, device: str) -> Activations:
    parts, done = [], 0
    while done < n_tokens:
        a = collect_activations(host, rows(32))
        parts.append(Activations(a.x_BLD.to(device, torch.bfloat16), a.y_BLD.to(device, torch.bfloat16)))
        done += len(a.x_BLD)
    return Activations(*(torch.cat(axis)[:n_tokens] for axis in zip(*parts, strict=True)))


def load(host: Host, text: tuple[str, ...], n_tokens: int, device: str) -> Data:
    sources = open_sources(text)
    rows = RowStream(host, Documents(sources, "train", 0), 256)
    train = collected(host, rows.rows, n_tokens, device)
    held = held_out_rows(host, sources, 256, 16384)
    held_out = collected(host, lambda n: held, min(16384, held.numel() - len(held)), device)
    train, held_out = usual(train), usual(held_out)
    moments = Moments(host)
    for part in range(0, min(len(train.x_BLD), 100_000), 4096):
        moments.add(train.x_BLD[part : part + 4096].cpu(), train.y_BLD[part : part + 4096].cpu())
    return Data(train, held_out, moments.units().to(device))


def usual(a: Activations) -> Activations:
    """Leave out tokens with massive activations."""
    parts = list(zip(a.x_BLD.split(8192), a.y_BLD.split(8192), strict=True))
    typical = Typical.of(parts)
    usual_B = torch.cat([~typical.massive(x_BLD, y_BLD) for x_BLD, y_BLD in parts])
    return Activations(a.x_BLD[usual_B], a.y_BLD[usual_B])


@torch.no_grad()
def calibrated(clt: CLT, data: Data, target: float) -> CLT:
    """Return a JumpReLU copy with the target L0 on training text."""
    return to_jumprelu(clt, (data.units.inputs(x) for x in data.train.x_BLD[:16384].split(2048)), target).clt


@torch.no_grad()
def held_out_measures(clt: CLT, data: Data, target: float) -> dict[str, float]:
    """Measure a transcoder in training units on held-out text, calibrated to the target L0."""
    n_layers, units = clt.config.n_layers, data.units
    before = clt.encode_sparse(units.inputs(data.held_out.x_BLD[:2048])) if clt.config.kind.thresholds else None
    clt = calibrated(clt, data, target)
    fit = Reconstruction(n_layers, clt.config.d_model)
    fired = torch.zeros(n_layers, clt.config.n_features, dtype=torch.int64, device=clt.device)
    for x, y in zip(data.held_out.x_BLD.split(2048), data.held_out.y_BLD.split(2048), strict=True):
        x_BLD = units.inputs(x)
        active = clt.encode_sparse(x_BLD)
        fit.add(clt.decode(active, x_BLD) / units.y_L[:, None], y.float())
        fired += torch.stack([a.count() for a in active])
    return {
        "fvu": fit.fvu(),
        "l0_per_layer": float(fired.sum()) / fit.n_tokens / n_layers,
        "l0_uncalibrated": sum(len(a.value_K) for a in before) / before[0].shape[0] / n_layers if before else 0.0,
        "dead": float((fired == 0).double().mean()),
    }


def run(
    host: Host, data: Data, config: TrainConfig, device: str, init: tuple[float, float] = (1.0, 1.0)
) -> dict[str, float]:
    """Train with one setting and return its measures; `init` scales the initial encoder and decoder."""
    sweep, began = Sweep(config, host, data, device, init), time.perf_counter()
    l0, fvu = list[float](), list[float]()
    while sweep.state.step < config.steps:
        metrics = sweep.one_step()
        sweep.state.step += 1
        if sweep.state.step > 0.9 * config.steps:
            l0.append(metrics["l0"] / host.n_layers)
            fvu.append(metrics["reconstruction"] / metrics["variance"])
    return {
        **held_out_measures(sweep.state.clt, data, sweep.target),
        "train_fvu": sum(fvu) / len(fvu),
        "l0_in_training": sum(l0) / len(l0),
        "train_s": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th setting from the I-th")
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no run after so many seconds")
    args = parser.parse_args()
    began = time.monotonic()
    host = load_host(args.host, dtype=torch.float32, device=args.device)
    which, of = map(int, args.part.split("/"))
    grid = json.loads(args.grid.read_text())[which::of]
    sizes = [int(settings.get("tokens", args.tokens) / settings.get("reuse", 1)) for settings in grid]
    most = max(sizes, default=args.tokens)
    if args.data and args.data.exists():
        kept = torch.load(args.data, mmap=True, weights_only=True)
        train, held_out, units = Activations(*kept[:2]), Activations(*kept[2:4]), Units(*kept[4:])
        data = Data(train, held_out, units)
    else:
        data = load(host, tuple(args.text), most, args.device)
        if args.data:
            torch.save([t.cpu() for t in (*data.train, *data.held_out, *data.units)], args.data)
    base = TrainConfig(text=("none",), tokens=args.tokens)
    budget = Budget(n_layers=host.n_layers, d_model=host.d_model, memory_bytes=1 << 36)
    for settings in grid:
        if time.monotonic() - began > args.limit_s:
            break
        settings = dict(settings)
        per_width, init = settings.pop("width_multiple", None), (settings.pop("enc", 1.0), settings.pop("dec", 1.0))
        if per_width:
            settings["n_features"] = int(per_width * host.d_model)
        config, _ = by_budget(replace(base, **settings), budget)
        n = config.tokens // config.reuse
        part = data._replace(train=Activations(data.train.x_BLD[:n], data.train.y_BLD[:n]))
        try:
            result = run(host, part, config, args.device, init)
        except Exception as error:  # noqa: BLE001
            result = {"error": str(error)[:200]}
        line = {
            "host": args.host,
            "tokens": config.tokens,
            **settings,
            "enc": init[0],
            "dec": init[1],
            "n_features": config.n_features,
            **result,
        }
        with args.log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        print({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}, flush=True)


if __name__ == "__main__":
    main()
