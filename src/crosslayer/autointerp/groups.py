"""Labels of clusters, from the labels of their members."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from crosslayer.autointerp.documents import in_drawn_order
from crosslayer.autointerp.endpoint import Request
from crosslayer.autointerp.explain import DATA, EXPLAIN_TOKENS, SAY, SCHEMA
from crosslayer.autointerp.quote import numbered, quoted
from crosslayer.bundles.bundle import FeatureBundle

MIN_MEMBERS = 2
"""Min number of labelled members of a cluster that gets a label."""
MOST_MEMBERS = 40

SYSTEM = f"""Features of a language model, each a detector that fires on some tokens of a text, were put into a group \
because they fire together, or read or write alike.
{DATA}
"members" holds what some of them fire on. Say what they have in common, and if it is little, what most of them are \
about.
{SAY}"""


class GroupMembers(NamedTuple):
    """A cluster and the labels of its members."""

    level: int
    number: int
    labels: list[str]


def groups_of(bundle: FeatureBundle, features: Collection[int], source: str, seed: int = 0) -> list[GroupMembers]:
    """Return clusters of all levels that hold some of the features and enough labelled members.

    Members labelled by a person or by this model come first; rule labels fill the rest of `MOST_MEMBERS`.
    """
    if not bundle.has("group"):
        return []
    group_NX = np.asarray(bundle.array("group"))
    found = []
    for level in range(group_NX.shape[1]):
        for number in sorted({int(group_NX[f, level]) for f in features} - {-1}):
            members = in_drawn_order((int(f) for f in np.flatnonzero(group_NX[:, level] == number)), seed)
            added = bundle.user.labels(members)
            own = [next((x.label for x in added.get(f, []) if x.source in ("person", source)), None) for f in members]
            labelled = [label for label in own if label]
            if len(labelled) < MIN_MEMBERS:
                continue
            by_rule = bundle.index.labels([f for f, label in zip(members, own, strict=True) if not label])
            rest = [label for label in by_rule.values() if label and not label.startswith("dead")]
            found.append(GroupMembers(level, number, (labelled + rest)[:MOST_MEMBERS]))
    return found


def group_request(labels: Sequence[str], thinking: int = 0) -> Request:
    """Build the request to label a cluster."""
    return Request(SYSTEM, f'{{"members": {numbered([quoted(x) for x in labels])}}}', SCHEMA, EXPLAIN_TOKENS + thinking)
