"""Interventions: change the activations of features on a prompt and measure the effect on the model.

An intervention sets, scales or ablates a feature at some positions. The change in activation times the feature's
decoder rows is added to the MLP outputs that the feature writes to. Three settings choose how the model reacts:

- `mlps="host"`: the host's own MLPs react to the changed residual stream. `mlps="replaced"`: the MLPs are replaced by
  the transcoder. Features are recomputed and the prompt's errors stay fixed. Generated tokens have no errors.
- `hold`: layers whose MLP outputs are fixed, except for what the interventions add (and for affine skips, which are
  linear). Features of these layers pass nothing on. Holding all layers leaves only direct effects, which are the edges
  of a graph.
- `freeze`: attention patterns, norm scales, both or neither are frozen at the prompt's values. Generated tokens have no
  values to freeze.

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
from crosslayer.host.host import Host

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
        before_TV, after_BTV: logits.
        watched_before_K, watched_BK: pre-activations of the watched features.
        generated_before, generated: generated tokens without and with each set of interventions.
        stream_before_LTD, stream_BLTD: MLP inputs at the transcoder's hook; None unless `keep_stream`.
    """

    tokens_T: Int[Tensor, " T"]
    before_TV: Float[Tensor, "T V"]
    after_BTV: Float[Tensor, "B T V"]
    watched_before_K: Float[Tensor, " K"]
    watched_BK: Float[Tensor, "B K"]
    generated_before: list[int]
    generated: list[list[int]]
    stream_before_LTD: Float[Tensor, "L T D"] | None
    stream_BLTD: Float[Tensor, "B L T D"] | None


class Watch(NamedTuple):
    """A feature at a position whose pre-activation is returned."""

    layer: int
    position: int
    index: int


class _Edit(NamedTuple):
    row: int
    intervention: Intervention
    row_SD: Tensor
    encoder_D: Tensor
    bias: float
    threshold: float


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
        self.edits: list[list[_Edit]] = [[] for _ in range(clt.config.n_layers)]
        for row, interventions in enumerate(batch):
            for i in interventions:
                self.edits[i.layer].append(_edit(clt, row, i))
        self.offset = 0
        self.pending: dict[int, Tensor] = {}
        self.watched = torch.zeros(len(batch), len(watch), dtype=torch.promote_types(clt.dtype, torch.float32))
        self.streams: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, layer: int, x_BTD: Tensor, y_BTD: Tensor) -> Tensor | None:
        positions = range(self.offset, self.offset + x_BTD.shape[1])
        self._look(layer, x_BTD)
        out_BTD = self._written(layer, x_BTD, y_BTD)
        if self.mlps == "replaced" and layer not in self.hold:
            self._react(layer, x_BTD)
        for edit in self.edits[layer]:
            self._carry_out(layer, edit, x_BTD, positions)
        added = self.pending.pop(layer, None)
        if added is None:
            return out_BTD
        base = y_BTD if out_BTD is None else out_BTD
        return (base + added.to(base.dtype)) if out_BTD is None or added.any() else out_BTD

    def _written(self, layer: int, x_BTD: Tensor, y_BTD: Tensor) -> Tensor | None:
        """Return the MLP output before any addition; None for the host's own output."""
        held = layer in self.hold
        if not (held or self.mlps == "replaced") or self.local is None:
            return None
        out_BTD = y_BTD.clone()
        first = max(self.n_skip - self.offset, 0)
        known = slice(first, max(self.n_prompt - self.offset, first))
        if self.offset == 0:
            out_BTD[:, known] = self.local.host_pass.y_LTD[layer, first : self.n_prompt].to(y_BTD.dtype)
            if self.clt.config.skip:
                x_TD = self.local.host_pass.x_LTD[layer, first : self.n_prompt].to(x_BTD.dtype)
                out_BTD[:, known] += self.clt.skip(x_BTD[:, known] - x_TD, layer).to(y_BTD.dtype)
        elif not held:
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
        now_BF = active
        parts_XSD = self.clt.decode_layer(now_BF, layer).unflatten(0, (B, T - first))
        if self.offset == 0 and self.local is not None:
            was = self._firing(layer, first)
            parts_XSD = parts_XSD - self.clt.decode_layer(was, layer)[None]
        for slot, part in enumerate(parts_XSD.unbind(2)):
            self._add(layer + slot, x_BTD, slice(None), slice(first, T), part)

    def _firing(self, layer: int, first: int) -> Active:
        assert self.local is not None
        return self.clt.encode_layer_sparse(self.local.host_pass.x_LTD[layer, first:], layer)

    def _carry_out(self, layer: int, edit: _Edit, x_BTD: Tensor, positions: range) -> None:
        at = [
            p - self.offset for p in _places(edit.intervention.positions, self.n_prompt, positions) if p >= self.n_skip
        ]
        if not at:
            return
        held = layer in self.hold and self.local is not None and self.offset == 0
        x_KD = self.local.host_pass.x_LTD[layer, at] if held and self.local is not None else x_BTD[edit.row, at]
        was_K = self._activation(layer, edit, x_KD)
        i = edit.intervention
        new_K = torch.full_like(was_K, i.set) if i.set is not None else was_K * (i.scale or 0.0)
        change_K = new_K - was_K
        if not change_K.any():
            return
        for slot, row_D in enumerate(edit.row_SD):
            self._add(layer + slot, x_BTD, edit.row, at, change_K[:, None] * row_D)

    def _activation(self, layer: int, edit: _Edit, x_KD: Tensor) -> Tensor:
        if self.clt.config.ranks:
            return self.clt.encode_layer(x_KD, layer)[:, edit.intervention.index].to(edit.encoder_D.dtype)
        z_K = x_KD.to(edit.encoder_D.dtype) @ edit.encoder_D + edit.bias
        return torch.where(z_K > edit.threshold, z_K, 0.0)

    def _add(self, layer: int, x_BTD: Tensor, row: Any, at: Any, values: Tensor) -> None:
        if layer not in self.pending:
            self.pending[layer] = torch.zeros(
                x_BTD.shape, dtype=torch.promote_types(values.dtype, torch.float32), device=x_BTD.device
            )
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


def _edit(clt: CLT, row: int, i: Intervention) -> _Edit:
    c = clt.config
    which = torch.tensor([i.index], device=clt.device)
    wide = torch.promote_types(clt.dtype, torch.float32)
    threshold = float(clt.threshold[i.layer][i.index]) if c.kind.thresholds else 0.0
    return _Edit(
        row,
        i,
        clt.decoder_rows(i.layer, which)[0].to(wide),
        clt.W_enc.rows(i.layer, which)[0].to(wide),
        float(clt.b_enc[i.layer][i.index]),
        threshold,
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
        _check_once(some, n, generate)
    for w in watch:
        if not (0 <= w.layer < c.n_layers and 0 <= w.index < c.n_features and 0 <= w.position < n):
            raise ConfigError(
                f"feature {w.index} of layer {w.layer} at position {w.position} does not exist on this prompt and"
                " cannot be watched"
            )


def _check_once(interventions: Sequence[Intervention], n: int, generate: int) -> None:
    """Check that each intervention has a position and that no feature is changed twice at one position."""
    taken: set[tuple[int, int, int]] = set()
    for i in interventions:
        places = _places(i.positions, n, range(n + generate))
        if not places:
            raise ConfigError(
                f"the positions of L{i.layer}/{i.index} hold none of the prompt's {n}; give 0 to {n - 1}, or -1 for the"
                " last"
            )
        for p in places:
            if (i.layer, i.index, p) in taken:
                raise ConfigError(f"L{i.layer}/{i.index} is changed twice at position {p}; give one intervention there")
            taken.add((i.layer, i.index, p))
