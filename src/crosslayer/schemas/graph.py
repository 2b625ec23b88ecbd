"""Attribution graphs as JSON: the header of our own files, and the interchange format of Anthropic's viewer.

The interchange format is also circuit-tracer's and Neuronpedia's. Unknown keys are kept, so a file read and written
again says what it said.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

FORMAT = "crosslayer-graph"
VERSION = 1
SLUG = re.compile(r"[A-Za-z0-9_.-]+")


class TargetRecord(BaseModel):
    """What a graph explains."""

    kind: Literal["logit", "difference", "vector", "feature"]
    name: str
    position: int
    layer: int
    """Of a feature; the number of layers for what reads the top of the stream."""
    token: int | None = None
    weight: float
    """Share of the influence that it hands on; a logit's probability."""
    probability: float | None = None


class GraphHeader(BaseModel):
    """Everything of a graph but its arrays."""

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
    """The bound: share of the targets' influence in features that have no row; none for a pruned file that was
    imported.
    """
    kept_share: float = 1.0
    """At least this share of each row's mass is in the edges kept."""
    host: str
    clt: str
    scan: str
    settings: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    created: str = ""
    """UTC, ISO 8601."""
    wall_s: float | None = None
    arrays: str | None = None
    """Hash of the file of arrays that was written with it."""


def _array(value: Any) -> Any:
    """circuit-tracer writes the lists of `qParams` as strings."""
    if isinstance(value, str):
        import json

        return json.loads(value) if value.strip() else []
    return value


class QParams(BaseModel):
    """What a viewer keeps with a graph."""

    model_config = ConfigDict(extra="allow")

    pinnedIds: Annotated[list[str], BeforeValidator(_array)] = Field(default_factory=list)
    supernodes: Annotated[list[list[str]], BeforeValidator(_array)] = Field(default_factory=list)
    linkType: str = "both"
    clickedId: str | None = ""
    sg_pos: str | None = ""


class GraphMetadata(BaseModel):
    """What a graph file says of itself; `slug` is its name."""

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
    """One node. `influence` is the cumulative share at the node's rank, or in some files the influence itself."""

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
    """One edge."""

    model_config = ConfigDict(extra="allow")

    source: str
    target: str
    weight: float


class GraphFile(BaseModel):
    """A whole file of the interchange format."""

    model_config = ConfigDict(extra="allow")

    metadata: GraphMetadata
    qParams: QParams = Field(default_factory=QParams)
    nodes: list[GraphNode]
    links: list[GraphLink]

    @property
    def raw_influence(self) -> bool:
        """Whether nodes state their influence rather than the cumulative share at their rank.

        Influence of tokens and errors sums to at most 1; shares of two tokens already come to more.
        """
        ends = [n.influence for n in self.nodes if n.influence is not None and n.feature_type in (TOKEN, ERROR)]
        return bool(ends) and sum(ends) <= 1.001 and max(ends) < 0.999

    def cumulative(self) -> list[float | None]:
        """For each node the cumulative share at its rank, whichever way the file states influence.

        Where it states influence itself, nodes that were pruned away are taken to hold what `node_threshold` leaves.
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
        """For each node its share of the influence; from cumulative shares, what each adds to the ones ranked above it.

        Nodes that were pruned away leave gaps, so no node is given more than the one above it.
        """
        if self.raw_influence:
            return [n.influence or 0.0 for n in self.nodes]
        ranked = sorted((n.influence, i) for i, n in enumerate(self.nodes) if n.influence is not None)
        found, so_far, most = [0.0] * len(self.nodes), 0.0, 1.0
        for value, i in ranked:
            most = min(most, max(value - so_far, 0.0))
            found[i], so_far = most, value
        return found
