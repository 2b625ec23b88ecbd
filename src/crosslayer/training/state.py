"""The state of a training run, and its checkpoint format."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosslayer.clt.config import CLTConfig
from crosslayer.clt.shard import by_feature
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import RunError
from crosslayer.data.massive import Typical
from crosslayer.data.stream import StreamState
from crosslayer.data.units import Units
from crosslayer.training import checkpoint
from crosslayer.training.config import TrainConfig
from crosslayer.training.optimiser import Adam
from crosslayer.training.schedule import Cut, Penalty


class Restored(NamedTuple):
    """Parts of a checkpoint that are not in `TrainState`."""

    mesh: tuple[int, int]
    """Data and feature ranks that saved the checkpoint."""
    streams: list[StreamState]


@dataclass(kw_only=True)
class TrainState:
    """Everything that a training step changes, on one rank.

    Attributes:
        clt: the features of this rank, in training units.
        inactive_LF: tokens since the last activation of each feature.
        density_L: density of each layer's entries in the previous step.
        last_norm: gradient norm of the previous step, which clips the next.
        units, typical: normalisation, and median norms that decide which tokens are left out; set before the first
            step.
        train_s, collect_s: seconds of training in total, and of activation collection.
    """

    clt: CLT
    optimiser: Adam
    cut: Cut
    penalty: Penalty
    inactive_LF: Tensor
    density_L: list[float]
    units: Units | None = None
    typical: Typical | None = None
    step: int = 0
    train_s: float = 0.0
    collect_s: float = 0.0
    last_norm: float = 0.0

    def saved(self, identity: dict[str, Any], streams: list[Any]) -> checkpoint.Saved:
        """Return the contents of a checkpoint.

        Args:
            identity: identity of the run; see `identity`.
            streams: state of each rank's activation stream.
        """
        assert self.units is not None, "state is saved after the first step"
        assert self.typical is not None
        tensors: dict[str, Tensor] = {f"silent.{i}": silent_F for i, silent_F in enumerate(self.inactive_LF)}
        tensors |= {f"units.{name}": t for name, t in zip(Units._fields, self.units, strict=True)}
        tensors |= {f"typical.{name}": t for name, t in zip(Typical._fields, self.typical, strict=True)}
        for name, p in self.clt.named_parameters():
            tensors[f"weights.{name}"] = p.data
            tensors |= {f"moments.{key}.{name}": t for key, t in self.optimiser.state.get(p, {}).items()}
        numbers = {
            "of": identity,
            "step": self.step,
            "train_s": self.train_s,
            "harvest_s": self.collect_s,
            "density_L": self.density_L,
            "last_norm": self.last_norm,
            "cut": asdict(self.cut),
            "penalty": asdict(self.penalty),
            "streams": streams,
        }
        return checkpoint.Saved(tensors, frozenset(name for name in tensors if _by_feature(name)), numbers)

    def restore(self, folder: Path, identity: dict[str, Any]) -> Restored:
        """Load a checkpoint into this state.

        Raises:
            RunError: for a checkpoint of another transcoder.
        """
        numbers = checkpoint.numbers(folder)
        for name, expected in identity.items():
            if numbers["of"].get(name) != expected:
                raise RunError(
                    f"checkpoint {folder} belongs to another transcoder, with {name}={numbers['of'].get(name)} and not"
                    f" {expected}; restore the run's own checkpoint, or start a new run"
                )
        device = self.clt.device
        tensors = checkpoint.load(folder, _by_feature, self.clt.mesh)
        for name, p in self.clt.named_parameters():
            p.data.copy_(tensors[f"weights.{name}"])
            moments = {
                key.split(".")[1]: t
                for key, t in tensors.items()
                if key.startswith("moments.") and key.split(".", 2)[2] == name
            }
            if moments:
                self.optimiser.state[p] = {key: t.to("cpu" if key == "step" else device) for key, t in moments.items()}
        n_layers = len(self.inactive_LF)
        self.inactive_LF = torch.stack([tensors[f"silent.{i}"] for i in range(n_layers)]).to(device)
        self.step, self.train_s, self.collect_s, self.density_L, self.last_norm = (
            numbers[name] for name in ("step", "train_s", "harvest_s", "density_L", "last_norm")
        )
        self.cut, self.penalty = Cut(**numbers["cut"]), Penalty(**numbers["penalty"])
        self.units = Units(*(tensors[f"units.{name}"] for name in Units._fields)).to(str(device))
        self.typical = Typical(*(tensors[f"typical.{name}"] for name in Typical._fields)).to(str(device))
        rows, columns = numbers["mesh"]
        return Restored((rows, columns), [StreamState(*s) for s in numbers["streams"]])


def identity(host_name: str, whole: CLTConfig, config: TrainConfig) -> dict[str, Any]:
    """Return what a checkpoint and a run must agree on to resume."""
    return {"host": host_name, **asdict(whole), "precision": config.precision, "moments": config.moments}


def _by_feature(name: str) -> bool:
    """Return whether a tensor of a checkpoint has one row per feature."""
    kind, _, rest = name.partition(".")
    if kind == "moments":
        key, _, rest = rest.partition(".")
        return key != "step" and by_feature(rest)
    return kind == "silent" or (kind == "weights" and by_feature(rest))
