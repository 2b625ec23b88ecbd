"""Activations made on the fly and shuffled at token level in a ring, with an exact resume.

The ring has `size` slots. Each *turn* a permutation, drawn from the seed and the number of the turn, fixes the order in
which slots are served; a slot that was served is refilled at once with the next token harvested, to be served in the
next turn. So tokens of a batch come from a stretch of `size` tokens of text, every token is served exactly once, and
none waits longer than two turns. With `reuse` above 1, a turn's contents are served that many times, each time in
another order, before they are replaced; it saves running the host. The state is a few numbers: the ring's contents are
made again by harvesting that stretch once more.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.data.rows import Cursor, RowStream
from crosslayer.host.host import Host


class Activations(NamedTuple):
    """MLP inputs and outputs of a batch of tokens at all layers."""

    x_BLD: Float[Tensor, "B L D"]
    y_BLD: Float[Tensor, "B L D"]


class StreamState(NamedTuple):
    """Enough to make the stream again: tokens served, and the cursor at which this turn's contents began."""

    served: int
    begun_at: Cursor
    skipped: int
    """Tokens of the first harvest from `begun_at` that belong to the turn before."""

    def plain(self) -> list:
        """As nested lists of numbers; `StreamState(*plain)` is the state again."""
        return json.loads(json.dumps(self))


def collect_activations(host: Host, rows_BT: Tensor) -> Activations:
    """Activations of every position of the rows but the first `n_skip`, flattened row by row."""
    tapped = host.tap(rows_BT)
    n = host.policy.n_skip
    return Activations(tapped.x_BTLD[:, n:].flatten(0, 1), tapped.y_BTLD[:, n:].flatten(0, 1))


class ActivationStream:
    """Shuffled activations, batch after batch, without end.

    Args:
        rows: where tokens come from.
        size: slots of the ring.
        rows_per_forward: rows that go through the host at once; part of what a resume must keep.
        dtype: of what the ring holds.
        reuse: turns that a token stays in the ring, being served once in each.
        state: where to go on, of a stream with the same arguments.
    """

    def __init__(
        self,
        rows: RowStream,
        size: int,
        rows_per_forward: int,
        dtype: torch.dtype = torch.bfloat16,
        reuse: int = 1,
        state: StreamState | None = None,
    ) -> None:
        self.rows, self.size, self.rows_per_forward, self.dtype, self.reuse = rows, size, rows_per_forward, dtype, reuse
        self.host = rows.host
        shape = (size, self.host.n_layers, self.host.d_model)
        self._x = torch.empty(shape, dtype=dtype)
        self._y = torch.empty(shape, dtype=dtype)
        self._pending = Activations(self._x[:0], self._y[:0])
        self._pending_cursor = rows.cursor
        self._pending_used = 0
        self._served = 0
        if state is None:
            self._fill()
        else:
            self.restore(state)

    def _permutation(self, turn: int) -> Tensor:
        if turn < 0:
            return torch.arange(self.size)
        return torch.from_numpy(np.random.default_rng((self.rows.seed, 7, turn)).permutation(self.size))

    def _fill(self) -> None:
        """Fill the ring for the turn that is about to begin, remembering where its text began."""
        turn = self._served // self.size
        self._begun = self._mark()
        self._write(self._permutation(turn - 1))
        self._order = self._permutation(turn)
        # What refills this turn's slots begins the next turn.
        self._next = self._mark()

    def _mark(self) -> tuple[Cursor, int]:
        """Where the next token to be written comes from: a cursor before its harvest, and its place therein."""
        if self._pending_used == self._pending.x_BLD.shape[0]:
            return self.rows.cursor, 0
        return self._pending_cursor, self._pending_used

    def _write(self, slots: Tensor) -> None:
        """Put the next tokens harvested into these slots."""
        at = 0
        while at < len(slots):
            if self._pending_used == self._pending.x_BLD.shape[0]:
                self._pending_cursor = self.rows.cursor
                fresh = collect_activations(self.host, self.rows.rows(self.rows_per_forward))
                self._pending = Activations(*(a.to(self._x.device, self.dtype) for a in fresh))
                self._pending_used = 0
            n = min(len(slots) - at, self._pending.x_BLD.shape[0] - self._pending_used)
            take = slice(self._pending_used, self._pending_used + n)
            self._x[slots[at : at + n]] = self._pending.x_BLD[take]
            self._y[slots[at : at + n]] = self._pending.y_BLD[take]
            self._pending_used += n
            at += n

    def batch(self, n: int) -> Activations:
        """The next `n` tokens, served once each."""
        xs, ys = [], []
        while n:
            position = self._served % self.size
            slots = self._order[position : position + n]
            xs.append(self._x[slots])
            ys.append(self._y[slots])
            last_use = self._served // self.size % self.reuse == self.reuse - 1
            if last_use:
                self._write(slots)
            self._served += len(slots)
            n -= len(slots)
            if self._served % self.size == 0:
                self._order = self._permutation(self._served // self.size)
                if last_use:
                    self._begun, self._next = self._next, self._mark()
        return Activations(torch.cat(xs), torch.cat(ys)) if len(xs) > 1 else Activations(xs[0], ys[0])

    def peek(self, n: int) -> Activations:
        """The next `n` tokens of this turn, or what is left of it, without serving them."""
        slots = self._order[self._served % self.size :][:n]
        return Activations(self._x[slots], self._y[slots])

    @property
    def state(self) -> StreamState:
        """What `restore` needs."""
        return StreamState(self._served, *self._begun)

    def restore(self, state: StreamState) -> None:
        """Make the ring again as it was: harvest this turn's contents and what has refilled them since."""
        self.rows.cursor = Cursor.of(state.begun_at)
        self._pending = Activations(self._x[:0], self._y[:0])
        self._pending_used = 0
        self._served = state.served - state.served % (self.size * self.reuse)
        if state.skipped:
            self._pending_cursor = self.rows.cursor
            fresh = collect_activations(self.host, self.rows.rows(self.rows_per_forward))
            self._pending = Activations(fresh.x_BLD.to(self.dtype), fresh.y_BLD.to(self.dtype))
            self._pending_used = state.skipped
        self._fill()
        self._served = state.served
        turn = state.served // self.size
        self._order = self._permutation(turn)
        if turn % self.reuse == self.reuse - 1:
            self._write(self._order[: state.served % self.size])
