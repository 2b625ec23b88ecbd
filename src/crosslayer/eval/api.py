"""`xl.evaluate`: a transcoder by path, its host by name, held-out text by source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from crosslayer.clt.open import load_clt
from crosslayer.core.errors import ConfigError
from crosslayer.core.progress import track
from crosslayer.data.rows import held_out_rows
from crosslayer.data.sources import open_sources
from crosslayer.eval.evaluate import evaluate_rows
from crosslayer.eval.replacement_model import host_of
from crosslayer.host.host import Host, choose_device
from crosslayer.schemas.evaluation import Evaluation


def evaluate(
    clt: str | Path,
    *,
    text: Sequence[str],
    model: str | Path | Host | None = None,
    tokens: int = 131_072,
    context: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    console: Console | None = None,
) -> Evaluation:
    """Measure a saved transcoder on the held-out side of the sources.

    Args:
        clt: a folder in any known format, a run, or a name on the hub.
        text: sources, as `crosslayer.data.sources` names them.
        model: the host; the one that the transcoder names unless given.
        dtype: of the host.
        tokens, context: how many held-out tokens, in rows of how many; of 256, or the host's context if that is less,
            unless given.
        console: where progress goes; quiet by default.

    Raises:
        CrosslayerError: for a folder, host or source that cannot be used.
    """
    device = choose_device(device)
    opened = load_clt(clt, device=device)
    host = host_of(opened, model, dtype=dtype, device=device)
    sources = open_sources(text)
    context = context or min(256, host.max_positions)
    if context > host.max_positions:
        raise ConfigError(f"context={context} exceeds that of {host.name}, {host.max_positions}; lower --context")
    rows_BT = held_out_rows(host, sources, context, tokens)
    with track(console or Console(quiet=True), "measure", 1.0) as update:
        return evaluate_rows(host, opened.clt, rows_BT, [s.source.name for s in sources], on_progress=update)
