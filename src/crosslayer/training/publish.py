"""End of a run: convert, fold, save and evaluate."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor

from crosslayer.clt.calibrate import to_jumprelu
from crosslayer.clt.config import Provenance
from crosslayer.clt.fold import fold
from crosslayer.clt.formats import published
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.open import load_clt
from crosslayer.clt.shard import join
from crosslayer.clt.transcoder import CLT
from crosslayer.core.files import write_json, write_text
from crosslayer.core.progress import track
from crosslayer.data.rows import Documents, RowStream
from crosslayer.data.sources import Weighted
from crosslayer.data.stream import collect_activations
from crosslayer.data.units import Units
from crosslayer.eval.evaluate import evaluate_rows
from crosslayer.eval.report import model_card
from crosslayer.host.host import Host
from crosslayer.parallel import Mesh
from crosslayer.schemas.evaluation import Evaluation
from crosslayer.training.config import TrainConfig


def in_host_units(clt: CLT, units: Units, config: TrainConfig, host: Host, sources: Sequence[Weighted]) -> CLT:
    """Return a JumpReLU copy, calibrated to the target L0 on training text, with the normalisation folded in."""
    if not (clt.config.ranks or clt.config.kind.thresholds):
        return fold(copy.deepcopy(clt), *units)
    # A different order than in training, so that tokens come from all of the text.
    rows = RowStream(host, Documents(sources, "train", config.seed + 1), config.context)
    n_forwards = -(-config.calibration_tokens // (config.rows_per_forward * (config.context - config.n_skip)))
    forwards = (collect_activations(host, rows.rows(config.rows_per_forward)).x_BLD for _ in range(n_forwards))
    batches = (units.inputs(x) for activations in forwards for x in activations.split(2048))
    return fold(to_jumprelu(clt, batches, config.target_l0(host.n_layers)), *units)


def publish(
    clt: CLT,
    config: TrainConfig,
    run: Path,
    host: Host,
    sources: Sequence[Weighted],
    held_out: Tensor,
    mesh: Mesh,
    console: Console,
    train_s: float,
) -> Evaluation:
    """Write `clt/`, evaluate it, and write its model card and `eval.json`.

    Args:
        clt: in the host's units.
        held_out: rows of token ids.
        train_s: seconds of training, for the model card.
    """
    provenance = Provenance(
        model_name=host.name,
        scan=run.resolve().name,
        input_hook=host.input_hook,
        output_hook=host.output_hook,
        policy=host.policy,
        extra={"trained_as": config.activation, "ranking": "value times decoder norm"} if config.ranks else {},
    )
    # Save before evaluating, which takes long: a saved transcoder cannot be lost.
    write_clt(clt, provenance, run, mesh)
    names = [s.source.name for s in sources]
    with track(console, "measure", 1.0) as update:
        evaluation = evaluate_rows(host, clt, held_out, names, on_progress=update)
    if mesh.world.rank == 0:
        trained = {
            "training tokens": f"{config.steps * config.batch:,}",
            "sources": ", ".join(f"{s.source.name} ({s.weight:g})" for s in sources),
            "trained as": f"{config.activation}, {config.precision}",
            "training time": f"{train_s:.0f} s on {clt.device}",
        }
        whole = replace(clt.config, n_features=config.n_features)
        write_text(run / "clt" / "README.md", model_card(whole, provenance, evaluation, trained))
        write_json(run / "eval.json", evaluation.model_dump())
    return evaluation


def write_clt(clt: CLT, provenance: Provenance, run: Path, mesh: Mesh) -> None:
    """Write `clt/`: each feature rank writes its features, then rank 0 merges them, some rows at a time."""
    world, features, parts = mesh.world, mesh.features, run / ".clt-parts"
    target = run / "clt"
    if world.rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(parts, ignore_errors=True)
    world.barrier()
    if features.size > 1 and mesh.data.rank == 0:
        published.save(clt, provenance, parts / f"{features.rank:04d}")
    world.barrier()
    if world.rank == 0:
        whole = (
            join([load_clt(part) for part in sorted(parts.iterdir())]) if features.size > 1 else Opened(clt, provenance)
        )
        published.save(*whole, target)
        shutil.rmtree(parts, ignore_errors=True)
    world.barrier()
