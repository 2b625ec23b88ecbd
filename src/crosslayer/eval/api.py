"""`xl.evaluate`: a transcoder by path, its host by name, held-out text by source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from crosslayer.acts.rows import held_out_rows
from crosslayer.acts.sources import open_sources
from crosslayer.clt.open import load_clt
from crosslayer.core.progress import track
from crosslayer.eval.evaluate import check_shape, evaluate_rows
from crosslayer.host.host import Host, load_host
from crosslayer.records.evaluation import Evaluation


def evaluate(
    clt: str | Path,
    *,
    text: Sequence[str],
    model: str | Path | Host | None = None,
    tokens: int = 131_072,
    context: int = 256,
    device: str = "cpu",
    console: Console | None = None,
) -> Evaluation:
    """Measure a saved transcoder on the held-out side of the sources.

    Args:
        clt: a folder in the published format, or a run.
        text: sources, as `crosslayer.acts.sources` names them.
        model: the host; the one that the transcoder names unless given.
        tokens, context: how many held-out tokens, in rows of how many.
        console: where progress goes; quiet by default.

    Raises:
        CrosslayerError: for a folder, host or source that cannot be used.
    """
    opened = load_clt(clt, dtype=torch.float32)
    p = opened.provenance
    host = load_host(
        model or p.model_name, device=device, input_hook=p.input_hook, output_hook=p.output_hook, policy=p.policy
    )
    check_shape(host, opened.clt)
    sources = open_sources(text)
    rows_BT = held_out_rows(host, sources, min(context, host.max_positions), tokens)
    with track(console or Console(quiet=True), "measure", 1.0) as update:
        return evaluate_rows(host, opened.clt.to(device), rows_BT, [s.source.name for s in sources], on_progress=update)
