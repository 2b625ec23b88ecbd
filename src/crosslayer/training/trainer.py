"""The training loop: trains, evaluates and saves a transcoder in a run folder.

    load host and text -> estimate normalisation -> fill the activation buffer -> training steps ->
    convert, fold, save -> evaluate

The same code runs in one process and under `torchrun`, on a mesh of data ranks and feature ranks (docs/many-gpus.md).
Each rank collects activations for its part of the batch. Feature ranks gather the tokens of their group and sum their
reconstructions. Gradients are averaged over data ranks. A run that is killed at any step and resumed is bitwise
identical to an uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import Parameter

from crosslayer import parallel
from crosslayer.clt.open import load_clt
from crosslayer.clt.precision import dtype_of
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError, CrosslayerError, RunError
from crosslayer.core.files import locked
from crosslayer.core.progress import Update, track
from crosslayer.data.rows import Cursor, Documents, RowStream, held_out_rows, redistribute
from crosslayer.data.sources import Weighted, open_sources
from crosslayer.data.stream import ActivationStream, StreamState
from crosslayer.eval.evaluate import evaluate_rows
from crosslayer.host.host import Host, choose_device, load_host
from crosslayer.parallel import Mesh
from crosslayer.schemas.evaluation import Evaluation
from crosslayer.schemas.run import host_precision, read_manifest
from crosslayer.training import checkpoint
from crosslayer.training.config import TrainConfig
from crosslayer.training.gradients import FusedUpdate, Gradients
from crosslayer.training.objective import SPARSE_BELOW, compute
from crosslayer.training.plan import budget_of, check_fits
from crosslayer.training.publish import convert, in_host_units, publish
from crosslayer.training.run_folder import Log, refuse_unless_new, resumed_config, write_manifest
from crosslayer.training.schedule import l0_asked, learning_rate
from crosslayer.training.settings import Choice, by_budget, print_choices
from crosslayer.training.setup import (
    check_same_text,
    empty_state,
    new_manifest,
    set_first_weights,
    shape_of,
    units_of_text,
)
from crosslayer.training.share import plan_of_one_rank
from crosslayer.training.signals import stop_signals
from crosslayer.training.sinks import open_sinks
from crosslayer.training.state import Restored, identity

METRICS = ("reconstruction", "sparsity", "revival", "variance", "dead_share")


class Trained(NamedTuple):
    """The result of a finished run."""

    folder: Path
    clt: CLT
    """In the host's units, as saved in `clt/`."""
    evaluation: Evaluation


class Stopped(CrosslayerError):
    """The run was interrupted; its state is saved and `--resume` continues it."""


def train(
    config: TrainConfig,
    out: Path | str,
    *,
    resume: bool = False,
    step: int | None = None,
    host: Host | None = None,
    console: Console | None = None,
) -> Trained:
    """Train a transcoder into the folder `out`.

    Args:
        config: all settings; see `crosslayer.training.recipes` for tested ones.
        out: run folder; must be new unless `resume`.
        resume: resume from the last checkpoint of `out`.
        step: with `resume`, resume from the checkpoint of this step instead.
        host: a loaded host, used instead of `config.model`.
        console: console for progress; quiet by default.

    Raises:
        CrosslayerError: for invalid input, before anything is written.
        Stopped: after Ctrl-C or SIGTERM, when the state is saved.
        RunError: if another rank was lost; names the checkpoint to resume from.
    """
    try:
        return _train(config, out, resume, step, host, console)
    except parallel.LostRank as error:
        saved = checkpoint.steps(Path(out))
        remedy = (
            f"resume from the checkpoint of step {saved[-1]} with --resume {out}, on any number of ranks"
            if saved
            else "there is no checkpoint yet; start again"
        )
        raise RunError(f"{error}; {remedy}") from error


def _train(
    config: TrainConfig, out: Path | str, resume: bool, step: int | None, host: Host | None, console: Console | None
) -> Trained:
    run, console = Path(out), console or Console(quiet=True)
    parallel.start()
    if not parallel.is_first():
        console = Console(quiet=True)
    # A resumed run keeps the precision that it started with, whatever is faster now.
    precision, choices = config.host_precision, list[Choice]()
    if resume:
        manifest = read_manifest(run)
        config = resumed_config(manifest.config, config.given())
        precision = host_precision(manifest)
    else:
        parallel.world().by_first(lambda: refuse_unless_new(run))
    device = choose_device(config.device)
    mesh = parallel.lay_out(config.feature_ranks, torch.device(device).type)
    host = load_host(
        host or config.model,
        dtype=dtype_of(precision, device),
        device=device,
        input_hook=config.input_hook,
        output_hook=config.output_hook,
        policy=config.policy,
    )
    if config.context > host.max_positions:
        raise ConfigError(
            f"context={config.context} exceeds the context of {host.name}, {host.max_positions}; lower --context"
        )
    if not resume:
        # Machines of several nodes may differ in memory: all take the settings of the first.
        config, choices = parallel.world().objects(by_budget(config, budget_of(config, shape_of(host))))[0]
    check_fits(plan_of_one_rank(config, shape_of(host), mesh.data.size), config, run)
    sources = open_sources(config.text, config.column)
    held_out = held_out_rows(host, sources, config.context, config.eval_tokens)
    with _locked_by_first(run):
        trainer = Trainer(config, run, host, sources, device, console, mesh)
        print_choices(console, choices)
        trainer.prepare(resume, step)
        trainer.run_steps(held_out)
        return trainer.finish(held_out)


class Trainer:
    """Prepares a run, runs its steps, and saves its state."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        host: Host,
        sources: Sequence[Weighted],
        device: str,
        console: Console,
        mesh: Mesh,
    ) -> None:
        self.config, self.run, self.host, self.sources = config, run, host, sources
        self.device, self.console, self.mesh = device, console, mesh
        documents = Documents(sources, "train", config.seed, mesh.world.rank, mesh.world.size)
        self.rows = RowStream(host, documents, config.context)
        self.whole = config.clt(host.n_layers, host.d_model)
        self.state = empty_state(config, self.whole, mesh, device)
        self.target = config.target_l0(host.n_layers)
        # Sums since the last log line.
        self.error_L = self.variance_L = torch.zeros(host.n_layers, dtype=torch.float64)
        self.log = Log(run)
        self.manifest = new_manifest(config, host, self.whole, sources)

    def prepare(self, resume: bool, step: int | None) -> None:
        """Set up normalisation, activation buffer and weights, from a checkpoint if `resume`."""
        first, config, state = self.mesh.world.rank == 0, self.config, self.state
        found = checkpoint.find(self.run, step, self.mesh) if resume else None
        if resume:
            self.manifest = read_manifest(self.run)
            self.manifest.state, self.manifest.config = "training", config.as_dict()
            check_same_text(self.manifest, self.sources)
        restored = self.restore(found) if found else None
        self.sinks = self.mesh.world.by_first(lambda: open_sinks(config, self.run)) or []
        if first:
            write_manifest(self.run, self.manifest)
            checkpoint.clear_unfinished(self.run)
            self.log.cut_back(state.step)
            if found:
                checkpoint.drop_after(self.run, state.step)
        self.mesh.world.barrier()
        if not (self.run / "run.json").exists():
            raise RunError(
                f"rank {self.mesh.world.rank} does not see {self.run}, which rank 0 created; give --out on a file"
                " system that all nodes share"
            )
        if not restored:
            estimate = units_of_text(config, self.host, self.sources, self.mesh, self.device, self.console)
            state.units, state.typical = estimate.units, estimate.typical
            set_first_weights(state, config, self.host, estimate)
        assert state.typical is not None
        self.stream = ActivationStream(
            self.rows,
            config.buffer_tokens // self.mesh.world.size,
            config.rows_per_forward,
            reuse=config.reuse,
            typical=state.typical,
            state=self._stream_state(restored) if restored else None,
        )

    def restore(self, folder: Path) -> Restored:
        """Load the state of a checkpoint."""
        return self.state.restore(folder, identity(self.host.name, self.whole, self.config))

    def _stream_state(self, restored: Restored) -> StreamState | None:
        """Return the state of this rank's stream; on another mesh, redistribute the remaining text instead."""
        if restored.mesh == self.mesh.shape:
            return restored.streams[self.mesh.world.rank]
        self.console.print(
            "the run was saved on {} x {} ranks (data x features) and resumes on {} x {}: weights and optimiser are"
            " unchanged, remaining text is redistributed".format(*restored.mesh, *self.mesh.shape),
            highlight=False,
        )
        cursors = [Cursor.of(state.start) for state in restored.streams]
        self.rows.cursor = redistribute(cursors, self.mesh.world.rank, self.mesh.world.size)
        return None

    def run_steps(self, held_out: Tensor) -> None:
        """Train until the last step.

        Raises:
            Stopped: after Ctrl-C or SIGTERM.
        """
        window: list[dict[str, float]] = []
        config, state, steps = self.config, self.state, self.config.steps
        with stop_signals() as asked, track(self.console, "train", steps) as update:
            while state.step < steps:
                began = time.perf_counter()
                window.append(self.one_step())
                state.step += 1
                state.train_s += time.perf_counter() - began
                if state.step % config.log_every == 0 or state.step == steps:
                    self._report(window, update)
                    window.clear()
                if config.eval_every and state.step % config.eval_every == 0 and state.step < steps:
                    self._evaluate_held_out(held_out)
                stop = self.mesh.world.any_(bool(asked))
                if stop or state.step % config.checkpoint_every == 0:
                    self.save()
                if stop and state.step < steps:
                    self._write_state("stopped")
                    raise Stopped(f"stopped at step {state.step} of {steps}; resume with --resume {self.run}")

    def one_step(self) -> dict[str, float]:
        """Do one training step and return its metrics."""
        config, state = self.config, self.state
        clt, steps = state.clt, config.steps
        asked, next_asked = (self._l0_asked(step) for step in (state.step, state.step + 1))
        penalty = 0.0
        if clt.config.kind.thresholds:
            clt.set_cut(state.cut.tau)
            penalty = config.sparsity * state.cut.tau**2
        elif not clt.config.ranks:
            penalty = state.penalty.coefficient(asked)
        for group in state.optimiser.param_groups:
            group["lr"] = config.lr * learning_rate((state.step + 1) / (steps + 1), config.warmup, config.decay)
        dead_LF = state.inactive_LF >= config.dead_after
        sparse_L = [density < SPARSE_BELOW[torch.device(self.device).type] for density in state.density_L]
        # Gradients that need no sum over micro-batches or ranks are applied as soon as they are known.
        fused = config.accumulate == 1 and self.mesh.data.size == 1
        gradients = FusedUpdate(self._update) if fused else Gradients()
        fired_LF = torch.zeros_like(state.inactive_LF)
        sums, micro = torch.zeros(len(METRICS), dtype=torch.float64), config.batch // config.accumulate
        layers_2L, above = torch.zeros(2, self.host.n_layers, dtype=torch.float64), 0.0
        features, data = self.mesh.features, self.mesh.data
        for _ in range(config.accumulate):
            x_BLD, y_BLD = self._batch(micro // self.mesh.world.size)
            terms = compute(
                clt,
                x_BLD,
                y_BLD,
                config,
                gradients,
                dead_LF=dead_LF,
                sparse_L=sparse_L,
                penalty=penalty,
                l0=asked if clt.config.ranks else None,
                share=1 / config.accumulate,
            )
            fired_LF += terms.fired_LF
            mean_LD = data.sum_(y_BLD.mean(0)) / data.size
            variance_L = (y_BLD - mean_LD).square().sum(dim=(0, 2)) / len(y_BLD)
            # Feature ranks have the same reconstruction, and each the penalties of its own features.
            rank_share = 1 / features.size
            sums += torch.tensor(
                [
                    terms.reconstruction * rank_share,
                    terms.sparsity,
                    terms.revival,
                    variance_L.sum() * rank_share,
                    dead_LF.double().mean() * rank_share,
                ],
                dtype=torch.float64,
            )
            layers_2L += torch.stack([terms.error_L, variance_L]).double().cpu() * rank_share
            above += terms.above
        self.mesh.world.sum_(sums)
        self.mesh.world.sum_(layers_2L)
        self.error_L, self.variance_L = self.error_L + layers_2L[0], self.variance_L + layers_2L[1]
        metrics: dict[str, float] = dict(zip(METRICS, (sums / (config.accumulate * data.size)).tolist(), strict=True))
        metrics["loss"] = metrics["reconstruction"] + penalty * metrics["sparsity"] + metrics["revival"]
        if not math.isfinite(metrics["loss"]):
            raise RunError(
                f"the loss of step {state.step + 1} is not finite; lower --lr in a new run, or resume from an earlier"
                f" step with --resume {self.run} --step"
            )
        gradients.average(data)
        if not fused:
            state.optimiser.step(gradients, self._scale())
        state.last_norm = metrics["gradient_norm"] = float(gradients.norm(clt))
        del gradients
        data.sum_(fired_LF)
        state.inactive_LF = torch.where(fired_LF > 0, 0, state.inactive_LF + config.batch)
        l0_L = features.sum_(fired_LF.sum(1).double()) / config.batch
        state.density_L = (l0_L / config.n_features).tolist()
        l0 = float(l0_L.sum())
        if clt.config.kind.thresholds:
            state.cut.observe(l0, self.mesh.world.total(above) / config.batch, asked, next_asked)
        elif not clt.config.ranks:
            state.penalty.observe(l0, asked)
        return metrics | {"l0": l0, "l0_asked": asked, "lambda": penalty, "tau": state.cut.tau}

    def _l0_asked(self, step: int) -> float:
        config = self.config
        return l0_asked(step / config.steps, config.first_l0(self.host.n_layers), self.target, config.l0_ramp)

    def _update(self, p: Parameter, blocks: Iterator[tuple[slice, Tensor]]) -> None:
        """Update one parameter during the step."""
        self.state.optimiser.update(p, blocks, self._scale())

    def _scale(self) -> float:
        """Return the factor that clips gradients to the maximum norm, by the norm of the previous step."""
        return (
            min(1.0, self.config.clip / (self.state.last_norm + 1e-6))
            if self.config.clip and self.state.last_norm
            else 1.0
        )

    def _batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Return normalised inputs and outputs of the next `n` tokens of each feature rank of this group."""
        began = time.perf_counter()
        x_BLD, y_BLD = (self.mesh.features.cat(a.to(self.device)) for a in self.stream.batch(n))
        assert self.state.units is not None
        x_BLD, y_BLD = self.state.units.inputs(x_BLD), self.state.units.outputs(y_BLD)
        self.state.collect_s += time.perf_counter() - began
        return x_BLD, y_BLD

    def _report(self, window: list[dict[str, float]], update: Update) -> None:
        state = self.state
        means = {name: sum(w[name] for w in window) / len(window) for name in window[-1]}
        tokens = state.step * self.config.batch
        counts = self.mesh.world.sum_(torch.tensor(self.stream.counts, dtype=torch.float64))
        record = {
            "step": state.step,
            "tokens": tokens,
            **{k: means[k] for k in ("loss", "reconstruction", "sparsity", "revival")},
            "fvu": means["reconstruction"] / means["variance"],
            "fvu_L": (self.error_L / self.variance_L).tolist(),
            "l0": means["l0"],
            "l0_per_layer": means["l0"] / self.host.n_layers,
            **{k: means[k] for k in ("l0_asked", "lambda", "tau", "dead_share")},
            "massive_share": float(counts[1] / counts[0]),
            "gradient_norm": means["gradient_norm"],
            "lr": state.optimiser.param_groups[0]["lr"],
            "train_s": round(state.train_s, 3),
            "collect_s": round(state.collect_s, 3),
            "tokens_per_s": tokens / state.train_s,
            "collect_tokens_per_s": tokens / state.collect_s,
            "step_tokens_per_s": tokens / (state.train_s - state.collect_s),
        }
        self.error_L = self.variance_L = torch.zeros_like(self.error_L)
        if self.mesh.world.rank == 0:
            self._record(record)
        update(
            state.step,
            f"loss {record['loss']:.1f}  FVU {record['fvu']:.3f}  L0 {record['l0']:.1f} ({record['l0_per_layer']:.1f}"
            f" per layer)  dead {record['dead_share']:.1%}  {record['tokens_per_s']:,.0f} tokens/s,"
            f" {state.collect_s / state.train_s:.0%} of it collecting activations",
        )

    def _record(self, record: dict[str, Any]) -> None:
        """Write one record to the log and the sinks."""
        self.log.write(record)
        for sink in self.sinks:
            sink(record)

    def _evaluate_held_out(self, held_out: Tensor) -> None:
        clt = self.in_host_units()
        e = evaluate_rows(self.host, clt, held_out[:64], [s.source.name for s in self.sources], replacement_tokens=4096)
        if self.mesh.world.rank == 0:
            self._record({"step": self.state.step, "eval": e.model_dump(exclude={"density_log10_edges", "sources"})})

    def in_host_units(self) -> CLT:
        """Return the current transcoder as JumpReLU at the target L0, in the host's units."""
        assert self.state.units is not None
        return in_host_units(self.state.clt, self.state.units, self.config, self.host, self._following_rows())

    def _following_rows(self) -> RowStream:
        """Return the text after what this run has collected, the same on every rank."""
        world, config = self.mesh.world, self.config
        rows = RowStream(self.host, Documents(self.sources, "train", config.seed, 0, world.size), config.context)
        rows.cursor = world.objects(self.rows.cursor)[0]
        return rows

    def finish(self, held_out: Tensor) -> Trained:
        """Convert, fold, save and evaluate the transcoder."""
        self.save()
        assert self.state.units is not None
        rows = self._following_rows()
        converted = convert(self.state.clt, self.state.units, self.config, self.host, rows, self.console)
        evaluation = publish(
            converted,
            self.config,
            self.run,
            self.host,
            self.sources,
            held_out,
            self.mesh,
            self.console,
            self.state.train_s,
        )
        self._write_state("finished")
        self.mesh.world.barrier()
        return Trained(self.run, converted.clt if self.mesh.features.size == 1 else load_clt(self.run).clt, evaluation)

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        streams = self.mesh.world.objects(self.stream.state.plain())
        saved = self.state.saved(identity(self.host.name, self.whole, self.config), streams)
        checkpoint.save(self.run, self.state.step, saved, self.config.keep, self.mesh)
        self._write_state("training")

    def _write_state(self, state: Any) -> None:
        self.manifest.state = state
        self.manifest.step, self.manifest.train_s = self.state.step, round(self.state.train_s, 3)
        self.manifest.tokens = self.state.step * self.config.batch
        if self.mesh.world.rank == 0:
            write_manifest(self.run, self.manifest)


@contextmanager
def _locked_by_first(run: Path) -> Iterator[None]:
    with ExitStack() as held:
        parallel.world().by_first(lambda: held.enter_context(locked(run)))
        yield
