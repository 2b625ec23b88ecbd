"""The source code of Python's standard library, which every Python has on disk.

Document ids are module paths, so Python 3.11 and 3.13 hold out the same modules. Tests are excluded by default, because
some distributions package them separately. Generated tables are excluded too.
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
    """Yield the modules of the running Python's standard library, in path order.

    Args:
        tests: include the tests of the library, if installed.
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
