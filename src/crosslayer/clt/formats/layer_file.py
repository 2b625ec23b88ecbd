"""The file of one layer of a transcoder set, in the three ways that it is published.

layer_{i}.safetensors       W_enc (F, D) · W_dec (F, D) · activation_function.threshold · W_skip, used as x @ W_skip.T
params.npz (Gemma Scope)    W_enc (D, F) · W_dec (F, D) · threshold
*.safetensors (Gemma        w_enc (D, F) · w_dec (F, D) · threshold · affine_skip_connection, used as
Scope 2)                    x @ affine_skip_connection

All have b_enc (F) and b_dec (D).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from crosslayer.clt.formats.npz import NpzFile
from crosslayer.clt.formats.opened import Vectors
from crosslayer.clt.formats.tensors import TensorFile
from crosslayer.core.errors import FormatError

THRESHOLD = "activation_function.threshold"


class Names(NamedTuple):
    """Names of the tensors, and whether the encoder has a column per feature, as x @ W_enc."""

    W_enc: str = "W_enc"
    W_dec: str = "W_dec"
    threshold: str = THRESHOLD
    W_skip: str = "W_skip"
    columns: bool = False


SET = Names()
GEMMA_SCOPE = Names(threshold="threshold", columns=True)
GEMMA_SCOPE_2 = Names("w_enc", "w_dec", "threshold", "affine_skip_connection", columns=True)


class LayerFile:
    """One layer's transcoder; matrices are memory-mapped or read by row.

    Raises:
        FormatError: for a missing or damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = NpzFile(path) if path.suffix == ".npz" else TensorFile(path)
        self.names = GEMMA_SCOPE if path.suffix == ".npz" else GEMMA_SCOPE_2 if "w_enc" in self.file else SET

    @property
    def shape(self) -> tuple[int, int]:
        """(features, width)"""
        shape = self.file.entry(self.names.W_enc).shape
        if len(shape) != 2:
            expected = "(width, features)" if self.names.columns else "(features, width)"
            raise FormatError(f"{self.path}: {self.names.W_enc} has shape {shape}, expected {expected}")
        return (shape[1], shape[0]) if self.names.columns else (shape[0], shape[1])

    @property
    def has_threshold(self) -> bool:
        return self.names.threshold in self.file

    @property
    def has_skip(self) -> bool:
        return self.names.W_skip in self.file

    @property
    def k(self) -> int | None:
        """Active features of TopK that the file itself names, as circuit-tracer saves it."""
        return self.file.integer("k") if "k" in self.file else None

    def check(self, n_features: int, d_model: int, *, skip: bool) -> None:
        """Check the shapes of the matrices.

        Raises:
            FormatError: with file, tensor, found and expected shape.
        """
        names = self.names
        self.file.entry(names.W_enc, (d_model, n_features) if names.columns else (n_features, d_model))
        self.file.entry(names.W_dec, (n_features, d_model))
        if skip:
            self.file.entry(names.W_skip, (d_model, d_model))

    def vectors(self, n_features: int, d_model: int, *, threshold: bool) -> Vectors:
        """Return biases and, if asked for, thresholds."""
        theta_F = self.file.tensor(self.names.threshold, (n_features,)) if threshold else None
        if theta_F is not None and (theta_F < 0).any():
            raise FormatError(f"{self.path}: {self.names.threshold} has {theta_F.min():g}, expected no negative values")
        return Vectors(self.file.tensor("b_enc", (n_features,)), self.file.tensor("b_dec", (d_model,)), theta_F)

    def W_enc(self, rows: Tensor | None = None) -> Tensor:
        """Return the encoder (F, D), or some of its rows."""
        name = self.names.W_enc
        if self.names.columns:
            W_FD = self.file.tensor(name).T
            return W_FD.contiguous() if rows is None else W_FD[rows]
        return self.file.tensor(name) if rows is None else self.file.rows(name, rows)

    def W_dec(self, rows: Tensor | None = None) -> Tensor:
        """Return the decoder (F, D), or some of its rows."""
        name = self.names.W_dec
        return self.file.tensor(name) if rows is None else self.file.rows(name, rows)

    def W_skip(self, rows: Tensor | None = None) -> Tensor:
        """Return the affine skip (D, D), used as x @ W_skip, or some of its rows."""
        W_DD = self.file.tensor(self.names.W_skip)
        W_DD = W_DD if self.names is GEMMA_SCOPE_2 else W_DD.T
        return W_DD if rows is None else W_DD[rows]
