"""Evaluate a transcoder on held-out rows: one pass for FVU and L0, three for the replacement model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError
from crosslayer.data.massive import Typical
from crosslayer.data.stream import collect_activations
from crosslayer.eval.baseline import Affine
from crosslayer.eval.measures import DENSITY_EDGES, Firing, Reconstruction
from crosslayer.eval.predictions import measure_replacement
from crosslayer.host.host import Host
from crosslayer.schemas.evaluation import Evaluation, TrainingEnd

REPLACEMENT_TOKENS = 32_768
MEDIAN_TOKENS = 4096
"""Tokens, from the first rows, over which each layer's median norm is taken to find massive activations."""
ROWS_AT_ONCE = 16
NUMBERS_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Maximum elements of a batch's activations, and of a layer's pre-activations, by type of device."""


@torch.no_grad()
def evaluate_rows(
    host: Host,
    clt: CLT,
    rows_BT: Int[Tensor, "B T"],
    sources: Sequence[str],
    *,
    replacement_tokens: int = REPLACEMENT_TOKENS,
    affine: Affine | None = None,
    training: TrainingEnd | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Evaluation:
    """Evaluate a transcoder in the host's units; if its features are sharded, call it on all ranks.

    Args:
        rows_BT: held-out rows, each with the special token of the policy.
        sources: names of the text sources, for the record.
        replacement_tokens: tokens for the replacement model, from the first rows.
        affine: baseline without features, fitted on training text.
        training: how training ended, for the record.

    Raises:
        ConfigError: if the shapes of transcoder and host differ.
    """
    check_shape(host, clt)
    began = time.perf_counter()
    context = rows_BT.shape[1]
    at_once = rows_at_once(host, clt, context)
    n_rows = -(-MEDIAN_TOKENS // context)
    typical = Typical.of(collect_activations(host, batch) for batch in rows_BT[:n_rows].split(at_once))
    fit, firing = Reconstruction(host.n_layers, host.d_model), Firing(host.n_layers, clt.config.n_features)
    massive_fit, massive_firing = Reconstruction(host.n_layers, host.d_model), Firing(*firing.count_LF.shape)
    affine_fit = Reconstruction(host.n_layers, host.d_model)
    affine = affine.to(host.device) if affine else None
    batches = rows_BT.split(at_once)
    replaced = rows_BT[: -(-replacement_tokens // context)].split(at_once)
    work = len(batches) + 3 * len(replaced)

    def measure(x_BLD: Tensor, y_BLD: Tensor, fit: Reconstruction, firing: Firing) -> None:
        active = clt.encode_sparse(x_BLD)
        fit.add(clt.decode(active, x_BLD), y_BLD)
        firing.add(active)

    for done, batch in enumerate(batches, 1):
        x_BLD, y_BLD = collect_activations(host, batch)
        massive_B = typical.massive(x_BLD, y_BLD)
        if massive_B.any():
            measure(x_BLD[massive_B], y_BLD[massive_B], massive_fit, massive_firing)
            x_BLD, y_BLD = x_BLD[~massive_B], y_BLD[~massive_B]
        measure(x_BLD, y_BLD, fit, firing)
        if affine:
            affine_fit.add(affine(x_BLD), y_BLD)
        on_progress(done / work)
    replacement = measure_replacement(host, clt, replaced, lambda done: on_progress((len(batches) + 3 * done) / work))
    firing, massive_firing = firing.joined(clt.mesh.features), massive_firing.joined(clt.mesh.features)
    everything = fit + massive_fit
    l0_L, dead_L = firing.l0_L(), firing.dead_L()
    return Evaluation(
        n_tokens=everything.n_tokens,
        sources=list(sources),
        fvu=fit.fvu(),
        fvu_L=fit.fvu_L().tolist(),
        fvu_all=everything.fvu(),
        affine_fvu=affine_fit.fvu() if affine else None,
        affine_fvu_L=affine_fit.fvu_L().tolist() if affine else None,
        l0=float(l0_L.sum()),
        l0_per_layer=float(l0_L.mean()),
        l0_L=l0_L.tolist(),
        l0_all=float(firing.count_LF.sum() + massive_firing.count_LF.sum()) / everything.n_tokens,
        massive_share=massive_fit.n_tokens / everything.n_tokens,
        dead_tokens=firing.dead_tokens,
        dead_share=float(dead_L.mean()),
        dead_L=dead_L.tolist(),
        density_log10_edges=DENSITY_EDGES,
        density_histogram_L=firing.density_histogram_L(),
        replacement=replacement,
        training=training,
        wall_s=time.perf_counter() - began,
    )


def rows_at_once(host: Host, clt: CLT, context: int) -> int:
    """Return the rows per batch: `ROWS_AT_ONCE`, or as many as `NUMBERS_AT_ONCE` allows."""
    numbers = NUMBERS_AT_ONCE.get(host.device.type, NUMBERS_AT_ONCE["cpu"])
    per_row = context * max(host.n_layers * host.d_model, clt.config.n_features)
    return max(1, min(ROWS_AT_ONCE, numbers // per_row))


def check_shape(host: Host, clt: CLT) -> None:
    """Raise ConfigError if the shapes of transcoder and host differ."""
    c = clt.config
    if (c.n_layers, c.d_model) != (host.n_layers, host.d_model):
        raise ConfigError(
            f"the transcoder has {c.n_layers} layers of width {c.d_model}, {host.name} {host.n_layers} of width "
            f"{host.d_model}; give the model it was trained on with --model"
        )
