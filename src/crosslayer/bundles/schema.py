"""The files of a feature bundle: one folder with its files and arrays.

manifest.json        provenance, settings and the size of each file
tokens.npy           the token file: rows of all streams, flat
vocabulary.json      token strings
NAME.npy             arrays, as listed in `ARRAYS`; N features by flat id, layer * n_features + index
features.sqlite      the table of features and the search index
user.sqlite          labels, pins and views added by users; not part of the bundle as built
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from crosslayer.core.errors import FormatError
from crosslayer.core.files import read_json
from crosslayer.schemas.bundle import BundleManifest

MANIFEST, TOKENS, VOCABULARY, INDEX, USER = (
    "manifest.json",
    "tokens.npy",
    "vocabulary.json",
    "features.sqlite",
    "user.sqlite",
)
PLACES = ("peak", "before", "first", "last")
"""Places whose tokens are counted: the peak, the token before it, and first and last of its run of active tokens."""


class ArraySpec(NamedTuple):
    """An array of a bundle: its dtype, its axes and its content.

    Axes: N features, X examples, A active tokens of examples; the other sizes follow from the settings.
    """

    dtype: str
    axes: str
    what: str


ARRAYS = {
    "count": ArraySpec("uint32", "N streams", "tokens on which the feature fires"),
    "mean": ArraySpec("float32", "N", "mean activation over those tokens"),
    "min": ArraySpec("float32", "N", ""),
    "max": ArraySpec("float32", "N", ""),
    "linear_histogram": ArraySpec("uint32", "N 32", "of activations over [0, 2^linear_exponent)"),
    "linear_exponent": ArraySpec("int8", "N", ""),
    "log_histogram": ArraySpec("uint32", "N 32", "of activations, two bins per octave"),
    "quantile_edge": ArraySpec("float32", "N edges", "of the quantile bins"),
    "token_at": ArraySpec("int32", "N 4 5", "most frequent tokens at the places, -1 for none"),
    "token_at_count": ArraySpec("uint16", "N 4 5", ""),
    "example": ArraySpec("int64", "N+1", "first example of each feature"),
    "example_start": ArraySpec("uint32", "X", "of the window in the token file"),
    "example_length": ArraySpec("uint8", "X", ""),
    "example_peak": ArraySpec("uint8", "X", "from the window's start"),
    "example_value": ArraySpec("float32", "X", "activation at the peak"),
    "example_bin": ArraySpec("uint8", "X", "0 top, else quantile bin"),
    "example_active": ArraySpec("uint8", "X", "active tokens in the window"),
    "active": ArraySpec("int64", "N+1", "first active token of each feature's examples"),
    "active_offset": ArraySpec("uint8", "A", "from the window's start"),
    "active_value": ArraySpec("uint8", "A", "in 255ths of the feature's max activation, rounded up"),
    "top_id": ArraySpec("int32", "N logits", "tokens promoted"),
    "top": ArraySpec("float32", "N logits", ""),
    "bottom_id": ArraySpec("int32", "N logits", "tokens suppressed"),
    "bottom": ArraySpec("float32", "N logits", ""),
    "logit_mean": ArraySpec("float32", "N", "over the vocabulary"),
    "logit_std": ArraySpec("float32", "N", ""),
    "decoder_norm": ArraySpec("float32", "N layers", "by layer written"),
    "encoder_id": ArraySpec("int32", "N neighbours", "nearest by encoder"),
    "encoder": ArraySpec("float16", "N neighbours", "cosine"),
    "decoder_id": ArraySpec("int32", "N neighbours", "nearest by summed decoder"),
    "decoder": ArraySpec("float16", "N neighbours", "cosine"),
    "own_id": ArraySpec("int32", "N coactive", "most coactive of the same layer"),
    "own_count": ArraySpec("uint32", "N coactive", "tokens of the sample on which both fire"),
    "other_id": ArraySpec("int32", "N coactive", "most coactive of other layers"),
    "other_count": ArraySpec("uint32", "N coactive", ""),
    "sample_count": ArraySpec("uint32", "N", "tokens of the sample on which the feature fires"),
    "upstream_id": ArraySpec("int32", "N virtual", "strongest virtual weights from earlier layers"),
    "upstream": ArraySpec("float32", "N virtual", ""),
    "downstream_id": ArraySpec("int32", "N virtual", "strongest virtual weights to later layers"),
    "downstream": ArraySpec("float32", "N virtual", ""),
    "group": ArraySpec("int32", "N levels", "group of each feature, finest level first; -1 for none"),
    "map": ArraySpec("float32", "N 2", "NaN for features without a place on the map"),
}
NEIGHBOURS = ("encoder", "decoder", "coactivation", "upstream", "downstream")
REBUILD = "build the bundle again with crosslayer features build"


def bundle_folder(path: str | Path) -> Path:
    """Return the bundle's folder: the path itself, or `features/` of a run."""
    path = Path(path).expanduser()
    return path / "features" if (path / "run.json").is_file() else path


def building_folder(path: Path) -> Path:
    """Return the temporary folder of a bundle while it is built."""
    return path.with_name(f".{path.name}.building")


def read_manifest(path: Path) -> BundleManifest:
    """Read the manifest of a bundle, after checking the size of every file.

    Raises:
        FormatError: for a folder that is not a bundle, an incomplete bundle, and files that are missing or truncated.
    """
    if not path.is_dir():
        if building_folder(path).is_dir():
            raise FormatError(
                f"{path} is not whole: its build was stopped; run the same crosslayer features build again to resume it"
            )
        raise FormatError(f"no feature bundle at {path}; make one with crosslayer features build -o {path}")
    missing = f"{path} is no feature bundle: it has no {MANIFEST}; {REBUILD}"
    read = read_json(path / MANIFEST, missing=missing, remedy=REBUILD)
    try:
        manifest = BundleManifest.model_validate(read)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"]) or "the file"
        raise FormatError(f"{path / MANIFEST}: {where} is not as expected ({first['msg']}); {REBUILD}") from error
    if not manifest.whole:
        raise FormatError(f"{path} is not whole; {REBUILD}")
    for name, n_bytes in manifest.files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            raise FormatError(f"{path}: {name} is missing; {REBUILD}, or copy it again")
        if found != n_bytes:
            raise FormatError(
                f"{path}: {name} has {found} bytes, expected {n_bytes}; it is truncated or changed; copy it again"
                f" or {REBUILD}"
            )
    return manifest
