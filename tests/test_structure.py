"""The structure of the sources: no import cycle, and a check of it that finds one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def cycles(language: str, root: Path = ROOT) -> tuple[int, list[str]]:
    """Exit code of scripts/cycles.py and the lines that it printed."""
    command = [sys.executable, str(ROOT / "scripts" / "cycles.py"), "--only", language, "--root", str(root)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    return ended.returncode, ended.stdout.splitlines()


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("language", ["python", "typescript"])
def test_there_is_no_import_cycle(language: str):
    code, lines = cycles(language)
    assert (code, lines[:-1]) == (0, [])
    assert lines[-1].startswith("0 import cycles among ")


@pytest.mark.parametrize(
    ("imports", "found"),
    [
        ('import { a } from "./views/a";', True),
        ('import {\n  type T,\n  a,\n} from "./views/a";', True),
        ('export * from "./views/a";', True),
        ('import "./views/a";', True),
        ('const late = () => import("./views/a");', True),
        ('import type { T } from "./views/a";', False),
        ('import { type T, type U } from "./views/a";', False),
        ('// import { a } from "./views/a";', False),
        ('export const a = "./views/a";', False),
    ],
)
def test_a_cycle_of_typescript_is_found_unless_it_is_of_types(tmp_path: Path, imports: str, found: bool):
    write(tmp_path / "web" / "src", {"main.ts": imports, "views/a.ts": 'import { b } from "../main";\n'})
    code, lines = cycles("typescript", tmp_path)
    assert code == found
    assert lines == (["main -> views/a -> main"] if found else []) + [
        f"{int(found)} import cycle{'' if found else 's'} among 2 modules"
    ]


@pytest.mark.parametrize(
    ("imports", "found"),
    [
        ("from crosslayer.part.b import y", True),
        ("from crosslayer.part import b", True),
        ("from . import b", True),
        ("from .b import y", True),
        ("import crosslayer.part.b", True),
        ("def late():\n    from crosslayer.part.b import y", True),
        ("if x:\n    pass\nelse:\n    from .b import y", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import y", False),
        ("import typing\nif typing.TYPE_CHECKING:\n    from .b import y", False),
        ("from crosslayer.other.b import y", False),
    ],
)
def test_a_cycle_of_python_is_found_unless_it_is_of_types(tmp_path: Path, imports: str, found: bool):
    files = {
        "__init__.py": "",
        "part/__init__.py": "",
        "part/a.py": imports,
        "part/b.py": "from crosslayer.part.a import x",
    }
    write(
        tmp_path / "src" / "crosslayer",
        {**files, "other/__init__.py": "", "other/b.py": "from crosslayer.part import a"},
    )
    code, lines = cycles("python", tmp_path)
    assert code == found
    assert lines == (["crosslayer.part.a -> crosslayer.part.b -> crosslayer.part.a"] if found else []) + [
        f"{int(found)} import cycle{'' if found else 's'} among 6 modules"
    ]


def test_a_package_that_imports_what_imports_it_is_a_cycle(tmp_path: Path):
    files = {"part/__init__.py": "from .a import x", "part/a.py": "from crosslayer.part import y"}
    write(tmp_path / "src" / "crosslayer", files)
    code, lines = cycles("python", tmp_path)
    assert (code, lines[0]) == (1, "crosslayer.part -> crosslayer.part.a -> crosslayer.part")
