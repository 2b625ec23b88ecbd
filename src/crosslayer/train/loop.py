"""The training loop: from a config and a folder to a trained, measured, saved transcoder.

    open the host and the text -> estimate normalisation -> fill the ring -> step, step, step -> convert, fold, save -> measure

The same code runs in one process and under `torchrun`, where each rank trains on its own text and gradients are averaged.
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
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from crosslayer import dist
from crosslayer.acts.rows import Documents, RowStream, document_tokens, held_out_rows
from crosslayer.acts.sources import ListedSource, Source, Weighted, open_sources
from crosslayer.acts.stream import ActivationStream, StreamState, harvest
from crosslayer.acts.units import Units, estimate_units
from crosslayer.clt.config import Provenance
from crosslayer.clt.convert import to_jumprelu
from crosslayer.clt.fold import fold
from crosslayer.clt.formats import published
from crosslayer.clt.init import initialise, set_bias_for_density
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError, CrosslayerError, RunError
from crosslayer.core.files import locked, write_json, write_text
from crosslayer.core.progress import Update, track
from crosslayer.eval.evaluate import evaluate_rows
from crosslayer.eval.report import model_card
from crosslayer.host.host import Host, choose_device, load_host
from crosslayer.records.evaluation import Evaluation
from crosslayer.records.run import RunManifest
from crosslayer.train import checkpoint
from crosslayer.train.config import TrainConfig
from crosslayer.train.objective import SPARSE_BELOW, compute
from crosslayer.train.optimiser import make_optimiser
from crosslayer.train.plan import HostShape, check_fits, make_plan
from crosslayer.train.run_folder import Log, check_same_config, read_manifest, refuse_unless_new, write_manifest
from crosslayer.train.schedule import Controller, l0_asked, learning_rate
from crosslayer.train.sinks import open_sinks

BIAS_TOKENS = 8_192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trained(NamedTuple):
    """What a finished run gives back."""

    folder: Path
    clt: CLT
    """In the host's own units, as saved under `clt/`."""
    evaluation: Evaluation


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
    """
    run, console = Path(out), console or Console(quiet=True)
    dist.start()
    if not dist.is_first():
        console = Console(quiet=True)
    if resume:
        manifest = read_manifest(run)
        check_same_config(manifest.config, config.as_dict())
    elif dist.is_first():
        refuse_unless_new(run)
    device = choose_device(config.device)
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
    check_fits(make_plan(config, _shape(host)), config, run)
    sources = open_sources(config.text)
    held_out = held_out_rows(host, sources, config.context, config.eval_tokens)
    with _locked_by_first(run):
        trainer = Trainer(config, run, host, sources, device, console)
        trainer.prepare(resume, step)
        trainer.run_steps(held_out)
        return trainer.finish(held_out)


class Trainer:
    """The state of a run, and what happens to it."""

    def __init__(
        self, config: TrainConfig, run: Path, host: Host, sources: Sequence[Weighted], device: str, console: Console
    ) -> None:
        self.config, self.run, self.host, self.sources = config, run, host, sources
        self.device, self.console = device, console
        documents = Documents(sources, "train", config.seed, dist.rank(), dist.world_size())
        self.rows = RowStream(host, documents, config.context)
        self.clt = CLT(config.clt(host.n_layers, host.d_model), dtype=DTYPES[config.precision], device=device)
        thresholds = list(self.clt.threshold)
        weights = [p for name, p in self.clt.named_parameters() if not name.startswith("threshold")]
        groups = [{"params": weights, "lr": config.lr}]
        if thresholds:
            groups.append({"params": thresholds, "lr": config.threshold_lr})
        self.base_lr = [config.lr, config.threshold_lr]
        self.optimiser = make_optimiser(groups, (config.beta1, config.beta2), config.seed)
        self.steps = config.tokens // (config.batch * dist.world_size())
        if not self.steps:
            raise ConfigError(f"tokens={config.tokens} make no step of {config.batch} tokens on each of {dist.world_size()} ranks; raise --tokens")  # fmt: skip
        self.target = config.target_l0(host.n_layers)
        self.start_l0 = min(self.target * config.l0_start, 0.5 * host.n_layers * config.n_features)
        self.controller = Controller(integral=-7.0)
        self.silent_LF = torch.zeros(host.n_layers, config.n_features, dtype=torch.int64, device=device)
        self.step, self.train_s, self.density = 0, 0.0, 1.0
        self.log = Log(run)
        self.manifest = _new_manifest(config, host, self.clt, sources)

    def prepare(self, resume: bool, step: int | None) -> None:
        """Bring normalisation, ring and weights to where the run begins or goes on."""
        state = checkpoint.load(self.run, step) if resume else None
        if state and len(state["streams"]) != dist.world_size():
            ranks = len(state["streams"])
            raise RunError(f"{self.run} was trained by {ranks} ranks, not {dist.world_size()}; resume it with as many")
        if resume:
            self.manifest = read_manifest(self.run)
            self.manifest.state = "training"
            _check_same_text(self.manifest, self.sources)
        self.sinks = open_sinks(self.config, self.run) if dist.is_first() else []
        if dist.is_first():
            write_manifest(self.run, self.manifest)
            checkpoint.clear_unfinished(self.run)
            self.log.cut_back(state["step"] if state else 0)
            if state:
                checkpoint.drop_after(self.run, state["step"])
        self.units = (Units(*state["units"]) if state else self._estimate_units()).to(self.device)
        stream_state = StreamState(*state["streams"][dist.rank()]) if state else None
        config = self.config
        self.stream = ActivationStream(
            self.rows, config.ring, config.rows_per_harvest, reuse=config.reuse, state=stream_state
        )
        if state:
            self._load(state)
        else:
            initialise(self.clt, self.config.seed, self.config.threshold)
            if not self.clt.config.ranks:
                share = self.start_l0 / (self.host.n_layers * self.config.n_features)
                set_bias_for_density(self.clt, self.units.inputs(self.stream.peek(BIAS_TOKENS).x_BLD), share)
                dist.copy_from_first(self.clt.parameters())

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
        dist.copy_from_first(units)
        return units

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
                stop = dist.any_(bool(asked))
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
        sparse = self.clt.config.ranks or self.density < SPARSE_BELOW[torch.device(self.device).type]
        fired_LF = torch.zeros_like(self.silent_LF)
        names = ("loss", "reconstruction", "sparsity", "revival", "variance")
        figures: dict[str, float] = dict.fromkeys(names, 0.0)
        micro, entries = config.batch // config.accumulate, torch.zeros((), dtype=torch.float64)
        for _ in range(config.accumulate):
            x_BLD, y_BLD = self._batch(micro)
            terms = compute(
                self.clt, x_BLD, y_BLD, config,
                coefficient=coefficient, running_l0=self.controller.running_l0, asked_l0=asked, dead_LF=revive_LF, sparse=sparse,
            )  # fmt: skip
            (terms.total / config.accumulate).backward()
            fired_LF += terms.fired_LF
            variance = (y_BLD - y_BLD.mean(0)).square().sum() / micro
            values = (terms.total.detach(), terms.reconstruction, terms.sparsity, terms.revival, variance)
            for name, value in zip(names, values, strict=True):
                figures[name] += float(value) / config.accumulate
            entries += terms.entries
        if not math.isfinite(figures["loss"]):
            raise RunError(f"the loss of step {self.step + 1} is not finite; lower --lr in a new run, or go on from an earlier step with --resume {self.run} --step")  # fmt: skip
        parameters = list(self.clt.parameters())
        dist.mean_gradients(parameters)
        if config.clip:
            figures["gradient_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if len(self.clt.threshold):
            for theta in self.clt.threshold:
                theta.data.clamp_(min=1e-6)
        dist.sum_(fired_LF)
        n_tokens = config.batch * dist.world_size()
        self.silent_LF = torch.where(fired_LF > 0, 0, self.silent_LF + n_tokens)
        self.density = float(dist.sum_(entries)) / (n_tokens * fired_LF.numel())
        l0 = float(fired_LF.sum()) / n_tokens
        self.controller.observe(l0, asked)
        return figures | {
            "l0": l0,
            "l0_asked": asked,
            "lambda": coefficient,
            "dead_share": float(dead_LF.double().mean()),
        }

    def _batch(self, n: int) -> tuple[Tensor, Tensor]:
        x_BLD, y_BLD = self.stream.batch(n)
        return self.units.inputs(x_BLD), self.units.outputs(y_BLD)

    def _report(self, window: list[dict[str, float]], update: Update) -> None:
        names = list(window[-1])
        means = {name: sum(w[name] for w in window) / len(window) for name in names}
        means = {name: float(v) for name, v in zip(names, dist.mean(list(means.values())), strict=True)}
        tokens = self.step * self.config.batch * dist.world_size()
        record = {
            "step": self.step,
            "tokens": tokens,
            **{k: means[k] for k in ("loss", "reconstruction", "sparsity", "revival")},
            "fvu": means["reconstruction"] / means["variance"],
            "l0": means["l0"],
            "l0_per_layer": means["l0"] / self.host.n_layers,
            **{k: means[k] for k in ("l0_asked", "lambda", "dead_share")},
            "gradient_norm": means.get("gradient_norm"),
            "lr": self.optimiser.param_groups[0]["lr"],
            "train_s": round(self.train_s, 3),
            "tokens_per_s": tokens / self.train_s,
        }
        if dist.is_first():
            self._record(record)
        update(
            self.step,
            f"loss {record['loss']:.1f}  FVU {record['fvu']:.3f}  L0 {record['l0']:.1f} ({record['l0_per_layer']:.1f} a layer)  "
            f"dead {record['dead_share']:.1%}  {record['tokens_per_s']:,.0f} tokens/s",
        )

    def _record(self, record: dict[str, Any]) -> None:
        """One line for the log and the sinks."""
        self.log.write(record)
        for sink in self.sinks:
            sink(record)

    def _evaluate_on_the_way(self, held_out: Tensor) -> None:
        if dist.is_first():
            clt = self.in_host_units()
            e = evaluate_rows(
                self.host, clt, held_out[:64], [s.source.name for s in self.sources], replacement_tokens=4096
            )
            self._record({"step": self.step, "eval": e.model_dump(exclude={"density_log10_edges", "sources"})})
        dist.barrier()

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
        if dist.is_first():
            trained = {
                "training tokens": f"{self.steps * self.config.batch * dist.world_size():,}",
                "sources": ", ".join(f"{s.source.name} ({s.weight:g})" for s in self.sources),
                "trained as": f"{self.clt.config.activation}, {self.config.precision}",
                "training time": f"{self.train_s:.0f} s on {self.device}",
            }
            if (self.run / "clt").exists():
                shutil.rmtree(self.run / "clt")
            published.save(clt, provenance, self.run / "clt")
            write_text(self.run / "clt" / "README.md", model_card(clt.config, provenance, evaluation, trained))
            write_json(self.run / "eval.json", evaluation.model_dump())
            self._write_state("finished")
        dist.barrier()
        return Trained(self.run, clt, evaluation)

    def save(self) -> None:
        """Write the checkpoint of this step."""
        streams = dist.gather_objects(self.stream.state.plain())
        if dist.is_first():
            state = {
                "step": self.step,
                "train_s": self.train_s,
                "density": self.density,
                "weights": self.clt.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "controller": asdict(self.controller),
                "silent": self.silent_LF,
                "units": tuple(self.units),
                "streams": streams,
            }
            checkpoint.save(self.run, self.step, state, self.config.keep)
            self._write_state("training")
        dist.barrier()

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.train_s, self.density = state["step"], state["train_s"], state["density"]
        self.clt.load_state_dict(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.controller = Controller(**state["controller"])
        self.silent_LF = state["silent"].to(self.device)

    def _write_state(self, state: Any) -> None:
        self.manifest.state = state
        self.manifest.step, self.manifest.train_s = self.step, round(self.train_s, 3)
        self.manifest.tokens = self.step * self.config.batch * dist.world_size()
        if dist.is_first():
            write_manifest(self.run, self.manifest)


def _new_manifest(config: TrainConfig, host: Host, clt: CLT, sources: Sequence[Weighted]) -> RunManifest:
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
        clt={**asdict(clt.config), "n_parameters": clt.config.n_parameters},
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
    if dist.is_first():
        with locked(run):
            yield
    else:
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
