"""Activations collected on the fly and shuffled at token level in an activation buffer, with exact resume.

The activation buffer has `size` slots. Time is divided into *turns*. In each turn, a permutation drawn from the seed
and the turn's number fixes the order in which slots are served. A served slot is refilled at once with the next
collected token, which is served in the next turn. So the tokens of a batch come from `size` consecutive tokens of text,
every token is served exactly once, and no token waits longer than two turns.

Tokens with massive activations (`crosslayer.data.massive`) never enter the buffer, nor do they count in its state.

With `reuse` above 1, the contents of a turn are served that many times, each time in another order, before they are
replaced. This saves forward passes of the host. The saved state is a few numbers: on resume, the contents of the buffer
are collected again.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.data.massive import Typical
from crosslayer.data.rows import Cursor, RowStream
from crosslayer.host.host import Host


class Activations(NamedTuple):
    """MLP inputs and outputs of a batch of tokens at all layers."""

    x_BLD: Float[Tensor, "B L D"]
    y_BLD: Float[Tensor, "B L D"]


class Counts(NamedTuple):
    """Numbers of tokens collected, and of those left out."""

    collected: int = 0
    massive: int = 0


class Pass(NamedTuple):
    """The activations of one forward pass, without massive ones, and what is before and after it."""

    activations: Activations
    begin: Cursor
    end: Cursor
    counts_before: Counts
    counts: Counts


class StreamState(NamedTuple):
    """State that restores a stream: tokens served, and the cursor at which the contents of this turn start."""

    served: int
    start: Cursor
    skipped: int
    """Tokens of the first forward pass from `start` that belong to the previous turn."""
    counts: Counts
    """Tokens collected before `start`."""

    def plain(self) -> list:
        """Return the state as nested lists; `StreamState(*plain)` restores it."""
        return json.loads(json.dumps(self))


def collect_activations(host: Host, rows_BT: Tensor, dtype: torch.dtype | None = None) -> Activations:
    """Return the activations of all positions but the first `n_skip`, flattened row by row.

    Args:
        dtype: dtype of the result; the host's by default.
    """
    n, (n_rows, length) = host.policy.n_skip, rows_BT.shape
    # Each layer is written to its place at once: this copies once, and no layer is kept in the host's precision.
    shape = (n_rows, length - n, host.n_layers, host.d_model)
    x_BTLD, y_BTLD = (torch.empty(shape, dtype=dtype or host.dtype, device=host.device) for _ in range(2))

    def store(layer: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
        x_BTLD[:, :, layer] = x_BTD[:, n:]
        y_BTLD[:, :, layer] = y_BTD[:, n:]

    with torch.no_grad():
        host.run(rows_BT, store, logits=False)
    return Activations(x_BTLD.flatten(0, 1), y_BTLD.flatten(0, 1))


class ActivationStream:
    """An infinite stream of shuffled activations.

    Args:
        rows: rows of tokens.
        size: size of the activation buffer in tokens.
        rows_per_forward: rows per forward pass of the host; must be the same on resume.
        dtype: dtype of the activation buffer.
        reuse: number of turns that a token stays in the buffer; it is served once per turn.
        typical: median norms by which tokens with massive activations are left out; none are by default.
        state: state to resume from, of a stream with the same arguments.
    """

    def __init__(
        self,
        rows: RowStream,
        size: int,
        rows_per_forward: int,
        dtype: torch.dtype = torch.bfloat16,
        reuse: int = 1,
        typical: Typical | None = None,
        state: StreamState | None = None,
    ) -> None:
        self.rows, self.size, self.rows_per_forward, self.dtype, self.reuse = rows, size, rows_per_forward, dtype, reuse
        self.host, self.typical = rows.host, typical
        shape = (size, self.host.n_layers, self.host.d_model)
        self._x = torch.empty(shape, dtype=dtype)
        self._y = torch.empty(shape, dtype=dtype)
        self._served = 0
        self._begin(rows.cursor, Counts())
        if state is None:
            self._fill()
        else:
            self.restore(state)

    def _begin(self, cursor: Cursor, counts: Counts) -> None:
        """Set the stream to the text at `cursor`, with nothing collected from it."""
        self.rows.cursor = cursor
        nothing = Activations(self._x[:0], self._y[:0])
        self._pass, self._used = Pass(nothing, cursor, cursor, counts, counts), 0

    def _permutation(self, turn: int) -> Tensor:
        if turn < 0:
            return torch.arange(self.size)
        return torch.from_numpy(np.random.default_rng((self.rows.seed, 7, turn)).permutation(self.size))

    def _fill(self) -> None:
        """Fill the buffer for the next turn, and record where its text starts."""
        turn = self._served // self.size
        self._turn_start = self._mark()
        self._write(self._permutation(turn - 1))
        self._order = self._permutation(turn)
        # Tokens that refill the slots of this turn belong to the next turn.
        self._next_start = self._mark()

    def _mark(self) -> tuple[Cursor, int, Counts]:
        """Return the source of the next token: the cursor before its pass, its index in it, and counts before it."""
        if self._used == len(self._pass.activations.x_BLD):
            return self._pass.end, 0, self._pass.counts
        return self._pass.begin, self._used, self._pass.counts_before

    def _collect(self) -> None:
        """Run the next forward pass, and leave out tokens with massive activations."""
        begin, before = self._pass.end, self._pass.counts
        x_BLD, y_BLD = collect_activations(self.host, self.rows.rows(self.rows_per_forward), self.dtype)
        n_tokens = len(x_BLD)
        if self.typical and (massive_B := self.typical.massive(x_BLD, y_BLD)).any():
            x_BLD, y_BLD = x_BLD[~massive_B], y_BLD[~massive_B]
        counts = Counts(before.collected + n_tokens, before.massive + n_tokens - len(x_BLD))
        kept = Activations(x_BLD.to(self._x.device), y_BLD.to(self._x.device))
        self._pass, self._used = Pass(kept, begin, self.rows.cursor, before, counts), 0

    def _write(self, slots: Tensor) -> None:
        """Write the next collected tokens into these slots."""
        at = 0
        while at < len(slots):
            pending = self._pass.activations
            n = min(len(slots) - at, len(pending.x_BLD) - self._used)
            if not n:
                self._collect()
                continue
            take = slice(self._used, self._used + n)
            self._x[slots[at : at + n]] = pending.x_BLD[take]
            self._y[slots[at : at + n]] = pending.y_BLD[take]
            self._used += n
            at += n

    def batch(self, n: int) -> Activations:
        """Return the next `n` tokens."""
        xs, ys = [], []
        while n:
            position = self._served % self.size
            slots = self._order[position : position + n]
            xs.append(self._x.index_select(0, slots))
            ys.append(self._y.index_select(0, slots))
            last_use = self._served // self.size % self.reuse == self.reuse - 1
            if last_use:
                self._write(slots)
            self._served += len(slots)
            n -= len(slots)
            if self._served % self.size == 0:
                self._order = self._permutation(self._served // self.size)
                if last_use:
                    self._turn_start, self._next_start = self._next_start, self._mark()
        return Activations(torch.cat(xs), torch.cat(ys)) if len(xs) > 1 else Activations(xs[0], ys[0])

    def peek(self, n: int) -> Activations:
        """Return up to `n` next tokens of this turn without serving them."""
        slots = self._order[self._served % self.size :][:n]
        return Activations(self._x[slots], self._y[slots])

    @property
    def counts(self) -> Counts:
        """Tokens collected so far, and those of them that were left out."""
        return self._pass.counts

    @property
    def state(self) -> StreamState:
        """The state that `restore` takes."""
        return StreamState(self._served, *self._turn_start)

    def restore(self, state: StreamState) -> None:
        """Restore the buffer: collect the contents of this turn, and the tokens that have refilled it since."""
        self._begin(Cursor.of(state.start), Counts(*state.counts))
        self._served = state.served - state.served % (self.size * self.reuse)
        if state.skipped:
            self._collect()
            self._used = state.skipped
        self._fill()
        self._served = state.served
        turn = state.served // self.size
        self._order = self._permutation(turn)
        if turn % self.reuse == self.reuse - 1:
            self._write(self._order[: state.served % self.size])
