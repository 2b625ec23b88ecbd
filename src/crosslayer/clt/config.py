"""The shape of a transcoder, and what it must say of itself on disk. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crosslayer.clt.activations import ACTIVATIONS, JUMPRELU, Activation
from crosslayer.core.errors import ConfigError
from crosslayer.schemas.policy import FirstPosition

Scope = Literal["layer", "all"]
RankBy = Literal["norm", "value"]


@dataclass(frozen=True, kw_only=True)
class CLTConfig:
    """Sizes and kind of a cross-layer transcoder.

    Attributes:
        n_layers, d_model, n_features: layers, width, features a layer.
        activation: the name of one of `crosslayer.clt.activations`.
        k: active features a token, per layer or in all as `scope` says; for those that rank only.
        scope: whether top-k ranks the features of each layer apart or those of all layers together.
        rank_by: what top-k ranks: the activation times its decoder's norm, or the activation's value alone.
        k_per_batch: k counts the whole batch in place of each token (batchtopk; as BluelightAI's loader has it).
        cross_layer: features write to their own and all later layers; if not, to their own only (a PLT).
        skip: an affine skip, y += x W_skip.

    Raises:
        ConfigError: for values that contradict each other.
    """

    n_layers: int
    d_model: int
    n_features: int
    activation: str = JUMPRELU.name
    k: int | None = None
    scope: Scope = "all"
    rank_by: RankBy = "norm"
    k_per_batch: bool = False
    cross_layer: bool = True
    skip: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation={self.activation} is not known; give one of {', '.join(ACTIVATIONS)}")
        for name in ("n_layers", "d_model", "n_features"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.ranks:
            if self.k is None or self.k < 1:
                raise ConfigError(f"activation {self.activation} needs k >= 1, not {self.k}; set k")
            most = self.n_features * (self.n_layers if self.scope == "all" else 1)
            if self.k > most:
                raise ConfigError(f"k={self.k} exceeds the {most} features it ranks; lower k or raise n_features")
        elif self.k is not None:
            raise ConfigError(f"k={self.k} is for topk and batchtopk, not {self.activation}; leave it out")

    @property
    def ranks(self) -> bool:
        """Whether the activation chooses features by rank."""
        return self.kind.ranks

    @property
    def kind(self) -> Activation:
        """The activation function."""
        return ACTIVATIONS[self.activation]

    def n_slots(self, layer: int) -> int:
        """Layers that features of `layer` write to."""
        return self.n_layers - layer if self.cross_layer else 1

    @property
    def n_parameters(self) -> int:
        """Weights, biases and thresholds."""
        slots = sum(self.n_slots(i) for i in range(self.n_layers))
        matrices = (self.n_layers + slots) * self.n_features * self.d_model
        thresholds = self.n_layers * self.n_features * self.kind.thresholds
        skip = self.n_layers * self.d_model**2 * self.skip
        return matrices + self.n_layers * (self.n_features + self.d_model) + thresholds + skip


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a transcoder's activations come from; written into `config.yaml`.

    Attributes:
        model_name: the host's name.
        scan: repo id or name under which viewers know the features.
        input_hook, output_hook: TransformerLens' names of the sites.
        policy: what was done with first positions.
        layers: the host's layers that the transcoder's are, where they are not all of them.
        extra: other keys under `crosslayer:`, kept as they are.
    """

    model_name: str
    scan: str
    input_hook: str = "mlp.hook_in"
    output_hook: str = "mlp.hook_out"
    policy: FirstPosition = field(default_factory=FirstPosition)
    layers: tuple[int, ...] | None = None
    extra: dict[str, object] = field(default_factory=dict)
