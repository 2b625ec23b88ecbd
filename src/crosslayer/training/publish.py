"""End of a run: convert, fold, save and evaluate."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

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
from crosslayer.core.progress import Update, track
from crosslayer.data.massive import Typical
from crosslayer.data.rows import RowStream
from crosslayer.data.sources import Weighted
from crosslayer.data.stream import Activations, collect_activations
from crosslayer.data.units import Units
from crosslayer.eval.baseline import Affine, AffineMoments
from crosslayer.eval.evaluate import evaluate_rows
from crosslayer.eval.report import model_card
from crosslayer.host.host import Host
from crosslayer.parallel import Mesh
from crosslayer.schemas.evaluation import Evaluation, TrainingEnd
from crosslayer.training.config import TrainConfig

AFFINE_BYTES = 4 << 30
"""Maximum memory for the affine baseline's moments; larger hosts get no baseline."""
LAST = 0.05
"""Share of the log, at its end, over which the L0 in training is averaged."""


KEEP = 0.05
"""Trained thresholds are kept if the L0 on the calibration text is within this share of the target: the mean L0 of a
hundred documents is not known better, and the end of the training run is a larger sample."""


class Converted(NamedTuple):
    """A trained transcoder in the form that is saved, and what its calibration measured."""

    clt: CLT
    """JumpReLU at the target L0, in the host's units."""
    l0_before: float | None
    """L0 with the trained thresholds; None if the activation has none."""
    affine: Affine | None
    """Baseline fitted on the calibration tokens, if asked for."""


def in_host_units(clt: CLT, units: Units, config: TrainConfig, host: Host, rows: RowStream) -> CLT:
    """Return a JumpReLU copy, calibrated to the target L0 on training text, with the normalisation folded in."""
    return convert(clt, units, config, host, rows, Console(quiet=True), baseline=False).clt


def convert(
    clt: CLT,
    units: Units,
    config: TrainConfig,
    host: Host,
    rows: RowStream,
    console: Console,
    *,
    baseline: bool = True,
) -> Converted:
    """Calibrate to the target L0 on training text and fold the normalisation in.

    Args:
        rows: training text, best such that the run has not trained on it: there the L0 is that of other text.
        console: for progress, and for a message if the host is too large for the baseline.
        baseline: fit the affine baseline on the same tokens.
    """
    n_bytes = AffineMoments.size_bytes(host.n_layers, host.d_model)
    if baseline and n_bytes > AFFINE_BYTES:
        console.print(
            f"no affine baseline: it needs {n_bytes / 2**30:.1f} GiB, over {AFFINE_BYTES >> 30}", highlight=False
        )
    moments = AffineMoments(host.n_layers, host.d_model) if baseline and n_bytes <= AFFINE_BYTES else None
    calibrates = clt.config.ranks or clt.config.kind.thresholds

    def batches(update: Update) -> Iterator[Tensor]:
        n_tokens = 0
        for batch in calibration_text(config, host, rows):
            if moments:
                moments.add(*batch)
            if calibrates:
                yield from (units.inputs(x_BLD) for x_BLD in batch.x_BLD.split(2048))
            n_tokens += len(batch.x_BLD)
            update(min(n_tokens, config.calibration_tokens))

    l0_before = None
    with track(console, "calibrate", config.calibration_tokens) as update:
        if calibrates:
            converted, l0_before = to_jumprelu(clt, batches(update), config.target_l0(host.n_layers), KEEP)
        else:
            converted = copy.deepcopy(clt)
            if moments:
                assert not list(batches(update)), "an activation without thresholds is not calibrated"
    return Converted(fold(converted, *units), l0_before, moments.solve() if moments else None)


def calibration_text(config: TrainConfig, host: Host, rows: RowStream) -> Iterator[Activations]:
    """Yield the activations of training text, at least `calibration_tokens` tokens, without massive ones."""
    typical, n_tokens = None, 0
    while n_tokens < config.calibration_tokens:
        x_BLD, y_BLD = collect_activations(host, rows.rows(config.rows_per_forward))
        typical = typical or Typical.of([(x_BLD, y_BLD)])
        usual_B = ~typical.massive(x_BLD, y_BLD)
        n_tokens += len(x_BLD)
        yield Activations(x_BLD[usual_B], y_BLD[usual_B])


def publish(
    converted: Converted,
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
        held_out: rows of token ids.
        train_s: seconds of training, for the model card.
    """
    clt = converted.clt
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
        evaluation = evaluate_rows(
            host,
            clt,
            held_out,
            names,
            affine=converted.affine,
            training=TrainingEnd(
                trained_as=config.activation,
                l0_asked=config.target_l0(host.n_layers),
                l0_training=last_l0(run),
                l0_uncalibrated=converted.l0_before,
            ),
            on_progress=update,
        )
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


def last_l0(run: Path) -> float | None:
    """Return the mean L0 over the last records of `log.jsonl`; None if there are none."""
    log = run / "log.jsonl"
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    l0s = [record["l0"] for record in records if "l0" in record]
    return fmean(l0s[-math.ceil(LAST * len(l0s)) :]) if l0s else None


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
