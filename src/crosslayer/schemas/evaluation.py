"""`eval.json`: what was measured of a transcoder, on text that it was not trained on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Replacement(BaseModel):
    """The full replacement model: every MLP output replaced, features recomputed on the replaced stream.

    Cross-entropies in nats a token. The first `n_skip` positions keep the host's own MLP outputs and are not predicted
    from.
    """

    model_config = ConfigDict(extra="forbid")

    n_tokens: int
    ce_host: float
    ce_replaced: float
    ce_zero: float
    """With every MLP output set to zero."""
    kl: float
    """KL(host || replacement), nats a token."""
    top1_agreement: float
    loss_recovered: float
    """(ce_zero - ce_replaced) / (ce_zero - ce_host)."""


class Evaluation(BaseModel):
    """Measures on held-out text. `_L` is a list over layers."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    n_tokens: int
    sources: list[str]
    fvu: float
    """sum ||yhat - y||^2 / sum ||y - mean(y)||^2, pooled over layers after dividing each by its mean squared norm.

    mean(y) is the layer's own mean over these held-out tokens.
    """
    fvu_L: list[float]
    l0: float
    """Features with f > 0 a token, summed over layers."""
    l0_per_layer: float
    l0_L: list[float]
    dead_tokens: int
    """Tokens over which the dead share is counted: the first 100,000, or all if fewer."""
    dead_share: float
    dead_L: list[float]
    density_log10_edges: list[float]
    density_histogram_L: list[list[int]]
    """Features by log10 of the share of tokens on which they fire; silent ones are in no bin."""
    replacement: Replacement
    wall_s: float
