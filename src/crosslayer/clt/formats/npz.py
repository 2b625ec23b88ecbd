"""Read a NumPy archive of plain arrays, as Gemma Scope publishes them, like a safetensors file.

Arrays of an uncompressed archive lie in the file as they are, so they are memory-mapped, and rows are read one by one.
Nothing is unpickled.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crosslayer.clt.formats.tensors import Entry, TensorFile
from crosslayer.core.errors import FormatError

NAMES = {"<f8": "F64", "<f4": "F32", "<f2": "F16"}
LOCAL_HEADER = 30
"""Bytes of a zip file's local header, before the name and the extra field, whose lengths are its last two numbers."""


class NpzFile(TensorFile):
    """An uncompressed `.npz` archive of floating-point arrays.

    Raises:
        FormatError: for a missing, damaged or compressed archive.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.entries, self.columns_first = path, {}, set[str]()
        if not path.is_file():
            raise FormatError(f"{path} is missing; the folder is incomplete; download or write it again")
        try:
            with zipfile.ZipFile(path) as archive, path.open("rb") as file:
                for member in archive.infolist():
                    if member.compress_type != zipfile.ZIP_STORED:
                        raise FormatError(f"{path}: {member.filename} is compressed; write it with numpy.savez")
                    file.seek(member.header_offset)
                    name_bytes, extra_bytes = struct.unpack("<HH", file.read(LOCAL_HEADER)[-4:])
                    file.seek(name_bytes + extra_bytes, 1)
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, columns_first, dtype = read[np.lib.format.read_magic(file)](file)
                    name = member.filename.removesuffix(".npy")
                    self.entries[name] = Entry(NAMES.get(dtype.str, dtype.str), shape, file.tell())
                    if columns_first and len(shape) > 1:
                        self.columns_first.add(name)
        except (zipfile.BadZipFile, OSError, ValueError, KeyError, struct.error) as error:
            raise FormatError(f"{path} cannot be read as a NumPy archive ({error}); download it again") from error

    def mapped(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a memory-mapped array."""
        entry = self.entry(name, shape)
        dtype = {v: k for k, v in NAMES.items()}[entry.dtype]
        order = "F" if name in self.columns_first else "C"
        try:
            return torch.from_numpy(np.memmap(self.path, dtype, "c", entry.begin, entry.shape, order))
        except ValueError as error:
            raise FormatError(f"{self.path} ended while {name} was read; download it again") from error

    def rows(self, name: str, rows: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read only these rows of an array, checked to be finite."""
        if name in self.columns_first:
            return self.finite(name, self.mapped(name, shape)[rows])
        return super().rows(name, rows, shape)
