"""Atomic file writes, through a temporary file that is renamed; locks and positional reads."""

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
    """Check that an output file can be written, before any work; missing parent folders are allowed.

    Raises:
        ConfigError: for a folder, a device, a name that is too long, or a folder that is not writable.
    """
    try:
        if path.is_dir() or (path.exists() and not path.is_file()):
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise ConfigError(f"{path} cannot be written: it is {kind}; give a file name")
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir():
            raise ConfigError(f"{path} cannot be written: {above} is a file, not a folder; give another name")
        # Tests the name itself if its folder exists, and any name otherwise.
        probe = above / (
            f".{path.name}.{os.getpid()}.tmp" if above == path.absolute().parent else f".{os.getpid()}.tmp"
        )
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{str(path)[:200]} cannot be written ({reason}); give a file in a writable folder"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds; create missing folders."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path} is not a regular file and would be replaced by one; give another name")
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
    """Write `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, missing: str, remedy: str) -> Any:
    """Read a JSON file.

    Args:
        missing: error message for a missing file.
        remedy: what the user can do about a truncated or unreadable file.

    Raises:
        FormatError: if the file is missing, truncated or unreadable.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(missing) from error
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} cannot be read ({error}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON ({error}); {remedy}") from error


def require_free_disk(folder: Path, needed_bytes: int, remedy: str) -> None:
    """Check that the disk has enough space, before any work."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise ResourceError(
            f"{folder} needs {needed_bytes / 2**30:.2f} GiB of disk but {free_bytes / 2**30:.2f} GiB are free; {remedy}"
        )


@contextmanager
def locked(folder: Path, remedy: str = "wait for it, or give another --out") -> Iterator[None]:
    """Lock a folder for this process; create it if it is missing.

    Args:
        remedy: what the user can do if another process holds the lock.

    Raises:
        RunError: for a folder that another process has locked, or that cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be created ({error.strerror}); give another --out") from error
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
    """A file that is read by offset, from any thread, without memory mapping.

    Memory mapping also loads neighbouring pages, which is slow for reads of single rows.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._number = self._file.fileno()
        self._lock = Lock()

    def read(self, n_bytes: int, offset: int) -> bytes:
        """Return `n_bytes` from `offset`, fewer only at the end of the file."""
        if hasattr(os, "pread"):
            return os.pread(self._number, n_bytes, offset)
        buffer = bytearray(n_bytes)
        return bytes(buffer[: self.read_into(memoryview(buffer), offset)])

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the buffer from `offset`; return the number of bytes read, fewer only at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self._number, [buffer], offset)
        # Windows, and macOS before 11, have no positional read, so a lock guards the file position.
        with self._lock:
            self._file.seek(offset)
            done = 0
            while done < len(buffer) and (n := self._file.readinto(buffer[done:])):
                done += n
            return done

    def close(self) -> None:
        """Close the file; repeated calls are allowed."""
        self._file.close()
        self._number = -1

    def __del__(self) -> None:
        # Bundles are often not closed explicitly.
        if hasattr(self, "_file"):
            self._file.close()

    def __enter__(self) -> PositionalFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
