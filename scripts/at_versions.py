"""Run tests with the lowest or the latest versions that pyproject.toml allows.

    python scripts/at_versions.py lowest|latest [--torch VERSION] -- TESTS

Makes `.venv-lowest` or `.venv-latest` anew, with uv: `lowest` takes the lowest version of each direct dependency. Test
tools are the ones of constraints.txt. torch is large: `--torch` takes one version of it in place of the one resolved.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=("lowest", "latest"))
    parser.add_argument("--torch", default="", metavar="VERSION")
    parser.add_argument("tests", nargs="+")
    args = parser.parse_args()
    venv = ROOT / f".venv-{args.end}"
    subprocess.run(["uv", "venv", "--quiet", "--clear", "--seed", str(venv)], check=True, env=_path())
    python = str(venv / "bin" / "python")
    with tempfile.TemporaryDirectory() as folder:
        override = Path(folder) / "override.txt"
        override.write_text(f"torch=={args.torch}\n" if args.torch else "")
        resolution = "lowest-direct" if args.end == "lowest" else "highest"
        compiled = subprocess.run(
            ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", python]
            + ["--resolution", resolution, "--override", str(override), "pyproject.toml"],
            check=True,
            cwd=ROOT,
            env=_path(),
            capture_output=True,
            text=True,
        )
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(compiled.stdout)
        # pip, not uv, installs: it knows this machine's own files of torch, if it has any.
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "--requirement", str(wanted)], check=True, cwd=ROOT)
        subprocess.run([*install, "--no-deps", "--editable", "."], check=True, cwd=ROOT)
        subprocess.run([*install, "--group", "test", "--constraint", str(wanted)], check=True, cwd=ROOT)
    print(compiled.stdout)
    run = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", *args.tests]
    return subprocess.run(run, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode


def _path() -> dict[str, str]:
    """The environment in which `uv` of this Python's own folder is found."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


if __name__ == "__main__":
    sys.exit(main())
