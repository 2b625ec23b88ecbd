"""A saved graph: `NAME.json`, its header, and `NAME.safetensors`, its arrays."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from crosslayer.core.errors import ConfigError, FormatError
from crosslayer.core.files import read_json, replacing, require_writable, write_text
from crosslayer.graphs.arrays import GraphArrays, fault
from crosslayer.schemas.graph import FORMAT, VERSION, GraphHeader


def write(header: GraphHeader, arrays: GraphArrays, path: str | Path) -> Path:
    """Write both files, whole or not at all; gives the path of the header.

    Raises:
        ConfigError: for a path that cannot be written.
    """
    header_path, tensors = files_of(path)
    for file in (header_path, tensors):
        require_writable(file)
    refuse_other_file(path)
    written = save({k: np.ascontiguousarray(v) for k, v in arrays._asdict().items()})
    said = header.model_copy(update={"arrays": _digest(written)})
    with replacing(tensors) as temporary:
        temporary.write_bytes(written)
    write_text(header_path, said.model_dump_json(indent=1) + "\n")
    return header_path


def read(path: str | Path) -> tuple[GraphHeader, GraphArrays]:
    """What `write` wrote, by either file's name or without the ending.

    Raises:
        FormatError: for files that are not there, cut short, of a newer version, or that contradict each other.
    """
    header_path, tensor_path = files_of(path)
    header = _read_header(header_path)
    try:
        written = tensor_path.read_bytes()
        tensors = load(written)
    except FileNotFoundError as error:
        raise FormatError(f"{tensor_path} is missing beside {header_path.name}; trace the prompt again") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(f"{tensor_path} cannot be read as safetensors ({error}); trace the prompt again") from error
    if header.arrays is not None and header.arrays != _digest(written):
        raise FormatError(
            f"{tensor_path} is not the one that {header_path.name} was written with; trace the prompt again"
        )
    missing = [k for k in GraphArrays._fields if k not in tensors]
    if missing:
        raise FormatError(f"{tensor_path} has no tensor {missing[0]}; trace the prompt again")
    arrays = GraphArrays(**{k: tensors[k] for k in GraphArrays._fields})
    if found := fault(header, arrays):
        raise FormatError(f"{tensor_path} does not fit {header_path.name}: {found}; trace the prompt again")
    return header, arrays


def refuse_other_file(path: str | Path) -> None:
    """Refuse to write a graph over a file that is something else.

    Raises:
        ConfigError: for a JSON file that is there and is no graph's.
    """
    header, _ = files_of(path)
    if not header.is_file():
        return
    try:
        said = json.loads(header.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise ConfigError(f"{header} is there and is no saved graph; give another name, or remove it")


def files_of(path: str | Path) -> tuple[Path, Path]:
    """The header and the tensors of a graph by either file's name, or without the ending."""
    base = Path(path)
    if not base.name or base.name in (".", ".."):
        raise ConfigError(f"{str(path)!r} is no file's name; give the name of a graph")
    if base.suffix in (".json", ".safetensors"):
        base = base.with_suffix("")
    return base.with_name(base.name + ".json"), base.with_name(base.name + ".safetensors")


def _digest(written: bytes) -> str:
    return hashlib.blake2b(written, digest_size=16).hexdigest()


def _read_header(path: Path) -> GraphHeader:
    missing = f"there is no graph {path}; make one with crosslayer graph -o {path}"
    said = read_json(path, missing=missing, remedy="trace the prompt again")
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise FormatError(
            f"{path} is no graph of crosslayer; a viewer's JSON must lie without a .safetensors of its name beside it"
        )
    if isinstance(said.get("version"), int) and said["version"] > VERSION:
        raise FormatError(f"{path} is of version {said['version']}, newer than {VERSION}; update crosslayer")
    try:
        return GraphHeader.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise FormatError(f"{path}: {where}: {first['msg']}; trace the prompt again") from error
