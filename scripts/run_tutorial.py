"""Run a notebook's code cells in order and save their output in the notebook.

    python scripts/run_tutorial.py docs/tutorial.ipynb

Needs no Jupyter. `CROSSLAYER_RUN` names the run to use, by default `runs/quickstart`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return the notebook with new outputs; errors in cells are raised."""
    names: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        number += 1
        source = "".join(cell["source"])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, f"cell {number}", "exec"), names)
        text = printed.getvalue()
        cell["execution_count"] = number
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": lines}] if text else []
    return notebook


if __name__ == "__main__":
    path = Path(sys.argv[1])
    done = run(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
