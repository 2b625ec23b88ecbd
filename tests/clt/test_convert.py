"""`convert` and `push`: exact, resumable, atomic."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from clt.test_published import PROVENANCE
from clt.test_transcoder import make
from crosslayer.cli.convert import command as convert_command
from crosslayer.cli.push import command as push_command
from crosslayer.clt.convert import convert
from crosslayer.clt.formats import published, writing
from crosslayer.core.errors import FormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    published.save(make(dtype=torch.float32), PROVENANCE, tmp_path / "clt")
    return tmp_path / "clt"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_same_format_and_dtype_gives_the_same_bytes(folder: Path, tmp_path: Path):
    (folder / "README.md").write_text("# card")
    convert(folder, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(folder)


def test_dtype_applies_to_every_tensor_and_rounds_once(folder: Path, tmp_path: Path):
    done = CliRunner().invoke(convert_command, [str(folder), str(tmp_path / "half"), "--dtype", "bf16"])
    assert done.exit_code == 0, done.output
    for file in sorted(folder.glob("*.safetensors")):
        before, after = load_file(file), load_file(tmp_path / "half" / file.name)
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor.to(torch.bfloat16)), name


KILLED = """
import os, sys
from pathlib import Path
from crosslayer.clt.convert import convert
convert(sys.argv[1], Path(sys.argv[2]), on_progress=lambda what, share: os._exit(9) if share > 0.4 else None)
"""


def test_a_killed_conversion_leaves_no_folder_and_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(target)], check=False)
    assert done.returncode == 9
    assert not target.exists()
    partial = tmp_path / ".out.partial"
    there = {p.name for p in partial.glob("*.safetensors")}
    assert there
    written: list[str] = []
    write = writing._write
    monkeypatch.setattr(writing, "_write", lambda path, *rest: (written.append(path.name), write(path, *rest)))
    convert(folder, target)
    assert not there & set(written)
    assert bytes_of(target) == bytes_of(folder)
    assert not partial.exists()


def test_a_partial_folder_of_another_source_is_discarded(folder: Path, tmp_path: Path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "plan").write_text("another")
    (partial / "W_dec_0.safetensors").write_bytes(b"another")
    convert(folder, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(folder)


def test_a_tensor_that_reads_back_differently_is_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    check_written = writing.check_written

    def spoil(written: Path, *rest: Any) -> None:
        path = written / "W_dec_1.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
        check_written(written, *rest)

    monkeypatch.setattr("crosslayer.clt.convert.check_written", spoil)
    with pytest.raises(FormatError, match="W_dec_1 was read back with other values"):
        convert(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_values_beyond_the_dtype_are_refused(folder: Path, tmp_path: Path):
    tensors = load_file(folder / "W_dec_1.safetensors")
    tensors["W_dec_1"][0, 0, 0] = 1e6
    big = tmp_path / "big"
    shutil.copytree(folder, big)
    save_file(tensors, big / "W_dec_1.safetensors")
    with pytest.raises(FormatError, match=r"does not fit into fp16.*give --dtype bf16 or fp32"):
        convert(big, tmp_path / "out", dtype=torch.float16)
    assert {p.name for p in tmp_path.iterdir()} == {folder.name, "big"}
    convert(big, tmp_path / "out", dtype=torch.bfloat16)


def test_a_target_that_is_not_empty_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FormatError, match="not empty"):
        convert(folder, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_push_dry_run_lists_the_files(folder: Path):
    done = CliRunner().invoke(push_command, [str(folder), "owner/name", "--dry-run"])
    assert isinstance(done.exception, FormatError)
    assert "no README.md" in str(done.exception)
    (folder / "README.md").write_text("# card")
    done = CliRunner().invoke(push_command, [str(folder), "owner/name", "--dry-run"])
    assert done.exit_code == 0
    for name in (*(p.name for p in folder.iterdir()), "in 8 files, to owner/name"):
        assert name in done.output
