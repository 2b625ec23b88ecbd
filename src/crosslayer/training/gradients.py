"""Gradients of a step, stored in factored form until the optimiser uses them.

The gradient of a weight is a sum of parts. With few active entries, a part is a sparse matrix times the gradient of
each token, which takes a thousandth of the memory of the full matrix. It is materialised some rows at a time, in a
buffer that fits the processor's cache, once, where the optimiser uses it; the norm is measured on the way, and clips
the next step. So a full gradient is held only for dense layers.

`FusedUpdate` stores no gradients: it updates each layer as soon as its gradient is final.
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
"""Elements of a gradient that are materialised at once."""


class Outer(NamedTuple):
    """Sum over entries of scale x the token's row of `by`, added to the row of the entry's feature."""

    start_R1: Int[Tensor, " R1"]
    token_K: Int[Tensor, " K"]
    scale_K: Float[Tensor, " K"]
    by_BX: Float[Tensor, "B X"]

    def add_to(self, out: Tensor, first: int, weights: Tensor) -> None:
        start = self.start_R1[first : first + len(out) + 1]
        a, b = int(start[0]), int(start[-1])
        add_rows(out, start - a, self.token_K[a:b], self.scale_K[a:b], self.by_BX)


class Scaled(NamedTuple):
    """Rows of the weights, each times a number: the gradient of row norms."""

    scale_F: Float[Tensor, " F"]

    def add_to(self, out: Tensor, first: int, weights: Tensor) -> None:
        rows = slice(first, first + len(out))
        out.addcmul_(self.scale_F[rows, None].to(out.dtype), weights[rows].to(out.dtype))


class Some(NamedTuple):
    """Some rows, sorted by index; all other rows are zero."""

    row_K: Int[Tensor, " K"]
    grad_KX: Float[Tensor, "K X"]

    def add_to(self, out: Tensor, first: int, weights: Tensor) -> None:
        a, b = torch.searchsorted(
            self.row_K, torch.tensor([first, first + len(out)], device=self.row_K.device)
        ).tolist()
        out.index_add_(0, self.row_K[a:b] - first, self.grad_KX[a:b].to(out.dtype))


class Whole(NamedTuple):
    """A full gradient."""

    grad_FX: Float[Tensor, "F X"]

    def add_to(self, out: Tensor, first: int, weights: Tensor) -> None:
        out += self.grad_FX[first : first + len(out)]


Part = Outer | Scaled | Some | Whole


class Gradients:
    """Parts of the gradient of each parameter; vectors are matrices of one column."""

    def __init__(self, parts: dict[Parameter, list[Part]] | None = None) -> None:
        self.parts = {} if parts is None else parts
        self.squares: dict[Parameter, Tensor | float] = {}

    def add(self, p: Parameter, part: Part | Tensor) -> None:
        """Add a part, or a full gradient, which is stored and may be modified."""
        there = self.parts.setdefault(p, [])
        if isinstance(part, Tensor):
            part = Whole(part.view(len(p), -1))
            for other in there:
                if isinstance(other, Whole):
                    other.grad_FX.add_(part.grad_FX)
                    return
        there.append(part)

    def final(self, parameters: Iterable[Parameter]) -> None:
        """Mark these gradients as complete for this step."""

    def blocks(self, p: Parameter) -> Iterator[tuple[slice, Tensor]]:
        """Yield the gradient in blocks of rows; a block is valid, and may be modified, until the next one."""
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

    def measured(self, p: Parameter) -> Iterator[tuple[slice, Tensor]]:
        """Yield the gradient in blocks, like `blocks`, and record its squared norm."""
        self.squares[p] = 0.0
        for rows, block in self.blocks(p):
            self.squares[p] = self.squares[p] + _square(block)
            yield rows, block

    def forget(self, p: Parameter) -> None:
        """Free the gradient of a parameter."""
        self.parts.pop(p, None)

    def of(self, p: Parameter) -> Tensor:
        """Return the full gradient in the shape of the parameter."""
        return torch.cat([block.clone() for _, block in self.blocks(p)]).view(p.shape)

    def average(self, group: Group) -> None:
        """Replace each gradient by its mean over the ranks of a group."""
        if group.size == 1:
            return
        # Ranks have different entries, so parts are materialised first.
        for p in self.parts:
            self.parts[p] = [Whole(self.of(p).view(len(p), -1).to(p.dtype))]
        group.mean_([part.grad_FX for (part,) in self.parts.values() if isinstance(part, Whole)])

    def norm(self, clt: CLT) -> Float[Tensor, ""]:
        """Return the global gradient norm over all feature ranks; decoder biases and affine skip count once.

        Gradients must be averaged over data ranks first; those that were `measured` may be freed.
        """
        return _norm(clt, self.squares | {p: sum(_square(b) for _, b in self.blocks(p)) for p in self.parts})


class FusedUpdate(Gradients):
    """Gradients that are applied as soon as they are complete.

    Args:
        update: called with a parameter and the blocks of its gradient; updates the parameter.
    """

    def __init__(self, update: Callable[[Parameter, Iterator[tuple[slice, Tensor]]], None]) -> None:
        super().__init__()
        self.update = update

    def final(self, parameters: Iterable[Parameter]) -> None:
        """Update these parameters, and free their gradients."""
        for p in parameters:
            self.update(p, self.measured(p))
            self.forget(p)


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
