"""`/api/runs`: what a run is, its metrics, and its curves while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from crosslayer.core.files import read_json
from crosslayer.serve.opened import library

router = APIRouter(tags=["runs"])
CARD = Path("clt") / "README.md"
MOST_LINES = 5000


@router.get("/runs/{id}")
def run(request: Request, id: str) -> dict[str, Any]:
    """Manifest, metrics and model card; the last two as soon as they are there."""
    path = library(request).find("run", id).path
    manifest = read_json(path / "run.json", missing=f"{path} is no longer a run", remedy="look again in a moment")
    metrics = path / "eval.json"
    card = path / CARD
    return {
        "manifest": manifest,
        "evaluation": (
            read_json(metrics, missing="", remedy="look again in a moment")
            if metrics.is_file() and not metrics.is_symlink()
            else None
        ),
        "card": card.read_text(encoding="utf-8") if card.is_file() and not _linked(path, card) else None,
    }


def _linked(run: Path, path: Path) -> bool:
    """Whether a file of a run lies elsewhere: what a link points to may be anything."""
    return path.resolve() != run.resolve() / path.relative_to(run)


@router.get("/runs/{id}/log")
def log(request: Request, id: str, after: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
    """Lines of `log.jsonl` from byte `after` on, and the byte to ask from next; whole lines only."""
    path = library(request).find("run", id).path / "log.jsonl"
    if not path.is_file() or path.is_symlink():
        return {"lines": [], "next": 0, "restarted": False}
    size = path.stat().st_size
    # A resume cuts the log back; then all of it is new.
    restarted = after > size
    with path.open("rb") as file:
        file.seek(0 if restarted else after)
        begin, lines = file.tell(), []
        for raw in file:
            if not raw.endswith(b"\n") or len(lines) == MOST_LINES:
                break
            begin += len(raw)
            try:
                lines.append(json.loads(raw))
            except ValueError:
                continue
    return {"lines": lines, "next": begin, "restarted": restarted}
