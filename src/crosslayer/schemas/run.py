"""`run.json`: the manifest of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from crosslayer.core.errors import RunError
from crosslayer.schemas.policy import FirstPosition

State = Literal["training", "stopped", "finished"]


class RunManifest(BaseModel):
    """Manifest of a run: its config, host, text, versions and state; checked on resume."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    state: State
    created: str
    """UTC, ISO 8601."""
    config: dict[str, Any]
    """All fields of the training config."""
    host: dict[str, Any]
    """name, model_type, n_layers, d_model, n_vocab, precision."""
    clt: dict[str, Any]
    """n_layers, d_model, n_features, n_parameters and kind."""
    policy: FirstPosition
    sources: list[dict[str, Any]]
    """Name, share of the tokens and digest, per source."""
    versions: dict[str, str]
    step: int = 0
    tokens: int = 0
    train_s: float = 0.0
    """Seconds of training, over all resumes, without normalisation and evaluation."""


def read_manifest(folder: Path) -> RunManifest:
    """Read `run.json` of a folder.

    Raises:
        RunError: for a folder without one, or one that cannot be read.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise RunError(f"{folder} holds no run: there is no run.json; give the --out folder of a training run")
    try:
        return RunManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path} is damaged; restore it, or start again in another folder (the transcoder in clt/ can still be"
            " opened)"
        ) from error


def manifest_of(path: str | Path) -> RunManifest | None:
    """Read `run.json` of a run folder; None for anything else, such as a transcoder's folder or a name on the Hub."""
    return read_manifest(Path(path)) if (Path(path) / "run.json").is_file() else None


def host_precision(manifest: RunManifest | None) -> str:
    """Return the precision that a run's host had; float32 without a run."""
    if manifest is None:
        return "fp32"
    return manifest.host.get("precision") or manifest.config.get("host_precision", "fp32")
