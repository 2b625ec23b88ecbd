"""Read a safetensors file: checked header, memory-mapped tensors, and single rows. Nothing is unpickled.

A whole tensor is memory-mapped, and its pages are read when used. Rows are read from the file instead of the map:
if the kernel caches files in huge pages, touching one mapped row makes two megabytes resident.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crosslayer.core.errors import FormatError
from crosslayer.core.files import PositionalFile

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_RUN_BYTES = 1 << 30


class Entry(NamedTuple):
    """Header entry of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""


class TensorFile:
    """A safetensors file of floating-point tensors.

    Raises:
        FormatError: for a missing or damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FormatError(f"{path} is missing; the folder is incomplete; download or write it again")
        try:
            self._mapped = safe_open(path, "pt")
            with path.open("rb") as file:
                n_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(n_bytes))
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{path} cannot be read as safetensors ({error}); download or write it again") from error
        header.pop("__metadata__", None)
        self.entries = {
            name: Entry(e["dtype"], tuple(e["shape"]), 8 + n_bytes + e["data_offsets"][0]) for name, e in header.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        """Return the header entry of a tensor; check its shape and dtype.

        Raises:
            FormatError: with file, tensor, found and expected values.
        """
        if name not in self.entries:
            found = ", ".join(sorted(self.entries)) or "none"
            raise FormatError(f"{self.path} has no tensor {name}; found {found}")
        entry = self.entries[name]
        if shape is not None and entry.shape != shape:
            raise FormatError(f"{self.path}: {name} has shape {entry.shape}, expected {shape}")
        if entry.dtype not in DTYPES:
            raise FormatError(f"{self.path}: {name} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}")
        return entry

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entry(name).dtype]

    def mapped(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a memory-mapped tensor, without checking that it is finite."""
        self.entry(name, shape)
        return self._mapped.get_tensor(name)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a tensor, checked to be finite."""
        return self.finite(name, self.mapped(name, shape))

    def rows(self, name: str, rows: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read only these rows of a tensor, checked to be finite."""
        entry = self.entry(name, shape)
        out = torch.empty(len(rows), *entry.shape[1:], dtype=DTYPES[entry.dtype])
        row_bytes = prod(entry.shape[1:]) * out.element_size()
        buffer = out.view(-1).view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        with PositionalFile(self.path) as file:
            for at, first, n in _runs(rows.tolist(), max(1, _MAX_RUN_BYTES // max(1, row_bytes))):
                part = buffer[at * row_bytes : (at + n) * row_bytes]
                if file.read_into(part, entry.begin + first * row_bytes) != len(part):
                    raise FormatError(f"{self.path} ended while {name} was read; download or write it again")
        return self.finite(name, out)

    def integer(self, name: str) -> int:
        """Return a tensor of one integer."""
        shape, dtype = self.entries[name].shape, self.entries[name].dtype
        if shape not in ((), (1,)) or dtype[0] not in "IU":
            raise FormatError(f"{self.path}: {name} is {dtype} of shape {shape}, expected one integer")
        return int(self._mapped.get_tensor(name))

    def finite(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor, checked to hold neither NaN nor infinity."""
        # A sum is much faster than an elementwise check, and is not finite if any element is not.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise FormatError(f"{self.path}: {name} holds NaN or infinity, expected finite numbers")
        return tensor


def _runs(rows: list[int], max_rows: int) -> list[tuple[int, int, int]]:
    """Split `rows` into runs of consecutive rows: (index in `rows`, first row, count up to `max_rows`)."""
    runs: list[tuple[int, int, int]] = []
    for at, row in enumerate(rows):
        if runs and runs[-1][1] + runs[-1][2] == row and runs[-1][2] < max_rows:
            start, first, n = runs[-1]
            runs[-1] = (start, first, n + 1)
        else:
            runs.append((at, row, 1))
    return runs
