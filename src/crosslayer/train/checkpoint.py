"""Checkpoints: `checkpoints/step-00001000/` with the state and its digest, renamed into place when both are whole."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from crosslayer.core.errors import RunError
from crosslayer.core.files import replacing, write_json


def save(run: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of a step, then remove all but the last `keep`."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    target = folder / f"step-{step:08d}"
    if target.exists():
        return
    with replacing(target) as temporary:
        temporary.mkdir()
        torch.save(state, temporary / "state.pt")
        write_json(temporary / "digest.json", {"blake2b": _digest(temporary / "state.pt")})
    for old in steps(run)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}")


def clear_unfinished(run: Path) -> None:
    """Remove what a killed process had begun to write; for whoever holds the run."""
    for begun in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(begun)


def steps(run: Path) -> list[int]:
    """Steps of which there is a checkpoint, in order."""
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*"))


def load(run: Path, step: int | None = None) -> dict[str, Any] | None:
    """The state of a step, the last one if none is named; nothing if there is no checkpoint.

    Raises:
        RunError: for a step without a checkpoint, or a damaged one; it offers the one before.
    """
    there = steps(run)
    if not there and step is None:
        return None
    if step is not None and step not in there:
        raise RunError(f"{run} has no checkpoint of step {step}; there are {', '.join(map(str, there)) or 'none'}")
    chosen = there[-1] if step is None else step
    folder = run / "checkpoints" / f"step-{chosen:08d}"
    damage = _damage(folder)
    if damage is None:
        try:
            return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            damage = str(error).splitlines()[0]
    before = [s for s in there if s < chosen and _damage(run / "checkpoints" / f"step-{s:08d}") is None]
    remedy = (
        f"go on from the one before with --step {before[-1]}"
        if before
        else "there is no whole one before it; start again"
    )
    raise RunError(f"checkpoint {folder} is damaged ({damage}); {remedy}")


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps: a resume from `step` makes them anew."""
    for later in steps(run):
        if later > step:
            shutil.rmtree(run / "checkpoints" / f"step-{later:08d}")


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if its digest does not fit."""
    try:
        expected = json.loads((folder / "digest.json").read_text(encoding="utf-8"))["blake2b"]
        return None if _digest(folder / "state.pt") == expected else "its digest does not fit"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return "its digest cannot be read"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
