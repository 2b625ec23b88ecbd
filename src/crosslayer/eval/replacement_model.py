"""`ReplacementModel`: a host and a transcoder in one object, for prompts.

model = ReplacementModel.from_pretrained("Qwen/Qwen3-0.6B-Base", "bluelightai/clt-qwen3-0.6b-base-20k")
features = model.features("The capital of France is")
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.open import load_clt
from crosslayer.core.errors import ConfigError, HostError
from crosslayer.eval.evaluate import check_shape
from crosslayer.eval.replacement import Replace
from crosslayer.host.host import Host, choose_device, load_host

Prompt = str | Sequence[int] | Tensor


def host_of(
    opened: Opened, model: str | Path | Host | None = None, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Host:
    """Load the host that a transcoder names, or another of the same shape, with a warning.

    Raises:
        HostError: if the transcoder names no host and none is given.
        ConfigError: if the shapes of host and transcoder differ.
    """
    p = opened.provenance
    if not (model or p.model_name):
        raise HostError(f"{p.scan} does not name its host; give the model it was trained on")
    host = load_host(
        model or p.model_name,
        dtype=dtype,
        device=device,
        input_hook=p.input_hook,
        output_hook=p.output_hook,
        policy=p.policy,
        layers=p.layers,
    )
    check_shape(host, opened.clt)
    if p.model_name and host.name != p.model_name:
        warnings.warn(f"{p.scan} was trained on {p.model_name}; it is used with {host.name}", stacklevel=3)
    return host


def tokens_of(host: Host, prompt: Prompt) -> Int[Tensor, "1 T"]:
    """Return token ids of a prompt; text gets the special token of the policy, token ids are unchanged.

    Raises:
        ConfigError: for an empty prompt, numbers that are not whole, or an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        return host.encode(prompt)
    try:
        given = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"a prompt is a text or one row of token ids, not {prompt!r:.80}") from error
    if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
        raise ConfigError(f"token ids are whole numbers, not {given.flatten()[0].item()}; give those of the tokenizer")
    given = given.long()
    if given.dim() > 1 and given.numel() != given.shape[-1]:
        raise ConfigError(f"a prompt is one row of token ids, not {tuple(given.shape)}; give rows one by one")
    tokens_BT = given.reshape(1, -1)
    if not tokens_BT.numel():
        raise ConfigError("the prompt has no tokens; give at least one")
    if beyond := [t for t in tokens_BT[0].tolist() if not 0 <= t < host.n_vocab]:
        raise ConfigError(f"token {beyond[0]} is not among the {host.n_vocab} tokens of {host.name}; give smaller ids")
    return tokens_BT


class ReplacementModel:
    """A host whose MLPs can be replaced by a transcoder, with or without its reconstruction errors.

    Attributes:
        host, clt, provenance: the host, the transcoder, and its provenance.
    """

    def __init__(self, host: Host, opened: Opened) -> None:
        check_shape(host, opened.clt)
        self.host, self.clt, self.provenance = host, opened.clt, opened.provenance

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | Path | Host,
        clt_name: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ) -> ReplacementModel:
        """Load host and transcoder by name or folder.

        Args:
            dtype: dtype of the host; the transcoder keeps its own, and computation uses the wider one.
            device: default: cuda if available.
        """
        where = choose_device(device or "auto")
        opened = load_clt(clt_name, device=where)
        return cls(host_of(opened, model_name, dtype=dtype, device=where), opened)

    def tokens(self, prompt: Prompt) -> Int[Tensor, "1 T"]:
        """Return token ids of a prompt; see `tokens_of`."""
        return tokens_of(self.host, prompt)

    @torch.no_grad()
    def features(self, prompt: Prompt) -> Float[Tensor, "L T F"]:
        """Return activations as a sparse COO tensor; skipped positions have none."""
        x_TLD = self.host.tap(self.tokens(prompt)).x_BTLD[0]
        n_skip = min(self.host.policy.n_skip, len(x_TLD))
        active = self.clt.encode_sparse(x_TLD[n_skip:])
        places = [
            torch.stack([torch.full_like(a.token_K, i), a.token_K + n_skip, a.feature_K]) for i, a in enumerate(active)
        ]
        shape = (len(active), len(x_TLD), self.clt.config.n_features)
        return torch.sparse_coo_tensor(
            torch.cat(places, dim=1), torch.cat([a.value_K for a in active]), shape, check_invariants=False
        ).coalesce()

    @torch.no_grad()
    def reconstruct(self, prompt: Prompt) -> Float[Tensor, "T L D"]:
        """Return reconstructed MLP outputs; skipped positions have the host's outputs."""
        x_BTLD, y_BTLD = self.host.tap(self.tokens(prompt))
        return self._reconstruct(x_BTLD[0], y_BTLD[0])

    def _reconstruct(self, x_TLD: Tensor, y_TLD: Tensor) -> Tensor:
        n_skip = min(self.host.policy.n_skip, len(x_TLD))
        yhat_TLD = self.clt.decode(self.clt.encode_sparse(x_TLD[n_skip:]), x_TLD[n_skip:])
        return torch.cat([y_TLD[:n_skip].to(yhat_TLD.dtype), yhat_TLD])

    @torch.no_grad()
    def logits(
        self, prompt: Prompt, *, replace: bool | Collection[int] = True, errors: bool = False
    ) -> Float[Tensor, "T V"]:
        """Return logits at every position.

        Args:
            replace: replace all MLPs (True), none (False), or those of these layers.
            errors: add the reconstruction errors on the host's residual stream, which gives the host's logits.

        Raises:
            ConfigError: for a layer that the transcoder does not have.
        """
        tokens_BT = self.tokens(prompt)
        layers = range(self.clt.config.n_layers) if replace is True else () if replace is False else replace
        if beyond := [i for i in layers if not 0 <= i < self.clt.config.n_layers]:
            raise ConfigError(f"the transcoder has {self.clt.config.n_layers} layers and no layer {beyond[0]}")
        visit = None
        if layers:
            errors_BTLD = None
            if errors:
                x_BTLD, y_BTLD = self.host.tap(tokens_BT)
                errors_BTLD = (y_BTLD[0] - self._reconstruct(x_BTLD[0], y_BTLD[0]))[None]
            visit = Replace(self.clt, self.host.policy.n_skip, layers, errors_BTLD)
        logits = self.host.run(tokens_BT, visit)
        assert logits is not None
        return logits[0]
