"""A Hugging Face causal language model whose MLP inputs and outputs can be read and replaced.

`Host.run` calls a visitor at each layer with the MLP's input and output. A tensor that the visitor returns replaces the
output. Tapping is a visitor that stores them, patching one that returns a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosslayer.core.errors import ConfigError, HostError
from crosslayer.host.families import Family, family_of, input_site, output_site
from crosslayer.host.norms import norm_of
from crosslayer.schemas.hooks import short_hook
from crosslayer.schemas.policy import FirstPosition

SHIPPED = "stdlib-qwen3"
SHIPPED_FOLDER = Path(__file__).parent.parent / "assets" / SHIPPED


@runtime_checkable
class Visitor(Protocol):
    """Called at each layer, bottom to top, with the MLP's input and output; a returned tensor replaces the output."""

    def __call__(self, layer: int, x_BTD: Tensor, y_BTD: Tensor, /) -> Tensor | None: ...


class Tapped(NamedTuple):
    """MLP inputs and outputs of all layers."""

    x_BTLD: Float[Tensor, "B T L D"]
    y_BTLD: Float[Tensor, "B T L D"]


def capped(logits: Float[Tensor, "*B V"], cap: float | None) -> Float[Tensor, "*B V"]:
    """Apply the soft-cap of final logits, c tanh(logits / c); None is none."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


class Host:
    """A language model with its tokenizer and the places where a transcoder reads and writes.

    Attributes:
        name: the name it was loaded by; written into the CLTs trained on it.
        layers, n_layers: layers whose MLPs are tapped and patched; default: all.
        d_model, n_vocab, max_positions: its sizes.
        input_hook, output_hook: the sites tapped and patched, in TransformerLens' names.
        read_scales: frozen norm scales of each layer, for the input hook `ln2.hook_normalized`; default: computed.
        kept: what was computed from the weights alone; emptied by `Anatomy` if they change.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        *,
        input_hook: str = "mlp.hook_in",
        output_hook: str = "mlp.hook_out",
        policy: FirstPosition | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        config: Any = model.config
        text_config = config.get_text_config()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        if getattr(text_config, "attn_logit_softcapping", None):
            # PyTorch's fused attention has no soft-cap; transformers before 5.24 omitted it without a warning.
            model.set_attn_implementation("eager")  # type: ignore[operator]
        self.model_type: str = config.model_type
        self.family: Family = family_of(config.model_type, name)
        self.layers: list[nn.Module] = list(model.get_submodule(self.family.layers))  # type: ignore[arg-type]
        self.layer_numbers = tuple(range(len(self.layers)) if layers is None else layers)
        if layers is not None:
            if beyond := [i for i in layers if not 0 <= i < len(self.layers)]:
                raise HostError(
                    f"{name} has {len(self.layers)} layers and no layer {beyond[0]}; give the model that the transcoder"
                    " was trained on"
                )
            self.layers = [self.layers[i] for i in layers]
        self.n_layers = len(self.layers)
        self.d_model: int = text_config.hidden_size
        self.n_vocab: int = text_config.vocab_size
        self.max_positions: int = text_config.max_position_embeddings
        self.parallel = bool(self.family.parallel_when and getattr(config, self.family.parallel_when))
        self.input_hook, self.output_hook = input_hook, output_hook
        self.policy = policy or FirstPosition()
        self.read_scales: list[Tensor] | None = None
        self.kept: dict[Hashable, Any] = {}
        self._input_site = input_site(self.family, input_hook, parallel=self.parallel)
        self._output_site = output_site(self.family, output_hook)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def run(
        self, tokens_BT: Int[Tensor, "B T"], visit: Visitor | None = None, *, logits: bool = True, cache: Any = None
    ) -> Float[Tensor, "B T V"] | None:
        """Run a forward pass over rows of equal length, calling `visit` at each MLP.

        Args:
            tokens_BT: token ids, used unchanged.
            visit: called at each MLP; a tensor that it returns replaces the MLP's output.
            logits: compute and return the logits; if false, the unembedding is not run.
            cache: from `cache()`; the tokens continue those already in it.

        Raises:
            HostError: for rows longer than the model's context.
        """
        output = self._forward(self.model if logits else self.model.base_model, tokens_BT, visit, cache)
        return output.logits if logits else None

    def hidden(self, tokens_BT: Int[Tensor, "B T"], visit: Visitor | None = None) -> Float[Tensor, "B T D"]:
        """Run a forward pass and return the final hidden states, after the last norm; `unembed` makes them logits.

        Raises:
            HostError: for rows longer than the model's context.
        """
        return self._forward(self.model.base_model, tokens_BT, visit, None).last_hidden_state

    def unembed(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Return the logits of final hidden states, as the model computes them, with its soft-cap if it has one."""
        model: Any = self.model
        logits = model.get_output_embeddings()(hidden)
        return capped(logits, self.softcap)

    @property
    def softcap(self) -> float | None:
        """Cap c of the final logits, c tanh(logits / c); None without."""
        return getattr(self.model.config, "final_logit_softcapping", None)

    @contextmanager
    def without_softcap(self) -> Iterator[None]:
        """Return logits before the soft-cap inside the block."""
        config: Any = self.model.config
        cap = self.softcap
        if cap is not None:
            config.final_logit_softcapping = None
        try:
            yield
        finally:
            if cap is not None:
                config.final_logit_softcapping = cap

    def _forward(self, runner: Any, tokens_BT: Tensor, visit: Visitor | None, cache: Any) -> Any:
        if tokens_BT.shape[1] > self.max_positions:
            raise HostError(
                f"{tokens_BT.shape[1]} tokens exceed the context of {self.name}, {self.max_positions}; shorten the text"
            )
        with ExitStack() as hooks:
            if visit is not None:
                for layer, block in enumerate(self.layers):
                    self._hook(hooks, layer, block, visit)
            known = {} if cache is None else {_cache_argument(runner): cache}
            return runner(tokens_BT.to(self.device), use_cache=cache is not None, **known)

    def cache(self) -> Any:
        """Return an empty key-value cache."""
        from transformers import DynamicCache

        config: Any = self.model.config
        return DynamicCache(config=config.get_text_config())

    def _hook(self, hooks: ExitStack, layer: int, block: nn.Module, visit: Visitor) -> None:
        seen: list[Tensor] = []
        source = block.get_submodule(self._input_site.module)
        norm = norm_of(source, self.family).plain() if self._input_site.normalized else None

        def store_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_BTD = inputs[0]
            if norm is not None:
                scale_T = self.read_scales[layer] if self.read_scales else norm.scale(x_BTD)
                x_BTD = norm.apply(x_BTD.to(scale_T.dtype), scale_T).to(x_BTD.dtype)
            seen.append(x_BTD)

        def on_output(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor | None:
            return visit(layer, seen.pop(), output)

        into = source.register_forward_pre_hook(store_input)
        out = block.get_submodule(self._output_site.module).register_forward_hook(on_output)
        hooks.callback(into.remove)
        hooks.callback(out.remove)

    @torch.no_grad()
    def tap(self, tokens_BT: Int[Tensor, "B T"]) -> Tapped:
        """Return MLP inputs and outputs of all layers on rows of token ids."""
        xs: list[Tensor] = []
        ys: list[Tensor] = []

        def store(_layer: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
            xs.append(x_BTD)
            ys.append(y_BTD)

        self.run(tokens_BT, store, logits=False)
        return Tapped(torch.stack(xs, dim=2), torch.stack(ys, dim=2))

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return the text that `encode` turns into these ids; if there is none, the text of the ids as they are."""
        ids = list(tokens)
        if self.tokenizer is None:
            return "".join(map(self.decode_token, ids))
        whole = self.tokenizer.decode(ids)
        if self.policy.prepend and ids[:1] == [self.first_token]:
            rest = self.tokenizer.decode(ids[1:])
            if self.encode(rest)[0].tolist() == ids:
                return rest
        return whole

    def encode(self, text: str) -> Int[Tensor, "1 T"]:
        """Return the token ids of a text, with the policy's special token in front unless it begins with it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise HostError(
                f"the text has {text[error.start]!r} at position {error.start}, which is not a valid character; give"
                " UTF-8 text"
            ) from error
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.policy.prepend and ids[:1] != [self.first_token]:
            ids = [self.first_token, *ids]
        return torch.tensor([ids], dtype=torch.long)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that the tokenizer marks as special, whose text in a document is not language."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added if token.special}

    def decode_token(self, token: int) -> str:
        """Return the text of a token."""
        return self.tokenizer.decode([token]) if self.tokenizer is not None else f"#{token}"

    @property
    def first_token(self) -> int:
        """The tokenizer's BOS token, else PAD, else EOS.

        Raises:
            HostError: for a tokenizer that has none of the three.
        """
        t = self.tokenizer
        for token in (t.bos_token_id, t.pad_token_id, t.eos_token_id):
            if token is not None:
                return int(token)
        raise HostError(
            f"the tokenizer of {self.name} has no BOS, PAD or EOS token to start a text with; set one of them in its"
            " tokenizer_config.json"
        )


def load_host(
    name: str | Path | Host,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    input_hook: str = "mlp.hook_in",
    output_hook: str = "mlp.hook_out",
    policy: FirstPosition | None = None,
    layers: Sequence[int] | None = None,
) -> Host:
    """Load a host by hub name, local folder or the name `stdlib-qwen3`; return a `Host` unchanged.

    Raises:
        ConfigError: for a loaded host with other sites, layers or another policy.
        HostError: for a model that is missing, cannot be read, or is of an unsupported family.
    """
    if isinstance(name, Host):
        _check_sites(name, input_hook, output_hook, policy or FirstPosition())
        if layers is not None and tuple(layers) != name.layer_numbers:
            raise ConfigError(
                f"{name.name} was loaded with the layers {list(name.layer_numbers)}, but {list(layers)} are needed;"
                " load it with these layers, or give its name"
            )
        return name
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shown, where = str(name), folder_of(name)
    config = reading(shown, lambda: AutoConfig.from_pretrained(where))
    family_of(config.model_type, shown)
    with _no_loading_bar():
        model = reading(shown, lambda: AutoModelForCausalLM.from_pretrained(where, dtype=dtype, use_safetensors=True))
    tokenizer = reading(shown, lambda: AutoTokenizer.from_pretrained(where), what="tokenizer")
    model.to(choose_device(device)).eval().requires_grad_(False)
    return Host(model, tokenizer, shown, input_hook=input_hook, output_hook=output_hook, policy=policy, layers=layers)


def _cache_argument(model: nn.Module) -> str:
    """Return the name of the key-value cache argument: `cache` since transformers 5.24, else `past_key_values`."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _check_sites(host: Host, input_hook: str, output_hook: str, policy: FirstPosition) -> None:
    found = (short_hook(host.input_hook), short_hook(host.output_hook), host.policy)
    wanted_sites = (short_hook(input_hook), short_hook(output_hook), policy)
    for name, has, wanted in zip(("input_hook", "output_hook", "policy"), found, wanted_sites, strict=True):
        if has != wanted:
            raise ConfigError(
                f"{host.name} was loaded with {name}={has}, but {wanted} is needed; load it with that, or give its name"
            )


def choose_device(name: str) -> str:
    """Return the device to use: for `auto`, cuda if available, else cpu.

    Raises:
        ConfigError: for a device that is unknown or not available.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if available["cuda"] else "cpu"
    kind, _, number = name.partition(":")
    if not available.get(kind) or (number and not (number.isdecimal() and int(number) < _count(kind))):
        found = ", ".join(
            f"{kind}:{i}" if kind == "cuda" else kind
            for kind, there in available.items()
            if there
            for i in range(_count(kind))
        )
        raise ConfigError(f"device={name} is not available; give one of auto, {found}")
    return name


def _count(kind: str) -> int:
    return torch.cuda.device_count() if kind == "cuda" else 1


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Disable the progress bar of `transformers`, which would interfere with the package's own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def folder_of(name: str | Path) -> str:
    """Return the path that `transformers` opens: the bundled model's folder for its name, other names unchanged."""
    return str(SHIPPED_FOLDER) if str(name) == SHIPPED else str(name)


def reading(name: str, read: Callable[[], Any], what: str = "Hugging Face causal language model") -> Any:
    """Call a loader and convert its errors to a `HostError` of one sentence."""
    from safetensors import SafetensorError

    try:
        return read()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if not Path(name).exists() and name != SHIPPED:
            raise HostError(
                f"no model {name!r}: it is not a local folder and could not be loaded from the Hugging Face Hub; check"
                " the name, or the network"
            ) from error
        if what == "tokenizer":
            raise HostError(
                f"{name} has no tokenizer that can be read; put tokenizer.json and tokenizer_config.json beside the"
                " model"
            ) from error
        first_line = str(error).strip().splitlines()[0]
        raise HostError(f"{name} cannot be read as a {what}: {first_line}") from error
