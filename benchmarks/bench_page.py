"""The page at full size in Chromium: 573,440 features, 10,000 nodes and 200,000 edges, and published graph files.

    python benchmarks/bench_page.py BUNDLE_FOLDER [--graphs FOLDER_OF_JSON] [--json FILE]

BUNDLE_FOLDER is written by `bench_bundle.py --keep`. Times are medians, from the request in the browser to the paint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from playwright.sync_api import Page, sync_playwright

from crosslayer.graphs.arrays import GraphArrays
from crosslayer.graphs.graph import Graph
from crosslayer.schemas.graph import GraphHeader, TargetRecord

LAYERS, POSITIONS, FEATURES, EDGES = 28, 16, 13_800, 275_000
WORDS = ("return", "self", "def", "name", "width", "the", "import", "value", "None", "class", "zzz", "list")


def large_graph(folder: Path) -> None:
    """Make a graph with 10,000 nodes and 200,000 edges after pruning; edges go from earlier to later nodes."""
    rng = np.random.default_rng(0)
    layer = np.sort(rng.integers(0, LAYERS, FEATURES))
    position = rng.integers(1, POSITIONS, FEATURES)
    order = np.lexsort((np.arange(FEATURES), position, layer))
    layer, position = layer[order], position[order]
    first_target = FEATURES + LAYERS * POSITIONS + POSITIONS
    n_nodes = first_target + 8
    rows = np.concatenate([np.arange(FEATURES), np.arange(first_target, n_nodes)])
    per_row = np.full(len(rows), EDGES // len(rows))
    per_row[: EDGES - per_row.sum()] += 1
    starts = np.concatenate([[0], np.cumsum(per_row)])
    # Edges from features of earlier layers and from tokens.
    below = np.searchsorted(layer, np.concatenate([layer, np.full(8, LAYERS)]))
    tokens = np.arange(first_target - POSITIONS, first_target)
    source = np.concatenate(
        [
            np.concatenate(
                [rng.choice(tokens, 2, replace=False), rng.choice(tokens if b < n else b, n - 2, replace=b < n)]
            )
            for b, n in zip(below.tolist(), per_row.tolist(), strict=True)
        ]
    ).astype(np.int32)
    weight = (rng.standard_normal(EDGES) * np.exp(rng.standard_normal(EDGES))).astype(np.float32)
    influence = np.exp(1.5 * rng.standard_normal(n_nodes))
    zero = np.zeros(len(rows), np.float32)
    targets = [
        TargetRecord(
            kind="logit", name=f" t{i}", position=POSITIONS - 1, layer=LAYERS, token=i, weight=0.1, probability=0.1
        )
        for i in range(8)
    ]
    header = GraphHeader(
        prompt="a prompt of sixteen tokens",
        tokens=list(range(POSITIONS)),
        token_strings=[f" word{i}" for i in range(POSITIONS)],
        n_layers=LAYERS,
        n_skip=1,
        n_vocab=1000,
        targets=targets,
        unexpanded=0.0,
        host="none",
        clt="none",
        scan="large",
    )
    arrays = GraphArrays(
        layer,
        position,
        rng.integers(0, 20_480, FEATURES),
        np.ones(FEATURES, np.float32),
        influence,
        rows,
        starts,
        source,
        weight,
        zero,
        zero,
        zero,
        np.zeros((len(rows), 4), np.float32),
    )
    Graph(header, arrays).save(folder / "large")


def shown(page: Page, url: str, selector: str) -> float:
    """Measure milliseconds from leaving a blank page to `selector`."""
    page.goto("about:blank")
    began = time.perf_counter()
    page.goto(url)
    page.wait_for_selector(selector)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graphs", type=Path, help="folder of graph files to import")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    with tempfile.TemporaryDirectory() as folder:
        large_graph(Path(folder))
        command = [sys.executable, "-m", "crosslayer", "serve", folder, str(args.bundle), "--port", "8791"]
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as p:
            assert server.stdout is not None
            base = re.search(r"http://\S+", server.stdout.readline())[0].rstrip("/")  # type: ignore[index]
            with urllib.request.urlopen(f"{base}/api/library") as answer:
                ids = {e["kind"]: e["id"] for e in json.load(answer)}
            found["usable_after_command_s"] = time.perf_counter() - began
            path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
            browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            try:
                measure(page, base, ids, found)
                found["imports"] = imports(page, base, sorted(args.graphs.glob("*.json"))) if args.graphs else {}
            finally:
                browser.close()
                server.terminate()
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(page: Page, base: str, ids: dict[str, str], found: dict[str, Any]) -> None:
    bundle, graph = f"{base}/#/bundle/{ids['bundle']}", f"{base}/#/graph/{ids['graph']}"
    found["first_page_ms"] = median(shown(page, bundle, "table.features tbody tr") for _ in range(5))
    found["feature_ms"] = median(shown(page, f"{bundle}/{n}/{n * 7}", ".example") for n in range(5))
    search = (
        "async q => { const t = performance.now(); await (await"
        " fetch(`/api/bundles/ID/search?limit=200&q=${q}`)).json(); return performance.now() - t; }"
    )
    shown(page, bundle, "table.features tbody tr")
    times = sorted(page.evaluate(search.replace("ID", ids["bundle"]), w) for _ in range(3) for w in WORDS)
    found["search_p95_ms"] = times[int(0.95 * len(times))]
    found["map_ms"] = median(shown(page, f"{bundle}/map", "canvas.map[data-points]") for _ in range(3))
    found["map_points"] = int(page.locator("canvas.map").get_attribute("data-points") or 0)
    view = {"value": {"node_threshold": 1.0, "edge_threshold": 1.0}}
    put = (
        "async ([at, view]) => (await fetch(at, { method: 'PUT', headers: { 'content-type': 'application/json' }, body:"
        " JSON.stringify(view) })).status"
    )
    assert page.evaluate(put, [f"/api/graphs/{ids['graph']}/views/default", view]) == 200
    found["graph_ms"] = median(shown(page, graph, ".stage[data-nodes]") for _ in range(3))
    found["graph_shown"] = page.locator(".graph p.soft").first.inner_text()
    found["hover_frames_per_s"] = hovering(page)


def hovering(page: Page, seconds: float = 3.0) -> float:
    """Measure frames per second while the pointer moves over nodes."""
    page.evaluate("window.frames_seen = 0; (function next() { window.frames_seen++; requestAnimationFrame(next); })()")
    box = page.locator("canvas.over").bounding_box()
    assert box is not None
    began, frames = time.perf_counter(), page.evaluate("window.frames_seen")
    step = 0
    while (now := time.perf_counter()) - began < seconds:
        page.mouse.move(box["x"] + 100 + (step * 13) % 600, box["y"] + 60 + (step * 7) % 400)
        step += 1
    return (page.evaluate("window.frames_seen") - frames) / (now - began)


def imports(page: Page, base: str, files: list[Path]) -> dict[str, float]:
    """Measure milliseconds from choosing a file to its drawn graph."""
    times = {}
    for path in files:
        shown(page, f"{base}/#/", ".card.drop")
        began = time.perf_counter()
        page.set_input_files("input[type=file]", path)
        page.wait_for_selector(".stage[data-nodes]")
        times[path.name] = 1000 * (time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main()
