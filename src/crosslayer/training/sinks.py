"""Log metrics to TensorBoard and Weights & Biases as well as `log.jsonl`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosslayer.core.errors import ConfigError
from crosslayer.training.config import TrainConfig

Sink = Callable[[dict[str, Any]], None]


def open_sinks(config: TrainConfig, run: Path) -> list[Sink]:
    """Return the sinks that the config enables; each takes a record of the log.

    Raises:
        ConfigError: if a package is not installed.
    """
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(_tensorboard(run))
    if config.wandb:
        sinks.append(_wandb(config, run))
    return sinks


def _tensorboard(run: Path) -> Sink:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the package tensorboard; run pip install 'crosslayer[tensorboard]'"
        ) from error
    writer = SummaryWriter(str(run / "tensorboard"))

    def write(record: dict[str, Any]) -> None:
        for name, value in _flat(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return write


def _wandb(config: TrainConfig, run: Path) -> Sink:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("--wandb needs the package wandb; run pip install 'crosslayer[wandb]'") from error
    session = wandb.init(project="crosslayer", name=run.name, config=config.as_dict(), dir=str(run), resume="allow")
    return lambda record: session.log(_flat(record), step=record["step"])


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}/"))
        elif isinstance(value, list):
            flat.update(_flat({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/"))
        elif isinstance(value, int | float) and name != "step":
            flat[prefix + name] = value
    return flat
