"""`manifest.json` of a feature bundle, and the record of one feature."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from crosslayer.schemas.policy import FirstPosition


class Stream(BaseModel):
    """Text of one source, in the order of the token file."""

    model_config = ConfigDict(extra="forbid")

    name: str
    n_rows: int
    digest: str
    """Hash of the tokens."""


class BundleManifest(BaseModel):
    """Manifest of a feature bundle: transcoder, host, text and files."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    whole: bool
    created: str
    """UTC, ISO 8601."""
    host: str
    host_hash: str
    clt: str
    scan: str
    clt_hash: str
    tokenizer_hash: str
    text: list[Stream]
    policy: FirstPosition
    n_layers: int
    n_features: int
    context: int
    """Tokens per row of the token file."""
    n_tokens: int
    """Number of scanned positions: all but the first `n_skip` of each row."""
    settings: dict[str, Any]
    sample_tokens: int
    """Tokens in the sample for co-activation and rules."""
    files: dict[str, int]
    """Size of each file in bytes."""
    imported: str | None = None
    """Source of an import from packed feature files, which hold less; None for a built bundle."""
    versions: dict[str, str]
    wall_s: float = 0.0


class TokenCount(NamedTuple):
    """The text of a token, and its count."""

    token: str
    count: int


class Example(NamedTuple):
    """A window of text on which a feature is active."""

    tokens: list[str]
    activations: list[float]
    """Activation per token, in units of 1/255 of the feature's maximum."""
    peak: int
    """Index of the token that the example was chosen for."""
    value: float
    """Exact activation at the peak."""
    bin: int
    """0 for a top activation, otherwise the quantile bin, from 1."""
    position: int
    """Position of the first token in the token file."""
    source: str


class Logit(NamedTuple):
    """A promoted or suppressed token: logit for an activation of 1, and z-score over the vocabulary."""

    token: str
    value: float | None
    z: float | None


class Neighbour(NamedTuple):
    """Another feature, and its similarity or connection strength."""

    layer: int
    index: int
    value: float
    label: str | None


class Rule(NamedTuple):
    """The best rule for a feature, scored on held-out tokens."""

    kind: str
    values: list[Any]
    precision: float | None
    recall: float | None
    auroc: float | None


class Histogram(NamedTuple):
    """Histogram of activations."""

    edges: list[float]
    counts: list[int]


class Feature(NamedTuple):
    """The record of one feature in a bundle."""

    layer: int
    index: int
    label: str | None
    label_from: str | None
    """Source of the label: person, the name of a model, or rule."""
    rule: Rule | None
    n_tokens: int
    count: int
    """Number of tokens on which the feature is active."""
    density: float
    density_by_source: dict[str, float]
    mean: float
    """Mean of the nonzero activations."""
    min: float
    max: float
    linear: Histogram
    log: Histogram
    quantile_edges: list[float]
    examples: list[Example]
    at: dict[str, list[TokenCount]]
    """Most frequent tokens at the peak, before it, and at start and end of the active run around it."""
    promotes: list[Logit]
    suppresses: list[Logit]
    decoder_norms: list[float]
    """Per layer written; empty if unknown."""
    groups: list[int]
    map_xy: tuple[float, float] | None


class Found(NamedTuple):
    """A row in a list of features."""

    layer: int
    index: int
    label: str | None
    density: float
    max: float
    auroc: float | None
    fires: list[str]
    """Tokens at peaks, the most frequent first."""
    promotes: list[str]
