"""The training loop: from a config and a folder to a trained, measured, saved transcoder.

    open the host and the text -> estimate normalisation -> fill the ring -> step, step, step -> convert, fold, save -> measure

The same code runs in one process and under `torchrun`, on a mesh of ranks that share the tokens and ranks that share the
features (docs/many-gpus.md). Each rank harvests its part of the batch; ranks that share features gather theirs, so that all of
them see all their tokens; what their features write is summed; gradients are averaged over ranks that share the tokens.
Killed at any step and resumed, a run ends bit-equal to one that was not.
"""

from __future__ import annotations

import copy
import datetime
import math
import platform
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import Parameter

from crosslayer import dist
from crosslayer.acts.rows import Cursor, Documents, RowStream, dealt_anew, document_tokens, held_out_rows
from crosslayer.acts.sources import ListedSource, Source, Weighted, open_sources
from crosslayer.acts.stream import ActivationStream, StreamState, harvest
from crosslayer.acts.units import Units, estimate_units
from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.convert import to_jumprelu
from crosslayer.clt.fold import fold
from crosslayer.clt.formats import published
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.init import initialise, set_bias_for_density
from crosslayer.clt.open import load_clt
from crosslayer.clt.shard import by_feature, join, share_of
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError, CrosslayerError, RunError
from crosslayer.core.files import locked, write_json, write_text
from crosslayer.core.progress import Update, track
from crosslayer.dist import Mesh
from crosslayer.eval.evaluate import evaluate_rows
from crosslayer.eval.report import model_card
from crosslayer.host.host import Host, choose_device, load_host
from crosslayer.records.evaluation import Evaluation
from crosslayer.records.run import RunManifest
from crosslayer.train import checkpoint
from crosslayer.train.config import TrainConfig
from crosslayer.train.gradients import FusedUpdate, Gradients
from crosslayer.train.objective import SPARSE_BELOW, compute
from crosslayer.train.optimiser import Adam
from crosslayer.train.plan import HostShape, check_fits
from crosslayer.train.run_folder import Log, check_same_config, read_manifest, refuse_unless_new, write_manifest
from crosslayer.train.schedule import Controller, Window, l0_asked, learning_rate
from crosslayer.train.share import plan_of_one_rank
from crosslayer.train.sinks import open_sinks

BIAS_TOKENS, BIAS_STRIDE = 8_192, 8
"""Tokens on which biases are set at the start, and how many lie from one to the next, so that they come from many documents."""
FIGURES = ("reconstruction", "sparsity", "revival", "variance", "dead_share")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trained(NamedTuple):
    """What a finished run gives back."""

    folder: Path
    clt: CLT
    """In the host's own units, as saved under `clt/`."""
    evaluation: Evaluation


class _Loaded(NamedTuple):
    """What of a checkpoint is not in the trainer's own state."""

    units: Units
    mesh: tuple[int, int]
    """Data and feature ranks that saved it."""
    streams: list[StreamState]


class Stopped(CrosslayerError):
    """The run was asked to stop; its state is saved and `--resume` goes on."""


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
        config: every setting; `crosslayer.train.recipes` has some that work.
        out: the run folder, new unless `resume`.
        resume: go on from the last checkpoint of `out`.
        step: go on from this step's checkpoint instead.
        host: a host that is loaded already, in place of `config.model`.
        console: where progress goes; quiet by default.

    Raises:
        CrosslayerError: for everything that a person can get wrong, before anything is written.
        Stopped: after Ctrl-C or SIGTERM, the state saved.
        RunError: also where another rank was lost; it names the checkpoint to go on from.
    """
    try:
        return _train(config, out, resume, step, host, console)
    except dist.LostRank as error:
        there = checkpoint.steps(Path(out))
        remedy = f"go on from the checkpoint of step {there[-1]} with --resume {out}, on as many ranks or others" if there else "there is no checkpoint yet, start again"  # fmt: skip
        raise RunError(f"{error}; {remedy}") from error


def _train(
    config: TrainConfig, out: Path | str, resume: bool, step: int | None, host: Host | None, console: Console | None
) -> Trained:
    run, console = Path(out), console or Console(quiet=True)
    dist.start()
    if not dist.is_first():
        console = Console(quiet=True)
    if resume:
        manifest = read_manifest(run)
        check_same_config(manifest.config, config.as_dict())
    else:
        dist.world().by_first(lambda: refuse_unless_new(run))
    device = choose_device(config.device)
    mesh = dist.lay_out(config.feature_ranks, torch.device(device).type)
    host = load_host(
        host or config.model,
        dtype=DTYPES[config.host_precision],
        device=device,
        input_hook=config.input_hook,
        output_hook=config.output_hook,
        policy=config.policy,
    )
    if config.context > host.max_positions:
        raise ConfigError(
            f"context={config.context} exceeds that of {host.name}, {host.max_positions}; lower --context"
        )
    check_fits(plan_of_one_rank(config, _shape(host), mesh.data.size), config, run)
    sources = open_sources(config.text)
    held_out = held_out_rows(host, sources, config.context, config.eval_tokens)
    with _locked_by_first(run):
        trainer = Trainer(config, run, host, sources, device, console, mesh)
        trainer.prepare(resume, step)
        trainer.run_steps(held_out)
        return trainer.finish(held_out)


class Trainer:
    """The state of a run, and what happens to it."""

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
        self.clt = share_of(self.whole, mesh, dtype=DTYPES[config.precision], device=device)
        thresholds = list(self.clt.threshold)
        weights = [p for name, p in self.clt.named_parameters() if not name.startswith("threshold")]
        groups = [{"params": weights, "lr": config.lr}]
        if thresholds:
            groups.append({"params": thresholds, "lr": config.threshold_lr})
        self.base_lr = [config.lr, config.threshold_lr]
        self.optimiser = Adam(groups, (config.beta1, config.beta2), config.seed, config.moments)
        self.steps = config.tokens // config.batch
        self.target = config.target_l0(host.n_layers)
        self.start_l0 = min(self.target * config.l0_start, 0.5 * host.n_layers * config.n_features)
        self.controller = Controller(integral=-7.0)
        self.window = Window(config.eps, config.window_cap, config.eps)
        self.silent_LF = torch.zeros(host.n_layers, self.clt.config.n_features, dtype=torch.int64, device=device)
        self.step, self.train_s, self.harvest_s = 0, 0.0, 0.0
        # Of each layer's entries, at the step before; the norm as well, which a fused update is clipped by.
        of_all = host.n_layers * config.n_features
        self.density_L = [self.start_l0 / of_all if self.clt.config.ranks else 1.0] * host.n_layers
        self.last_norm = 0.0
        # Since the last report.
        self.error_L = self.variance_L = torch.zeros(host.n_layers, dtype=torch.float64)
        self.log = Log(run)
        self.manifest = _new_manifest(config, host, self.whole, sources)

    def prepare(self, resume: bool, step: int | None) -> None:
        """Bring normalisation, ring and weights to where the run begins or goes on."""
        first, config = self.mesh.world.rank == 0, self.config
        found = checkpoint.find(self.run, step, self.mesh) if resume else None
        if resume:
            self.manifest = read_manifest(self.run)
            self.manifest.state, self.manifest.config = "training", config.as_dict()
            _check_same_text(self.manifest, self.sources)
        saved = self._load(found) if found else None
        self.sinks = self.mesh.world.by_first(lambda: open_sinks(config, self.run)) or []
        if first:
            write_manifest(self.run, self.manifest)
            checkpoint.clear_unfinished(self.run)
            self.log.cut_back(self.step)
            if found:
                checkpoint.drop_after(self.run, self.step)
        self.mesh.world.barrier()
        if not (self.run / "run.json").exists():
            raise RunError(f"rank {self.mesh.world.rank} does not see {self.run}, which rank 0 has made; give --out on a file system that all nodes share")  # fmt: skip
        self.units = saved.units if saved else self._estimate_units()
        self.stream = ActivationStream(
            self.rows,
            config.ring // self.mesh.world.size,
            config.rows_per_harvest,
            reuse=config.reuse,
            state=self._stream_state(saved) if saved else None,
        )
        if not saved:
            initialise(self.clt, config.seed, config.threshold)
            if not self.clt.config.ranks:
                share = self.start_l0 / (self.host.n_layers * config.n_features)
                set_bias_for_density(self.clt, self._sample(), share)
            self.mesh.data.copy_from_first(self.clt.parameters())

    def _stream_state(self, saved: _Loaded) -> StreamState | None:
        """Where this rank's stream goes on; on another mesh, the text that is left is dealt to the ranks anew."""
        if saved.mesh == self.mesh.shape:
            return saved.streams[self.mesh.world.rank]
        self.console.print("the run was on {} x {} ranks (data x features) and goes on on {} x {}: weights and optimiser as they were, the text dealt out anew".format(*saved.mesh, *self.mesh.shape), highlight=False)  # fmt: skip
        cursors = [Cursor.of(state.begun_at) for state in saved.streams]
        self.rows.cursor = dealt_anew(cursors, self.mesh.world.rank, self.mesh.world.size)
        return None

    def _estimate_units(self) -> Units:
        documents = Documents(self.sources, "train", self.config.seed)
        n_tokens = min(self.config.scale_tokens, _tokens_there_are(self.host, self.sources, self.config.scale_tokens))
        rows = RowStream(self.host, documents, self.config.context)
        with track(self.console, "normalise", n_tokens) as update:
            units = estimate_units(
                self.host, rows.rows, n_tokens, self.config.rows_per_harvest, lambda done: update(min(done, n_tokens))
            )
        # Eigenvectors have no sign of their own: ranks must not differ in it.
        units = units.to(self.device)
        self.mesh.world.copy_from_first(units)
        return units

    def _sample(self) -> Tensor:
        """Inputs of some tokens of training text, the same on every rank, in the units of training."""
        rows = RowStream(self.host, Documents(self.sources, "train", self.config.seed), self.config.context)
        n_tokens, kept, passed = min(BIAS_TOKENS * BIAS_STRIDE, self.config.scale_tokens), list[Tensor](), 0
        while passed < n_tokens:
            x_BLD = harvest(self.host, rows.rows(self.config.rows_per_harvest)).x_BLD
            kept.append(x_BLD[::BIAS_STRIDE])
            passed += len(x_BLD)
        return self.units.inputs(torch.cat(kept))

    def run_steps(self, held_out: Tensor) -> None:
        """Train until the last step.

        Raises:
            Stopped: after Ctrl-C or SIGTERM.
        """
        window: list[dict[str, float]] = []
        config = self.config
        with _asked_to_stop() as asked, track(self.console, "train", self.steps) as update:
            while self.step < self.steps:
                began = time.perf_counter()
                window.append(self.one_step())
                self.step += 1
                self.train_s += time.perf_counter() - began
                if self.step % config.log_every == 0 or self.step == self.steps:
                    self._report(window, update)
                    window.clear()
                if config.eval_every and self.step % config.eval_every == 0 and self.step < self.steps:
                    self._evaluate_on_the_way(held_out)
                stop = self.mesh.world.any_(bool(asked))
                if stop or self.step % config.checkpoint_every == 0:
                    self.save()
                if stop and self.step < self.steps:
                    self._write_state("stopped")
                    raise Stopped(f"stopped at step {self.step} of {self.steps}; go on with --resume {self.run}")

    def one_step(self) -> dict[str, float]:
        """One update of the weights; returns its figures."""
        config = self.config
        progress = self.step / self.steps
        asked = l0_asked(progress, self.start_l0, self.target, config.l0_ramp)
        coefficient = self.controller.coefficient(asked) if config.sparsity == "tanh" else 1.0
        for group, base in zip(self.optimiser.param_groups, self.base_lr, strict=False):
            group["lr"] = base * learning_rate((self.step + 1) / (self.steps + 1), config.warmup, config.decay)
        dead_LF = self.silent_LF >= config.dead_after
        revive_LF = dead_LF & (not self.clt.config.ranks or self.step % config.auxiliary_every == 0)
        sparse_L = [density < SPARSE_BELOW[torch.device(self.device).type] for density in self.density_L]
        gradients = FusedUpdate(self._update) if config.fused_update else Gradients()
        fired_LF = torch.zeros_like(self.silent_LF)
        sums, micro = torch.zeros(len(FIGURES), dtype=torch.float64), config.batch // config.accumulate
        layers_3L = torch.zeros(3, self.host.n_layers, dtype=torch.float64)
        features, data = self.mesh.features, self.mesh.data
        for _ in range(config.accumulate):
            x_BLD, y_BLD = self._batch(micro // self.mesh.world.size)
            terms = compute(
                self.clt, x_BLD, y_BLD, config, gradients,
                coefficient=coefficient, running_l0=self.controller.running_l0, asked_l0=asked, eps=self.window.eps,
                dead_LF=revive_LF, sparse_L=sparse_L, share=1 / config.accumulate,
            )  # fmt: skip
            fired_LF += terms.fired_LF
            mean_LD = data.sum_(y_BLD.mean(0)) / data.size
            variance_L = (y_BLD - mean_LD).square().sum(dim=(0, 2)) / len(y_BLD)
            # Ranks that share features have the same reconstruction, and each the penalties of its own features.
            of_all = 1 / features.size
            sums += torch.tensor([
                terms.reconstruction * of_all, terms.sparsity, terms.revival * (of_all if self.clt.config.ranks else 1),
                variance_L.sum() * of_all, dead_LF.double().mean() * of_all,
            ], dtype=torch.float64)  # fmt: skip
            layers_3L[:2] += torch.stack([terms.error_L, variance_L]).double().cpu() * of_all
            layers_3L[2] += terms.entries_L / len(x_BLD)
        self.mesh.world.sum_(sums)
        self.mesh.world.sum_(layers_3L)
        self.error_L, self.variance_L = self.error_L + layers_3L[0], self.variance_L + layers_3L[1]
        entries_L = layers_3L[2] / (config.accumulate * data.size)
        figures: dict[str, float] = dict(zip(FIGURES, (sums / (config.accumulate * data.size)).tolist(), strict=True))
        figures["loss"] = figures["reconstruction"] + coefficient * figures["sparsity"] + figures["revival"]
        if not math.isfinite(figures["loss"]):
            raise RunError(f"the loss of step {self.step + 1} is not finite; lower --lr in a new run, or go on from an earlier step with --resume {self.run} --step")  # fmt: skip
        gradients.average(data)
        if config.clip:
            self.last_norm = figures["gradient_norm"] = float(gradients.norm(self.clt))
        if not config.fused_update:
            self.optimiser.step(gradients, self._scale())
        del gradients
        if len(self.clt.threshold):
            for theta in self.clt.threshold:
                theta.data.clamp_(min=1e-6)
        data.sum_(fired_LF)
        self.silent_LF = torch.where(fired_LF > 0, 0, self.silent_LF + config.batch)
        self.density_L = (entries_L / config.n_features).tolist()
        l0 = features.total(float(fired_LF.sum())) / config.batch
        self.controller.observe(l0, asked)
        figures |= {"l0": l0, "l0_asked": asked, "lambda": coefficient, "window": self.window.eps}
        self.window.observe(float(entries_L.sum()) - l0, max(l0, asked))
        return figures

    def _update(self, p: Parameter, blocks: Iterator[tuple[slice, Tensor]]) -> None:
        """Update one parameter while the step goes on."""
        self.optimiser.update(p, blocks, self._scale())

    def _scale(self) -> float:
        """What gradients are multiplied by, so that their norm is at most what is allowed."""
        return min(1.0, self.config.clip / (self.last_norm + 1e-6)) if self.config.clip and self.last_norm else 1.0

    def _batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of this rank's next `n` tokens, and of those of the ranks that share the features with it."""
        began = time.perf_counter()
        x_BLD, y_BLD = (self.mesh.features.cat(a.to(self.device)) for a in self.stream.batch(n))
        x_BLD, y_BLD = self.units.inputs(x_BLD), self.units.outputs(y_BLD)
        self.harvest_s += time.perf_counter() - began
        return x_BLD, y_BLD

    def _report(self, window: list[dict[str, float]], update: Update) -> None:
        means = {name: sum(w[name] for w in window) / len(window) for name in window[-1]}
        tokens = self.step * self.config.batch
        record = {
            "step": self.step,
            "tokens": tokens,
            **{k: means[k] for k in ("loss", "reconstruction", "sparsity", "revival")},
            "fvu": means["reconstruction"] / means["variance"],
            "fvu_L": (self.error_L / self.variance_L).tolist(),
            "l0": means["l0"],
            "l0_per_layer": means["l0"] / self.host.n_layers,
            **{k: means[k] for k in ("l0_asked", "lambda", "window", "dead_share")},
            "gradient_norm": means.get("gradient_norm"),
            "lr": self.optimiser.param_groups[0]["lr"],
            "train_s": round(self.train_s, 3),
            "harvest_s": round(self.harvest_s, 3),
            "tokens_per_s": tokens / self.train_s,
            "harvest_tokens_per_s": tokens / self.harvest_s,
            "step_tokens_per_s": tokens / (self.train_s - self.harvest_s),
        }
        self.error_L = self.variance_L = torch.zeros_like(self.error_L)
        if self.mesh.world.rank == 0:
            self._record(record)
        update(
            self.step,
            f"loss {record['loss']:.1f}  FVU {record['fvu']:.3f}  L0 {record['l0']:.1f} ({record['l0_per_layer']:.1f} a layer)  "
            f"dead {record['dead_share']:.1%}  {record['tokens_per_s']:,.0f} tokens/s, {self.harvest_s / self.train_s:.0%} of it harvest",
        )

    def _record(self, record: dict[str, Any]) -> None:
        """One line for the log and the sinks."""
        self.log.write(record)
        for sink in self.sinks:
            sink(record)

    def _evaluate_on_the_way(self, held_out: Tensor) -> None:
        clt = self.in_host_units()
        e = evaluate_rows(self.host, clt, held_out[:64], [s.source.name for s in self.sources], replacement_tokens=4096)
        if self.mesh.world.rank == 0:
            self._record({"step": self.step, "eval": e.model_dump(exclude={"density_log10_edges", "sources"})})

    def in_host_units(self) -> CLT:
        """The transcoder as it is now, as JumpReLU at the target L0 of training text, its units folded away."""
        clt, config = self.clt, self.config
        if clt.config.activation != "relu":
            # Another order than training's, so that the tokens come from everywhere.
            rows = RowStream(self.host, Documents(self.sources, "train", config.seed + 1), config.context)
            n_harvests = -(-config.calibration_tokens // (config.rows_per_harvest * (config.context - config.n_skip)))
            harvests = (harvest(self.host, rows.rows(config.rows_per_harvest)).x_BLD for _ in range(n_harvests))
            batches = (self.units.inputs(x) for h in harvests for x in h.split(2048))
            clt = to_jumprelu(clt, batches, self.target)
        # A copy made above is folded where it is.
        return fold(clt if clt is not self.clt else copy.deepcopy(clt), *self.units)

    def finish(self, held_out: Tensor) -> Trained:
        """Convert, fold, save, measure."""
        self.save()
        clt = self.in_host_units()
        names = [s.source.name for s in self.sources]
        provenance = Provenance(
            model_name=self.host.name,
            scan=self.run.resolve().name,
            input_hook=self.host.input_hook,
            output_hook=self.host.output_hook,
            policy=self.host.policy,
            extra={"trained_as": self.clt.config.activation, "ranking": "value times decoder norm"}
            if self.clt.config.ranks
            else {},
        )
        with track(self.console, "measure", 1.0) as update:
            evaluation = evaluate_rows(self.host, clt, held_out, names, on_progress=update)
        self._publish(clt, provenance)
        if self.mesh.world.rank == 0:
            trained = {
                "training tokens": f"{self.steps * self.config.batch:,}",
                "sources": ", ".join(f"{s.source.name} ({s.weight:g})" for s in self.sources),
                "trained as": f"{self.clt.config.activation}, {self.config.precision}",
                "training time": f"{self.train_s:.0f} s on {self.device}",
            }
            config = replace(clt.config, n_features=self.config.n_features)
            write_text(self.run / "clt" / "README.md", model_card(config, provenance, evaluation, trained))
            write_json(self.run / "eval.json", evaluation.model_dump())
            self._write_state("finished")
        self.mesh.world.barrier()
        return Trained(self.run, clt if self.mesh.features.size == 1 else load_clt(self.run).clt, evaluation)

    def _publish(self, clt: CLT, provenance: Provenance) -> None:
        """Write `clt/`: each rank the features that it holds, then the first all of them, some rows at a time."""
        world, features, parts = self.mesh.world, self.mesh.features, self.run / ".clt-parts"
        target = self.run / "clt"
        if world.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(parts, ignore_errors=True)
        world.barrier()
        if features.size > 1 and self.mesh.data.rank == 0:
            published.save(clt, provenance, parts / f"{features.rank:04d}")
        world.barrier()
        if world.rank == 0:
            whole = join([load_clt(part) for part in sorted(parts.iterdir())]) if features.size > 1 else Opened(clt, provenance)  # fmt: skip
            published.save(*whole, target)
            shutil.rmtree(parts, ignore_errors=True)
        world.barrier()

    def save(self) -> None:
        """Write the checkpoint of this step."""
        tensors: dict[str, Tensor] = {f"silent.{i}": silent_F for i, silent_F in enumerate(self.silent_LF)}
        tensors |= {f"units.{name}": t for name, t in zip(Units._fields, self.units, strict=True)}
        for name, p in self.clt.named_parameters():
            tensors[f"weights.{name}"] = p.data
            tensors |= {f"moments.{key}.{name}": t for key, t in self.optimiser.state.get(p, {}).items()}
        numbers = {
            "of": self._of(),
            "step": self.step,
            "train_s": self.train_s,
            "harvest_s": self.harvest_s,
            "density_L": self.density_L,
            "last_norm": self.last_norm,
            "controller": asdict(self.controller),
            "window": self.window.eps,
            "streams": self.mesh.world.objects(self.stream.state.plain()),
        }
        split = frozenset(name for name in tensors if _by_feature(name))
        checkpoint.save(self.run, self.step, checkpoint.Saved(tensors, split, numbers), self.config.keep, self.mesh)
        self._write_state("training")

    def _of(self) -> dict[str, Any]:
        """What a checkpoint must be of, to be taken up by this run."""
        return {
            "host": self.host.name,
            **asdict(self.whole),
            "precision": self.config.precision,
            "moments": self.config.moments,
        }

    def _load(self, folder: Path) -> _Loaded:
        """Take weights, optimiser and controller from a checkpoint.

        Raises:
            RunError: for a checkpoint of another transcoder.
        """
        numbers = checkpoint.numbers(folder)
        for name, mine in self._of().items():
            if numbers["of"].get(name) != mine:
                raise RunError(f"checkpoint {folder} is of another transcoder, with {name}={numbers['of'].get(name)} and not {mine}; put back the run's own, or start a new run")  # fmt: skip
        tensors = checkpoint.load(folder, _by_feature, self.mesh)
        for name, p in self.clt.named_parameters():
            p.data.copy_(tensors[f"weights.{name}"])
            of_it = {key.split(".")[1]: t for key, t in tensors.items() if key.startswith("moments.") and key.split(".", 2)[2] == name}  # fmt: skip
            if of_it:
                self.optimiser.state[p] = {key: t.to("cpu" if key == "step" else p.device) for key, t in of_it.items()}
        self.silent_LF = torch.stack([tensors[f"silent.{i}"] for i in range(self.host.n_layers)]).to(self.device)
        self.step, self.train_s, self.harvest_s, self.density_L, self.last_norm, self.window.eps = (
            numbers[name] for name in ("step", "train_s", "harvest_s", "density_L", "last_norm", "window")
        )
        self.controller = Controller(**numbers["controller"])
        units = Units(*(tensors[f"units.{name}"] for name in Units._fields)).to(self.device)
        rows, columns = numbers["mesh"]
        return _Loaded(units, (rows, columns), [StreamState(*s) for s in numbers["streams"]])

    def _write_state(self, state: Any) -> None:
        self.manifest.state = state
        self.manifest.step, self.manifest.train_s = self.step, round(self.train_s, 3)
        self.manifest.tokens = self.step * self.config.batch
        if self.mesh.world.rank == 0:
            write_manifest(self.run, self.manifest)


def _by_feature(name: str) -> bool:
    """Whether a tensor of a checkpoint has a row for each feature."""
    kind, _, rest = name.partition(".")
    if kind == "moments":
        key, _, rest = rest.partition(".")
        return key != "step" and by_feature(rest)
    return kind == "silent" or (kind == "weights" and by_feature(rest))


def _new_manifest(config: TrainConfig, host: Host, clt: CLTConfig, sources: Sequence[Weighted]) -> RunManifest:
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


def _check_same_text(manifest: RunManifest, sources: Sequence[Weighted]) -> None:
    """A resume trains on the text that the run began with; streamed sources cannot be compared."""
    for said, (source, _) in zip(manifest.sources, sources, strict=True):
        if said.get("digest") != _digest(source):
            raise RunError(f"{source.name} has other text than when the run began; put it back, or start a new run")


def _shape(host: Host) -> HostShape:
    total = sum(p.numel() for p in host.model.parameters())
    return HostShape(
        name=host.name,
        n_layers=host.n_layers,
        d_model=host.d_model,
        n_parameters=total,
        n_matrix_parameters=total - host.n_vocab * host.d_model,
    )


def _tokens_there_are(host: Host, sources: Sequence[Weighted], most: int) -> int:
    """Tokens in one pass over the sources, counted no further than `most`."""
    count = 0
    for source, _ in sources:
        if not isinstance(source, ListedSource):
            return most
        for document in source.documents_of("train", 0, 0):
            if count >= most:
                return most
            count += len(document_tokens(host, document))
    return count


@contextmanager
def _locked_by_first(run: Path) -> Iterator[None]:
    with ExitStack() as held:
        dist.world().by_first(lambda: held.enter_context(locked(run)))
        yield


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM put their number into, instead of ending the process in the middle of a step."""
    asked: list[int] = []
    try:
        before = {
            s: signal.signal(s, lambda number, _frame: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread, where signals do not come
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
