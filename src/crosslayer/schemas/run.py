"""`run.json`: the manifest of a run folder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

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
    """name, model_type, n_layers, d_model, n_vocab."""
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
