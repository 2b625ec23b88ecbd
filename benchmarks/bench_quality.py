"""FVU, dead features and loss recovered against seconds of training steps: ours and a plain dense trainer.

    python benchmarks/bench_quality.py [--quick] [--seconds 60] [--json FILE] [--plot FILE.svg]
    python benchmarks/bench_quality.py --host NAME --text FILE --host ...

All methods train on the same activations in memory, on the same machine, for the same seconds, in turns of a tenth of
them; measurements are not counted. All are measured on the same held-out tokens after conversion to JumpReLU; one
factor on the thresholds gives all of them the same L0 on these tokens. Schedules (learning rate, L0, penalty) follow
the clock, so each run ends with its schedule. Ours has the settings by budget for the tokens that it can train in these
seconds.

The plain trainers are written as published, with dense products, `torch.optim.Adam`, and one scale per layer as
normalisation. Both start from Anthropic's initial weights, clip gradients to norm 1 and decay the learning rate over
the last fifth.

- jumprelu: a threshold per feature with a straight-through estimator in a rectangle on both sides of the threshold
  (Rajamanoharan et al. 2024, arXiv:2407.14435); penalty lambda tanh(c ||W_dec|| f) with lambda rising linearly from 0
  over the whole run, and a pre-activation loss on features below their threshold (Conerly et al., Anthropic, Circuits
  Updates, January 2025; cross-layer: Ameisen et al., Anthropic, Circuit Tracing, 2025). Lambda is searched with runs of
  the same length on another seed, until the L0 is near the target; the search is not counted.
- batchtopk: k = L0 (Bussmann et al. 2024, arXiv:2412.06410), ranked by f ||W_dec||, with the auxiliary loss of
  1/32 on dead features (Gao et al. 2024, arXiv:2406.04093).

Their batches are smaller than published (4096), since runs are short (`--plain-batch`). Each also trains with three
times the published learning rate, and the better one counts. Published rates are for much longer runs: give
`--lr-factor 10 --lr-factor 30` to tune them for short ones.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sweep_settings import Data, Shuffled, Sweep, calibrated, held_out_measures, load
from torch import Tensor, nn

from crosslayer.clt.config import CLTConfig
from crosslayer.clt.fold import fold
from crosslayer.clt.transcoder import CLT
from crosslayer.data.rows import held_out_rows
from crosslayer.data.sources import open_sources
from crosslayer.data.units import Units
from crosslayer.eval.predictions import measure_replacement
from crosslayer.host.host import Host, load_host
from crosslayer.training.config import TrainConfig
from crosslayer.training.settings import Budget, by_budget

PUBLISHED_LR = {"jumprelu": 2e-4, "batchtopk": 3e-4}
DECAY, CLIP = 0.2, 1.0
THRESHOLD, BANDWIDTH, TANH_C, PRE_ACTIVATION_LOSS = 0.03, 1.0, 4.0, 3e-6
AUX_LOSS, AUX_K, DEAD_AFTER_STEPS = 1 / 32, 512, 20
POINTS = 10
"""Measurements of a run."""
SEARCH_SEED = 1_000
NEAR = 1.2
"""Factor between L0 and target within which the search for lambda ends."""


class Method(NamedTuple):
    """A training run that can be continued step by step."""

    name: str
    step: Callable[[float], None]
    """Do a step, given the share of the seconds that has passed."""
    clt: Callable[[], CLT]
    data: Data
    """Held-out tokens to calibrate and to measure on, and the units that the transcoder was trained in."""
    batch: int


def budget_config(host: Host, tokens: int, n_features: int, seed: int = 0) -> TrainConfig:
    given = TrainConfig(text=("none",), tokens=tokens, n_features=n_features, seed=seed)
    return by_budget(given, Budget(n_layers=host.n_layers, d_model=host.d_model, memory_bytes=1 << 36))[0]


def ours(host: Host, data: Data, config: TrainConfig, device: str) -> Method:
    """Make the package's trainer; its step number follows the clock."""
    sweep = Sweep(config, host, data, device)

    def step(progress: float) -> None:
        sweep.state.step = min(int(progress * config.steps), config.steps - 1)
        sweep.one_step()

    return Method("ours", step, lambda: sweep.state.clt, data._replace(train=data.held_out), config.batch)


def tokens_in(seconds: float, host: Host, data: Data, n_features: int, device: str) -> int:
    """Return about how many tokens ours trains in so many seconds, from some steps spread over the schedule."""
    tokens, n, warm_up = 100_000, 40, 5
    for _ in range(3):
        config = budget_config(host, tokens, n_features)
        method, passed = ours(host, data, config, device), 0.0
        for i in range(n):
            passed += step_s(method, i / n, device) * (i >= warm_up)
        tokens = max(2_000, int(config.batch * (n - warm_up) / passed * seconds))
    return tokens


class JumpReLU(torch.autograd.Function):
    """z where z > theta; theta's gradient is that of a step smoothed over a window of `BANDWIDTH` around it."""

    @staticmethod
    def forward(ctx: Any, z_BF: Tensor, theta_F: Tensor) -> Tensor:
        ctx.save_for_backward(z_BF, theta_F)
        return z_BF * (z_BF > theta_F)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        z_BF, theta_F = ctx.saved_tensors
        in_window = (z_BF - theta_F).abs() < BANDWIDTH / 2
        return grads[0] * (z_BF > theta_F), -theta_F / BANDWIDTH * (grads[0] * in_window).sum(0)


class Plain(nn.Module):
    """A dense cross-layer transcoder."""

    def __init__(self, n_layers: int, width: int, n_features: int, seed: int, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device))

        def full(value: float, n: int) -> nn.Parameter:
            return nn.Parameter(torch.full((n,), value, device=device))

        layers, decoder = range(n_layers), (n_layers * width) ** -0.5
        self.W_enc = nn.ParameterList([uniform(n_features**-0.5, n_features, width) for _ in layers])
        self.W_dec = nn.ParameterList([uniform(decoder, n_features, (n_layers - i) * width) for i in layers])
        self.b_enc = nn.ParameterList([full(0.0, n_features) for _ in layers])
        self.b_dec = nn.ParameterList([full(0.0, width) for _ in layers])
        self.log_theta = nn.ParameterList([full(math.log(THRESHOLD), n_features) for _ in layers])

    def pre(self, x_BLD: Tensor) -> list[Tensor]:
        return [F.linear(x, W, b) for x, W, b in zip(x_BLD.unbind(1), self.W_enc, self.b_enc, strict=True)]

    def norms(self) -> list[Tensor]:
        return [W.norm(dim=1) for W in self.W_dec]

    def decode(self, f: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum of what features write to each layer, without biases."""
        width = len(self.b_dec[0])
        y = [f[0].new_zeros(len(f[0]), width) for _ in f]
        for i, (f_BF, W) in enumerate(zip(f, self.W_dec, strict=True)):
            for slot, part_BD in enumerate((f_BF @ W).split(width, dim=1)):
                y[i + slot] = y[i + slot] + part_BD
        return y

    def error(self, f: Sequence[Tensor], y_BLD: Tensor) -> Tensor:
        """Return the residual y - yhat."""
        return y_BLD - torch.stack([yhat + b for yhat, b in zip(self.decode(f), self.b_dec, strict=True)], 1)


def jumprelu_loss(model: Plain, x_BLD: Tensor, y_BLD: Tensor, coefficient: float) -> Tensor:
    """Return the loss of JumpReLU with the tanh penalty."""
    pre, norms, theta = model.pre(x_BLD), model.norms(), [log_F.exp() for log_F in model.log_theta]
    f: list[Tensor] = [JumpReLU.apply(z, theta_F) for z, theta_F in zip(pre, theta, strict=True)]  # type: ignore[misc]
    sparsity = sum((torch.tanh(TANH_C * n * f_BF).sum() for f_BF, n in zip(f, norms, strict=True)), torch.tensor(0.0))
    below = sum((((t - z).relu() * n).sum() for z, n, t in zip(pre, norms, theta, strict=True)), torch.tensor(0.0))
    loss = model.error(f, y_BLD).square().sum() + coefficient * sparsity + PRE_ACTIVATION_LOSS * below
    return loss / len(x_BLD)


def batchtopk_loss(model: Plain, x_BLD: Tensor, y_BLD: Tensor, k: float, idle_LF: Tensor) -> Tensor:
    """Return the loss of BatchTopK; counts in `idle_LF` the steps since each feature was active."""
    n_layers, n_features = idle_LF.shape
    z_BK = torch.cat(model.pre(x_BLD), 1).relu()
    score_BK = z_BK.detach() * torch.cat(model.norms()).detach()
    flat = score_BK.flatten()
    mask_BK = torch.zeros_like(flat).index_fill_(0, flat.topk(round(k * len(x_BLD))).indices, 1.0).view_as(z_BK)
    error_BLD = model.error((z_BK * mask_BK).split(n_features, 1), y_BLD)
    loss = error_BLD.square().sum()
    dead_K = idle_LF.flatten() >= DEAD_AFTER_STEPS
    if n_dead := int(dead_K.sum()):
        best = torch.where(dead_K, score_BK, -1.0).topk(min(AUX_K, n_dead), dim=1).indices
        aux = (z_BK * torch.zeros_like(z_BK).scatter_(1, best, 1.0)).split(n_features, 1)
        loss = loss + AUX_LOSS * (error_BLD.detach() - torch.stack(model.decode(aux), 1)).square().sum()
    fired_LF = (mask_BK * z_BK.detach() > 0).any(0).view(n_layers, n_features)
    idle_LF.add_(1).masked_fill_(fired_LF, 0)
    return loss / len(x_BLD)


def plain(
    kind: str,
    host: Host,
    data: Data,
    n_features: int,
    l0: float,
    lr: float,
    coefficient: float,
    args: argparse.Namespace,
    seed: int,
) -> Method:
    """Make a plain dense trainer.

    Args:
        kind: jumprelu or batchtopk.
        coefficient: lambda at the end, for jumprelu.
    """
    shape = (host.n_layers, host.d_model, n_features)
    model = Plain(*shape, seed, args.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.999))
    stream, idle_LF = Shuffled(data.train, seed), torch.zeros(shape[0], n_features, device=args.device)
    x_L, y_L, _ = data.units

    def step(progress: float) -> None:
        batch = stream.batch(args.plain_batch)
        x_BLD, y_BLD = batch.x_BLD.float() * x_L[:, None], batch.y_BLD.float() * y_L[:, None]
        if kind == "jumprelu":
            loss = jumprelu_loss(model, x_BLD, y_BLD, coefficient * progress)
        else:
            loss = batchtopk_loss(model, x_BLD, y_BLD, l0, idle_LF)
        optimiser.param_groups[0]["lr"] = lr * min(1.0, max(0.0, 1.0 - progress) / DECAY)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()

    @torch.no_grad()
    def clt() -> CLT:
        config = CLTConfig(
            n_layers=shape[0],
            d_model=shape[1],
            n_features=n_features,
            activation=kind,
            k=round(l0) if kind == "batchtopk" else None,
        )
        out = CLT(config, device=args.device)
        for i in range(host.n_layers):
            for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
                weights = getattr(out, name)[i]
                weights.copy_(getattr(model, name)[i].view_as(weights))
            if kind == "jumprelu":
                out.threshold[i].copy_(model.log_theta[i].exp())
        return out

    identity = torch.eye(host.d_model, device=args.device).expand(host.n_layers, -1, -1)
    scaled = Data(data.held_out, data.held_out, Units(x_L, y_L, identity))
    return Method(f"{kind}, lr {lr:g}", step, clt, scaled, args.plain_batch)


def race(
    methods: Sequence[Method], seconds: float, points: int, l0: float, device: str
) -> list[list[dict[str, float]]]:
    """Train in turns, each for so many seconds, and return the measurements of each."""
    used, tokens = [0.0] * len(methods), [0] * len(methods)
    series: list[list[dict[str, float]]] = [[] for _ in methods]
    order = list(range(len(methods)))
    for point in range(1, points + 1):
        for m in order:
            method = methods[m]
            while used[m] < seconds * point / points:
                used[m] += step_s(method, used[m] / seconds, device)
                tokens[m] += method.batch
            measures = held_out_measures(method.clt(), method.data, l0)
            series[m].append({"seconds": used[m], "tokens": tokens[m], **measures})
        order.reverse()
    return series


def search(make: Callable[[float], Method], start: float, args: argparse.Namespace, l0: float, n_layers: int) -> float:
    """Return the lambda whose run ended nearest to the target L0."""
    found, coefficient = list[tuple[float, float]](), start
    for _ in range(args.searches):
        method = make(coefficient)
        last = race([method], args.seconds, 1, l0, args.device)[0][-1]
        found.append((math.log(coefficient), math.log(max(last["l0_uncalibrated"], 1e-3) * n_layers / l0)))
        print(f"{method.name}, lambda {coefficient:.3g}: L0 {last['l0_uncalibrated']:.3g} a layer", flush=True)
        if abs(found[-1][1]) < math.log(NEAR):
            break
        slope = -1.0
        if len(found) > 1 and found[-1][0] != found[-2][0]:
            slope = min(-0.2, (found[-1][1] - found[-2][1]) / (found[-1][0] - found[-2][0]))
        coefficient *= math.exp(max(-3.0, min(3.0, -found[-1][1] / slope)))
    return math.exp(min(found, key=lambda each: abs(each[1]))[0])


def step_s(method: Method, progress: float, device: str) -> float:
    """Do a step and return its seconds."""
    began = time.perf_counter()
    method.step(progress)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def loss_recovered(host: Host, method: Method, rows: Tensor, l0: float) -> float:
    clt = fold(calibrated(method.clt(), method.data, l0), *method.data.units)
    return measure_replacement(host, clt, rows.split(8)).loss_recovered


def compare(host: Host, text: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train all methods on one host, and return their settings and series by method and seed."""
    data = load(host, (text,), args.tokens, args.device)
    rows = held_out_rows(host, open_sources((text,)), 256, 8192)
    n_features = args.n_features
    tokens = tokens_in(args.seconds, host, data, n_features, args.device)
    config = budget_config(host, tokens, n_features)
    n_features, l0 = config.n_features, config.target_l0(host.n_layers)
    print(f"ours: about {tokens:,} tokens, batch {config.batch}, lr {config.lr:g}, {n_features} features a layer")

    def make_plain(kind: str, factor: float, coefficient: float, seed: int) -> Method:
        return plain(kind, host, data, n_features, l0, factor * PUBLISHED_LR[kind], coefficient, args, seed)

    def found_lambda(factor: float, start: float) -> float:
        return search(lambda c: make_plain("jumprelu", factor, c, SEARCH_SEED), start, args, l0, host.n_layers)

    # A feature is worth its penalty if it explains more than lambda; a tenth of the mean share is the first guess.
    coefficient, lambdas = 0.1 * host.n_layers * host.d_model / l0, dict[float, float]()
    for factor in args.lr_factor:
        lambdas[factor] = coefficient = found_lambda(factor, coefficient)
    runs: dict[str, list[Any]] = {}
    for seed in range(args.seeds):
        methods = [ours(host, data, budget_config(host, tokens, n_features, seed), args.device)]
        methods += [make_plain(kind, f, lambdas[f], seed) for kind in PUBLISHED_LR for f in args.lr_factor]
        for method, series in zip(methods, race(methods, args.seconds, POINTS, l0, args.device), strict=True):
            recovered = loss_recovered(host, method, rows, l0)
            runs.setdefault(method.name, []).append({"seed": seed, "series": series, "loss_recovered": recovered})
            last = {k: round(v, 4) for k, v in series[-1].items()}
            print(f"seed {seed}, {method.name}: {last}, loss recovered {recovered:.3f}", flush=True)
    settings = {k: getattr(config, k) for k in ("tokens", "batch", "lr", "beta2", "dead_after", "n_features")}
    return {"text": text, "l0": l0, "lambda": lambdas, "ours": settings, "runs": runs}


def at_end(runs: Sequence[Any], what: str) -> float:
    return median(run["series"][-1][what] for run in runs)


def best_of_each(runs: dict[str, list[Any]]) -> list[str]:
    """Return ours, and of each plain kind the learning rate with the lowest FVU at the end."""
    kinds = [[name for name in runs if name.startswith(kind)] for kind in PUBLISHED_LR]
    return ["ours", *(min(names, key=lambda name: at_end(runs[name], "fvu")) for names in kinds)]


def print_table(host: str, result: dict[str, Any]) -> None:
    """Print FVU at equal seconds with ratios ours / plain, and what each reached; medians over seeds."""
    runs = result["runs"]
    names = best_of_each(runs)
    print(f"\n{host}, {result['text']}, L0 {result['l0']:g} in total, medians over {len(runs['ours'])} seeds\n")
    heads = ["seconds", *(f"FVU: {n}" for n in names), *(f"ours / {n}" for n in names[1:])]
    print("| " + " | ".join(heads) + " |")
    print("|---" * (2 * len(names)) + "|")
    for point in range(POINTS):
        fvu = {n: [run["series"][point]["fvu"] for run in runs[n]] for n in names}
        ratios = [median(a / b for a, b in zip(fvu["ours"], fvu[n], strict=True)) for n in names[1:]]
        second = median(run["series"][point]["seconds"] for run in runs["ours"])
        cells = [f"{second:.1f}", *(f"{median(fvu[n]):.4f}" for n in names), *(f"{r:.2f}" for r in ratios)]
        print("| " + " | ".join(cells) + " |")
    print("\n| at the end | seconds | tokens | FVU | L0 a layer | dead | loss recovered | ours reaches its FVU after |")
    print("|---|---|---|---|---|---|---|---|")
    for n, each in runs.items():
        fvu, recovered = at_end(each, "fvu"), median(run["loss_recovered"] for run in each)
        reached = [next((p["seconds"] for p in run["series"] if p["fvu"] <= fvu), math.inf) for run in runs["ours"]]
        cells = (
            f"{at_end(each, 'seconds'):.1f} | {at_end(each, 'tokens'):,.0f} | {fvu:.4f} |"
            f" {at_end(each, 'l0_per_layer'):.2f} | {at_end(each, 'dead'):.1%} | {recovered:.3f} |"
            f" {f'{median(reached):.1f} s' if median(reached) < math.inf else 'never'}"
        )
        print(f"| {n} | {cells} |")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw FVU and dead share against seconds: a line per seed, of ours and the better of each plain kind."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "crosslayer"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 2, figsize=(9, 3.4 * len(results)), squeeze=False, layout="constrained")
    for (fvu_axis, dead_axis), (host, result) in zip(axes, results.items(), strict=True):
        for colour, name in zip(("C0", "C1", "C2"), best_of_each(result["runs"]), strict=True):
            for i, run in enumerate(result["runs"][name]):
                seconds = [p["seconds"] for p in run["series"]]
                label = None if i else name
                fvu_axis.plot(seconds, [p["fvu"] for p in run["series"]], color=colour, alpha=0.8, label=label)
                dead_axis.plot(seconds, [100 * p["dead"] for p in run["series"]], color=colour, alpha=0.8, label=label)
        fvu_axis.set(xlabel="seconds of training steps", ylabel="held-out FVU", yscale="log", title=host)
        dead_axis.set(xlabel="seconds of training steps", ylabel="dead features, %", title=f"L0 {result['l0']:g}")
        fvu_axis.legend(fontsize=8)
        for axis in (fvu_axis, dead_axis):
            axis.grid(True, alpha=0.25)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="append", help="default: stdlib-qwen3; repeatable, each with its --text")
    parser.add_argument("--text", action="append", help="default: stdlib")
    parser.add_argument("--seconds", type=float, default=60.0, help="training steps of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=600_000, help="activations in memory; reused in a new order")
    parser.add_argument("--n-features", type=int, default=0, help="per layer; 0: by budget")
    parser.add_argument("--plain-batch", type=int, default=256)
    parser.add_argument(
        "--lr-factor", type=float, action="append", help="of the published rates; repeatable, default: 1 and 3"
    )
    parser.add_argument("--searches", type=int, default=4, help="runs to find lambda, at each learning rate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="5 seconds, one seed, 256 features")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="SVG file; needs matplotlib")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.seeds, args.tokens, args.n_features, args.searches = 5.0, 1, 30_000, 256, 2
    args.lr_factor = args.lr_factor or [1.0, 3.0]
    hosts, texts = args.host or ["stdlib-qwen3"], args.text or ["stdlib"]
    if len(hosts) != len(texts):
        parser.error(f"{len(hosts)} --host and {len(texts)} --text; give a text with each host")
    results = {}
    for name, text in zip(hosts, texts, strict=True):
        results[name] = compare(load_host(name, dtype=torch.float32, device=args.device), text, args)
        print_table(name, results[name])
    machine = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if args.json:
        given = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
        args.json.write_text(json.dumps({"machine": machine, "args": given, "results": results}, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
