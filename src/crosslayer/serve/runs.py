"""`/api/runs`: the manifest, metrics and training curves of a run."""

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
    """Return manifest, metrics and model card; the last two once they exist."""
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
    """Return whether a file of a run is outside the run, through a link."""
    return path.resolve() != run.resolve() / path.relative_to(run)


@router.get("/runs/{id}/log")
def log(request: Request, id: str, after: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
    """Return complete lines of `log.jsonl` from byte `after`, and the byte to continue from."""
    path = library(request).find("run", id).path / "log.jsonl"
    if not path.is_file() or path.is_symlink():
        return {"lines": [], "next": 0, "restarted": False}
    size = path.stat().st_size
    # Resuming truncates the log; then read it from the start.
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
