"""Settings of a training run: one flat, frozen dataclass, from which the command-line flags are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from crosslayer.clt.activations import ACTIVATIONS, JUMPRELU
from crosslayer.clt.config import CLTConfig, Scope
from crosslayer.core.errors import ConfigError
from crosslayer.schemas.policy import FirstPosition

Precision = Literal["fp32", "bf16"]
HostPrecision = Literal["auto", "fp32", "bf16"]
Moments = Literal["fp32", "8bit"]

RENAMED = {"ring": "buffer_tokens", "rows_per_harvest": "rows_per_forward"}
"""Old setting names, as saved in `run.json` by earlier versions, and their current names."""


def setting(default: Any, text: str, group: str, choices: Iterable[str] = ()) -> Any:
    """Return a dataclass field with its help text, its heading in `--help`, and its choices."""
    return field(default=default, metadata={"help": text, "group": group, "choices": tuple(choices)})


def chosen(default: Any, text: str, group: str) -> Any:
    """Return a dataclass field that is left to the budget by default; `default` is 0 in the type of the setting."""
    return field(default=default, metadata={"help": text, "group": group, "choices": (), "by_budget": True})


LEAST = {
    **dict.fromkeys(("tokens", "reuse", "rows_per_forward", "accumulate", "feature_ranks", "keep", "log_every"), 1),
    "l0_start": 1,
    "sparsity_c": 1e-9,
}
"""Least values of settings that may not be 0."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. Losses are means over tokens, in units where activations have norm sqrt(D).

    Settings that are 0 by default are left to the budget: `crosslayer.training.settings.by_budget` chooses them.

    Raises:
        ConfigError: for invalid or contradictory values.
    """

    model: str = setting("stdlib-qwen3", "host model: Hub name, local folder, or stdlib-qwen3", "host")
    input_hook: str = setting("mlp.hook_in", "hook that features read: mlp.hook_in or hook_resid_mid", "host")
    output_hook: str = setting("mlp.hook_out", "hook that features write: mlp.hook_out or hook_mlp_out", "host")
    prepend: bool = setting(True, "prepend the tokenizer's BOS, PAD or EOS token to text", "host")
    n_skip: int = setting(1, "number of leading positions without features (Gemma-3-it: 4)", "host")

    text: tuple[str, ...] = setting(
        (), "text source: stdlib, PATH or hf:NAME[:CONFIG][:SPLIT], optionally with =WEIGHT; repeatable", "data"
    )
    column: str = setting(
        "",
        "column of JSON, CSV, Parquet or Hugging Face records that holds the text, a chat or token ids;"
        " empty: text, content, markdown, code, input_ids or messages",
        "data",
    )
    tokens: int = setting(1_000_000, "number of training tokens; a reused token counts each time", "data")
    context: int = setting(256, "tokens per row (context length), including the special token", "data")
    buffer_tokens: int = chosen(
        0, "size of the activation buffer in tokens, over all ranks; batches are shuffled within it", "data"
    )
    reuse: int = setting(
        1, "times that each token's activations are used before they leave the activation buffer", "data"
    )
    rows_per_forward: int = setting(32, "rows per forward pass of the host", "data")
    scale_tokens: int = chosen(0, "maximum of tokens used to estimate the normalisation", "data")
    calibration_tokens: int = chosen(0, "tokens used to calibrate thresholds to the target L0 after training", "data")

    n_features: int = chosen(0, "features per layer", "transcoder")
    activation: str = setting(
        JUMPRELU.name, "activation function; topk and batchtopk are saved as jumprelu", "transcoder", ACTIVATIONS
    )
    scope: Scope = setting(
        "all", "scope of top-k: features of all layers together, or of each layer separately", "transcoder"
    )
    cross_layer: bool = setting(
        True,
        "features write to all later layers (CLT); otherwise only to their own layer (per-layer transcoder)",
        "transcoder",
    )
    skip: bool = setting(False, "add an affine skip connection from each MLP's input to its output", "transcoder")
    l0: float = setting(0.0, "target L0: active features per token, summed over layers", "transcoder")
    l0_per_layer: float = chosen(
        0.0, "target L0 per layer: active features per token and layer; give this or --l0", "transcoder"
    )

    sparsity: float = setting(
        0.0,
        "jumprelu: coefficient of the sparsity penalty tanh(c ||W_dec|| f), as a multiple of the squared cut",
        "objective",
    )
    sparsity_c: float = setting(1.0, "c in tanh(c ||W_dec|| f)", "objective")
    l0_start: float = setting(6.0, "L0 at the start, as a multiple of the target", "objective")
    l0_ramp: float = setting(0.7, "fraction of the run over which the requested L0 falls to the target", "objective")
    dead_after: int = chosen(0, "tokens without activation after which a feature counts as dead", "objective")
    revive: float = setting(3e-3, "coefficient of the pre-activation loss that revives dead features", "objective")

    batch: int = chosen(0, "batch size: tokens per step, over all ranks", "optimiser")
    accumulate: int = setting(
        1, "gradient accumulation: micro-batches per step, each of batch / accumulate tokens", "optimiser"
    )
    lr: float = chosen(0.0, "learning rate of weights and biases", "optimiser")
    warmup: float = chosen(0.0, "fraction of the run for the learning-rate warm-up", "optimiser")
    decay: float = setting(
        0.7, "fraction of the run, at its end, over which the learning rate decays to zero", "optimiser"
    )
    beta1: float = setting(0.9, "Adam's beta1", "optimiser")
    beta2: float = chosen(0.0, "Adam's beta2", "optimiser")
    clip: float = setting(
        1.0, "maximum global gradient norm, as of the previous step (gradient clipping); 0: no clipping", "optimiser"
    )
    precision: Precision = setting(
        "fp32", "precision of the weights: fp32, or bf16 with stochastic rounding", "optimiser"
    )
    moments: Moments = setting("fp32", "precision of Adam's moments: fp32, or 8bit with one scale per row", "optimiser")
    host_precision: HostPrecision = setting(
        "auto", "precision of the host; auto: bf16 where the device is faster with it, else fp32", "optimiser"
    )
    device: str = setting("auto", "cpu, cuda, or auto (cuda if available)", "optimiser")
    seed: int = setting(0, "random seed of the initial weights and of the order of text", "optimiser")
    feature_ranks: int = setting(
        1,
        "number of ranks that the features of each layer are sharded over; the rest is data parallelism",
        "optimiser",
    )

    eval_tokens: int = chosen(0, "held-out tokens for the final evaluation", "run")
    eval_every: int = setting(
        0, "steps between evaluations on held-out text during training; 0: only at the end", "run"
    )
    checkpoint_every: int = chosen(0, "steps between checkpoints", "run")
    keep: int = setting(2, "number of checkpoints to keep", "run")
    log_every: int = setting(10, "steps between lines of log.jsonl", "run")
    tensorboard: bool = setting(False, "also log metrics to TensorBoard (extra: tensorboard)", "run")
    wandb: bool = setting(False, "also log metrics to Weights & Biases (extra: wandb)", "run")

    def __post_init__(self) -> None:
        for f in fields(self):
            # Those left to the budget may be 0.
            self._at_least(f.name, LEAST.get(f.name, 0))
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        for name in ("lr", "sparsity_c"):
            if getattr(self, name) == float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} must be finite")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation={self.activation} is unknown; give one of {', '.join(ACTIVATIONS)}")
        if self.context <= self.n_skip + 1:
            raise ConfigError(f"context={self.context} leaves no tokens after n_skip={self.n_skip}; raise --context")
        if not (self.warmup + self.decay <= 1 and self.l0_ramp <= 1):
            raise ConfigError(
                f"warmup={self.warmup}, decay={self.decay} and l0_ramp={self.l0_ramp} are"
                " fractions of the run and exceed it; lower them"
            )
        if self.l0 and self.l0_per_layer:
            raise ConfigError("give the target L0 once: --l0 (summed over layers) or --l0-per-layer")
        if self.seed >= 2**63:
            raise ConfigError(f"seed={self.seed} must be below 2**63")
        if not self.model:
            raise ConfigError("model is empty; give a hub name, a local folder, or stdlib-qwen3 with --model")
        if self.n_features % self.feature_ranks:
            raise ConfigError(
                f"n_features={self.n_features} cannot be divided evenly over feature_ranks={self.feature_ranks};"
                " make --n-features a multiple of it, or change --feature-ranks"
            )
        if self.batch:
            self._check_batch()

    def _check_batch(self) -> None:
        if self.batch % self.accumulate:
            raise ConfigError(
                f"batch={self.batch} is not a multiple of accumulate={self.accumulate}; change one of them"
            )
        if self.batch // self.accumulate < 2:
            raise ConfigError(
                f"batch={self.batch} in {self.accumulate} micro-batches leaves one token per micro-batch; raise --batch"
                " or lower --accumulate"
            )
        if self.batch > self.tokens:
            raise ConfigError(f"batch={self.batch} exceeds tokens={self.tokens}; lower --batch or raise --tokens")
        if self.buffer_tokens and self.buffer_tokens < self.batch // self.accumulate:
            raise ConfigError(
                f"buffer_tokens={self.buffer_tokens} is smaller than a micro-batch of {self.batch // self.accumulate};"
                " raise --buffer-tokens"
            )

    def _at_least(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if isinstance(value, int | float) and not value >= least:
            raise ConfigError(f"{name}={value} must be at least {least:g}")

    @property
    def policy(self) -> FirstPosition:
        """The first-position policy."""
        return FirstPosition(prepend=self.prepend, n_skip=self.n_skip)

    def share(self, data_ranks: int) -> TrainConfig:
        """Return the part of this run that one rank does, as a run of its own; for plans.

        Args:
            data_ranks: number of data-parallel groups of `feature_ranks` ranks.

        Raises:
            ConfigError: for a batch that cannot be divided evenly over the ranks.
        """
        ranks = data_ranks * self.feature_ranks
        if self.batch % (self.accumulate * ranks):
            raise ConfigError(
                f"batch={self.batch} in accumulate={self.accumulate} micro-batches cannot be divided evenly over"
                f" {ranks} ranks; make --batch a multiple of {self.accumulate * ranks}"
            )
        per_rank = {name: getattr(self, name) / self.feature_ranks for name in ("l0", "l0_per_layer")}
        return replace(
            self,
            n_features=self.n_features // self.feature_ranks,
            batch=self.batch // data_ranks,
            buffer_tokens=max(self.buffer_tokens // ranks, self.batch // data_ranks // self.accumulate),
            feature_ranks=1,
            **per_rank,
        )

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.tokens // self.batch

    @property
    def ranks(self) -> bool:
        """Whether the activation ranks features (TopK, BatchTopK)."""
        return ACTIVATIONS[self.activation].ranks

    def target_l0(self, n_layers: int) -> float:
        """Return the target L0 per token, summed over layers."""
        return self.l0 or self.l0_per_layer * n_layers

    def first_l0(self, n_layers: int) -> float:
        """Return the L0 requested at the first step, summed over layers: at most half of all features."""
        return min(self.target_l0(n_layers) * self.l0_start, 0.5 * n_layers * self.n_features)

    def clt(self, n_layers: int, d_model: int) -> CLTConfig:
        """Return the config of the transcoder to train on a host of this shape.

        Raises:
            ConfigError: for a target L0 that exceeds the number of features.
        """
        l0, max_l0 = self.target_l0(n_layers), n_layers * self.n_features
        if l0 > max_l0:
            raise ConfigError(
                f"a target L0 of {l0:g} exceeds the {max_l0} features of the transcoder;"
                " lower --l0 or raise --n-features"
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

    def given(self) -> dict[str, Any]:
        """Return the settings that are not left to the budget, as JSON types."""
        left = {f.name for f in fields(self) if f.metadata.get("by_budget") and not getattr(self, f.name)}
        return {name: value for name, value in self.as_dict().items() if name not in left}

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> TrainConfig:
        """Return the config of a dict that `as_dict` made; names of earlier versions are accepted (`RENAMED`)."""
        saved = renamed(saved)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(saved) - known):
            raise ConfigError(f"unknown setting {unknown[0]}; another version of crosslayer wrote it")
        # Earlier versions saved the L0 that was not given as null.
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if v is not None}
        return cls(**values)


def renamed(saved: dict[str, Any]) -> dict[str, Any]:
    """Return saved settings under their current names."""
    return {RENAMED.get(name, name): value for name, value in saved.items()}
