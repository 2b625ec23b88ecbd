"""Start of a run: manifest, normalisation, initial weights and biases."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version

import torch
from rich.console import Console

from crosslayer.clt.config import CLTConfig
from crosslayer.clt.init import centre, cut_for_density, initialise, set_bias_for_density
from crosslayer.clt.precision import DTYPES
from crosslayer.clt.shard import share_of
from crosslayer.core.errors import RunError
from crosslayer.core.progress import track
from crosslayer.data.rows import Documents, RowStream
from crosslayer.data.sources import ListedSource, Source, Weighted
from crosslayer.data.units import Estimate, Means, estimate, estimate_tokens
from crosslayer.host.host import Host
from crosslayer.parallel import Mesh
from crosslayer.schemas.run import RunManifest
from crosslayer.training.config import TrainConfig
from crosslayer.training.optimiser import Adam
from crosslayer.training.plan import HostShape
from crosslayer.training.schedule import Cut, Penalty
from crosslayer.training.state import TrainState


def empty_state(config: TrainConfig, whole: CLTConfig, mesh: Mesh, device: str) -> TrainState:
    """Return the state of a run before weights are initialised, for the features of this rank.

    Args:
        whole: config of the whole transcoder, over all ranks.
    """
    clt = share_of(whole, mesh, dtype=DTYPES[config.precision], device=device)
    groups = [{"params": [p for p in clt.parameters() if p.requires_grad], "lr": config.lr}]
    start_density = config.first_l0(whole.n_layers) / (whole.n_layers * config.n_features)
    return TrainState(
        clt=clt,
        optimiser=Adam(groups, (config.beta1, config.beta2), config.seed, config.moments),
        cut=Cut(),
        penalty=Penalty(),
        inactive_LF=torch.zeros(whole.n_layers, clt.config.n_features, dtype=torch.int64, device=device),
        density_L=[start_density] * whole.n_layers,
    )


def set_first_weights(state: TrainState, config: TrainConfig, host: Host, found: Estimate) -> None:
    """Initialise weights, and set the cut (JumpReLU) or biases (ReLU) so that the first L0 is the requested one.

    Biases start at the means, so that features begin with what varies.

    Args:
        found: estimate on training text, the same on every rank.
    """
    clt, units, sample_BLD = state.clt, state.units, found.sample_BLD
    assert units is not None
    initialise(clt, config.seed)
    centre(clt, units.inputs(found.mean.x_LD[None])[0], units.outputs(found.mean.y_LD[None])[0])
    if not clt.config.ranks:
        share = config.first_l0(host.n_layers) / (host.n_layers * config.n_features)
        x_BLD = units.inputs(sample_BLD)
        if clt.config.kind.thresholds:
            state.cut.log_tau = math.log(cut_for_density(clt, x_BLD, share))
        else:
            set_bias_for_density(clt, x_BLD, share)
    clt.mesh.data.copy_from_first(clt.parameters())


def units_of_text(
    config: TrainConfig, host: Host, sources: Sequence[Weighted], mesh: Mesh, device: str, console: Console
) -> Estimate:
    """Estimate the normalisation on training text; it is the same on every rank."""
    n_tokens = estimate_tokens(config.scale_tokens, config.tokens // config.reuse, host.d_model)
    rows = RowStream(host, Documents(sources, "train", config.seed), config.context)
    with track(console, "normalise", n_tokens) as update:
        found = estimate(host, rows.rows, n_tokens, config.rows_per_forward, lambda done: update(min(done, n_tokens)))
    # The sign of an eigenvector is arbitrary: ranks must agree on it.
    found = found._replace(
        units=found.units.to(device), typical=found.typical.to(device), mean=Means(*(t.to(device) for t in found.mean))
    )
    mesh.world.copy_from_first([*found.units, *found.typical, *found.mean])
    return found


def new_manifest(config: TrainConfig, host: Host, clt: CLTConfig, sources: Sequence[Weighted]) -> RunManifest:
    """Return the manifest of a new run."""
    import transformers

    total = sum(s.weight for s in sources)
    return RunManifest(
        state="training",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=config.as_dict(),
        host={
            "name": host.name,
            "model_type": host.model_type,
            "n_layers": host.n_layers,
            "d_model": host.d_model,
            "n_vocab": host.n_vocab,
            "precision": "bf16" if host.dtype == torch.bfloat16 else "fp32",
        },
        clt={**asdict(clt), "n_parameters": clt.n_parameters},
        policy=host.policy,
        sources=[{"name": s.name, "share": weight / total, "digest": _digest(s)} for s, weight in sources],
        versions={
            "crosslayer": version("crosslayer"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _digest(source: Source) -> str | None:
    return source.digest() if isinstance(source, ListedSource) else None


def check_same_text(manifest: RunManifest, sources: Sequence[Weighted]) -> None:
    """Refuse to resume on other text than the run started with; streamed sources are not compared."""
    for saved, (source, _) in zip(manifest.sources, sources, strict=True):
        if saved.get("digest") != _digest(source):
            raise RunError(f"{source.name} has changed since the run started; restore it, or start a new run")


def shape_of(host: Host) -> HostShape:
    """Return the shape of a loaded host, for `plan`."""
    total = sum(p.numel() for p in host.model.parameters())
    return HostShape(
        name=host.name,
        n_layers=host.n_layers,
        d_model=host.d_model,
        n_parameters=total,
        n_matrix_parameters=total - host.n_vocab * host.d_model,
    )
