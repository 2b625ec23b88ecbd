"""A Hugging Face causal language model whose MLPs can be watched and replaced.

There is one mechanism: `Host.run` calls a visitor at each layer with what its MLP reads and writes; what the
visitor returns, if anything, takes the place of what the MLP wrote. Tapping is a visitor that keeps, patching one
that returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosslayer.core.errors import ConfigError, HostError
from crosslayer.host.families import Family, family_of, input_site, output_site
from crosslayer.schemas.hooks import short_hook
from crosslayer.schemas.policy import FirstPosition

SHIPPED = "stdlib-qwen3"
SHIPPED_FOLDER = Path(__file__).parent.parent / "assets" / SHIPPED


@runtime_checkable
class Visitor(Protocol):
    """Called at each layer, bottom to top, with the MLP's input and output; what it returns replaces the output."""

    def __call__(self, layer: int, x_BTD: Tensor, y_BTD: Tensor, /) -> Tensor | None: ...


class Tapped(NamedTuple):
    """MLP inputs and outputs of all layers."""

    x_BTLD: Float[Tensor, "B T L D"]
    y_BTLD: Float[Tensor, "B T L D"]


class Host:
    """A language model with its tokenizer and the places where a transcoder reads and writes.

    Attributes:
        name: what it was asked for by; written into the CLTs trained on it.
        layers, n_layers: those whose MLPs are tapped and patched, all unless some were named.
        d_model, n_vocab, max_positions: its sizes.
        input_hook, output_hook: the sites tapped and patched, in TransformerLens' names.
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
            # PyTorch's fused attention has no soft-cap, and transformers before 5.24 left it out without a word.
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
        """One forward pass over rows of equal length, calling `visit` at each MLP.

        Args:
            tokens_BT: token ids, used as they are.
            visit: watches, and by returning a tensor replaces, each MLP's output.
            logits: compute and return the logits; without, the unembedding is not run.
            cache: from `cache()`; the tokens follow those that it has seen.

        Raises:
            HostError: for rows longer than the model's context.
        """
        if tokens_BT.shape[1] > self.max_positions:
            raise HostError(
                f"{tokens_BT.shape[1]} tokens exceed the context of {self.name}, {self.max_positions}; shorten the text"
            )
        with ExitStack() as hooks:
            if visit is not None:
                for layer, block in enumerate(self.layers):
                    self._hook(hooks, layer, block, visit)
            runner: Any = self.model if logits else self.model.base_model
            known = {} if cache is None else {_cache_argument(runner): cache}
            output = runner(tokens_BT.to(self.device), use_cache=cache is not None, **known)
        return output.logits if logits else None

    def cache(self) -> Any:
        """An empty cache of keys and values, for a generation."""
        from transformers import DynamicCache

        config: Any = self.model.config
        return DynamicCache(config=config.get_text_config())

    def _hook(self, hooks: ExitStack, layer: int, block: nn.Module, visit: Visitor) -> None:
        seen: list[Tensor] = []

        def keep_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])

        def on_output(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor | None:
            return visit(layer, seen.pop(), output)

        into = block.get_submodule(self._input_site.module).register_forward_pre_hook(keep_input)
        out = block.get_submodule(self._output_site.module).register_forward_hook(on_output)
        hooks.callback(into.remove)
        hooks.callback(out.remove)

    @torch.no_grad()
    def tap(self, tokens_BT: Int[Tensor, "B T"]) -> Tapped:
        """MLP inputs and outputs of all layers on rows of token ids."""
        xs: list[Tensor] = []
        ys: list[Tensor] = []

        def keep(_layer: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
            xs.append(x_BTD)
            ys.append(y_BTD)

        self.run(tokens_BT, keep, logits=False)
        return Tapped(torch.stack(xs, dim=2), torch.stack(ys, dim=2))

    def encode(self, text: str) -> Int[Tensor, "1 T"]:
        """Token ids of a text, with the policy's special token in front."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise HostError(
                f"the text holds {text[error.start]!r} at {error.start}, which is no letter of any script; give UTF-8"
                " text"
            ) from error
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.policy.prepend and not (ids and ids[0] in self.tokenizer.all_special_ids):
            ids = [self.first_token, *ids]
        return torch.tensor([ids], dtype=torch.long)

    def decode_token(self, token: int) -> str:
        """The text of one token."""
        return self.tokenizer.decode([token]) if self.tokenizer is not None else f"#{token}"

    @property
    def first_token(self) -> int:
        """The tokenizer's BOS, else PAD, else EOS.

        Raises:
            HostError: for a tokenizer that has none of the three.
        """
        t = self.tokenizer
        for token in (t.bos_token_id, t.pad_token_id, t.eos_token_id):
            if token is not None:
                return int(token)
        raise HostError(
            f"the tokenizer of {self.name} has no BOS, PAD or EOS to begin a text with; set one of them in its"
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
    """A host by hub name, local folder, the name `stdlib-qwen3`, or as it is if it is one already.

    Raises:
        ConfigError: for a host that was loaded with other sites or another policy than are asked for.
        HostError: for a model that is not there, cannot be read, or is of no known family.
    """
    if isinstance(name, Host):
        _check_sites(name, input_hook, output_hook, policy or FirstPosition())
        if layers is not None and tuple(layers) != name.layer_numbers:
            raise ConfigError(
                f"{name.name} was loaded with the layers {list(name.layer_numbers)}, but {list(layers)} are asked for;"
                " load it again with those, or give its name"
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
    """What a model calls its cache of keys and values: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _check_sites(host: Host, input_hook: str, output_hook: str, policy: FirstPosition) -> None:
    found = (short_hook(host.input_hook), short_hook(host.output_hook), host.policy)
    asked = (short_hook(input_hook), short_hook(output_hook), policy)
    for name, has, wanted in zip(("input_hook", "output_hook", "policy"), found, asked, strict=True):
        if has != wanted:
            raise ConfigError(
                f"{host.name} was loaded with {name}={has}, but {wanted} is asked for; load it again with that, or give"
                " its name"
            )


def choose_device(name: str) -> str:
    """The device to use: `auto` is cuda where there is one and cpu elsewhere.

    Raises:
        ConfigError: for a device that PyTorch does not know or does not find.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if there["cuda"] else "cpu"
    kind, _, number = name.partition(":")
    if not there.get(kind) or (number and not (number.isdecimal() and int(number) < _count(kind))):
        found = ", ".join(
            f"{kind}:{i}" if kind == "cuda" else kind for kind in there if there[kind] for i in range(_count(kind))
        )
        raise ConfigError(f"device={name} is not available; give one of auto, {found}")
    return name


def _count(kind: str) -> int:
    return torch.cuda.device_count() if kind == "cuda" else 1


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """`transformers` draws a bar over the weights it reads; it would break ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def folder_of(name: str | Path) -> str:
    """What `transformers` is to open: the shipped host's folder for its name, anything else as it is."""
    return str(SHIPPED_FOLDER) if str(name) == SHIPPED else str(name)


def reading(name: str, read: Callable[[], Any], what: str = "Hugging Face causal language model") -> Any:
    """Turn the many errors of a loader into one sentence."""
    from safetensors import SafetensorError

    try:
        return read()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if not Path(name).exists() and name != SHIPPED:
            raise HostError(
                f"no model {name!r}: it is no local folder, and the Hugging Face hub did not give it; check the name,"
                " or the network"
            ) from error
        if what == "tokenizer":
            raise HostError(
                f"{name} has no tokenizer that can be read; put tokenizer.json and tokenizer_config.json beside the"
                " model"
            ) from error
        first_line = str(error).strip().splitlines()[0]
        raise HostError(f"{name} cannot be read as a {what}: {first_line}") from error
