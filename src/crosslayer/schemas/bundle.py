"""`manifest.json` of a feature bundle, and the record of one feature that it gives out."""

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
    """Hash of its tokens."""


class BundleManifest(BaseModel):
    """What a bundle is of, and what it holds."""

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
    """Tokens of a row of the token file."""
    n_tokens: int
    """Positions at which features were looked at: all but the first `n_skip` of each row."""
    settings: dict[str, Any]
    sample_tokens: int
    """Of the sample that co-activation and rules were counted on."""
    files: dict[str, int]
    """Bytes of each file."""
    imported: str | None = None
    """Where it was imported from: packed feature files, which say less."""
    versions: dict[str, str]
    wall_s: float = 0.0


class TokenCount(NamedTuple):
    """A token's text, and how often it was met."""

    token: str
    count: int


class Example(NamedTuple):
    """A stretch of text on which a feature fires."""

    tokens: list[str]
    activations: list[float]
    """Of each token; in 255ths of the feature's highest."""
    peak: int
    """Of the token that the example was chosen for."""
    value: float
    """The activation there, exact."""
    bin: int
    """0 for a top example, else the quantile bin that it was drawn from, from 1."""
    position: int
    """Of its first token in the token file."""
    source: str


class Logit(NamedTuple):
    """A token that a feature promotes or suppresses: the logit for an activation of 1, and its z-score over the
    vocabulary.
    """

    token: str
    value: float | None
    z: float | None


class Neighbour(NamedTuple):
    """Another feature, and how near or how strongly connected it is."""

    layer: int
    index: int
    value: float
    label: str | None


class Rule(NamedTuple):
    """The rule that describes a feature best, measured on tokens that did not choose it."""

    kind: str
    values: list[Any]
    precision: float | None
    recall: float | None
    auroc: float | None


class Histogram(NamedTuple):
    """Counts of activations between edges."""

    edges: list[float]
    counts: list[int]


class Feature(NamedTuple):
    """All that a bundle knows of one feature."""

    layer: int
    index: int
    label: str | None
    label_from: str | None
    """person, a model's name, or rule."""
    rule: Rule | None
    n_tokens: int
    count: int
    """Tokens on which it fires."""
    density: float
    density_by_source: dict[str, float]
    mean: float
    """Of its activations where it fires."""
    min: float
    max: float
    linear: Histogram
    log: Histogram
    quantile_edges: list[float]
    examples: list[Example]
    at: dict[str, list[TokenCount]]
    """Most frequent tokens at the peak, just before it, and first and last in the run around it."""
    promotes: list[Logit]
    suppresses: list[Logit]
    decoder_norms: list[float]
    """By layer written; empty where they are not known."""
    groups: list[int]
    map_xy: tuple[float, float] | None


class Found(NamedTuple):
    """A line of a list of features."""

    layer: int
    index: int
    label: str | None
    density: float
    max: float
    auroc: float | None
    fires: list[str]
    """Tokens at its peaks, the most frequent first."""
    promotes: list[str]
