"""Attribution graphs as JSON: the header of crosslayer's files, and the format of Anthropic's viewer.

The interchange format is also used by circuit-tracer and Neuronpedia. Unknown keys are preserved.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

FORMAT = "crosslayer-graph"
VERSION = 1
SLUG = re.compile(r"[A-Za-z0-9_.-]+")


class TargetRecord(BaseModel):
    """An attribution target of a graph."""

    kind: Literal["logit", "difference", "vector", "feature"]
    name: str
    position: int
    layer: int
    """Layer of a feature; the number of layers for targets at the end of the residual stream."""
    token: int | None = None
    weight: float
    """Weight of the target in influence; for a logit, its probability."""
    probability: float | None = None


class GraphHeader(BaseModel):
    """Everything in a graph but its arrays."""

    format: Literal["crosslayer-graph"] = FORMAT
    version: int = VERSION
    prompt: str
    tokens: list[int]
    token_strings: list[str]
    n_layers: int
    n_skip: int
    """Leading positions without features."""
    n_vocab: int
    targets: list[TargetRecord]
    unexpanded: float | None
    """Bound on the fraction of influence in features whose edges are not computed; None for imported files."""
    kept_share: float = 1.0
    """Minimum fraction of each row's mass in the stored edges."""
    host: str
    clt: str
    scan: str
    settings: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    created: str = ""
    """UTC, ISO 8601."""
    wall_s: float | None = None
    arrays: str | None = None
    """Hash of the array file written with this header."""


def _array(value: Any) -> Any:
    """Parse the lists of `qParams`, which circuit-tracer writes as strings."""
    if isinstance(value, str):
        import json

        return json.loads(value) if value.strip() else []
    return value


class QParams(BaseModel):
    """State that viewers save in a graph."""

    model_config = ConfigDict(extra="allow")

    pinnedIds: Annotated[list[str], BeforeValidator(_array)] = Field(default_factory=list)
    supernodes: Annotated[list[list[str]], BeforeValidator(_array)] = Field(default_factory=list)
    linkType: str = "both"
    clickedId: str | None = ""
    sg_pos: str | None = ""


class GraphMetadata(BaseModel):
    """Metadata of a graph file; `slug` is its name."""

    model_config = ConfigDict(extra="allow")

    slug: str
    scan: str
    prompt: str
    prompt_tokens: list[str]
    transcoder_list: list[Any] = Field(default_factory=list)
    node_threshold: float | None = None
    schema_version: int = 1


FEATURE, ERROR, TOKEN, LOGIT = (
    "cross layer transcoder",
    "mlp reconstruction error",
    "embedding",
    "logit",
)


class GraphNode(BaseModel):
    """A node; `influence` is the cumulative share at its rank, or in some files the influence."""

    model_config = ConfigDict(extra="allow")

    node_id: str
    feature: int | None
    layer: str
    ctx_idx: int
    feature_type: str
    jsNodeId: str
    clerp: str | None
    influence: float | None = None
    activation: float | None = None
    token_prob: float | None = 0.0
    is_target_logit: bool = False
    run_idx: int | None = 0
    reverse_ctx_idx: int | None = 0


class GraphLink(BaseModel):
    """An edge."""

    model_config = ConfigDict(extra="allow")

    source: str
    target: str
    weight: float


class GraphFile(BaseModel):
    """A file in the interchange format."""

    model_config = ConfigDict(extra="allow")

    metadata: GraphMetadata
    qParams: QParams = Field(default_factory=QParams)
    nodes: list[GraphNode]
    links: list[GraphLink]

    @property
    def raw_influence(self) -> bool:
        """Whether `influence` is the influence itself, not the cumulative share at the node's rank.

        The influence of tokens and errors sums to at most 1; cumulative shares sum to more.
        """
        ends = [n.influence for n in self.nodes if n.influence is not None and n.feature_type in (TOKEN, ERROR)]
        return bool(ends) and sum(ends) <= 1.001 and max(ends) < 0.999

    def cumulative(self) -> list[float | None]:
        """Return the cumulative share at each node's rank.

        If the file holds influence itself, pruned nodes are assumed to hold 1 - `node_threshold`.
        """
        if not self.raw_influence:
            return [n.influence for n in self.nodes]
        ranked = sorted((n.influence, i) for i, n in enumerate(self.nodes) if n.influence is not None)[::-1]
        total, so_far = sum(v for v, _ in ranked), 0.0
        shares: list[float | None] = [None] * len(self.nodes)
        for value, i in ranked:
            so_far += value
            shares[i] = so_far / total * (self.metadata.node_threshold or 1.0) if total else 1.0
        return shares

    def influences(self) -> list[float]:
        """Return the influence of each node; from cumulative shares, the difference to the previous rank.

        Pruned nodes leave gaps, so no node gets more than the one ranked above it.
        """
        if self.raw_influence:
            return [n.influence or 0.0 for n in self.nodes]
        ranked = sorted((n.influence, i) for i, n in enumerate(self.nodes) if n.influence is not None)
        found, so_far, limit = [0.0] * len(self.nodes), 0.0, 1.0
        for value, i in ranked:
            limit = min(limit, max(value - so_far, 0.0))
            found[i], so_far = limit, value
        return found
