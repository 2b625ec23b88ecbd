"""The package as it is installed: the wheel in an empty folder, and machines that lack what Unix has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml

from made_bundle import clt_folder

__all__ = ["clt_folder"]
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the hatchling that is installed here, so that nothing is fetched."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(installed: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", "-m", "crosslayer", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_what_a_package_needs(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "py.typed",
        "assets/stdlib-qwen3/model.safetensors",
        "serve/static/page.js",
        "serve/static/index.html",
    ):
        assert f"crosslayer/{name}" in names
    assert not [n for n in names if n.startswith(("tests/", "docs/", "web/")) or "__pycache__" in n]
    assert any(n.endswith("entry_points.txt") for n in names)


def test_the_wheel_works_from_an_empty_folder(installed: Path, clt_folder: Path, tmp_path: Path):
    ended = run(installed, "quickstart", "--help", cwd=tmp_path)
    assert (ended.returncode, "--out" in ended.stdout) == (0, True), ended.stderr
    ended = run(installed, "inspect", str(clt_folder), "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["n_layers"] == 3
    code = "import crosslayer as xl; print(xl.__file__); xl.load_host('stdlib-qwen3'); print(xl.load_host.__module__)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", "-c", code]
    loaded = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert loaded.stdout.startswith(str(installed))
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_serves_its_page(installed: Path, tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-P", "-m", "crosslayer", "serve", str(tmp_path)]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert server.stdout is not None
        said, until = "", time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", said)) and time.monotonic() < until:
            line = server.stdout.readline().decode()
            assert line, said
            said += line
        assert found, said
        with urllib.request.urlopen(found[0] + "page.js", timeout=20) as answer:
            assert len(answer.read()) > 10_000
    finally:
        server.terminate()
        server.wait(timeout=20)
        assert server.stdout is not None
        server.stdout.close()


WINDOWS = """
import os, sys
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None  # import raises ImportError
for name in ("pread", "preadv", "fork", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
"""


@pytest.mark.parametrize(
    "code",
    [
        "import crosslayer; print(crosslayer.__version__)",
        "from crosslayer.cli.main import app; app(['--help'])",
        "from crosslayer.cli.main import app; app(['train', '--help'])",
        "import crosslayer.serve.app, crosslayer.bundles.bundle, crosslayer.graphs, crosslayer.autointerp.run",
    ],
)
def test_imports_need_nothing_of_unix(code: str):
    ended = subprocess.run([sys.executable, "-c", WINDOWS + code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_rows_are_read_and_folders_locked_without_unix(clt_folder: Path, tmp_path: Path):
    """One process reads with the system's positional read, one without it: the same numbers."""
    code = f"""
import torch
from pathlib import Path
from crosslayer.clt.open import load_clt
from crosslayer.core.errors import RunError
from crosslayer.core.files import PositionalFile
path = Path({str(clt_folder)!r}) / "W_dec_0.safetensors"
with PositionalFile(path) as file:
    buffer = bytearray(64)
    assert file.read_into(memoryview(buffer), 100) == 64 and bytes(buffer) == path.read_bytes()[100:164]
    assert file.read_into(memoryview(bytearray(64)), path.stat().st_size - 10) == 10
    assert file.read(64, 100) == bytes(buffer) and len(file.read(64, path.stat().st_size - 10)) == 10
print(load_clt({str(clt_folder)!r}).clt.decoder_rows(0, torch.tensor([3, 1, 2])).sum().item())
"""
    hide = "import os\nfor name in ('pread', 'preadv'): delattr(os, name)\n"
    sums = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout
        for c in (code, hide + code)
    ]
    assert sums[0] == sums[1] != ""


def test_a_device_that_is_not_here_is_refused_by_its_name():
    from crosslayer.core.errors import ConfigError
    from crosslayer.host.host import choose_device

    for name in ("tpu", "cpu:1", "cuda:99", "mps:1"):
        with pytest.raises(ConfigError, match=f"device={name} is not available; give one of auto, cpu"):
            choose_device(name)


def test_mps_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch):
    import torch

    from crosslayer.host.host import choose_device

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == "mps"


def test_bounds_and_pins_agree():
    """Each direct dependency has a lower bound and is pinned within its bounds; nothing in the pins names a host."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for text in PROJECT["dependencies"]:
        wanted = Requirement(text)
        assert any(s.operator == ">=" for s in wanted.specifier), text
        assert wanted.specifier.contains(pins[wanted.name.lower().replace("_", "-")]), text
    for name in ("torch", "transformers"):
        assert any(
            s.operator == "<" for r in map(Requirement, PROJECT["dependencies"]) if r.name == name for s in r.specifier
        )


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (PROJECT["version"], PROJECT["license"])
