"""Time and memory of tracing a prompt.

    python benchmarks/bench_attribution.py [--reference DIR] [--quick] [--json FILE]

Random Qwen3 hosts and random transcoders of the sizes in PEERS.md, with thresholds set for the same number of active
features. Values measured for circuit-tracer 0.4.1 on the same kind of machine are printed beside ours. `DIR` is written
by `benchmarks/make_reference.py`; without it the full size is left out. Each case runs in its own process, which opens
everything, traces once to warm up where that is quick, and then three times; the table shows the median. Share of rate:
floating point operations of the products that the sweep needs, over the rate of a plain square product of the same
dtype on this machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class Case(NamedTuple):
    """One row of the table."""

    size: str
    tokens: int
    active: float
    """Active features per layer and token; 0 leaves thresholds unchanged."""
    tolerance: float
    max_nodes: int | None
    precision: str
    asked_s: float | None
    theirs_s: float | None
    repeat: int = 3

    @property
    def name(self) -> str:
        nodes = (
            f"{self.max_nodes} nodes"
            if self.max_nodes
            else "all nodes"
            if self.tolerance == 0
            else f"{self.tolerance:.0%} left"
        )
        return f"{self.size}, {self.tokens} tokens, {nodes}, {self.precision}"


SHAPES = {"small": (4, 64, 512, 4, 2, 16, 512), "middle": (12, 768, 8192, 12, 4, 64, 4096)}
"""Layers, width, features, heads, value heads, head width, vocabulary."""

CASES = [
    Case("small", 10, 22, 0.0, None, "fp32", 0.22, 0.22, 9),
    Case("small", 32, 21, 0.0, None, "fp32", 1.3, 1.3, 5),
    Case("small", 64, 19, 0.0, None, "fp32", 3.4, 3.4),
    Case("middle", 10, 57.6, 0.0, None, "fp32", 3.5, 176.0, 7),
    Case("middle", 10, 57.6, 0.0, None, "bf16", 3.5, 176.0, 7),
    Case("reference", 10, 54, 0.0, 7500, "fp32", 50.0, 1911.0, 1),
    Case("reference", 10, 54, 0.0, 7500, "bf16", 50.0, 1911.0, 1),
    Case("reference", 10, 54, 0.02, None, "bf16", 45.0, None, 1),
    Case("reference", 10, 0, 0.02, None, "fp32", 8.0, None),
    Case("reference", 10, 0, 0.02, None, "bf16", 8.0, None),
    Case("reference", 64, 0, 0.02, 2000, "fp32", None, None, 1),
    Case("reference", 64, 0, 0.02, 2000, "bf16", None, None, 1),
    Case("reference", 512, 0, 0.02, 2000, "fp32", 600.0, None, 1),
    Case("reference", 512, 0, 0.02, 2000, "bf16", 600.0, None, 1),
]

COST = [Case("reference", n, 0, 0.02, 500, "bf16", None, None, 1) for n in (10, 32, 64, 128, 256, 512)]
COST += [Case("reference", 10, active, 0.02, None, "bf16", None, None, 1) for active in (4, 8, 16, 32, 54)]
"""With `--cost`: against the length of the prompt, and against the number of active features."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--reference", type=Path, help="folder written by make_reference.py")
    arguments.add_argument("--quick", action="store_true", help="the small size only")
    arguments.add_argument(
        "--cost", action="store_true", help="cost against length and L0; plot_attribution.py draws it"
    )
    arguments.add_argument("--only", default="", help="only cases whose name contains this")
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments.add_argument("--json", type=Path, help="also write the results here")
    arguments.add_argument("--case", type=int, help=argparse.SUPPRESS)
    a = arguments.parse_args()
    cases = COST if a.cost else CASES
    if a.case is not None:
        print(json.dumps(measure(cases[a.case], a.reference, a.device)))
        return
    results = []
    print(
        f"{'case':<46}{'active':>8}{'rows':>7}{'seconds':>9}{'target':>7}{'tracer':>8}{'ratio':>8}{'bound':>8}{'GiB':>6}{'rate':>6}"
    )
    for i, case in enumerate(cases):
        if (
            (a.quick and case.size != "small")
            or (case.size == "reference" and a.reference is None)
            or a.only not in case.name
        ):
            continue
        command = [sys.executable, __file__, "--case", str(i), "--device", a.device]
        command += ["--cost"] if a.cost else []
        command += ["--reference", str(a.reference)] if a.reference else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{case.name:<46} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        r = json.loads(done.stdout.strip().splitlines()[-1])
        results.append({"case": case.name, "tokens": case.tokens} | r)
        dash = lambda x, f: format(x, f) if x is not None else "-"  # noqa: E731
        print(
            f"{case.name:<46}{r['active']:>8}{r['rows']:>7}{r['seconds']:>9.2f}"
            f"{dash(case.asked_s, '7.4g'):>7}{dash(case.theirs_s, '8.4g'):>8}"
            f"{dash(r['ratio'], '8.1f'):>8}{r['unexpanded']:>8.3f}{r['peak_gib']:>6.1f}{r['share_of_rate']:>6.0%}",
            flush=True,
        )
    if a.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        if a.device == "cuda":
            machine["gpu"] = torch.cuda.get_device_name()
        a.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def measure(case: Case, reference: Path | None, device: str) -> dict[str, Any]:
    """Measure one case in this process."""
    import crosslayer as xl
    from crosslayer.clt.open import load_clt
    from crosslayer.host.host import load_host

    if case.size == "reference":
        assert reference is not None
        clt = load_clt(reference / "clt", device=device).clt
        host = load_host(reference / "host", dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    else:
        host, clt = made(*SHAPES[case.size])
        host.model.to(device)
        clt.to(device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.tensor([1]), torch.randint(2, host.n_vocab, (case.tokens - 1,), generator=generator)])
    if case.active:
        calibrate(host, clt, tokens, case.active)
    knobs = {"tolerance": case.tolerance, "max_nodes": case.max_nodes, "precision": case.precision}
    trace = partial(xl.attribute, host, clt, tokens, **knobs)
    if case.repeat > 1:
        trace()
    times, graph = [], None
    for _ in range(case.repeat):
        began = time.perf_counter()
        graph = trace()
        times.append(time.perf_counter() - began)
    assert graph is not None
    seconds = statistics.median(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    rate = square_rate(torch.bfloat16 if case.precision == "bf16" else torch.float32, device)
    needed = operations(graph, host)
    return {
        "active": graph.n_features,
        "rows": int((graph.arrays.row_R < graph.n_features).sum()),
        "edges": len(graph.arrays.weight_E),
        "seconds": seconds,
        "ratio": case.theirs_s / seconds if case.theirs_s else None,
        "unexpanded": graph.unexpanded,
        "peak_gib": peak,
        "tflop": needed / 1e12,
        "share_of_rate": needed / seconds / rate,
        "sum_error": graph.sum_error(),
    }


def made(
    layers: int, width: int, features: int, heads: int, value_heads: int, head: int, vocabulary: int
) -> tuple[Any, Any]:
    """Make a random host and transcoder."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    from crosslayer.clt.config import CLTConfig
    from crosslayer.clt.transcoder import CLT
    from crosslayer.host.host import Host

    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=3 * width,
        num_attention_heads=heads,
        num_key_value_heads=value_heads,
        head_dim=head,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        eos_token_id=0,
        bos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    clt = CLT(CLTConfig(n_layers=layers, d_model=width, n_features=features))
    for p in clt.parameters():
        p.requires_grad_(False)
    for weights in (clt.W_enc, clt.W_dec):
        for p in weights:
            nn.init.normal_(p, std=width**-0.5)
    return Host(model, None, "random"), clt


def calibrate(host: Any, clt: Any, tokens: torch.Tensor, active: float) -> None:
    """Set thresholds at which this many features per layer fire on each token, on average."""
    x_TLD = host.tap(tokens[None]).x_BTLD[0, host.policy.n_skip :]
    for layer in range(clt.config.n_layers):
        with torch.no_grad():
            pre = clt.pre(x_TLD[:, layer], layer).flatten().float()
            threshold = pre.kthvalue(pre.numel() - round(active * len(x_TLD))).values
            clt.threshold[layer].data = torch.full_like(clt.threshold[layer], max(float(threshold), 0.0))


def operations(graph: Any, host: Any) -> float:
    """Count the operations of the necessary products: attention's projections and contraction, over causal cones."""
    a, config = graph.arrays, host.model.config
    n_skip, D = host.policy.n_skip, host.d_model
    per_position = 2 * D * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    total = 0.0
    below = torch.zeros(graph.n_positions + 1, graph.header.n_layers + 1)
    for layer, position in zip(a.layer_F.tolist(), a.position_F.tolist(), strict=True):
        below[position + 1, layer + 1] += 1
    sources = below.cumsum(0)  # features of one layer, cumulative over positions
    slots = torch.arange(graph.header.n_layers + 1)
    for node in a.row_R.tolist():
        feature = node < graph.n_features
        layer = int(a.layer_F[node]) if feature else graph.header.n_layers
        position = graph.position(node)
        total += (layer + feature) * per_position * max(position + 1 - n_skip, 0)
        reach = sources[position + 1, 1 : layer + 1] * (layer - slots[:layer])
        total += 2 * D * float(reach.sum())
    return total


def square_rate(dtype: torch.dtype, device: str) -> float:
    """Measure the operations per second of a plain product on this machine."""
    a = torch.randn(4096, 1024, device=device).to(dtype)
    b = torch.randn(1024, 2048, device=device).to(dtype)
    best = float("inf")
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        torch.matmul(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * 4096 * 1024 * 2048 / best


if __name__ == "__main__":
    main()
