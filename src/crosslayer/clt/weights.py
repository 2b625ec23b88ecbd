"""The weights of all layers, each read when it is first asked for.

A transcoder that is trained holds ordinary parameters. One that was opened holds promises: the shape of each layer's
matrix, and how to get it. A published CLT of 18 GB is opened in a second, and a prompt reads the rows of its own
features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Reader(Protocol):
    """Gives the matrix of a layer, or these rows of it, as it is on disk or made from that."""

    def __call__(self, layer: int, rows: Tensor | None = None, /) -> Tensor: ...


class Weights(nn.ParameterList):
    """One parameter a layer; with a reader, one that is read at its first use and kept."""

    reader: Reader | None = None
    by_row = False
    """Whether the reader gives some rows for their own cost, so that a product need not keep the matrix."""

    @classmethod
    def promised(
        cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, reader: Reader, *, by_row: bool = False
    ) -> Weights:
        """Weights of these shapes that the reader will give."""
        weights = cls(nn.Parameter(torch.empty(s, dtype=dtype, device="meta"), requires_grad=False) for s in shapes)
        weights.reader, weights.by_row = reader, by_row
        return weights

    def __getitem__(self, layer: int) -> nn.Parameter:  # type: ignore[override]
        parameter: nn.Parameter = super().__getitem__(layer)
        if self.reader is not None and parameter.is_meta:
            parameter = nn.Parameter(self.reader(layer), requires_grad=False)
            super().__setitem__(layer, parameter)
        return parameter

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, read or not."""
        return super().__getitem__(0).dtype

    def here(self, layer: int) -> bool:
        """Whether the layer's weights are in memory, or mapped to it."""
        return not super().__getitem__(layer).is_meta

    def shape(self, layer: int) -> tuple[int, ...]:
        """Of a layer's matrix, read or not."""
        return tuple(super().__getitem__(layer).shape)

    def passing(self, layer: int) -> Tensor:
        """A layer's matrix without keeping it."""
        return self.reader(layer) if self.reader and not self.here(layer) else self[layer].detach()

    def rows(self, layer: int, rows: Tensor) -> Tensor:
        """Some rows of a layer's matrix; if it was not read yet, only these are."""
        return self.reader(layer, rows) if self.reader and not self.here(layer) else self[layer].detach()[rows]

    def parts(self, layer: int, rows_at_once: int) -> Iterator[Tensor]:
        """A layer's matrix some rows at a time; what was not read yet is let go again, where that costs no more."""
        if self.by_row and not self.here(layer):
            for rows in torch.arange(self.shape(layer)[0]).split(rows_at_once):
                yield self.rows(layer, rows)
        else:
            yield from self[layer].split(rows_at_once)

    def read_all(self) -> None:
        """Read what was not read yet."""
        for layer in range(len(self)):
            self[layer]
        self.reader = None
