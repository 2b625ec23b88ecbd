"""Write a folder of safetensors in constant memory: to a temporary folder that is renamed when complete.

If the process is killed, the temporary folder, `.NAME.partial`, remains. Writing the same content again resumes with
the missing files. A folder with the final name is always complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from crosslayer.clt.formats.tensors import NAMES, TensorFile
from crosslayer.clt.weights import Weights
from crosslayer.core.errors import FormatError
from crosslayer.core.files import replacing, require_free_disk, write_text

PART_BYTES = 64 * 2**20


class Chunks(NamedTuple):
    """A tensor, read in parts along its first axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Iterator[Tensor]]

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of_layer(cls, weights: Weights, layer: int, dtype: torch.dtype | None) -> Chunks:
        """Return one layer's matrix, read in parts and not cached."""
        shape = weights.shape(layer)
        kind = dtype or weights.dtype
        rows_at_once = max(1, PART_BYTES // max(1, prod(shape[1:]) * weights.dtype.itemsize))

        def read() -> Iterator[Tensor]:
            for part in torch.arange(shape[0]).split(rows_at_once):
                yield weights.rows(layer, part).to("cpu", kind)

        return cls(shape, kind, read)


class FilePlan(NamedTuple):
    """A file to write: tensors or text."""

    name: str
    tensors: Mapping[str, Chunks] = {}
    text: str | None = None

    @property
    def n_bytes(self) -> int:
        return len(self.text or "") + sum(chunks.n_bytes for chunks in self.tensors.values())


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Chunks:
    """Return an in-memory tensor as one part."""
    tensor = tensor.detach().to("cpu", dtype or tensor.dtype)
    return Chunks(tuple(tensor.shape), tensor.dtype, lambda: iter([tensor]))


def write_folder(
    folder: Path,
    files: Sequence[FilePlan],
    on_progress: Callable[[int], None] = lambda n_bytes: None,
    check: Callable[[Path], None] = lambda written: None,
) -> None:
    """Write all files, then rename the folder; resumes what a killed process had started.

    Args:
        on_progress: called with the bytes written so far.
        check: called with the temporary folder before it is renamed; if it raises, the folder is removed.

    Raises:
        FormatError: for a folder that is not empty.
        ResourceError: for too little disk space.
    """
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        what = "is a file" if folder.is_file() else "is not empty"
        raise FormatError(f"{folder} {what}; give another output folder")
    partial = folder.with_name(f".{folder.name}.partial")
    fingerprint = _fingerprint(files)
    if partial.exists() and _read(partial / "plan") != fingerprint:
        shutil.rmtree(partial)
    for begun in partial.glob(".*.tmp"):
        begun.unlink()
    left = sum(f.n_bytes for f in files if not (partial / f.name).exists())
    require_free_disk(folder.parent, left, "free some, or give an output folder on another disk")
    partial.mkdir(parents=True, exist_ok=True)
    write_text(partial / "plan", fingerprint)
    done = 0
    for file in files:
        if not (partial / file.name).exists():
            _write(partial / file.name, file, lambda n, before=done: on_progress(before + n))
        done += file.n_bytes
        on_progress(done)
    try:
        check(partial)
    except FormatError:
        shutil.rmtree(partial)
        raise
    (partial / "plan").unlink()
    if folder.exists():
        folder.rmdir()
    os.replace(partial, folder)


def _fingerprint(files: Sequence[FilePlan]) -> str:
    described = [(f.name, f.text, {k: (c.shape, NAMES[c.dtype]) for k, c in f.tensors.items()}) for f in files]
    # Hash the vectors too: they distinguish transcoders of the same shape and are cheap to read.
    digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=16)
    for file in files:
        for chunks in file.tensors.values():
            if len(chunks.shape) == 1:
                for part in chunks.read():
                    digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _write(path: Path, file: FilePlan, on_progress: Callable[[int], None]) -> None:
    if file.text is not None:
        write_text(path, file.text)
        return
    header: dict[str, object] = {}
    at = 0
    for name, chunks in file.tensors.items():
        header[name] = {
            "dtype": NAMES[chunks.dtype],
            "shape": list(chunks.shape),
            "data_offsets": [at, at + chunks.n_bytes],
        }
        at += chunks.n_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as temporary, temporary.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        written = 0
        for chunks in file.tensors.values():
            for part in chunks.read():
                written += out.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)
                on_progress(written)
        assert written == at, f"{path} should have {at} bytes of tensors and has {written}"
        out.flush()
        os.fsync(out.fileno())


def check_written(
    folder: Path, files: Sequence[FilePlan], on_progress: Callable[[int], None] = lambda n_bytes: None
) -> None:
    """Read every tensor back and compare it with its source.

    Raises:
        FormatError: for a tensor that differs.
    """
    done = 0
    for plan in files:
        if plan.text is None:
            file = TensorFile(folder / plan.name)
            for name, chunks in plan.tensors.items():
                file.entry(name, chunks.shape)
                at = 0
                for part in chunks.read():
                    back = file.rows(name, torch.arange(at, at + len(part)))
                    if back.dtype != part.dtype or not torch.equal(back, part.cpu()):
                        raise FormatError(
                            f"{folder / plan.name}: {name} was read back with other values than were written; the disk"
                            " may be failing; write it again"
                        )
                    at += len(part)
        done += plan.n_bytes
        on_progress(done)
