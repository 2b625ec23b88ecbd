"""Arrays of a bundle: written whole, mapped to memory, or read by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosslayer.bundles.schema import ARRAYS, REBUILD
from crosslayer.core.errors import FormatError
from crosslayer.core.files import PositionalFile, replacing


def save_array(folder: Path, name: str, array: NDArray) -> None:
    """Write one array of a bundle, whole or not at all, in the dtype of `ARRAYS`."""
    spec = ARRAYS[name]
    # A float cannot be too large for its place, nor a whole number: that would be an error of ours.
    kept = np.ascontiguousarray(array).astype(spec.dtype, copy=False)
    with replacing(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
        np.save(file, kept, allow_pickle=False)


def mapped_array(path: Path) -> NDArray:
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}); {REBUILD}") from error
    spec = ARRAYS.get(path.stem)
    if spec is not None and (mapped.dtype != spec.dtype or mapped.ndim != len(spec.axes.split())):
        raise FormatError(
            f"{path} holds {mapped.dtype} of {mapped.ndim} axes, expected {spec.dtype} by {spec.axes}; {REBUILD}"
        )
    return mapped


class RowFile:
    """Rows of a `.npy` file, read without mapping it."""

    def __init__(self, path: Path) -> None:
        mapped: Any = mapped_array(path)
        self.dtype, self.shape, self.begin = mapped.dtype, mapped.shape[1:], int(mapped.offset)
        self.n, self.path = len(mapped), path
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))
        self.file = PositionalFile(path)

    def rows(self, first: int, last: int | None) -> Any:
        """Row `first`, or rows from `first` to `last`.

        Raises:
            FormatError: for rows that the file does not have.
        """
        n = 1 if last is None else last - first
        raw = self.file.read(n * self.row_bytes, self.begin + first * self.row_bytes) if first >= 0 else b""
        if len(raw) != n * self.row_bytes or first < 0:
            raise FormatError(f"{self.path} ended at row {first} of {self.n}; {REBUILD}")
        rows = np.frombuffer(raw, self.dtype).reshape(n, *self.shape)
        return rows[0] if last is None else rows

    def close(self) -> None:
        """Close the file; more than once is fine."""
        self.file.close()
