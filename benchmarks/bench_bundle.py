"""Feature bundles: size and speed at 573,440 features, and the overhead of the pass over host and encoder.

    python benchmarks/bench_bundle.py RUN [--reference DIR] [--quick] [--json FILE]

RUN is a run with a feature bundle (make quickstart). A bundle of the reference's size (28 x 20,480) is written from the
features of that bundle, sampled with replacement from those with all 32 examples, with new neighbour ids. It is then
opened in its own process. DIR, from make_reference.py, is a host and a transcoder of the reference's shape, to measure
the cost of the pass at that size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from crosslayer.bundles.bundle import load_features
from crosslayer.bundles.index import SORT_KEYS, Group, Row, write_index
from crosslayer.bundles.row_files import save_array
from crosslayer.bundles.schema import ARRAYS, INDEX, MANIFEST, TOKENS, VOCABULARY
from crosslayer.bundles.settings import ScanSettings
from crosslayer.core.files import write_json

LAYERS, FEATURES = 28, 20_480
BARS = {
    "size_gb": 1.5,
    "open_s": 1.0,
    "feature_ms": 5.0,
    "search_p95_ms": 200.0,
    "page_worst_ms": 50.0,
    "rss_mib": 300.0,
    "pass_ratio": 1.3,
}


def write_synthetic(real_path: Path, folder: Path, n_layers: int, n_features: int) -> None:
    """Write a bundle of any size from a real bundle's features."""
    real, chance = load_features(real_path), np.random.default_rng(0)
    n, settings = (
        n_layers * n_features,
        ScanSettings(**{k: v for k, v in real.manifest.settings.items() if k != "cluster_weights"}),
    )
    full = np.flatnonzero(np.diff(real.array("example")) == settings.n_examples)
    drawn = chance.choice(full, n)
    folder.mkdir(parents=True)
    for name in (TOKENS, VOCABULARY):
        shutil.copy(real_path / name, folder / name)
    for name, spec in ARRAYS.items():
        axes = spec.axes.split()
        if axes[0] == "N" and name != "decoder_norm":
            array = np.asarray(real.array(name))[drawn]
            if name.endswith("_id") and name.split("_")[0] not in ("top", "bottom"):
                array = chance.integers(0, n, array.shape)
            save_array(folder, name, array)
    save_array(folder, "decoder_norm", chance.random((n, n_layers)))
    save_array(folder, "map", chance.normal(size=(n, 2)))
    groups = np.stack([np.arange(n) // size for size in (16, 128, 2048, 20_480)], axis=1)
    save_array(folder, "group", groups)
    _examples(real, folder, drawn, settings.n_examples)
    _index(real, folder, drawn, n_features, groups)
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    manifest = real.manifest.model_copy(update={"n_layers": n_layers, "n_features": n_features, "files": files})
    write_json(folder / MANIFEST, manifest.model_dump())


def _examples(real, folder: Path, drawn: np.ndarray, per_feature: int) -> None:
    n_active = np.asarray(real.array("example_active"))
    begins = np.concatenate([[0], np.cumsum(n_active, dtype=np.int64)])
    first = np.asarray(real.array("example"))[drawn]
    example = (first[:, None] + np.arange(per_feature)).reshape(-1)
    for name in ("start", "length", "peak", "value", "bin", "active"):
        save_array(folder, f"example_{name}", np.asarray(real.array(f"example_{name}"))[example])
    save_array(folder, "example", np.arange(len(drawn) + 1) * per_feature)
    lengths = begins[first + per_feature] - begins[first]
    active = np.concatenate([[0], np.cumsum(lengths)])
    entry = np.arange(active[-1]) + np.repeat(begins[first] - active[:-1], lengths)
    save_array(folder, "active", active)
    for name in ("active_offset", "active_value"):
        save_array(folder, name, np.asarray(real.array(name))[entry])


def _index(real, folder: Path, drawn: np.ndarray, n_features: int, groups: np.ndarray) -> None:
    rows = [real.index.row(f) for f in range(real.n_layers * real.n_features)]
    metrics = [real.index.metrics(f) for f in range(real.n_layers * real.n_features)]
    chance = np.random.default_rng(1)
    columns = {
        name: (
            np.array([np.nan if x[name] is None else x[name] for x in metrics], float)[drawn]
            * (1 + 1e-3 * chance.random(len(drawn)))
        )
        for name in ("density", "mean", "max", "auroc", "precision", "recall", "norm", "reach")
    }
    texts = lambda ids: [" ".join(real.text(t) for t in row if t >= 0) for row in ids.tolist()]  # noqa: E731
    fires, promotes = texts(real.array("token_at")[:, 0]), texts(real.array("top_id"))
    members = [
        Group(level, g, int(c), f"group {g}", [(0, 0.5)])
        for level, of in enumerate(groups.T)
        for g, c in enumerate(np.bincount(of))
    ]
    write_index(
        folder / INDEX,
        n_features,
        columns,
        (Row(*rows[f]) for f in drawn),
        (fires[f] for f in drawn),
        (promotes[f] for f in drawn),
        members,
    )


def read(path: Path, *, quick: bool) -> dict[str, float]:
    """Measure a bundle in a new process."""
    import psutil

    began = time.perf_counter()
    bundle = load_features(path)
    bundle.index.row(0)
    open_s = time.perf_counter() - began
    chance, repeats = random.Random(0), 40 if quick else 300
    n = bundle.n_layers * bundle.n_features

    def timed(work) -> float:
        at = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - at)

    feature = [timed(lambda: bundle.feature(*bundle.place(chance.randrange(n)))) for _ in range(repeats)]
    words = sorted({w for t in bundle.vocabulary for w in [t.strip()] if w})
    common = [
        "self",
        "def",
        "return",
        "(",
        "the",
        "i",
        "in",
        "label:after",
        "fires:self",
        "promotes:self",
        "se*",
        "self def",
        "def return (",
    ]
    search = [
        timed(lambda w=w: bundle.search(w, 50)) for w in common * 3 + [chance.choice(words) for _ in range(repeats)]
    ]
    page = {}
    for key in SORT_KEYS:
        for descending in (False, True):
            for offset in (0, n // 2):
                page[key, descending, offset] = statistics.median(
                    timed(lambda k=key, d=descending, o=offset: bundle.page(k, descending=d, offset=o))
                    for _ in range(3)
                )
    worst = max(page, key=lambda k: page[k])
    print(
        f"slowest page: by {worst[0]}, {'descending' if worst[1] else 'ascending'}, from {worst[2]:,}", file=sys.stderr
    )
    process = psutil.Process()
    return {
        "open_s": open_s,
        "feature_ms": statistics.median(feature),
        "feature_p95_ms": sorted(feature)[int(0.95 * len(feature))],
        "search_ms": statistics.median(search),
        "search_p95_ms": sorted(search)[int(0.95 * len(search))],
        "search_worst_ms": max(search),
        "page_ms": statistics.median(page.values()),
        "page_worst_ms": max(page.values()),
        "rss_mib": process.memory_info().rss / 2**20,
        "private_mib": process.memory_full_info().uss / 2**20,
    }


def pass_cost(host, clt, rows_BT, *, repeats: int) -> dict[str, float]:
    """Compare the seconds of batches of the pass with those of host and encoder products alone, alternating."""
    import torch

    from crosslayer.data.stream import collect_activations
    from crosslayer.features.scan import Batch, Seen, take

    clt.W_enc.read_all()
    seen = Seen.nothing(clt, 1, rows_BT.shape[1], ScanSettings(), torch.device("cpu"))
    bare, whole = [], []
    with torch.no_grad():
        for i in range(repeats + 1):
            rows = rows_BT[16 * i : 16 * (i + 1)]
            began = time.perf_counter()
            x_BLD, _ = collect_activations(host, torch.from_numpy(rows.astype(np.int64)))
            for layer in range(clt.config.n_layers):
                clt.pre(x_BLD[:, layer], layer)
            bare.append(time.perf_counter() - began)
            began = time.perf_counter()
            take(seen, host, clt, rows_BT, Batch(0, 16 * i, 16), i)
            whole.append(time.perf_counter() - began)
    return {
        "tokens": rows_BT[:16].size,
        "bare_s": statistics.median(bare[1:]),
        "pass_s": statistics.median(whole[1:]),
        "pass_ratio": statistics.median(w / b for w, b in zip(whole[1:], bare[1:], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="save the synthetic bundle in this folder, for bench_page.py")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.run, quick=arguments.quick)))
        return
    layers, features = (6, 2048) if arguments.quick else (LAYERS, FEATURES)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        began = time.perf_counter()
        write_synthetic(arguments.run / "features", folder, layers, features)
        size = sum(p.stat().st_size for p in folder.iterdir())
        largest = sorted(((p.stat().st_size / 2**20, p.name) for p in folder.iterdir()), reverse=True)[:8]
        print("largest files, MiB:", ", ".join(f"{name} {s:.0f}" for s, name in largest), file=sys.stderr)
        command = [sys.executable, __file__, str(folder), "--read", *(["--quick"] if arguments.quick else [])]
        found = json.loads(
            subprocess.run(command, capture_output=False, stdout=subprocess.PIPE, text=True, check=True).stdout
        )
        if arguments.keep:
            shutil.copytree(folder, arguments.keep)
        active = float(np.asarray(load_features(folder).array("example_active")).mean())
        results["bundle"] = {
            "features": layers * features,
            "size_gb": size / 1e9,
            "write_s": time.perf_counter() - began,
            "active_per_example": active,
        } | found
    results["pass, quickstart"] = _pass(arguments.run, arguments.run / "features", repeats=3 if arguments.quick else 15)
    if arguments.reference:
        results["pass, reference"] = _pass(arguments.reference / "clt", None, repeats=3)
    for case, metrics in results.items():
        print(case)
        for name, value in metrics.items():
            bar = f"   (max {BARS[name]:g})" if name in BARS else ""
            print(f"    {name:20} {value:12,.3f}{bar}")
    if arguments.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        write_json(
            arguments.json,
            {"when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, "results": results},
        )


def _pass(clt: Path, bundle: Path | None, *, repeats: int) -> dict[str, float]:
    from crosslayer.clt.open import load_clt
    from crosslayer.eval.replacement_model import host_of

    opened = load_clt(clt)
    host = host_of(opened)
    if bundle is not None:
        rows = np.asarray(load_features(bundle).tokens).reshape(-1, 256)
    else:
        rows = np.random.default_rng(0).integers(0, host.n_vocab, (16 * (repeats + 1), 128))
    return pass_cost(host, opened.clt, rows, repeats=min(repeats, len(rows) // 16 - 1))


if __name__ == "__main__":
    main()
