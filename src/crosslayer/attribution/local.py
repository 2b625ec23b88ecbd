"""The local replacement model of one prompt: the host as a linear function of features, errors and tokens.

Attention patterns and norm scales are frozen. Each MLP output is the sum of the decoder writes of active features, an
error vector and a constant (DESIGN section 5; Ameisen et al., "Circuit Tracing", 2025). One forward pass of the host
gives the patterns, the MLP outputs and the active features. The residual stream is then recomputed from these parts
alone, in float32 or wider. So edges sum to pre-activations up to rounding, even if the host runs in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.attribution.patterns import Patterns, eager_attention
from crosslayer.clt.sparse import Active
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError
from crosslayer.host.anatomy import Anatomy
from crosslayer.host.host import Host, capped
from crosslayer.host.memory import fetch
from crosslayer.schemas.hooks import short_hook


class HostPass(NamedTuple):
    """Values saved from one forward pass of the host over one row of tokens."""

    tokens_T: Int[Tensor, " T"]
    hidden_TD: Float[Tensor, "T D"]
    """Final hidden states, which the host unembeds."""
    token_TD: Float[Tensor, "T D"]
    """Token embeddings as they enter the stream: what the first layer reads, less learned positions."""
    start_TD: Float[Tensor, "T D"]
    """The residual stream before the first layer: token embeddings and learned positions, if any."""
    patterns: Patterns
    x_LTD: Float[Tensor, "L T D"]
    y_LTD: Float[Tensor, "L T D"]


@torch.no_grad()
def run_host(host: Host, anatomy: Anatomy, tokens_T: Int[Tensor, " T"]) -> HostPass:
    """Run one forward pass at batch size 1 and save its values.

    Raises:
        HostError: for a prompt longer than the host's context.
        ResourceError: if attention patterns do not fit into memory; checked before they are computed.
    """
    patterns = Patterns(host, len(tokens_T))
    starts: list[Tensor] = []
    xs: list[Tensor] = []
    ys: list[Tensor] = []

    def visit(_layer: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
        xs.append(x_BTD[0])
        ys.append(y_BTD[0])

    with ExitStack() as stack:
        stack.enter_context(eager_attention(host))
        hook = lambda handle: stack.callback(handle.remove)  # noqa: E731
        for block in anatomy.blocks:
            hook(block.attention.module.register_forward_hook(patterns.save, with_kwargs=True))
        first = lambda _m, args, kwargs: starts.append((args[0] if args else kwargs["hidden_states"])[0])  # noqa: E731
        hook(host.layers[0].register_forward_pre_hook(first, with_kwargs=True))
        hidden_TD = host.hidden(tokens_T[None], visit)[0]
    x_LTD, y_LTD = torch.stack(xs), torch.stack(ys)
    positions_TD = anatomy.positions_TD(len(tokens_T))
    token_TD = starts[0] if positions_TD is None else starts[0] - positions_TD
    return HostPass(tokens_T.to(host.device), hidden_TD, token_TD, starts[0], patterns, x_LTD, y_LTD)


class Features(NamedTuple):
    """Active features of one prompt, sorted by layer, position and index."""

    position_N: Int[Tensor, " N"]
    index_N: Int[Tensor, " N"]
    activation_N: Float[Tensor, " N"]


class Scales(NamedTuple):
    """Norm scales of one layer, per position."""

    attention_T: Float[Tensor, " T"]
    after_attention_T: Float[Tensor, " T"] | None
    mlp_T: Float[Tensor, " T"]
    after_mlp_T: Float[Tensor, " T"] | None


class LocalModel:
    """A host and a transcoder on one prompt, linear in features, errors and tokens.

    Attributes:
        host_pass: attention patterns and MLP outputs of the host.
        scales, final_scale_T: norm scales of the layers and of the final norm.
        features: the active features, with activations on this model's own residual stream.
        layers, positions, indices: those of the active features, on the machine.
        firing: the active features of each layer; positions count from 0.
        error_LTD: MLP outputs minus the transcoder's reconstruction; zero at the first positions of the policy.
        constant_LTD: MLP outputs that belong to no feature: decoder biases, and the whole output at the first
            positions.
        x_LTD: MLP inputs, as the transcoder reads them, on this model's own residual stream.
        top_TD: the residual stream that the final norm reads.
        early: the residual stream before each layer and after the last, at the first positions of the policy.
    """

    def __init__(self, anatomy: Anatomy, clt: CLT, host_pass: HostPass, firing: Sequence[Active]) -> None:
        host = anatomy.host
        self.anatomy, self.clt, self.host_pass = anatomy, clt, host_pass
        self.dtype = torch.promote_types(host.dtype, torch.float32)
        self.n_skip = min(host.policy.n_skip, len(host_pass.tokens_T))
        self.writes_before_norm = short_hook(host.output_hook) == "mlp.hook_out"
        self.scales: list[Scales] = []
        self.early: list[Tensor] = []
        xs: list[Tensor] = []
        stream_TD = host_pass.start_TD.to(self.dtype)
        for layer in range(len(anatomy.blocks)):
            self.early.append(stream_TD[: self.n_skip])
            scales, x_TD, stream_TD = self._up(layer, stream_TD)
            self.scales.append(scales)
            xs.append(x_TD)
        self.early.append(stream_TD[: self.n_skip])
        self.x_LTD, self.top_TD = torch.stack(xs), stream_TD
        self.final_scale_T = anatomy.final_norm.scale(stream_TD)
        firing, self.layers, self.positions, self.indices = _only_firing(firing)
        self.positions = self.positions + self.n_skip
        self.firing = [self._values(layer, active) for layer, active in enumerate(firing)]
        self.features = Features(*(torch.cat(x) for x in zip(*(a[:3] for a in self.firing), strict=True)))
        self._probabilities: dict[int, np.ndarray] = {}
        self.error_LTD = torch.zeros_like(self.x_LTD)
        self.constant_LTD = torch.zeros_like(self.x_LTD)

    @property
    def device(self) -> torch.device:
        return self.x_LTD.device

    @property
    def n_layers(self) -> int:
        return len(self.anatomy.blocks)

    @property
    def n_positions(self) -> int:
        return len(self.host_pass.tokens_T)

    def probabilities(self, position: int) -> Float[np.ndarray, " V"]:
        """Return the host's own probabilities of the token after a position, in float32."""
        if position not in self._probabilities:
            logits_V = self.anatomy.host.unembed(self.host_pass.hidden_TD[position])
            (self._probabilities[position],) = fetch(logits_V.float().softmax(0))
        return self._probabilities[position]

    def _up(self, layer: int, stream_TD: Tensor) -> tuple[Scales, Tensor, Tensor]:
        """Run one layer with the host's MLP output."""
        block = self._block(layer)
        attention_T = block.attention_norm.scale(stream_TD)
        written_TD = self._attend(layer, block.attention_norm.apply(stream_TD, attention_T))
        after_attention_T = after_mlp_T = None
        if block.after_attention_norm:
            after_attention_T = block.after_attention_norm.scale(written_TD)
            written_TD = block.after_attention_norm.apply(written_TD, after_attention_T)
        middle_TD = stream_TD + written_TD
        read_TD = stream_TD if self.anatomy.parallel else middle_TD
        mlp_T = block.mlp_norm.scale(read_TD)
        x_TD = block.read_norm.apply(read_TD, mlp_T) if block.read_norm else read_TD
        y_TD = self.host_pass.y_LTD[layer].to(self.dtype)
        if block.after_mlp_norm and self.writes_before_norm:
            after_mlp_T = block.after_mlp_norm.scale(y_TD)
        scales = Scales(attention_T, after_attention_T, mlp_T, after_mlp_T)
        return scales, x_TD, middle_TD + self._enter(layer, y_TD, scales)

    def _block(self, layer: int) -> Any:
        return self.anatomy.blocks[layer]

    def _attend(self, layer: int, x_TD: Tensor) -> Tensor:
        attention = self._block(layer).attention.to(self.dtype)
        return attention.apply(x_TD[None], self.host_pass.patterns[layer].to(self.dtype))[0]

    def carry_early(self, layer: int, h_XTD: Float[Tensor, "X T D"]) -> Float[Tensor, "X T D"]:
        """Carry parts of the residual stream at the first positions through one layer, without biases and MLPs."""
        block, scales, n = self._block(layer), self.scales[layer], self.n_skip
        linear = lambda norm: norm._replace(bias_D=None)  # noqa: E731
        attention = block.attention.to(self.dtype)._replace(value_bias_X=None, output_bias_D=None)
        x_XTD = linear(block.attention_norm).apply(h_XTD, scales.attention_T[:n])
        written_XTD = attention.apply(x_XTD, self.host_pass.patterns[layer][:, :n, :n].to(self.dtype))
        if scales.after_attention_T is not None:
            written_XTD = linear(block.after_attention_norm).apply(written_XTD, scales.after_attention_T[:n])
        return h_XTD + written_XTD

    def _enter(self, layer: int, y_TD: Tensor, scales: Scales) -> Tensor:
        """Map a write at the output site to its addition to the residual stream."""
        if scales.after_mlp_T is None:
            return y_TD
        return self._block(layer).after_mlp_norm.apply(y_TD, scales.after_mlp_T)

    def _values(self, layer: int, active: Active) -> Active:
        """Compute the activations of the active features on this model's stream; positions count from 0."""
        position_K = active.token_K + self.n_skip
        value_K = active.value_K.new_empty(len(position_K), dtype=self.dtype)
        bias_F = self.clt.b_enc[layer]
        parts = zip(*(t.split(1 << 14) for t in (position_K, active.feature_K, value_K)), strict=True)
        for position, feature, value in parts:
            rows_KD = self.clt.W_enc.rows(layer, feature).to(self.dtype)
            torch.linalg.vecdot(rows_KD, self.x_LTD[layer].index_select(0, position), out=value)
            value += bias_F[feature]
        return Active(position_K, active.feature_K, value_K, (self.n_positions, active.shape[1]))

    def set_writes(self, made_LTD: Float[Tensor, "L T D"]) -> None:
        """Split the MLP outputs into feature writes, errors and constants.

        Args:
            made_LTD: what features write, without biases and skips.
        """
        y_LTD, later = self.host_pass.y_LTD.to(self.dtype), slice(self.n_skip, None)
        self.constant_LTD[:, : self.n_skip] = y_LTD[:, : self.n_skip]
        self.constant_LTD[:, later] = torch.stack([*self.clt.b_dec])[:, None]
        torch.sub(y_LTD, made_LTD + self.constant_LTD, out=self.error_LTD)
        if self.clt.config.skip:
            for layer in range(self.n_layers):
                self.error_LTD[layer, later] -= self.clt.skip(self.x_LTD[layer, later], layer)
        self.error_LTD[:, : self.n_skip] = 0

    def logits(self, made_LTD: Float[Tensor, "L T D"]) -> Float[Tensor, "T V"]:
        """Compute logits with features, errors and constants in place of the MLPs.

        Args:
            made_LTD: what features write. Other activations than the prompt's own give the linear response of this
                model.
        """
        stream_TD = self.host_pass.start_TD.to(self.dtype)
        for layer, scales in enumerate(self.scales):
            block = self._block(layer)
            written_TD = self._attend(layer, block.attention_norm.apply(stream_TD, scales.attention_T))
            if scales.after_attention_T is not None:
                written_TD = block.after_attention_norm.apply(written_TD, scales.after_attention_T)
            middle_TD = stream_TD + written_TD
            y_TD = made_LTD[layer] + self.error_LTD[layer] + self.constant_LTD[layer]
            if self.clt.config.skip:
                read_TD = stream_TD if self.anatomy.parallel else middle_TD
                x_TD = block.read_norm.apply(read_TD, scales.mlp_T) if block.read_norm else read_TD
                y_TD[self.n_skip :] += self.clt.skip(x_TD[self.n_skip :], layer)
            stream_TD = middle_TD + self._enter(layer, y_TD, scales)
        top_TD = self.anatomy.final_norm.apply(stream_TD, self.final_scale_T)
        logits = top_TD @ self.anatomy.unembedding_VD.T.to(self.dtype)
        if self.anatomy.unembedding_bias_V is not None:
            logits = logits + self.anatomy.unembedding_bias_V
        return capped(logits, self.anatomy.host.softcap)


@torch.no_grad()
def local_model(host: Host, clt: CLT, tokens_T: Int[Tensor, " T"], anatomy: Anatomy | None = None) -> LocalModel:
    """Build the local replacement model of a prompt. Features are found; their decoders are not read yet.

    Raises:
        ConfigError: for a transcoder that covers only some of the host's layers.
        HostError: for a prompt longer than the host's context.
        ResourceError: if attention patterns do not fit into memory; checked before they are computed.
    """
    anatomy = anatomy or Anatomy(host)
    if host.n_layers != len(anatomy.blocks):
        raise ConfigError(
            f"the transcoder covers {host.n_layers} of the {len(anatomy.blocks)} layers of {host.name}; graphs need a"
            " transcoder of all layers"
        )
    host_pass = run_host(host, anatomy, tokens_T)
    n_skip = min(host.policy.n_skip, len(tokens_T))
    # Products in float32 decide which features fire, whatever the precision of host and transcoder.
    x_BLD = host_pass.x_LTD[:, n_skip:].transpose(0, 1).to(torch.promote_types(host.dtype, torch.float32))
    return LocalModel(anatomy, clt, host_pass, clt.encode_sparse(x_BLD))


def _only_firing(firing: Sequence[Active]) -> tuple[Sequence[Active], np.ndarray, np.ndarray, np.ndarray]:
    """Leave out entries that do not fire, as top-k may select zeros and negative values.

    Returns:
        What is left, and its layers, tokens and features on the machine.
    """
    layers = np.repeat(np.arange(len(firing)), [len(a.token_K) for a in firing])
    joined = [torch.cat(x) for x in zip(*(a[:3] for a in firing), strict=True)]
    tokens, features, fires = fetch(joined[0], joined[1], joined[2] > 0)
    if fires.all():
        return firing, layers, tokens, features
    kept = [torch.from_numpy(fires[layers == i].nonzero()[0]).to(a.token_K.device) for i, a in enumerate(firing)]
    left = [Active(a.token_K[k], a.feature_K[k], a.value_K[k], a.shape) for a, k in zip(firing, kept, strict=True)]
    return left, layers[fires], tokens[fires], features[fires]
