"""Writing so that a reader never sees half a file: to a temporary name beside it, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from crosslayer.core.errors import ConfigError, FormatError, ResourceError, RunError


def require_writable(path: Path) -> None:
    """Refuse, before any work is done, an output file that could not be written. Missing folders are fine.

    Raises:
        ConfigError: for a folder, a device, a name that is too long, and a place that takes no files.
    """
    try:
        if path.is_dir() or (path.exists() and not path.is_file()):
            kind = "a folder" if path.is_dir() else "no ordinary file"
            raise ConfigError(f"{path} cannot be written: it is {kind}; give the name of a file")
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir():
            raise ConfigError(f"{path} cannot be written: {above} is a file and no folder; give another name")
        # The name itself is tried where its folder exists, any name where the folder is still to be made.
        probe = above / (
            f".{path.name}.{os.getpid()}.tmp" if above == path.absolute().parent else f".{os.getpid()}.tmp"
        )
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{str(path)[:200]} cannot be written ({said}); give the name of a file in a folder that you may write to"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` if the block succeeds and removed if not; makes the folders."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path} is no ordinary file and would be replaced by one; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """Lock the folder, which is made where it is missing, for this process.

    Args:
        remedy: what to do where another process has locked it.

    Raises:
        RunError: for a folder that another process has locked, or that cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); give another --out") from error
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunError(f"{folder} is in use by another process; {remedy}") from error
    try:
        yield
    finally:
        lock.release()


class PositionalFile:
    """A file of which parts are read by offset, from any thread, without mapping it.

    A mapped page brings its neighbours into memory, which costs more than it is worth where single rows are read.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._turn = Lock()

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the buffer from `offset` on; gives the number of bytes read, fewer only where the file ends."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        # Windows, and macOS before 11, have no positional read: one thread moves the file's position at a time.
        with self._turn:
            self._file.seek(offset)
            done = 0
            while done < len(buffer) and (n := self._file.readinto(buffer[done:])):
                done += n
            return done

    def close(self) -> None:
        """Close the file; more than once is fine."""
        self._file.close()

    def __del__(self) -> None:
        # A bundle is often left open to the end.
        if hasattr(self, "_file"):
            self._file.close()

    def __enter__(self) -> PositionalFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
