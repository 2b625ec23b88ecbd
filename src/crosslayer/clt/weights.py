"""Weights of all layers, loaded lazily.

A transcoder in training holds ordinary parameters. One opened from disk holds the shape of each layer's matrix and a
reader that loads it. A published CLT of 18 GB opens in a second, and a prompt reads only the rows of its active
features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Reader(Protocol):
    """A function that returns the matrix of a layer, or some of its rows."""

    def __call__(self, layer: int, rows: Tensor | None = None, /) -> Tensor: ...


class Weights(nn.ParameterList):
    """One parameter per layer; with a reader, loaded at first use and cached."""

    reader: Reader | None = None
    by_row = False
    """Whether the reader reads single rows cheaply, so that products need not cache the matrix."""

    @classmethod
    def lazy(
        cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, reader: Reader, *, by_row: bool = False
    ) -> Weights:
        """Return lazily loaded weights of these shapes."""
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
        """Dtype of the weights, loaded or not."""
        return super().__getitem__(0).dtype

    def here(self, layer: int) -> bool:
        """Return whether the layer's weights are in memory or memory-mapped."""
        return not super().__getitem__(layer).is_meta

    def shape(self, layer: int) -> tuple[int, ...]:
        """Return the shape of a layer's matrix, loaded or not."""
        return tuple(super().__getitem__(layer).shape)

    def passing(self, layer: int) -> Tensor:
        """Return a layer's matrix without caching it."""
        return self.reader(layer) if self.reader and not self.here(layer) else self[layer].detach()

    def rows(self, layer: int, rows: Tensor) -> Tensor:
        """Return some rows of a layer's matrix; if it is not loaded, read only these."""
        return self.reader(layer, rows) if self.reader and not self.here(layer) else self[layer].detach()[rows]

    def parts(self, layer: int, rows_at_once: int) -> Iterator[Tensor]:
        """Yield a layer's matrix in blocks of rows, without caching it if rows can be read cheaply."""
        if self.by_row and not self.here(layer):
            for rows in torch.arange(self.shape(layer)[0]).split(rows_at_once):
                yield self.rows(layer, rows)
        else:
            yield from self[layer].split(rows_at_once)

    def read_all(self) -> None:
        """Load all weights that are not loaded yet."""
        for layer in range(len(self)):
            self[layer]
        self.reader = None
