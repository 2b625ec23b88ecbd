"""The arrays of a graph, and a check that they fit its header."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from crosslayer.schemas.graph import GraphHeader


class GraphArrays(NamedTuple):
    """The arrays of a graph: F features, R rows, E edges, N nodes."""

    layer_F: Int[np.ndarray, " F"]
    position_F: Int[np.ndarray, " F"]
    index_F: Int[np.ndarray, " F"]
    activation_F: Float[np.ndarray, " F"]
    influence_N: Float[np.ndarray, " N"]
    """Influence from complete rows, with targets weighted as in the header."""
    row_R: Int[np.ndarray, " R"]
    """Node of each row."""
    start_R1: Int[np.ndarray, " R1"]
    """Offset of each row's edges, and the number of edges at the end."""
    source_E: Int[np.ndarray, " E"]
    weight_E: Float[np.ndarray, " E"]
    value_R: Float[np.ndarray, " R"]
    """Pre-activation of the row's node, or value of the target."""
    constant_R: Float[np.ndarray, " R"]
    """Edge from the constant node: biases, and what MLPs write at the first positions."""
    rest_R: Float[np.ndarray, " R"]
    """Sum of the edges that are not stored."""
    mass_R4: Float[np.ndarray, "R 4"]
    """Sums of absolute edges from features, errors and tokens, and of the edges that are not stored."""


def fault(header: GraphHeader, a: GraphArrays) -> str | None:
    """Return the first inconsistency of a header and its arrays, or None."""
    F, T = len(a.layer_F), len(header.tokens)
    N = F + header.n_layers * T + T + len(header.targets)
    R, E = len(a.row_R), len(a.weight_E)
    shapes = {
        "layer_F": (F,),
        "position_F": (F,),
        "index_F": (F,),
        "activation_F": (F,),
        "influence_N": (N,),
        "row_R": (R,),
        "start_R1": (R + 1,),
        "source_E": (E,),
        "weight_E": (E,),
        "value_R": (R,),
        "constant_R": (R,),
        "rest_R": (R,),
        "mass_R4": (R, 4),
    }
    for name, shape in shapes.items():
        if getattr(a, name).shape != shape:
            return f"{name} has shape {getattr(a, name).shape}, expected {shape}"
    for name in ("layer_F", "position_F", "index_F", "row_R", "start_R1", "source_E"):
        if getattr(a, name).dtype.kind != "i":
            return f"{name} holds {getattr(a, name).dtype}, expected integers"
    bounds = {"layer_F": header.n_layers, "position_F": T, "row_R": N, "source_E": N}
    for name, most in bounds.items():
        values = getattr(a, name)
        if len(values) and not (values.min() >= 0 and values.max() < most):
            return f"{name} has numbers outside 0 to {most - 1}"
    if len(np.unique(a.row_R)) != R:
        return "row_R names a node twice"
    if a.start_R1[0] != 0 or a.start_R1[-1] != E or (np.diff(a.start_R1) < 0).any():
        return "start_R1 does not divide the edges"
    for name in ("weight_E", "value_R", "constant_R", "rest_R", "mass_R4", "activation_F", "influence_N"):
        if getattr(a, name).dtype.kind != "f":
            return f"{name} holds {getattr(a, name).dtype}, expected floats"
        if not np.isfinite(getattr(a, name)).all():
            return f"{name} holds numbers that are not finite"
    for name in ("influence_N", "mass_R4", "index_F"):
        if len(getattr(a, name)) and getattr(a, name).min() < 0:
            return f"{name} has numbers below 0"
    if len(header.token_strings) != len(header.tokens):
        return f"{len(header.token_strings)} token_strings for {len(header.tokens)} tokens"
    weights = [t.weight for t in header.targets]
    if not all(0 <= w < float("inf") for w in weights) or not (sum(weights) > 0 or header.unexpanded is None):
        return "the targets' weights must be 0 or more, with at least one above 0"
    if not all(0 <= t.position < T for t in header.targets):
        return "a target is at a position outside the prompt"
    return None
