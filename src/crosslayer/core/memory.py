"""Memory of this machine that a process may use: what is free, and no more than its control groups allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
NO_LIMIT = 1 << 60
"""Version 1 of control groups writes a number above this where there is no limit."""


def free_bytes(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Return the memory that is free, file caches included."""
    groups = [limit - used for limit, used in _groups(cgroups, own)]
    return max(0, min([psutil.virtual_memory().available, *groups]))


def total_bytes(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Return the memory of the machine, or the lowest limit of the process's control groups."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _groups(cgroups, own))])


def _groups(cgroups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of the process's control groups that have a limit, and of the groups around them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder == root or root in folder.parents:
                yield from _group(folder, *names)


def _group(folder: Path, limit: str, used: str, cache: str) -> Iterator[tuple[int, int]]:
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    if most.isdecimal() and int(most) < NO_LIMIT:
        yield int(most), max(0, now - int(stat.get(cache, 0)))
