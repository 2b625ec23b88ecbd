"""`eval.json`: metrics of a transcoder on held-out text."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Replacement(BaseModel):
    """The full replacement model: every MLP output replaced, features recomputed on the replaced stream.

    Cross-entropies are in nats per token. The first `n_skip` positions keep the host's MLP outputs, and their
    predictions are not counted.
    """

    model_config = ConfigDict(extra="forbid")

    n_tokens: int
    ce_host: float
    ce_replaced: float
    ce_zero: float
    """Cross-entropy with every MLP output set to zero."""
    kl: float
    """KL(host || replacement), nats per token."""
    top1_agreement: float
    loss_recovered: float
    """(ce_zero - ce_replaced) / (ce_zero - ce_host)."""


class TrainingEnd(BaseModel):
    """How training ended; every L0 is per token, summed over layers."""

    model_config = ConfigDict(extra="forbid")

    trained_as: str
    """Activation in training; the saved one is JumpReLU, or ReLU."""
    l0_asked: float
    l0_training: float | None
    """Mean over the last 5 % of the records of `log.jsonl`."""
    l0_uncalibrated: float | None
    """L0 on the calibration tokens with the trained thresholds; None for an activation without thresholds."""


class Evaluation(BaseModel):
    """Metrics on held-out text; the suffix `_L` is a list over layers.

    Tokens with massive activations count only in `n_tokens`, `fvu_all`, `l0_all` and the replacement model.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    n_tokens: int
    sources: list[str]
    fvu: float
    """sum ||yhat - y||^2 / sum ||y - mean(y)||^2, pooled over layers after dividing each by its mean squared norm.

    mean(y) is the layer's mean over these held-out tokens.
    """
    fvu_L: list[float]
    fvu_all: float | None = None
    """FVU with massive activations."""
    affine_fvu: float | None = None
    """FVU of the best affine map from each MLP's own input to its output, fitted on training text."""
    affine_fvu_L: list[float] | None = None
    l0: float
    """Features with f > 0 per token, summed over layers."""
    l0_per_layer: float
    l0_L: list[float]
    l0_all: float | None = None
    """L0 with massive activations."""
    massive_share: float | None = None
    """Share of tokens whose MLP input or output at some layer exceeds 10 times the layer's median norm."""
    dead_tokens: int
    """Tokens over which dead features are counted: the first 100,000, or all if fewer."""
    dead_share: float
    dead_L: list[float]
    density_log10_edges: list[float]
    density_histogram_L: list[list[int]]
    """Features by log10 of their density; features without activation are in no bin."""
    replacement: Replacement
    training: TrainingEnd | None = None
    wall_s: float
