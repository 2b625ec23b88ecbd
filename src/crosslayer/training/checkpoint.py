"""Checkpoints: `checkpoints/step-00001000/`, written by all ranks and renamed into place when complete.

    .metadata, __0_0.distcp, ...    tensors, in the format of torch.distributed.checkpoint: one file per rank
    state.json                      numbers, stream cursors, identity of the run, and a digest of each file

A tensor with one row per feature is saved as one logical tensor, so any number of ranks can load it. A save succeeds on
every rank or fails on every rank; a failed save leaves the previous checkpoint untouched.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard

from crosslayer.core.errors import ResourceError, RunError
from crosslayer.core.files import write_json
from crosslayer.parallel import Mesh

STATE = "state.json"


class Saved(NamedTuple):
    """The contents of a checkpoint on one rank."""

    tensors: dict[str, Tensor]
    by_feature: frozenset[str]
    """Names of tensors sharded by feature; all other tensors are the same on every rank."""
    numbers: dict[str, Any]
    """JSON values."""


def save(run: Path, step: int, saved: Saved, keep: int, mesh: Mesh) -> None:
    """Write the checkpoint of a step, then remove all but the last `keep` checkpoints.

    Raises:
        ResourceError: on every rank, if any rank could not write its part.
    """
    folder = run / "checkpoints"
    target = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    there = mesh.world.objects(steps(run))[0]
    if step in there:
        return

    def begin() -> None:
        if mesh.world.rank == 0:
            folder.mkdir(exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

    def write() -> None:
        writer = dcp.FileSystemWriter(temporary, thread_count=1)
        with _without_process_group_warning():
            dcp.save(_whole(saved.tensors, saved.by_feature, mesh), storage_writer=writer, no_dist=mesh.world.size == 1)

    def conclude() -> None:
        mine = {p.name: _digest(p) for p in temporary.glob(f"__{mesh.world.rank}_*")}
        digests = {name: digest for part in mesh.world.objects(mine) for name, digest in part.items()}
        if mesh.world.rank == 0:
            digests[".metadata"] = _digest(temporary / ".metadata")
            write_json(temporary / STATE, {"mesh": mesh.shape, **saved.numbers, "blake2b": digests})
            temporary.rename(target)

    for action in (begin, write, conclude):
        failures = mesh.world.objects(_failure(action, mesh.world.rank))
        if wrong := [(rank, message) for rank, message in enumerate(failures) if message]:
            if mesh.world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            rank, message = wrong[0]
            remedy = (
                f"the checkpoint of step {there[-1]} is intact: free disk space and resume with --resume {run}"
                if there
                else "there is no earlier checkpoint: free disk space and start again"
            )
            raise ResourceError(f"rank {rank} could not write the checkpoint of step {step} ({message}); {remedy}")
    if mesh.world.rank == 0:
        for old in steps(run)[:-keep]:
            shutil.rmtree(folder / f"step-{old:08d}")


def clear_unfinished(run: Path) -> None:
    """Remove unfinished checkpoints of killed processes; the caller holds the lock of the run."""
    for begun in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(begun)


def steps(run: Path) -> list[int]:
    """Return the steps that have a checkpoint, in order."""
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*"))


def find(run: Path, step: int | None, mesh: Mesh) -> Path | None:
    """Return the folder of the checkpoint of `step`, by default the last one; None without checkpoints.

    Raises:
        RunError: for a step without a checkpoint, or a damaged checkpoint; names an earlier intact one.
    """
    there = mesh.world.objects(steps(run))[0]
    if not there and step is None:
        return None
    if step is not None and step not in there:
        steps_there = ", ".join(map(str, there)) or "none"
        raise RunError(f"{run} has no checkpoint of step {step}; its checkpoints are of steps {steps_there}")
    chosen = there[-1] if step is None else step
    folder = _folder(run, chosen)
    damage = _damage(folder, mesh)
    if damage is None:
        return folder
    before = [s for s in there if s < chosen and _damage(_folder(run, s), mesh) is None]
    remedy = (
        f"resume from an earlier one with --step {before[-1]}"
        if before
        else "there is no earlier intact checkpoint; start again"
    )
    raise RunError(f"checkpoint {folder} is damaged ({damage}); {remedy}")


def numbers(folder: Path) -> dict[str, Any]:
    """Return the `numbers` that were saved, and `mesh`, the layout of the ranks that saved them."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def load(folder: Path, by_feature: Callable[[str], bool], mesh: Mesh) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint; of sharded ones, the rows of this rank's features.

    Raises:
        RunError: for a checkpoint that cannot be read.
    """
    try:
        reader = _Reader(folder)
        described = reader.read_metadata().state_dict_metadata
        tensors = dict[str, Tensor]()
        for name, entry in described.items():
            assert isinstance(entry, TensorStorageMetadata), f"{name} is not a tensor"
            shape, device = list(entry.size), "cpu"
            if by_feature(name):
                shape[0] //= mesh.features.size
                device = mesh.devices.device_type if mesh.devices else "cpu"
            tensors[name] = torch.empty(shape, dtype=entry.properties.dtype, device=device)
        split = frozenset(name for name in tensors if by_feature(name))
        with _without_process_group_warning():
            dcp.load(_whole(tensors, split, mesh), storage_reader=reader, no_dist=mesh.world.size == 1)
    except (CheckpointException, OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise RunError(
            f"checkpoint {folder} cannot be read ({_message(error)}); resume from another with --step"
        ) from error
    return tensors


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps; a run resumed from `step` writes them again."""
    for later in steps(run):
        if later > step:
            shutil.rmtree(_folder(run, later))


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _whole(tensors: dict[str, Tensor], by_feature: frozenset[str], mesh: Mesh) -> dict[str, Any]:
    """Return tensors for torch.distributed.checkpoint: those sharded by feature become DTensors."""
    if mesh.devices is None:
        return dict(tensors)
    placed = [Replicate(), Shard(0)]
    return {
        name: DTensor.from_local(t, mesh.devices, placed, run_check=False) if name in by_feature else t
        for name, t in tensors.items()
    }


_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


class _Unpickler(pickle.Unpickler):
    """Load only the classes of checkpoint metadata: an untrusted checkpoint must not run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        known = global_name in _KNOWN.get(module_name, ())
        if known or (module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"its metadata names {module_name}.{global_name}, which is not part of the format")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _Unpickler(file).load()


def _failure(action: Callable[[], None], rank: int) -> str | None:
    """Run `action`; return the error message of this rank, if any."""
    try:
        action()
    except CheckpointException as error:
        # Raised on every rank, for the failures of some.
        return _message(error.failures[rank][0]) if rank in error.failures else None
    except (OSError, RuntimeError) as error:
        return _message(error)
    return None


def _message(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _without_process_group_warning() -> Iterator[None]:
    """Silence a warning about a missing process group, which appears even with no_dist=True."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _damage(folder: Path, mesh: Mesh) -> str | None:
    """Return what is wrong with a checkpoint, if its digests differ; each rank reads some of its files."""
    found = mesh.world.objects(_damage_here(folder, mesh))
    return next((message for message in found if message), None)


def _damage_here(folder: Path, mesh: Mesh) -> str | None:
    try:
        expected: dict[str, str] = numbers(folder)["blake2b"]
        for name in sorted(expected)[mesh.world.rank :: mesh.world.size]:
            if _digest(folder / name) != expected[name]:
                return f"the digest of {name} differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE} cannot be read"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
