"""Free memory is what the machine has, and no more than the process's control groups allow."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from crosslayer.core import memory

MIB = 1 << 20


def group(folder: Path, limit: str, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 0\ninactive_file {cache}\n")


def test_the_lowest_limit_around_the_process_counts(tmp_path: Path):
    own = tmp_path / "own"
    own.write_text("0::/jobs/7\n")
    group(tmp_path / "jobs" / "7", "max", 5 * MIB)
    assert memory.total_bytes(tmp_path, own) == psutil.virtual_memory().total
    group(tmp_path / "jobs", str(10 * MIB), 6 * MIB, cache=MIB)
    assert memory.free_bytes(tmp_path, own) == 5 * MIB
    assert memory.total_bytes(tmp_path, own) == 10 * MIB
    group(tmp_path / "jobs" / "7", str(8 * MIB), 9 * MIB)
    assert memory.free_bytes(tmp_path, own) == 0


def test_version_one_and_its_way_to_say_no_limit(tmp_path: Path):
    own = tmp_path / "own"
    own.write_text("4:cpu,cpuacct:/x\n3:memory:/job\n")
    folder = tmp_path / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.usage_in_bytes").write_text(str(3 * MIB))
    (folder / "memory.stat").write_text(f"total_inactive_file {MIB}\n")
    for limit, total in ((9 * MIB, 9 * MIB), ((1 << 63) - 4096, psutil.virtual_memory().total)):
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        assert memory.total_bytes(tmp_path, own) == total
    (folder / "memory.limit_in_bytes").write_text(str(9 * MIB))
    assert memory.free_bytes(tmp_path, own) == 7 * MIB


@pytest.mark.parametrize("text", [None, "0::/gone\n"])
def test_without_control_groups(tmp_path: Path, text: str | None):
    own = tmp_path / "own"
    if text is not None:
        own.write_text(text)
    assert memory.total_bytes(tmp_path, own) == psutil.virtual_memory().total
