"""Rules of the package: the public names, the axis letters, what may import torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import crosslayer as xl
from crosslayer.core.axes import AXES

SOURCES = sorted(Path(xl.__file__).parent.rglob("*.py"))


def test_public_names():
    assert xl.__all__ == [
        "CLT",
        "RECIPES",
        "CLTConfig",
        "CrosslayerError",
        "Evaluation",
        "FirstPosition",
        "Graph",
        "Host",
        "Intervention",
        "ReplacementModel",
        "Target",
        "TrainConfig",
        "__version__",
        "attribute",
        "evaluate",
        "intervene",
        "load_clt",
        "load_features",
        "load_host",
        "train",
        "validate",
    ]
    for name in xl.__all__:
        assert getattr(xl, name) is not None


def test_train_can_be_called_whatever_was_imported_first():
    import crosslayer.training.recipes  # noqa: F401

    assert callable(xl.train)


def shapes_in(source: str) -> list[str]:
    """Strings S of annotations like Float[Tensor, S]."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(
                value=ast.Name(id="Float" | "Int" | "Bool"), slice=ast.Tuple(elts=[_, ast.Constant(value=shape)])
            ):
                found.append("..." if shape is ... else shape)
    return found


def test_shapes_use_one_alphabet():
    shapes = [(p.name, s) for p in SOURCES for s in shapes_in(p.read_text())]
    assert len(shapes) > 50
    for name, shape in shapes:
        for axis in (a.lstrip("*") for a in shape.split()):
            assert axis in AXES or axis == "..." or re.fullmatch(r"\d+", axis), f"{name}: {shape!r}"


@pytest.mark.parametrize(
    "module",
    [
        "crosslayer",
        "crosslayer.schemas.run",
        "crosslayer.core.files",
        "crosslayer.cli.main",
        "crosslayer.graphs",
        "crosslayer.graphs.graph",
        "crosslayer.graphs.influence",
        "crosslayer.graphs.interchange",
        "crosslayer.graphs.compare",
        "crosslayer.graphs.report",
        "crosslayer.graphs.circuit",
        "crosslayer.serve.app",
        "crosslayer.serve.listen",
        "crosslayer.features",
        "crosslayer.bundles.bundle",
        "crosslayer.bundles.packed",
        "crosslayer.bundles.parquet",
        "crosslayer.bundles.report",
        "crosslayer.autointerp.run",
        "crosslayer.autointerp.report",
        "crosslayer.autointerp.choose",
    ],
)
def test_imports_without_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
