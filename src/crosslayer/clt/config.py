"""Config of a transcoder, and its provenance on disk. Does not import torch."""

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
    """Sizes and options of a cross-layer transcoder.

    Attributes:
        n_layers, d_model, n_features: number of layers, width, and features per layer.
        activation: name of an activation in `crosslayer.clt.activations`.
        k: active features per token, per layer or in total depending on `scope`; TopK and BatchTopK only.
        scope: whether top-k ranks features per layer or over all layers.
        rank_by: whether top-k ranks activation times decoder norm, or the activation.
        k_per_batch: k counts the whole batch instead of each token (batchtopk, as in BluelightAI's loader).
        cross_layer: features write to their own and all later layers; otherwise to their own only (PLT).
        skip: whether there is an affine skip connection, y += x W_skip.

    Raises:
        ConfigError: for contradictory values.
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
            raise ConfigError(f"activation={self.activation} is unknown; give one of {', '.join(ACTIVATIONS)}")
        for name in ("n_layers", "d_model", "n_features"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.ranks:
            if self.k is None or self.k < 1:
                raise ConfigError(f"activation {self.activation} needs k >= 1, not {self.k}; set k")
            max_k = self.n_features * (self.n_layers if self.scope == "all" else 1)
            if self.k > max_k:
                raise ConfigError(f"k={self.k} exceeds the {max_k} features it ranks; lower k or raise n_features")
        elif self.k is not None:
            raise ConfigError(f"k={self.k} is for topk and batchtopk, not {self.activation}; omit it")

    @property
    def ranks(self) -> bool:
        """Whether the activation ranks features (TopK, BatchTopK)."""
        return self.kind.ranks

    @property
    def kind(self) -> Activation:
        """The activation function."""
        return ACTIVATIONS[self.activation]

    def n_slots(self, layer: int) -> int:
        """Return the number of layers that features of `layer` write to."""
        return self.n_layers - layer if self.cross_layer else 1

    @property
    def n_parameters(self) -> int:
        """Number of parameters: weights, biases and thresholds."""
        slots = sum(self.n_slots(i) for i in range(self.n_layers))
        matrices = (self.n_layers + slots) * self.n_features * self.d_model
        thresholds = self.n_layers * self.n_features * self.kind.thresholds
        skip = self.n_layers * self.d_model**2 * self.skip
        return matrices + self.n_layers * (self.n_features + self.d_model) + thresholds + skip


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Host, hooks and policy of a transcoder; written to `config.yaml`.

    Attributes:
        model_name: name of the host.
        scan: repo id or name of the features in viewers.
        input_hook, output_hook: hook names of TransformerLens.
        policy: first-position policy.
        layers: host layers of the transcoder; None for all.
        extra: other keys under `crosslayer:`, unchanged.
    """

    model_name: str
    scan: str
    input_hook: str = "mlp.hook_in"
    output_hook: str = "mlp.hook_out"
    policy: FirstPosition = field(default_factory=FirstPosition)
    layers: tuple[int, ...] | None = None
    extra: dict[str, object] = field(default_factory=dict)
