"""All settings of a training run: one flat, frozen record. The command line's flags are made from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from crosslayer.clt.activations import ACTIVATIONS, JUMPRELU
from crosslayer.clt.config import CLTConfig, Scope
from crosslayer.core.errors import ConfigError
from crosslayer.schemas.policy import FirstPosition

Precision = Literal["fp32", "bf16"]
Moments = Literal["fp32", "8bit"]
Sparsity = Literal["tanh", "l0"]


def setting(default: Any, text: str, group: str, choices: Iterable[str] = ()) -> Any:
    """A field with its explanation, which `--help` prints, the heading it stands under, and what may be chosen."""
    return field(default=default, metadata={"help": text, "group": group, "choices": tuple(choices)})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how. Losses are means over tokens, in units where activations have norm sqrt(D).

    Raises:
        ConfigError: for values that cannot be, or contradict each other.
    """

    model: str = setting("stdlib-qwen3", "host: hub name, local folder, or stdlib-qwen3", "host")
    input_hook: str = setting("mlp.hook_in", "what features read: mlp.hook_in or hook_resid_mid", "host")
    output_hook: str = setting("mlp.hook_out", "what they write: mlp.hook_out or hook_mlp_out", "host")
    prepend: bool = setting(True, "put the tokenizer's BOS, PAD or EOS in front of text", "host")
    n_skip: int = setting(1, "leading positions without features (Gemma-3-it: 4)", "host")

    text: tuple[str, ...] = setting(
        (), "source, repeatable: stdlib, PATH or hf:NAME[:CONFIG][:SPLIT], each with =WEIGHT", "data"
    )
    tokens: int = setting(1_000_000, "tokens to train on, counted each time they are", "data")
    context: int = setting(256, "tokens of a row, the special token included", "data")
    ring: int = setting(65_536, "tokens among which batches are shuffled, over all ranks", "data")
    reuse: int = setting(1, "times that each token's activations are trained on before they leave the ring", "data")
    rows_per_harvest: int = setting(32, "rows that go through the host at once", "data")
    scale_tokens: int = setting(1_000_000, "tokens from which norms and axes are estimated", "data")
    calibration_tokens: int = setting(65_536, "tokens on which thresholds are set to the target L0 at the end", "data")

    n_features: int = setting(4096, "features a layer", "transcoder")
    activation: str = setting(
        JUMPRELU.name, "activation function; those that rank are saved as jumprelu", "transcoder", ACTIVATIONS
    )
    scope: Scope = setting(
        "all", "top-k ranks the features of all layers together, or of each layer apart", "transcoder"
    )
    cross_layer: bool = setting(
        True, "features write to all later layers; without: to their own (a per-layer transcoder)", "transcoder"
    )
    skip: bool = setting(False, "an affine skip from each MLP's input to its output", "transcoder")
    l0: float | None = setting(None, "target: active features a token, summed over layers", "transcoder")
    l0_per_layer: float | None = setting(
        None, "target: active features a token and layer; give this or --l0", "transcoder"
    )

    sparsity: Sparsity = setting(
        "tanh", "jumprelu's penalty: tanh of the activation, or l0 through the threshold", "objective"
    )
    sparsity_c: float = setting(1.0, "c in tanh(c ||W_dec|| f)", "objective")
    l0_start: float = setting(20.0, "L0 at the start, as a multiple of the target", "objective")
    l0_ramp: float = setting(0.5, "share of the run over which the L0 asked for falls to the target", "objective")
    eps: float = setting(0.5, "jumprelu: width of the straight-through window", "objective")
    window_cap: float = setting(
        4.0,
        "jumprelu: silent entries inside the window, as a multiple of the L0, above which it is narrowed; 0: never",
        "objective",
    )
    threshold: float = setting(0.1, "jumprelu: thresholds at the start", "objective")
    dead_after: int = setting(1_000_000, "tokens of silence after which a feature counts as dead", "objective")
    revive: float = setting(
        3e-3, "weight of the pre-activation loss that revives dead features (jumprelu)", "objective"
    )
    auxiliary: float = setting(1 / 32, "weight of the reconstruction by dead features (topk, batchtopk)", "objective")
    auxiliary_k: int = setting(32, "dead features a token and layer that take part in it", "objective")
    auxiliary_every: int = setting(1, "steps from one such reconstruction to the next", "objective")

    batch: int = setting(4096, "tokens a step, over all ranks", "optimiser")
    accumulate: int = setting(1, "micro-batches a step; each has batch / accumulate tokens", "optimiser")
    lr: float = setting(4e-4, "learning rate of the weights", "optimiser")
    threshold_lr: float = setting(1e-3, "learning rate of the thresholds", "optimiser")
    warmup: float = setting(0.02, "share of the run over which the learning rate rises", "optimiser")
    decay: float = setting(0.2, "share of the run over which it falls to zero, at the end", "optimiser")
    beta1: float = setting(0.9, "Adam's", "optimiser")
    beta2: float = setting(0.999, "Adam's", "optimiser")
    clip: float = setting(1.0, "global gradient norm above which gradients are scaled down; 0: never", "optimiser")
    precision: Precision = setting(
        "fp32", "of weights: fp32, or bf16 with stochastic rounding and fp32 moments", "optimiser"
    )
    moments: Moments = setting("fp32", "Adam's moments: fp32, or 8bit with a scale for each row", "optimiser")
    fused_update: bool = setting(
        False,
        "update each layer as soon as its gradient is known, clipping by the norm of the step before",
        "optimiser",
    )
    host_precision: Precision = setting("fp32", "of the host", "optimiser")
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one", "optimiser")
    seed: int = setting(0, "of initial weights and of the order of text", "optimiser")
    feature_ranks: int = setting(
        1,
        "ranks, of those that torchrun starts, that share the features of each layer; groups of so many share the"
        " tokens",
        "optimiser",
    )

    eval_tokens: int = setting(131_072, "held-out tokens measured at the end", "run")
    eval_every: int = setting(0, "steps between measures on held-out text while training; 0: only at the end", "run")
    checkpoint_every: int = setting(1000, "steps between checkpoints", "run")
    keep: int = setting(2, "checkpoints kept", "run")
    log_every: int = setting(10, "steps between lines of log.jsonl", "run")
    tensorboard: bool = setting(False, "also write the figures for TensorBoard (extra: tensorboard)", "run")
    wandb: bool = setting(False, "also send the figures to Weights & Biases (extra: wandb)", "run")

    def __post_init__(self) -> None:
        for name in (
            "tokens",
            "ring",
            "reuse",
            "rows_per_harvest",
            "scale_tokens",
            "calibration_tokens",
            "n_features",
            "batch",
            "accumulate",
            "feature_ranks",
        ):
            self._at_least(name, 1)
        for name in (
            "checkpoint_every",
            "keep",
            "log_every",
            "eval_tokens",
            "dead_after",
            "auxiliary_k",
            "auxiliary_every",
        ):
            self._at_least(name, 1)
        for name in (
            "n_skip",
            "eval_every",
            "clip",
            "revive",
            "window_cap",
            "auxiliary",
            "warmup",
            "decay",
            "l0_ramp",
            "seed",
        ):
            self._at_least(name, 0)
        for name in ("lr", "threshold_lr", "eps", "threshold", "sparsity_c"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0 and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation={self.activation} is not known; give one of {', '.join(ACTIVATIONS)}")
        if self.sparsity == "l0" and not (self.ranks or ACTIVATIONS[self.activation].thresholds):
            raise ConfigError("sparsity=l0 works through thresholds, which relu has none of; use tanh, or jumprelu")
        self._at_least("l0_start", 1)
        if self.context <= self.n_skip + 1:
            raise ConfigError(f"context={self.context} leaves no tokens after n_skip={self.n_skip}; raise --context")
        if not (self.warmup + self.decay <= 1 and self.l0_ramp <= 1):
            raise ConfigError(
                f"warmup={self.warmup}, decay={self.decay} and l0_ramp={self.l0_ramp} are shares of the run; lower them"
            )
        if (self.l0 is None) == (self.l0_per_layer is None):
            raise ConfigError("give the target L0 once: --l0 (summed over layers) or --l0-per-layer")
        if self.seed >= 2**63:
            raise ConfigError(f"seed={self.seed} must be below 2**63")
        if not self.model:
            raise ConfigError("model is empty; give a hub name, a local folder, or stdlib-qwen3 with --model")
        if not (self.l0 or self.l0_per_layer or 0) > 0:
            raise ConfigError(
                f"a target L0 of {self.l0 or self.l0_per_layer or 0} activates nothing; give a positive one"
            )
        if self.batch % self.accumulate:
            raise ConfigError(f"batch={self.batch} is no multiple of accumulate={self.accumulate}; change one of them")
        if self.fused_update and self.accumulate > 1:
            raise ConfigError(
                f"fused_update uses each gradient at once, and accumulate={self.accumulate} micro-batches would have to"
                " be added up first; give --accumulate 1, or leave --fused-update out"
            )
        if self.batch // self.accumulate < 2:
            raise ConfigError(
                f"batch={self.batch} in {self.accumulate} micro-batches leaves one token in each; raise --batch or"
                " lower --accumulate"
            )
        if self.n_features % self.feature_ranks:
            raise ConfigError(
                f"n_features={self.n_features} cannot be shared out evenly over feature_ranks={self.feature_ranks};"
                " make --n-features a multiple of it, or change --feature-ranks"
            )
        if self.batch > self.tokens:
            raise ConfigError(f"batch={self.batch} exceeds tokens={self.tokens}; lower --batch or raise --tokens")
        if self.ring < self.batch // self.accumulate:
            raise ConfigError(
                f"ring={self.ring} is smaller than a micro-batch of {self.batch // self.accumulate}; raise --ring"
            )

    def _at_least(self, name: str, least: int) -> None:
        if not getattr(self, name) >= least:
            raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def policy(self) -> FirstPosition:
        """The first-position policy these settings state."""
        return FirstPosition(prepend=self.prepend, n_skip=self.n_skip)

    def share(self, data_ranks: int) -> TrainConfig:
        """Of this run, what one rank of so many groups of `feature_ranks` takes upon itself, as a run of its own: for
        plans.

        Raises:
            ConfigError: for a batch that the ranks cannot share evenly.
        """
        ranks = data_ranks * self.feature_ranks
        if self.batch % (self.accumulate * ranks):
            raise ConfigError(
                f"batch={self.batch} in accumulate={self.accumulate} micro-batches cannot be shared out evenly over"
                f" {ranks} ranks; make --batch a multiple of {self.accumulate * ranks}"
            )
        if self.fused_update and data_ranks > 1:
            raise ConfigError(
                f"fused_update uses each gradient at once, and those of {data_ranks} data ranks would have to be"
                f" averaged first; leave --fused-update out, or give --feature-ranks {ranks}"
            )
        per_rank = {
            name: None if (x := getattr(self, name)) is None else x / self.feature_ranks
            for name in ("l0", "l0_per_layer")
        }
        return replace(
            self,
            n_features=self.n_features // self.feature_ranks,
            batch=self.batch // data_ranks,
            ring=max(self.ring // ranks, self.batch // data_ranks // self.accumulate),
            feature_ranks=1,
            **per_rank,
        )

    @property
    def steps(self) -> int:
        """Updates of the weights."""
        return self.tokens // self.batch

    @property
    def ranks(self) -> bool:
        """Whether the activation chooses features by rank."""
        return ACTIVATIONS[self.activation].ranks

    def target_l0(self, n_layers: int) -> float:
        """Active features a token, summed over layers."""
        return self.l0 if self.l0 is not None else (self.l0_per_layer or 0) * n_layers

    def clt(self, n_layers: int, d_model: int) -> CLTConfig:
        """The transcoder to train on a host of this shape.

        Raises:
            ConfigError: for a target L0 that exceeds the number of features.
        """
        l0, most = self.target_l0(n_layers), n_layers * self.n_features
        if l0 > most:
            raise ConfigError(
                f"a target L0 of {l0:g} exceeds the {most} features there are; lower --l0 or raise --n-features"
            )
        return CLTConfig(
            n_layers=n_layers,
            d_model=d_model,
            n_features=self.n_features,
            activation=self.activation,
            k=max(1, round(l0 / (1 if self.scope == "all" else n_layers))) if self.ranks else None,
            scope=self.scope,
            cross_layer=self.cross_layer,
            skip=self.skip,
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> TrainConfig:
        """From what `as_dict` made."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(saved) - known):
            raise ConfigError(f"unknown setting {unknown[0]}; it was written by another version of crosslayer")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        return cls(**values)
