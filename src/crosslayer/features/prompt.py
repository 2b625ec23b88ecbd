"""Features of a prompt: load the transcoder of a bundle, and find the active features per token."""

from __future__ import annotations

from pathlib import Path

from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.clt.open import load_clt
from crosslayer.core.errors import ConfigError
from crosslayer.eval.replacement_model import Prompt, ReplacementModel, host_of
from crosslayer.features.identity import clt_hash
from crosslayer.host.host import choose_device


def transcoder_of(
    bundle: FeatureBundle, clt: str | Path | None = None, model: str | None = None, *, device: str = "auto"
) -> ReplacementModel:
    """Load the transcoder of a bundle with its host.

    Args:
        clt: the transcoder; by default that of the run that contains the bundle, or of the source of an import.

    Raises:
        ConfigError: for a transcoder that does not match the bundle.
    """
    where = choose_device(device)
    name = clt if clt is not None else _own(bundle)
    opened = load_clt(name, device=where)
    c = opened.clt.config
    if (c.n_layers, c.n_features) != (bundle.n_layers, bundle.n_features):
        raise ConfigError(
            f"{name} has {c.n_layers} layers of {c.n_features} features, the bundle {bundle.path} {bundle.n_layers} of"
            f" {bundle.n_features}; give the bundle's own transcoder with --clt"
        )
    if bundle.manifest.clt_hash and clt_hash(opened.clt) != bundle.manifest.clt_hash:
        raise ConfigError(
            f"the bundle {bundle.path} is of another transcoder than {name}; give the bundle's own with --clt"
        )
    return ReplacementModel(host_of(opened, model, device=where), opened)


def _own(bundle: FeatureBundle) -> str | Path:
    run = bundle.path.absolute().parent
    if (run / "run.json").is_file():
        return run
    if bundle.manifest.imported:
        return bundle.manifest.imported
    raise ConfigError(f"the bundle {bundle.path} does not lie in a run; give its transcoder with --clt")


def active_features(
    model: ReplacementModel, prompt: Prompt, top: int
) -> tuple[list[str], list[list[tuple[int, float]]]]:
    """Return the prompt's token strings, and per token the top features as (flat id, activation)."""
    tokens_BT = model.tokens(prompt)
    if isinstance(prompt, str) and not prompt:
        raise ConfigError("the prompt is empty; give some text")
    found = model.features(tokens_BT)
    layer_K, position_K, index_K = found.indices()
    ids = (layer_K * model.clt.config.n_features + index_K).tolist()
    active: list[list[tuple[int, float]]] = [[] for _ in range(tokens_BT.shape[1])]
    for feature, position, value in zip(ids, position_K.tolist(), found.values().tolist(), strict=True):
        active[position].append((feature, value))
    strings = [model.host.decode_token(t) for t in tokens_BT[0].tolist()]
    return strings, [sorted(some, key=lambda pair: (-pair[1], pair[0]))[:top] for some in active]
