"""`run.json`: what a run folder says of itself."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from crosslayer.schemas.policy import FirstPosition

State = Literal["training", "stopped", "finished"]


class RunManifest(BaseModel):
    """Everything needed to tell what a run is, and to check that a resume belongs to it."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    state: State
    created: str
    """UTC, ISO 8601."""
    config: dict[str, Any]
    """The training config as given, every field."""
    host: dict[str, Any]
    """name, model_type, n_layers, d_model, n_vocab."""
    clt: dict[str, Any]
    """n_layers, d_model, n_features, n_parameters and kind."""
    policy: FirstPosition
    sources: list[dict[str, Any]]
    """name and share of the tokens."""
    versions: dict[str, str]
    step: int = 0
    tokens: int = 0
    train_s: float = 0.0
    """Seconds of training, all resumes together, without scale estimation and evaluation."""
