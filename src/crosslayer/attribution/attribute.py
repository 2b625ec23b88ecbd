"""`xl.attribute`: compute the attribution graph of a prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from crosslayer.attribution.local import LocalModel, local_model
from crosslayer.attribution.opening import open_both
from crosslayer.attribution.sweep import BYTES_AT_ONCE, Swept, sweep
from crosslayer.attribution.targets import DESIRED_PROBABILITY, Resolved, Target, parse_target, resolve
from crosslayer.attribution.writes import Writes
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.precision import NAMES, bfloat16_is_fast
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError
from crosslayer.core.progress import Update, track
from crosslayer.eval.replacement_model import Prompt, ReplacementModel, tokens_of
from crosslayer.graphs.arrays import GraphArrays
from crosslayer.graphs.graph import Graph
from crosslayer.host import memory
from crosslayer.host.anatomy import Anatomy
from crosslayer.host.host import Host
from crosslayer.schemas.graph import GraphHeader, TargetRecord

TOLERANCE = 0.02


def attribute(
    model: str | Path | Host | ReplacementModel | None,
    clt: str | Path | CLT | Opened | None,
    prompt: Prompt | Sequence[Prompt],
    *,
    targets: Any = None,
    tolerance: float = TOLERANCE,
    max_nodes: int | None = None,
    precision: str = "fp32",
    device: str = "auto",
    console: Console | None = None,
) -> Any:
    """Compute the attribution `Graph` of a prompt, or a list of graphs; prompts share the reading of decoders.

    Args:
        model: the host, or a `ReplacementModel`; None for the host named by the transcoder.
        clt: a transcoder, loaded or by folder, run or Hub name; None if `model` holds it.
        prompt: text or token ids, or a list of either.
        targets: one or several `Target`s, token ids, or strings in command-line syntax. Default: the most probable next
            tokens that reach 95 % of the probability, max 10.
        tolerance: share of the targets' influence that may stay in nodes without a row; 0 computes a row for every
            active feature.
        max_nodes: max number of features with a row; the bound reached is in the result.
        precision: precision of the matrix products: `fp32`, `bf16` (edges within about 1 % of a row's largest), or
            `auto`, which is bf16 if the device is faster with it. Sums are always in float32.
        device: cpu, cuda, or auto; a loaded model or transcoder is not moved.
        console: console for progress; default: quiet.

    Raises:
        ConfigError: for an empty prompt, a target, position or feature that does not exist, a setting out of range, or
            a transcoder of another shape than the host.
        HostError: for a prompt longer than the host's context.
        ResourceError: if memory is too small; checked before it is allocated.
    """
    if not 0 <= tolerance <= 1:
        raise ConfigError(f"tolerance={tolerance} must be between 0 and 1")
    if max_nodes is not None and max_nodes < 1:
        raise ConfigError(f"max_nodes={max_nodes} must be at least 1; omit it for no limit")
    if precision not in NAMES:
        raise ConfigError(f"precision {precision!r} is unknown; give one of {', '.join(NAMES)}")
    host, opened = open_both(model, clt, device)
    if precision == "auto":
        precision = "bf16" if bfloat16_is_fast(host.device) else "fp32"
    several = not isinstance(prompt, str | Tensor) and len(prompt) > 0 and not isinstance(prompt[0], int | np.integer)
    prompts: list[Any] = list(prompt) if several else [prompt]
    if isinstance(targets, Target | str) or hasattr(targets, "__index__"):
        targets = [targets]
    chosen: list[Target] | None = None if targets is None else [_target(t) for t in targets]
    settings = {
        "tolerance": tolerance,
        "max_nodes": max_nodes,
        "precision": precision,
        "desired_logit_prob": DESIRED_PROBABILITY,
        "targets": None,
    }
    with track(console or Console(quiet=True), "trace", float(len(prompts))) as update:
        graphs = _attribute(host, opened, prompts, chosen, settings, update)
    return graphs if several else graphs[0]


@torch.no_grad()
def _attribute(
    host: Host,
    opened: Opened,
    prompts: list[Any],
    chosen: Sequence[Target] | None,
    settings: dict[str, Any],
    update: Update,
) -> list[Graph]:
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.promote_types(host.dtype, torch.float32)
    if any(isinstance(prompt, str) and not prompt for prompt in prompts):
        raise ConfigError("the prompt is empty; give some text")
    rows = [tokens_of(host, prompt)[0] for prompt in prompts]
    anatomy, graphs = Anatomy(host), list[Graph]()
    # Patterns and decoder rows of one prompt at a time are in memory.
    for i, (prompt, tokens_T) in enumerate(zip(prompts, rows, strict=True)):
        began = time.perf_counter()
        local = local_model(host, opened.clt, tokens_T, anatomy)
        targets = resolve(local, chosen)
        if chosen is not None:
            settings = settings | {"targets": [r.name for r in targets]}
        writes = Writes(local, dtype)
        _check_memory(writes, settings)
        writes.fill(opened.clt)
        swept = sweep(
            writes,
            targets,
            tolerance=settings["tolerance"],
            max_nodes=settings["max_nodes"],
            dtype=dtype,
            on_progress=lambda share, metrics, at=i: update(at + share, metrics),
        )
        header = _header(host, opened, prompt, local, targets, swept, settings, time.perf_counter() - began)
        graphs.append(Graph(header, _arrays(local, swept)))
    return graphs


def _target(target: Any) -> Target:
    if isinstance(target, Target):
        return target
    return parse_target(target) if isinstance(target, str) else Target(token=index(target))


def _header(
    host: Host,
    opened: Opened,
    prompt: Any,
    local: LocalModel,
    targets: Sequence[Resolved],
    swept: Swept,
    settings: dict[str, Any],
    wall_s: float,
) -> GraphHeader:
    tokens = local.host_pass.tokens_T.tolist()
    strings = [host.decode_token(t) for t in tokens]
    p = opened.provenance
    records = [
        TargetRecord(
            kind=r.kind,  # type: ignore[arg-type]
            name=r.name,
            position=r.position,
            layer=r.layer,
            token=r.token,
            weight=r.weight,
            probability=r.probability,
        )
        for r in targets
    ]
    return GraphHeader(
        prompt=prompt if isinstance(prompt, str) else host.text_of(tokens),
        tokens=tokens,
        token_strings=strings,
        n_layers=local.n_layers,
        n_skip=local.n_skip,
        n_vocab=host.n_vocab,
        targets=records,
        unexpanded=swept.unexpanded,
        kept_share=1 - settings["tolerance"] / 10,
        host=host.name,
        clt=str(p.model_name),
        scan=p.scan or "",
        settings=settings,
        versions={
            "crosslayer": version("crosslayer"),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=round(wall_s, 3),
    )


def _arrays(local: LocalModel, s: Swept) -> GraphArrays:
    return GraphArrays(
        local.layers,
        local.positions,
        local.indices,
        local.features.activation_N.cpu().numpy(),
        s.influence_N,
        s.row_node_R,
        s.indptr_R1,
        s.source_E,
        s.weight_E,
        s.value_R,
        s.constant_R,
        s.rest_R,
        s.sums_R4,
    )


def _check_memory(writes: Writes, settings: dict[str, Any]) -> None:
    """Check that a prompt's decoder rows and edges fit, before its decoders are read."""
    device, n = writes.local.device, len(writes.local.layers)
    written = 2 * BYTES_AT_ONCE + writes.n_bytes
    edges = int(min(n, settings["max_nodes"] or n) * n / 2 * 8 * (1.0 if settings["tolerance"] == 0 else 0.5))
    remedy = "set or lower max_nodes (--max-nodes), or shorten the prompt"
    # Edges are kept on the machine, whatever the device.
    if device.type == "cpu":
        memory.require(written + edges, device, f"decoder rows and edges of {n} active features", remedy)
    else:
        memory.require(written, device, f"decoder rows of {n} active features", "shorten the prompt")
        memory.require(edges, torch.device("cpu"), f"edges of {n} active features", remedy)
