"""`xl.evaluate`: evaluate a saved transcoder on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console

from crosslayer.clt.open import load_clt
from crosslayer.clt.precision import dtype_of
from crosslayer.core.errors import ConfigError, RunError
from crosslayer.core.progress import track
from crosslayer.data.rows import held_out_rows
from crosslayer.data.sources import open_sources
from crosslayer.eval.evaluate import evaluate_rows
from crosslayer.eval.replacement_model import host_of
from crosslayer.host.host import Host, choose_device
from crosslayer.schemas.evaluation import Evaluation, TrainingEnd
from crosslayer.schemas.run import host_precision, manifest_of


def evaluate(
    clt: str | Path,
    *,
    text: Sequence[str],
    column: str = "",
    model: str | Path | Host | None = None,
    tokens: int = 131_072,
    context: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> Evaluation:
    """Evaluate a saved transcoder on held-out text.

    Args:
        clt: folder in any supported format, run folder, or name on the Hub.
        text: names of text sources; see `crosslayer.data.sources`.
        column: column of records that holds the text; default: the usual names.
        model: host model; default: the host that the transcoder names.
        tokens: number of held-out tokens.
        context: tokens per row; default: 256, or the host's context if that is less.
        dtype: dtype of the host; default: as in the run, else float32.
        device: cpu, cuda, or auto.
        console: console for progress; quiet by default.

    Raises:
        CrosslayerError: for an invalid folder, host or source.
    """
    device = choose_device(device)
    opened = load_clt(clt, device=device)
    host = host_of(opened, model, dtype=dtype or host_dtype(clt, device), device=device)
    sources = open_sources(text, column)
    context = context or min(256, host.max_positions)
    if context > host.max_positions:
        raise ConfigError(
            f"context={context} exceeds the context of {host.name}, {host.max_positions}; lower --context"
        )
    rows_BT = held_out_rows(host, sources, context, tokens)
    with track(console or Console(quiet=True), "measure", 1.0) as update:
        return evaluate_rows(
            host,
            opened.clt,
            rows_BT,
            [s.source.name for s in sources],
            training=training_end(clt),
            on_progress=update,
        )


def training_end(clt: str | Path) -> TrainingEnd | None:
    """Return how a finished run's training ended; None for a transcoder without a run."""
    metrics = Path(clt) / "eval.json"
    if manifest_of(clt) is None or not metrics.is_file():
        return None
    try:
        return Evaluation.model_validate_json(metrics.read_text(encoding="utf-8")).training
    except (ValidationError, UnicodeDecodeError) as error:
        raise RunError(f"{metrics} is damaged; delete it to evaluate the transcoder without it") from error


def host_dtype(clt: object, device: str) -> torch.dtype:
    """Return the dtype that a run's host had; float32 for a transcoder without a run."""
    manifest = manifest_of(clt) if isinstance(clt, str | Path) else None
    return dtype_of(host_precision(manifest), device)
