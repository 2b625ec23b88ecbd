"""Targets of a graph: logits, differences of logits, directions and features.

A target reads the residual stream at one position. A logit's direction is its unembedding row minus the mean row, so
that it does not depend on an offset common to all logits. Logits are those before a soft-cap (Gemma 2), as it is not
linear; so are `Intervened.linear_before_TV` and `linear_after_BTV`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from crosslayer.attribution.descent import Reads
from crosslayer.attribution.local import LocalModel
from crosslayer.core.errors import ConfigError
from crosslayer.host.memory import fetch

MAX_LOGITS = 10
DESIRED_PROBABILITY = 0.95


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target of a graph.

    Give one of `token`, `feature` and `vector`.

    Attributes:
        token: id or text of one token; with `minus`, its logit minus that of another token.
        feature: (layer, index), at `position`.
        vector: direction (D,) that is multiplied with the final norm's output, like an unembedding row.
        position: position in the prompt; negative from the end.
        weight: the target's share of influence; by default the probability of a token, and 1 for other targets.
        name: name in printed output and on pages.
    """

    token: int | str | None = None
    minus: int | str | None = None
    feature: tuple[int, int] | None = None
    vector: Tensor | None = None
    position: int = -1
    weight: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.token, self.feature, self.vector)) != 1:
            raise ConfigError("a target is a token, a feature or a vector; give exactly one of the three")
        if self.minus is not None and self.token is None:
            raise ConfigError(f"minus={self.minus!r} needs a token to subtract from; give token too")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(f"a target's weight must be positive, not {self.weight}")


def parse_target(text: str) -> Target:
    """Parse a target of the command line: `TOKEN`, `TOKEN-minus-TOKEN` or `L12/345`, each with an optional `@POSITION`.

    A token is its text, or `#ID`. Without `@POSITION` the target is at the last position.

    Raises:
        ConfigError: for a text of another form.
    """
    body, position = text, -1
    if "@" in text[1:] and re.fullmatch(r"-?[0-9]{1,9}", text.rsplit("@", 1)[1]):
        body, number = text.rsplit("@", 1)
        position = int(number)
    if not body:
        raise ConfigError(
            f"target {text!r} names nothing; give a token, TOKEN-minus-TOKEN, or LAYER/INDEX of a feature as L12/345"
        )
    layer, slash, index = body[1:].partition("/")
    if body[0] == "L" and slash and re.fullmatch(r"[0-9]{1,9}", layer) and re.fullmatch(r"[0-9]{1,9}", index):
        return Target(feature=(int(layer), int(index)), position=position, name=text)
    one, minus, other = body.partition("-minus-")
    if minus and one and other:
        return Target(token=_token(one), minus=_token(other), position=position)
    return Target(token=_token(body), position=position)


def _token(text: str) -> int | str:
    return int(text[1:]) if re.fullmatch(r"#[0-9]{1,9}", text) else text


@dataclass(frozen=True)
class Resolved:
    """A target resolved on one prompt."""

    kind: str
    """logit, difference, vector or feature"""
    name: str
    position: int
    layer: int
    """Layer of the feature; the number of layers for targets after the last layer."""
    token: int | None
    weight: float
    probability: float | None
    read_D: Tensor
    constant: float
    value: float


def resolve(local: LocalModel, asked: Sequence[Target] | None) -> list[Resolved]:
    """Resolve targets to directions; by default the fewest tokens that reach 95 % of the probability, max 10.

    Raises:
        ConfigError: for a position outside the prompt, a text that is not one token, or a feature that is not active
            at its position.
    """
    if asked is None:
        probability_V = local.probabilities(local.n_positions - 1)
        top = np.argsort(-probability_V, kind="stable")[:MAX_LOGITS]
        n = int((probability_V[top].cumsum() < DESIRED_PROBABILITY).sum()) + 1
        asked = [Target(token=int(i)) for i in top[:n]]
    if not asked:
        raise ConfigError("no target was given; name one, or leave targets out for the most probable tokens")
    resolved = _with_values(local, [_resolve(local, target) for target in asked])
    if not sum(r.weight for r in resolved) > 0:
        raise ConfigError(
            f"target {resolved[0].name!r} has a probability of 0 here, so it has no influence; give it a weight"
        )
    for i, r in enumerate(resolved):
        if r.kind != "vector" and any(
            (r.kind, r.name, r.position, r.token) == (q.kind, q.name, q.position, q.token) for q in resolved[:i]
        ):
            raise ConfigError(f"target {r.name!r} at position {r.position} is given twice; name it once")
    return resolved


def _resolve(local: LocalModel, target: Target) -> Resolved:
    position = _position(local, target.position)
    if target.feature is not None:
        return _feature(local, target, position)
    host, full = local.anatomy.host, local.dtype
    unembedding_VD, bias_V = local.anatomy.unembedding_VD, local.anatomy.unembedding_bias_V
    mean_D = local.anatomy.mean_unembedding_D.to(full)
    shift = 0.0
    token = probability = None
    if target.vector is not None:
        vector_D = torch.as_tensor(target.vector).to(mean_D)
        if vector_D.shape != mean_D.shape:
            raise ConfigError(
                f"a target vector of shape {tuple(vector_D.shape)} does not fit the width of {host.name}, {len(mean_D)}"
            )
        if not bool(vector_D.isfinite().all()):
            raise ConfigError("a target vector holds numbers that are not finite")
        kind, name = "vector", target.name or "vector"
    else:
        token, name = token_of(local, target.token)
        vector_D = unembedding_VD[token].to(full) - mean_D
        shift = 0.0 if bias_V is None else float(bias_V[token] - bias_V.mean())
        if target.minus is None:
            kind = "logit"
            probability = float(local.probabilities(position)[token])
        else:
            kind, (other, other_name) = "difference", token_of(local, target.minus)
            vector_D = vector_D - (unembedding_VD[other].to(full) - mean_D)
            shift -= 0.0 if bias_V is None else float(bias_V[other] - bias_V.mean())
            name = f"{name} - {other_name}"
        name = target.name or name
    norm, scale = local.anatomy.final_norm, local.final_scale_T[position]
    constant = shift + (0.0 if norm.bias_D is None else float(norm.bias_D.to(full) @ vector_D))
    read_D = norm.pull(vector_D) * scale
    weight = target.weight if target.weight is not None else 1.0 if probability is None else probability
    return Resolved(kind, name, position, local.n_layers, token, weight, probability, read_D, constant, 0.0)


def _with_values(local: LocalModel, resolved: list[Resolved]) -> list[Resolved]:
    """Compute the values of targets after the last layer, of all at once.

    Raises:
        ConfigError: for a direction that reads nothing.
    """
    tops = [r for r in resolved if r.layer == local.n_layers]
    if not tops:
        return resolved
    read_ND = torch.stack([r.read_D for r in tops])
    top_ND = local.top_TD[[r.position for r in tops]]
    sizes, values = fetch(read_ND.abs().amax(1), torch.linalg.vecdot(read_ND, top_ND))
    for r, size in zip(tops, sizes, strict=True):
        if size == 0:
            raise ConfigError(f"target {r.name!r} is a zero direction, which has no edges; give another")
    value = iter(values.tolist())
    return [replace(r, value=next(value) + r.constant) if r.layer == local.n_layers else r for r in resolved]


def _position(local: LocalModel, position: int) -> int:
    n = local.n_positions
    if not -n <= position < n:
        raise ConfigError(
            f"position {position} is not among the prompt's {n} tokens; give 0 to {n - 1}, or -1 for the last"
        )
    return position % n


def token_of(local: LocalModel, token: int | str | None) -> tuple[int, str]:
    """Return id and text of a token given as either.

    Raises:
        ConfigError: for an id that does not exist or a text that is not one token.
    """
    host = local.anatomy.host
    if isinstance(token, int):
        if not 0 <= token < host.n_vocab:
            raise ConfigError(
                f"token {token} is outside the vocabulary of {host.name}; give an id below {host.n_vocab}"
            )
        return token, host.decode_token(token)
    ids = host.tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        shown = ", ".join(f"#{i} {host.decode_token(i)!r}" for i in ids[:12]) or "none"
        raise ConfigError(
            f"target {token!r} is {len(ids)} tokens of {host.name} ({shown}); give one of them by its text or #ID;"
            " leading spaces count"
        )
    return ids[0], host.decode_token(ids[0])


def _feature(local: LocalModel, target: Target, position: int) -> Resolved:
    assert target.feature is not None
    layer, index = target.feature
    config = local.clt.config
    if not (0 <= layer < config.n_layers and 0 <= index < config.n_features):
        raise ConfigError(
            f"there is no feature {index} in layer {layer}; the transcoder has {config.n_layers} layers of"
            f" {config.n_features} features"
        )
    same_N = (local.layers == layer) & (local.indices == index)
    found = (same_N & (local.positions == position)).nonzero()[0]
    if not len(found):
        elsewhere = local.positions[same_N].tolist()
        where = f"it is at {', '.join(map(str, elsewhere[:12]))}" if elsewhere else "nor anywhere else on this prompt"
        raise ConfigError(
            f"feature {index} of layer {layer} is not active at position {position}, {where}; a graph explains active"
            " features only"
        )
    reads = feature_reads(local, layer, found)
    name = target.name or f"L{layer}/{index}"
    weight = 1.0 if target.weight is None else target.weight
    return Resolved(
        "feature",
        name,
        position,
        layer,
        None,
        weight,
        None,
        reads.read_ND[0],
        float(reads.constant_N[0]),
        float(reads.value_N[0]),
    )


def feature_reads(local: LocalModel, layer: int, which_N: Int[np.ndarray, " N"]) -> Reads:
    """Build the reads of active features of one layer.

    Args:
        which_N: places among `local.features`.
    """
    f, full, block = local.features, local.dtype, local.anatomy.blocks[layer]
    at_N = torch.from_numpy(which_N).to(local.device)
    index_N = f.index_N[at_N]
    row_ND = local.clt.W_enc.rows(layer, index_N).to(full)
    constant_N = local.clt.b_enc[layer][index_N].to(full)
    if block.read_norm is not None:
        if block.read_norm.bias_D is not None:
            constant_N = constant_N + row_ND @ block.read_norm.bias_D.to(full)
        row_ND = block.read_norm.pull(row_ND) * local.scales[layer].mlp_T[f.position_N[at_N], None]
    return Reads(layer, local.positions[which_N], row_ND, constant_N, f.activation_N[at_N])


def target_reads(resolved: Sequence[Resolved]) -> Reads:
    """Build the reads of targets of one site."""
    read_ND = torch.stack([r.read_D for r in resolved])
    numbers_2N = read_ND.new_tensor([[r.constant for r in resolved], [r.value for r in resolved]])
    return Reads(resolved[0].layer, np.array([r.position for r in resolved]), read_ND, *numbers_2N)
