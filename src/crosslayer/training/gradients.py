"""Gradients of a step, kept as what they are made of until the optimiser wants them.

A weight's gradient is a sum of parts. That of a matrix over few active entries is a sparse matrix times the gradient
that came to each token: it takes a thousandth of the matrix's memory, and is multiplied out some rows at a time, into a
buffer that stays in the processor's cache, for the norm and again for the update. So no gradient of all the weights is
ever held, unless a layer was dense.

`FusedUpdate` keeps none at all: each layer is updated as soon as its gradient is final, clipped by the norm of the step
before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Parameter

from crosslayer.clt.shard import by_feature
from crosslayer.clt.sparse import add_rows
from crosslayer.clt.transcoder import CLT
from crosslayer.parallel import Group

NUMBERS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 27, "mps": 1 << 25}
"""Numbers of a gradient that are multiplied out together."""


class Outer(NamedTuple):
    """sum over entries of scale x one token's row of `by`, into the row of the entry's feature."""

    start_R1: Int[Tensor, " R1"]
    token_K: Int[Tensor, " K"]
    scale_K: Float[Tensor, " K"]
    by_BX: Float[Tensor, "B X"]

    def add_to(self, out: Tensor, first: int, weights: Tensor) -> None:
        start = self.start_R1[first : first + len(out) + 1]
        a, b = int(start[0]), int(start[-1])
        add_rows(out, start - a, self.token_K[a:b], self.scale_K[a:b], self.by_BX)


class Scaled(NamedTuple):
    """Each row of the weights themselves times a number: what a norm of rows gives."""

    scale_F: Float[Tensor, " F"]

    def add_to(self, out: Tensor, first: int, weights: Tensor) -> None:
        rows = slice(first, first + len(out))
        out.addcmul_(self.scale_F[rows, None].to(out.dtype), weights[rows].to(out.dtype))


class Some(NamedTuple):
    """Some rows, in order; the others are zero."""

    row_K: Int[Tensor, " K"]
    grad_KX: Float[Tensor, "K X"]

    def add_to(self, out: Tensor, first: int, weights: Tensor) -> None:
        a, b = torch.searchsorted(
            self.row_K, torch.tensor([first, first + len(out)], device=self.row_K.device)
        ).tolist()
        out.index_add_(0, self.row_K[a:b] - first, self.grad_KX[a:b].to(out.dtype))


class Whole(NamedTuple):
    """All of it."""

    grad_FX: Float[Tensor, "F X"]

    def add_to(self, out: Tensor, first: int, weights: Tensor) -> None:
        out += self.grad_FX[first : first + len(out)]


Part = Outer | Scaled | Some | Whole


class Gradients:
    """Of each parameter, the parts of its gradient. Vectors are matrices of one column."""

    def __init__(self, parts: dict[Parameter, list[Part]] | None = None) -> None:
        self.parts = {} if parts is None else parts

    def add(self, p: Parameter, part: Part | Tensor) -> None:
        """Another part, or a whole gradient, which is kept and may be added to."""
        there = self.parts.setdefault(p, [])
        if isinstance(part, Tensor):
            part = Whole(part.view(len(p), -1))
            for other in there:
                if isinstance(other, Whole):
                    other.grad_FX.add_(part.grad_FX)
                    return
        there.append(part)

    def final(self, parameters: Iterable[Parameter]) -> None:
        """Say that no more will be added to these in this step."""

    def blocks(self, p: Parameter) -> Iterator[tuple[slice, Tensor]]:
        """The gradient, some rows after another; a block may be overwritten, and is when the next is asked for."""
        parts = self.parts.get(p, [])
        weights = p.detach().view(len(p), -1)
        n_rows, width = weights.shape
        if len(parts) == 1 and isinstance(parts[0], Whole):
            yield slice(0, n_rows), parts[0].grad_FX
            return
        at_once = min(n_rows, max(1, NUMBERS_AT_ONCE[p.device.type] // width))
        buffer = torch.empty(at_once, width, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        for first in range(0, n_rows, at_once):
            out = buffer[: min(at_once, n_rows - first)].zero_()
            for part in parts:
                part.add_to(out, first, weights)
            yield slice(first, first + len(out)), out

    def forget(self, p: Parameter) -> None:
        """Let go of what was kept of it."""
        self.parts.pop(p, None)

    def of(self, p: Parameter) -> Tensor:
        """The gradient in the parameter's shape."""
        return torch.cat([block.clone() for _, block in self.blocks(p)]).view(p.shape)

    def average(self, group: Group) -> None:
        """Replace each by its mean over the ranks of a group."""
        if group.size == 1:
            return
        # Ranks have different entries, so what is in parts is multiplied out first.
        for p in self.parts:
            self.parts[p] = [Whole(self.of(p).view(len(p), -1).to(p.dtype))]
        group.mean_([part.grad_FX for (part,) in self.parts.values() if isinstance(part, Whole)])

    def norm(self, clt: CLT) -> Float[Tensor, ""]:
        """Of the whole gradient, over the features of all ranks that share them; what every rank has (decoder biases,
        affine skip) counts once.

        Gradients must have been averaged over the ranks that share the tokens: those are alike, and count once too.
        """
        return _norm(clt, {p: sum(_square(block) for _, block in self.blocks(p)) for p in self.parts})


class FusedUpdate(Gradients):
    """Gradients that are used as soon as they are final.

    Args:
        update: given a parameter and the blocks of its gradient, updates it.
    """

    def __init__(self, update: Callable[[Parameter, Iterator[tuple[slice, Tensor]]], None]) -> None:
        super().__init__()
        self.update = update
        self.squares: dict[Parameter, Tensor | float] = {}

    def final(self, parameters: Iterable[Parameter]) -> None:
        """Update these, and forget their gradients."""
        for p in parameters:
            self.squares[p] = 0.0
            self.update(p, self._measured(p))
            self.forget(p)

    def norm(self, clt: CLT) -> Float[Tensor, ""]:
        """Of all the gradients of the step, which are gone."""
        return _norm(clt, self.squares)

    def _measured(self, p: Parameter) -> Iterator[tuple[slice, Tensor]]:
        for rows, block in self.blocks(p):
            self.squares[p] = self.squares[p] + _square(block)
            yield rows, block


def _square(block: Tensor) -> Tensor:
    flat = block.flatten().to(torch.promote_types(block.dtype, torch.float32))
    return torch.dot(flat, flat)


def _norm(clt: CLT, squares: dict[Parameter, Tensor | float]) -> Tensor:
    wide = torch.promote_types(clt.dtype, torch.float32)
    total = {
        True: torch.zeros((), dtype=wide, device=clt.device),
        False: torch.zeros((), dtype=wide, device=clt.device),
    }
    for name, p in clt.named_parameters():
        total[by_feature(name)] += squares.get(p, 0.0)
    return (clt.mesh.features.sum_(total[True]) + total[False]).sqrt()
