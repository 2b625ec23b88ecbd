"""The sources of Python's standard library: real text that every Python has on disk.

Documents are named by module path, so that Python 3.11 and 3.13 agree about which are held out.
Tests are left out by default (some distributions package them apart), and so are generated tables.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from crosslayer.data.documents import Document

NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "ensurepip"})
TESTS = frozenset({"test", "tests", "idle_test"})
GENERATED = frozenset({"encodings", "pydoc_data"})


def stdlib_documents(*, tests: bool = False) -> Iterator[Document]:
    """Each module of the running Python's standard library, in path order.

    Args:
        tests: also the library's own tests, where this Python has them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = NOT_THE_LIBRARY | GENERATED | (frozenset() if tests else TESTS)
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if left_out.intersection(module.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(f"stdlib:{module.as_posix()}", text)
