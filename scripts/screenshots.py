"""Take the README's screenshots of the page, from a finished quickstart run.

    python scripts/screenshots.py runs/quickstart [--out docs/page] [--dark]

The run is copied first; a circuit is pinned in the copy. Needs Playwright and a Chromium (the development
dependencies).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1280, 860


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/page"))
    parser.add_argument("--dark", action="store_true", help="also take dark-mode screenshots")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(args.run, Path(folder) / "quickstart", ignore=shutil.ignore_patterns("checkpoints")))
        serve = [sys.executable, "-m", "crosslayer", "serve", str(run), "--port", "8790"]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            base = re.search(r"http://\S+", server.stdout.readline())[0].rstrip("/")  # type: ignore[index]
            try:
                _take(base, args.out, ["light", "dark"] if args.dark else ["light"])
            finally:
                server.terminate()


def _ask(url: str, body: Any = None) -> Any:
    asked = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(), method="PUT" if body else "GET"
    )
    asked.add_header("content-type", "application/json")
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)


def _take(base: str, out: Path, schemes: list[str]) -> None:
    ids = {e["kind"]: e["id"] for e in _ask(f"{base}/api/library")}
    node = _circuit(base, ids["graph"])
    best = _ask(f"{base}/api/bundles/{ids['bundle']}/search?q=label:return&limit=1")[0]
    views = {
        "run": f"run/{ids['run']}",
        "features": f"bundle/{ids['bundle']}?q=return",
        "feature": f"bundle/{ids['bundle']}/{best['layer']}/{best['index']}",
        "map": f"bundle/{ids['bundle']}/map?level=2",
        "graph": f"graph/{ids['graph']}?node={node}",
    }
    with sync_playwright() as p:
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in schemes:
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)  # type: ignore[arg-type]
            for name, view in views.items():
                page.goto(f"{base}/#/{view}")
                page.wait_for_selector("main:not([aria-busy])")
                page.wait_for_timeout(1000)
                suffix = "" if scheme == "light" else f"-{scheme}"
                path = out / f"{name}{suffix}.png"
                page.screenshot(path=path, full_page=name == "graph")
                # Flat colours: 255 of them look the same, in a third of the bytes.
                with Image.open(path) as picture:
                    few = picture.convert("RGB").quantize(255, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
                few.save(path, optimize=True)
        browser.close()


def _circuit(base: str, graph: str) -> int:
    """Pin the most influential features, add the best suggestion that fits, and return the first feature's number."""
    nodes = _ask(f"{base}/api/graphs/{graph}")["nodes"]
    order = sorted(range(len(nodes["id"])), key=lambda i: -nodes["influence"][i])
    features = [nodes["id"][i] for i in order if nodes["kind"][i] == "feature"][:9]
    tokens = [nodes["id"][i] for i in order if nodes["kind"][i] == "target"][:1]
    small = [s["nodes"] for s in _ask(f"{base}/api/graphs/{graph}/suggestions") if len(s["nodes"]) < 6][:1]
    groups = [{"name": "say “width”", "members": s} for s in small]
    pins = list(dict.fromkeys([*features, *tokens, *(n for g in groups for n in g["members"])]))
    _ask(f"{base}/api/graphs/{graph}/views/default", {"value": {"pins": pins, "supernodes": groups}})
    return features[0]


if __name__ == "__main__":
    main()
