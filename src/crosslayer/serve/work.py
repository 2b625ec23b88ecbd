"""`/api/jobs`: trace a graph, run an intervention, or compute the features of a text, with progress and cancelling."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from crosslayer.core.errors import ConfigError
from crosslayer.graphs.circuit import predicted_changes
from crosslayer.graphs.graph import Graph
from crosslayer.serve.jobs import FINAL, MOST_STREAMS, Busy, Jobs
from crosslayer.serve.library import Entry, id_of
from crosslayer.serve.opened import library, opened

router = APIRouter(tags=["jobs"])
MOST_PROMPT = 100_000


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Trace(_Asked):
    """A new graph of a run's transcoder, saved in the run's `graphs/`."""

    run: str
    prompt: Annotated[str, Field(min_length=1, max_length=MOST_PROMPT)]
    name: Annotated[str, Field(min_length=1, max_length=80)]
    targets: Annotated[list[str], Field(max_length=20)] = []
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.02
    max_nodes: Annotated[int, Field(ge=1)] | None = None


class Change(_Asked):
    """A feature node of a graph, and its new activation or the factor on its activation."""

    node: int
    set: float | None = None
    scale: float | None = None


class Intervene(_Asked):
    """Change feature nodes of a graph on its own prompt, and measure other nodes and the next tokens."""

    graph: str
    changes: Annotated[list[Change], Field(min_length=1, max_length=200)]
    watch: Annotated[list[int], Field(max_length=500)] = []
    freeze: Literal["none", "attention", "norms", "both"] = "none"


class Activations(_Asked):
    """Features active on a text, per token, or the activations of one feature."""

    run: str
    text: Annotated[str, Field(min_length=1, max_length=MOST_PROMPT)]
    top: Annotated[int, Field(ge=1, le=50)] = 8
    layer: int | None = None
    index: int | None = None


def _jobs(request: Request) -> Any:
    return request.app.state.jobs


@router.post("/jobs/trace")
async def trace(request: Request, asked: Trace) -> dict[str, Any]:
    """Trace a prompt; `graph` is the id of the new graph."""
    run = library(request).find("run", asked.run)
    jobs: Jobs = _jobs(request)
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", asked.name).strip(".-")
    if not slug:
        raise ConfigError(f"{asked.name!r} is not a name for a graph; use letters, digits, '_' and '-'")
    # A dot would start a suffix.
    out = run.path / "graphs" / slug.replace(".", "-")
    waiting = {j.arguments.get("out") for j in jobs.jobs.values() if j.kind == "trace" and j.state not in FINAL}
    if out.with_suffix(".json").exists() or str(out) in waiting:
        raise ConfigError(f"the run already has a graph {out.name!r}; give another name")
    arguments = asked.model_dump(exclude={"run", "name"}) | {"clt": str(run.path), "out": str(out)}
    number = jobs.add("trace", arguments).number
    return {"job": number, "graph": id_of(out.with_suffix(".json"))}


@router.post("/jobs/intervene")
async def intervene(request: Request, asked: Intervene) -> dict[str, int]:
    """Run an intervention: top tokens before and after, and watched nodes, measured and predicted by edges."""
    entry = library(request).find("graph", asked.graph)
    graph: Graph = opened(request).graph(entry.path)
    clt = _run_of(request, entry)
    a = graph.arrays
    changes, factors = list[dict[str, int | float | None]](), {}
    for c in asked.changes:
        if not 0 <= c.node < graph.n_features:
            raise ConfigError(f"node {c.node} is not a feature of the graph; interventions change features only")
        if (c.set is None) == (c.scale is None):
            raise ConfigError(f"node {c.node} needs exactly one of set and scale; give one")
        was = float(a.activation_F[c.node])
        factors[c.node] = c.scale if c.scale is not None else (c.set or 0.0) / was if was else 1.0
        changes.append(_place(graph, c.node) | {"set": c.set, "scale": c.scale})
    watched = [n for n in asked.watch if 0 <= n < graph.n_features]
    predicted = predicted_changes(graph, factors)
    arguments = {
        "clt": str(clt),
        "tokens": graph.header.tokens,
        "changes": changes,
        "freeze": asked.freeze,
        "watch": [
            {"node": n, **_place(graph, n), "predicted": float(predicted[n]), "activation": float(a.activation_F[n])}
            for n in watched
        ],
    }
    return {"job": _jobs(request).add("intervene", arguments).number}


def _place(graph: Graph, node: int) -> dict[str, int]:
    a = graph.arrays
    return {
        "layer": int(a.layer_F[node]),
        "index": int(a.index_F[node]),
        "position": int(a.position_F[node]),
    }


@router.post("/jobs/activations")
async def activations(request: Request, asked: Activations) -> dict[str, int]:
    """Compute the features of a text."""
    run = library(request).find("run", asked.run)
    if (asked.layer is None) != (asked.index is None):
        raise ConfigError("a feature has a layer and an index; give both, or neither for all features")
    return {"job": _jobs(request).add("activations", asked.model_dump(exclude={"run"}) | {"clt": str(run.path)}).number}


def _run_of(request: Request, entry: Entry) -> Path:
    if entry.run is None:
        raise ConfigError(
            f"the graph {entry.name!r} is not in a run, so its transcoder is unknown; move it into the run's graphs/"
        )
    return library(request).find("run", entry.run).path


@router.get("/jobs/{number}")
async def job(request: Request, number: int) -> dict[str, Any]:
    """Return the state of a job."""
    found = _jobs(request).job(number)
    return {"job": number, "kind": found.kind, **found.events[-1]}


@router.get("/jobs/{number}/events")
async def events(request: Request, number: int) -> StreamingResponse:
    """Stream server-sent events: every state and stage, the last with the result or the error."""
    jobs: Jobs = _jobs(request)
    found = jobs.job(number)
    if jobs.streams >= MOST_STREAMS:
        raise Busy(f"{MOST_STREAMS} event streams are already open; close some tabs")

    async def lines() -> AsyncIterator[str]:
        jobs.streams += 1
        try:
            async for event in found.all_events():
                yield f"data: {json.dumps(event)}\n\n"
        finally:
            jobs.streams -= 1

    return StreamingResponse(lines(), media_type="text/event-stream")


@router.delete("/jobs/{number}")
async def cancel(request: Request, number: int) -> dict[str, str]:
    """Stop a job."""
    jobs: Jobs = _jobs(request)
    jobs.cancel(number)
    return {"state": jobs.job(number).state}
