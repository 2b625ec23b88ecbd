"""Interventions: change the activations of features on a prompt and measure the effect on the model.

An intervention sets, scales or ablates a feature at some positions. The change in activation times the feature's
decoder rows is added to the MLP outputs that the feature writes to. Three settings choose how the model reacts:

- `mlps="host"`: the host's own MLPs react to the changed residual stream. `mlps="replaced"`: the MLPs are replaced by
  the transcoder. Features are recomputed and the prompt's errors stay fixed. Generated tokens have no errors.
- `hold`: layers whose MLP outputs are fixed, except for what the interventions add (and for affine skips, which are
  linear). Features of these layers pass nothing on. Holding all layers leaves only direct effects, which are the edges
  of a graph.
- `freeze`: attention patterns, norm scales, both or neither are frozen at the prompt's values.

Generated tokens have no values to hold or to freeze: there all layers react as `mlps` says.

The first positions of the policy have no features. Their MLPs are always the host's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.attribution.freeze import FREEZES, frozen
from crosslayer.attribution.local import LocalModel, local_model
from crosslayer.attribution.opening import open_both
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.sparse import Active
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError
from crosslayer.eval.replacement_model import Prompt, ReplacementModel, tokens_of
from crosslayer.host import memory
from crosslayer.host.host import Host, capped

MOST = 1e18
"""Maximum value or scale of an intervention. Its square still fits into a float32."""
Positions = int | slice | Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """One feature, some positions, and a new value.

    Give one of `set` and `scale`; `scale=0` ablates.

    Attributes:
        layer, index: the feature.
        positions: one position, several, a slice (an open end includes generated tokens), or None for all.
        set: the new activation.
        scale: factor on the activation that the feature has at that point.
    """

    layer: int
    index: int
    positions: Any = None
    set: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if (self.set is None) == (self.scale is None):
            raise ConfigError(
                f"feature {self.layer}/{self.index} must be set or scaled; give exactly one of set and scale"
            )
        object.__setattr__(self, "layer", index(self.layer))
        object.__setattr__(self, "index", index(self.index))
        if self.positions is not None and not isinstance(self.positions, slice):
            several = self.positions if isinstance(self.positions, Iterable) else [self.positions]
            object.__setattr__(self, "positions", tuple(index(p) for p in several))
        value = self.set if self.set is not None else self.scale
        if not abs(float(value or 0.0)) <= MOST:
            raise ConfigError(
                f"feature {self.layer}/{self.index} cannot take the value {value}; give a finite number of at most"
                f" {MOST:g}"
            )


class Intervened(NamedTuple):
    """Result of B sets of interventions, run side by side.

    Attributes:
        tokens_T: the prompt.
        linear_before_TV, linear_after_BTV: logits before a soft-cap (Gemma 2), as the targets of a graph are.
        softcap: cap of the host's logits.
        changes: per set, the largest change of each intervention's feature over its positions; 0 if it did nothing.
        watched_before_K, watched_BK: pre-activations of the watched features.
        generated_before, generated: generated tokens without and with each set of interventions.
        stream_before_LTD, stream_BLTD: MLP inputs at the transcoder's hook; None unless `keep_stream`.
    """

    tokens_T: Int[Tensor, " T"]
    linear_before_TV: Float[Tensor, "T V"]
    linear_after_BTV: Float[Tensor, "B T V"]
    softcap: float | None
    changes: list[list[float]]
    watched_before_K: Float[Tensor, " K"]
    watched_BK: Float[Tensor, "B K"]
    generated_before: list[int]
    generated: list[list[int]]
    stream_before_LTD: Float[Tensor, "L T D"] | None
    stream_BLTD: Float[Tensor, "B L T D"] | None

    @property
    def before_TV(self) -> Float[Tensor, "T V"]:
        """Logits of the host without interventions."""
        return capped(self.linear_before_TV, self.softcap)

    @property
    def after_BTV(self) -> Float[Tensor, "B T V"]:
        """Logits of the host with each set of interventions."""
        return capped(self.linear_after_BTV, self.softcap)


class Watch(NamedTuple):
    """A feature at a position whose pre-activation is returned."""

    layer: int
    position: int
    index: int


class _Edits(NamedTuple):
    """The E interventions of one layer, with the weights of the N distinct features that they change."""

    row_E: list[int]
    """The set of interventions that each belongs to, which is its row of the batch, and its place in the set."""
    place_E: list[int]
    which_E: Int[Tensor, " E"]
    """Each one's feature among the distinct ones."""
    interventions: list[Intervention]
    index_N: Int[Tensor, " N"]
    row_NSD: Float[Tensor, "N S D"]
    encoder_ND: Float[Tensor, "N D"]
    bias_N: Float[Tensor, " N"]
    threshold_N: Float[Tensor, " N"] | None

    def at(self, positions: range, n_prompt: int, first: int) -> tuple[Tensor, Tensor]:
        """Return K pairs of intervention and position that this pass covers, from the first position with features."""
        pairs = [
            (e, p)
            for e, i in enumerate(self.interventions)
            for p in _places(i.positions, n_prompt, positions)
            if p >= first
        ]
        edit_K, position_K = torch.tensor(pairs, device=self.which_E.device).view(-1, 2).unbind(1)
        return edit_K, position_K


class _Steer:
    """A visitor that applies interventions to one prompt and to the tokens generated after it."""

    def __init__(
        self,
        clt: CLT,
        batch: Sequence[Sequence[Intervention]],
        local: LocalModel | None,
        n_skip: int,
        n_prompt: int,
        mlps: str,
        hold: Collection[int],
        watch: Sequence[Watch],
        keep_stream: bool,
    ) -> None:
        self.clt, self.local, self.n_skip, self.n_prompt = clt, local, n_skip, n_prompt
        self.mlps, self.hold, self.watch, self.keep_stream = mlps, hold, watch, keep_stream
        self.edits = {layer: _edits(clt, layer, batch) for layer in {i.layer for some in batch for i in some}}
        self.largest = [torch.zeros(len(some), dtype=torch.float64) for some in batch]
        self.offset = 0
        self.pending: dict[int, Tensor] = {}
        self.watched = torch.zeros(len(batch), len(watch), dtype=torch.promote_types(clt.dtype, torch.float32))
        self.streams: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, layer: int, x_BTD: Tensor, y_BTD: Tensor) -> Tensor | None:
        positions = range(self.offset, self.offset + x_BTD.shape[1])
        self._look(layer, x_BTD)
        out_BTD = self._written(layer, x_BTD, y_BTD)
        if self.mlps == "replaced" and not self._held(layer):
            self._react(layer, x_BTD)
        if layer in self.edits:
            self._carry_out(layer, self.edits[layer], x_BTD, positions)
        added = self.pending.pop(layer, None)
        if added is None:
            return out_BTD
        base = y_BTD if out_BTD is None else out_BTD
        return (base + added.to(base.dtype)) if out_BTD is None or added.any() else out_BTD

    def _held(self, layer: int) -> bool:
        """Whether a layer's outputs are fixed at the tokens of this pass; only the prompt's can be."""
        return layer in self.hold and self.offset == 0

    def _written(self, layer: int, x_BTD: Tensor, y_BTD: Tensor) -> Tensor | None:
        """Return the MLP output before any addition; None for the host's own output."""
        if not (self._held(layer) or self.mlps == "replaced") or self.local is None:
            return None
        out_BTD = y_BTD.clone()
        first = max(self.n_skip - self.offset, 0)
        known = slice(first, max(self.n_prompt - self.offset, first))
        if self.offset == 0:
            out_BTD[:, known] = self.local.host_pass.y_LTD[layer, first : self.n_prompt].to(y_BTD.dtype)
            if self.clt.config.skip:
                x_TD = self.local.host_pass.x_LTD[layer, first : self.n_prompt].to(x_BTD.dtype)
                out_BTD[:, known] += self.clt.skip(x_BTD[:, known] - x_TD, layer).to(y_BTD.dtype)
        else:
            fresh = self.clt.b_dec[layer].to(y_BTD.dtype).expand_as(y_BTD)
            out_BTD = fresh + self.clt.skip(x_BTD, layer).to(y_BTD.dtype) if self.clt.config.skip else fresh.clone()
        return out_BTD

    def _react(self, layer: int, x_BTD: Tensor) -> None:
        """Add the writes of a replaced layer's current features, minus those on the prompt."""
        B, T, D = x_BTD.shape
        first = max(self.n_skip - self.offset, 0)
        if first >= T:
            return
        active = self.clt.encode_layer_sparse(x_BTD[:, first:].reshape(-1, D), layer)
        parts_XSD = self.clt.decode_layer(active, layer).unflatten(0, (B, T - first))
        if self.offset == 0 and self.local is not None:
            was = self._firing(layer, first)
            parts_XSD = parts_XSD - self.clt.decode_layer(was, layer)[None]
        for slot, part in enumerate(parts_XSD.unbind(2)):
            self._add(layer + slot, x_BTD, slice(None), slice(first, T), part)

    def _firing(self, layer: int, first: int) -> Active:
        assert self.local is not None
        return self.clt.encode_layer_sparse(self.local.host_pass.x_LTD[layer, first:], layer)

    def _carry_out(self, layer: int, edits: _Edits, x_BTD: Tensor, positions: range) -> None:
        """Add what the interventions on a layer's features write, to this and to later layers."""
        edit_K, position_K = edits.at(positions, self.n_prompt, self.n_skip)
        if not len(edit_K):
            return
        row_K = torch.tensor(edits.row_E, device=x_BTD.device)[edit_K]
        at_K, which_K = position_K - self.offset, edits.which_E[edit_K]
        if self._held(layer) and self.local is not None:
            x_KD = self.local.host_pass.x_LTD[layer, at_K]
        else:
            x_KD = x_BTD[row_K, at_K]
        was_K = self._activation(layer, edits, which_K, x_KD)
        value_E = was_K.new_tensor([i.scale if i.set is None else i.set for i in edits.interventions])
        scaled_E = torch.tensor([i.set is None for i in edits.interventions], device=x_BTD.device)
        change_K = torch.where(scaled_E[edit_K], was_K * value_E[edit_K], value_E[edit_K]) - was_K
        self._note(edits, edit_K, change_K)
        if not change_K.any():
            return
        for slot in range(edits.row_NSD.shape[1]):
            self._add(layer + slot, x_BTD, row_K, at_K, change_K[:, None] * edits.row_NSD[which_K, slot])

    def _activation(self, layer: int, edits: _Edits, which_K: Tensor, x_KD: Tensor) -> Tensor:
        if self.clt.config.ranks:
            f_KF = self.clt.encode_layer(x_KD, layer)
            return f_KF.gather(1, edits.index_N[which_K, None])[:, 0].to(edits.encoder_ND.dtype)
        z_K = (x_KD.to(edits.encoder_ND.dtype) * edits.encoder_ND[which_K]).sum(1) + edits.bias_N[which_K]
        fires_K = z_K > (0.0 if edits.threshold_N is None else edits.threshold_N[which_K])
        return torch.where(fires_K, z_K, 0.0)

    def _note(self, edits: _Edits, edit_K: Tensor, change_K: Tensor) -> None:
        """Record the largest change of each intervention."""
        largest_E = change_K.new_zeros(len(edits.interventions), dtype=torch.float64)
        largest_E.scatter_reduce_(0, edit_K, change_K.abs().double(), "amax")
        for row, place, largest in zip(edits.row_E, edits.place_E, largest_E.tolist(), strict=True):
            self.largest[row][place] = max(float(self.largest[row][place]), largest)

    def _add(self, layer: int, x_BTD: Tensor, row: Any, at: Any, values: Tensor) -> None:
        if layer not in self.pending:
            self.pending[layer] = torch.zeros(
                x_BTD.shape, dtype=torch.promote_types(values.dtype, torch.float32), device=x_BTD.device
            )
        if isinstance(row, Tensor):
            self.pending[layer].index_put_((row, at), values.to(self.pending[layer].dtype), accumulate=True)
        else:
            self.pending[layer][row, at] += values

    def _look(self, layer: int, x_BTD: Tensor) -> None:
        """Record the pre-activations and MLP inputs that were asked for."""
        if self.offset > 0:
            return
        if self.keep_stream:
            self.streams.append(x_BTD)
        here = [k for k, w in enumerate(self.watch) if w.layer == layer]
        if here:
            index_K = torch.tensor([self.watch[k].index for k in here], device=x_BTD.device)
            row_KD = self.clt.W_enc.rows(layer, index_K).to(self.watched.dtype)
            x_BKD = x_BTD[:, [self.watch[k].position for k in here]].to(self.watched.dtype)
            self.watched[:, here] = ((x_BKD * row_KD).sum(-1) + self.clt.b_enc[layer][index_K]).to(self.watched).cpu()


def _edits(clt: CLT, layer: int, batch: Sequence[Sequence[Intervention]]) -> _Edits:
    """Read the weights of all features of one layer that are changed, once each."""
    chosen = [(row, place, i) for row, some in enumerate(batch) for place, i in enumerate(some) if i.layer == layer]
    index_N, which_E = torch.tensor([i.index for *_, i in chosen], device=clt.device).unique(return_inverse=True)
    wide = torch.promote_types(clt.dtype, torch.float32)
    return _Edits(
        [row for row, *_ in chosen],
        [place for _, place, _ in chosen],
        which_E,
        [i for *_, i in chosen],
        index_N,
        clt.decoder_rows(layer, index_N).to(wide),
        clt.W_enc.rows(layer, index_N).to(wide),
        clt.b_enc[layer][index_N].to(wide),
        clt.threshold[layer][index_N].to(wide) if clt.config.kind.thresholds else None,
    )


def _places(positions: Positions, n_prompt: int, now: range) -> list[int]:
    """Return which positions of this pass are selected; negative positions count from the end of the prompt."""
    if positions is None:
        return list(now)
    if isinstance(positions, slice):
        start = positions.start or 0
        start = start + n_prompt if start < 0 else start
        stop = positions.stop
        stop = None if stop is None else stop + n_prompt if stop < 0 else stop
        step = positions.step or 1
        return [p for p in now if p >= start and (stop is None or p < stop) and (p - start) % step == 0]
    wanted = {p + n_prompt if p < 0 else p for p in _several(positions)}
    return [p for p in now if p in wanted]


def _several(positions: int | Sequence[int]) -> Sequence[int]:
    return [positions] if isinstance(positions, int) else positions


def intervene(
    model: str | Path | Host | ReplacementModel | None,
    clt: str | Path | CLT | Opened | None,
    prompt: Prompt,
    interventions: Sequence[Intervention] | Sequence[Sequence[Intervention]],
    *,
    freeze: str = "none",
    mlps: str = "host",
    hold: Collection[int] = (),
    generate: int = 0,
    watch: Sequence[Watch] = (),
    keep_stream: bool = False,
    device: str = "auto",
) -> Intervened:
    """Run a prompt with changed features; the module docstring explains `mlps`, `hold` and `freeze`.

    Args:
        model, clt, device: as for `attribute`.
        interventions: one set of interventions, or several to run side by side.
        generate: number of tokens to generate, greedily.
        watch: features whose pre-activations are returned.
        keep_stream: also return the MLP inputs.

    Raises:
        ConfigError: for a feature, layer or position that does not exist, or an unknown setting.
        ResourceError: if memory is too small; checked before it is allocated.
    """
    host, opened = open_both(model, clt, device)
    clt_ = opened.clt
    if clt_.config.ranks and clt_.config.scope == "all":
        raise ConfigError(
            f"{clt_.config.activation} over all layers cannot run layer by layer; convert the transcoder to JumpReLU"
        )
    if clt_.config.kind.over_batch:
        raise ConfigError(
            "batchtopk ranks the tokens of a batch together, so interventions run side by side would affect"
            " each other; convert the transcoder to JumpReLU"
        )
    tokens_BT = tokens_of(host, prompt).to(host.device)
    batch: list[list[Intervention]] = _as_batch(interventions)
    _check(clt_, tokens_BT.shape[1], batch, freeze, mlps, hold, generate, watch, host)
    _check_memory(host, clt_, len(batch), tokens_BT.shape[1], keep_stream)
    local = None
    if freeze != "none" or mlps == "replaced" or hold:
        local = local_model(host, clt_, tokens_BT[0])
    plain = _Steer(clt_, [[]], None, host.policy.n_skip, tokens_BT.shape[1], "host", (), watch, keep_stream)
    before, generated_before = _run(host, tokens_BT, plain, None, "none", generate)
    steer = _Steer(clt_, batch, local, host.policy.n_skip, tokens_BT.shape[1], mlps, set(hold), watch, keep_stream)
    after, generated = _run(host, tokens_BT.expand(len(batch), -1), steer, local, freeze, generate)
    return Intervened(
        tokens_BT[0],
        before[0],
        after,
        host.softcap,
        [largest.tolist() for largest in steer.largest],
        plain.watched[0],
        steer.watched,
        generated_before[0],
        generated,
        torch.stack(plain.streams, dim=1)[0] if keep_stream else None,
        torch.stack(steer.streams, dim=1) if keep_stream else None,
    )


@torch.no_grad()
def _run(
    host: Host, tokens_BT: Tensor, steer: _Steer, local: LocalModel | None, freeze: str, generate: int
) -> tuple[Tensor, list[list[int]]]:
    """Run the prompt, then generate greedily with a key-value cache."""
    with ExitStack() as stack:
        if local is not None and freeze != "none":
            stack.enter_context(frozen(local, freeze))
        stack.enter_context(host.without_softcap())
        cache = host.cache() if generate else None
        logits = host.run(tokens_BT, steer, cache=cache)
    assert logits is not None
    generated: list[list[int]] = [[] for _ in range(len(tokens_BT))]
    steer.offset, last = tokens_BT.shape[1], logits[:, -1]
    for step in range(generate):
        chosen_B = last.argmax(-1)
        for row, token in zip(generated, chosen_B.tolist(), strict=True):
            row.append(token)
        if step + 1 < generate:
            more = host.run(chosen_B[:, None], steer, cache=cache)
            assert more is not None
            steer.offset, last = steer.offset + 1, more[:, -1]
    return logits, generated


def _as_batch(interventions: Sequence[Any]) -> list[list[Intervention]]:
    if all(isinstance(i, Intervention) for i in interventions):
        return [list(interventions)]
    return [list(i) for i in interventions]


def _check(
    clt: CLT,
    n: int,
    batch: list[list[Intervention]],
    freeze: str,
    mlps: str,
    hold: Collection[int],
    generate: int,
    watch: Sequence[Watch],
    host: Host,
) -> None:
    c = clt.config
    if freeze not in FREEZES:
        raise ConfigError(f"freeze={freeze!r} is unknown; give one of {', '.join(FREEZES)}")
    if mlps not in ("host", "replaced"):
        raise ConfigError(f"mlps={mlps!r} is unknown; give host or replaced")
    if beyond := [i for i in hold if not 0 <= i < c.n_layers]:
        raise ConfigError(f"there is no layer {beyond[0]} to hold; the transcoder has {c.n_layers}")
    if generate < 0 or n + generate > host.max_positions:
        remedy = "lower it" if n <= host.max_positions and generate > 0 else "shorten the prompt"
        raise ConfigError(
            f"generate={generate} after {n} tokens does not fit the context of {host.name}, {host.max_positions};"
            f" {remedy}"
        )
    for i in [i for some in batch for i in some]:
        if not (0 <= i.layer < c.n_layers and 0 <= i.index < c.n_features):
            raise ConfigError(
                f"there is no feature {i.index} in layer {i.layer}; the transcoder has {c.n_layers} layers of"
                f" {c.n_features} features"
            )
        if not isinstance(i.positions, slice | None):
            for p in _several(i.positions):
                if not -n <= p < n + generate:
                    raise ConfigError(
                        f"position {p} is not among the prompt's {n} tokens; give 0 to {n - 1}, or -1 for the last"
                    )
                if p % n < host.policy.n_skip and p < n:
                    raise ConfigError(
                        f"position {p} is among the first {host.policy.n_skip}, which have no features; give a"
                        " later one"
                    )
    for some in batch:
        _check_once(some, n, generate, host.policy.n_skip)
    for w in watch:
        if not (0 <= w.layer < c.n_layers and 0 <= w.index < c.n_features and 0 <= w.position < n):
            raise ConfigError(
                f"feature {w.index} of layer {w.layer} at position {w.position} does not exist on this prompt and"
                " cannot be watched"
            )


def _check_memory(host: Host, clt: CLT, n_sets: int, n_positions: int, keep_stream: bool) -> None:
    """Check that logits, MLP inputs and what is written to later layers fit, for all sets and the plain run."""
    numbers = 2 * host.n_vocab + host.d_model * (clt.config.n_layers * (1 + keep_stream) + 4)
    wide = torch.finfo(torch.promote_types(host.dtype, torch.float32)).bits // 8
    memory.require(
        (n_sets + 1) * n_positions * numbers * wide,
        host.device,
        f"{n_sets} sets of interventions on {n_positions} tokens",
        "run fewer sets at once, or shorten the prompt",
    )


def _check_once(interventions: Sequence[Intervention], n: int, generate: int, n_skip: int) -> None:
    """Check that each intervention has a position with features, and that no feature is changed twice at a position."""
    taken: set[tuple[int, int, int]] = set()
    for i in interventions:
        places = _places(i.positions, n, range(n + generate))
        if not places:
            raise ConfigError(
                f"the positions of L{i.layer}/{i.index} hold none of the prompt's {n}; give 0 to {n - 1}, or -1 for the"
                " last"
            )
        if max(places) < n_skip:
            raise ConfigError(
                f"the positions of L{i.layer}/{i.index} are among the first {n_skip}, which have no features; give a"
                " later one"
            )
        for p in places:
            if (i.layer, i.index, p) in taken:
                raise ConfigError(f"L{i.layer}/{i.index} is changed twice at position {p}; give one intervention there")
            taken.add((i.layer, i.index, p))
