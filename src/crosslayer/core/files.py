"""Writing so that a reader never sees half a file: to a temporary name beside it, then renamed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crosslayer.core.errors import ConfigError, FormatError, ResourceError, RunError


def require_writable(path: Path) -> None:
    """Refuse, before any work is done, a file that could not be written.

    Raises:
        ConfigError: for a folder, a device, a name that is too long, and a folder that is not there or that takes no
            files.
    """
    remedy = "give the name of a file in a folder that you may write to"
    try:
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise ConfigError(
                f"{path} cannot be written: it is {'a folder' if path.is_dir() else 'no ordinary file'}; give the name"
                " of a file"
            )
        if not path.absolute().parent.is_dir():
            raise ConfigError(
                f"{path} cannot be written: there is no folder {path.absolute().parent}; make it, or give another name"
            )
        probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{str(path)[:200]} cannot be written ({said}); {remedy}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` if the block ends well and removed if it does not."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path} is no ordinary file, and would be put out of the way by one; give another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, missing: str, remedy: str) -> Any:
    """What a JSON file says.

    Args:
        missing: what to say where there is no such file.
        remedy: what to do about one that is cut short or cannot be read.

    Raises:
        FormatError: for either.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(missing) from error
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} cannot be read ({error}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not whole JSON ({error}); {remedy}") from error


def require_free_disk(folder: Path, needed_bytes: int, remedy: str) -> None:
    """Refuse before starting what the disk cannot hold."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise ResourceError(
            f"{folder} needs {needed_bytes / 2**30:.2f} GiB of disk but {free_bytes / 2**30:.2f} GiB are free; {remedy}"
        )


@contextmanager
def locked(folder: Path, remedy: str = "wait for it, or give another --out") -> Iterator[None]:
    """Hold the folder for this process.

    Args:
        remedy: what to do where another process holds it.

    Raises:
        RunError: for a folder that another process holds.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); give another --out") from error
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{folder} is in use by another process; {remedy}") from error
        yield
