"""The run folder: manifest, log and lock; files are written atomically."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from crosslayer.core.errors import RunError
from crosslayer.core.files import write_json, write_text
from crosslayer.schemas.run import RunManifest
from crosslayer.training.config import TrainConfig, renamed

MAY_CHANGE = frozenset({"checkpoint_every", "feature_ranks", "keep", "log_every", "tensorboard", "wandb"})
"""Settings that may change when a run resumes: they do not affect the trained weights."""


def refuse_unless_new(folder: Path) -> None:
    """Refuse a folder that is not empty.

    Raises:
        RunError: for a folder with files in it.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; give a folder with --out")
    if (folder / "run.json").exists():
        raise RunError(f"{folder} already holds a run; resume it with --resume {folder}, or give another --out")
    if folder.exists() and any(p.name != ".lock" for p in folder.iterdir()):
        raise RunError(f"{folder} is not empty; give another --out")


def write_manifest(folder: Path, manifest: RunManifest) -> None:
    """Write `run.json` atomically."""
    write_json(folder / "run.json", manifest.model_dump())


def resumed_config(saved: dict[str, Any], asked: dict[str, Any]) -> TrainConfig:
    """Return the saved config of a run with those asked settings that may change.

    Raises:
        RunError: naming the first setting that differs and may not.
    """
    check_same_config(saved, asked)
    return TrainConfig.from_dict(saved | {name: value for name, value in asked.items() if name in MAY_CHANGE})


def check_same_config(saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to resume a run with other settings; saved settings may have old names, or lack newer ones.

    Raises:
        RunError: naming the first setting that differs.
    """
    saved = {f.name: f.default for f in fields(TrainConfig)} | renamed(saved)
    for name, value in asked.items():
        if name not in MAY_CHANGE and saved.get(name) != value:
            raise RunError(
                f"the run was started with {name}={saved.get(name)}, not {value}; omit it, or start a new run"
            )


class Log:
    """`log.jsonl`: one JSON object per line, appended and flushed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"

    def cut_back(self, step: int) -> None:
        """Remove lines after `step`; the resumed run logs those steps again."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            lines_before = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_text(self.path, "".join(f"{line}\n" for line in lines_before))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
