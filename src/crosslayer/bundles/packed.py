"""Packed feature files: JSON records that circuit-tracer's viewer fetches by byte range.

    features/index.json.gz    {"0": {"filename": "layer_0.bin", "offsets": [F + 1 numbers]}, ...}
    features/layer_0.bin      records in order: length in 4 bytes, little-endian, then zlib-compressed JSON

They hold less than a bundle: no neighbours, no logit values, and token strings in place of ids. An imported bundle
lacks these data.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.bundles.index import Row, write_index
from crosslayer.bundles.row_files import save_array
from crosslayer.bundles.schema import ARRAYS, INDEX, MANIFEST, TOKENS, VOCABULARY, building_folder
from crosslayer.core.errors import FormatError, RunError
from crosslayer.core.files import replacing, require_free_disk, write_json
from crosslayer.schemas.bundle import BundleManifest, Example, Feature, Stream
from crosslayer.schemas.policy import FirstPosition

INDEX_FILE = "index.json.gz"
TOP = "Top activations"
MAX_TOKENS = 255
BYTES_A_RECORD = 9_000
"""Approximate size of a record with 32 examples."""


def record_of(bundle: FeatureBundle, feature: Feature) -> dict[str, Any]:
    """Convert one feature to a packed record.

    `histogram` covers [act_min, act_max]. `quantile_values` are the percentiles 1 to 100 of the activations.
    """
    bins = max((i for i, c in enumerate(feature.linear.counts) if c), default=-1) + 1
    scan = bundle.manifest.scan or bundle.manifest.clt
    return {
        "transcoder_id": f"{scan}-{feature.layer}",
        "index": feature.index,
        "examples_quantiles": [
            {
                "quantile_name": _quantile_name(bundle, feature, number),
                "examples": [_example(e) for e in feature.examples if e.bin == number],
            }
            for number in sorted({e.bin for e in feature.examples}, key=lambda number: (number > 0, -number))
        ],
        "top_logits": [x.token for x in feature.promotes],
        "bottom_logits": [x.token for x in feature.suppresses],
        "act_min": feature.linear.edges[0],
        "act_max": feature.linear.edges[bins],
        "quantile_values": _percentiles(feature),
        "histogram": feature.linear.counts[:bins],
        "activation_frequency": feature.density,
    }


def _quantile_name(bundle: FeatureBundle, feature: Feature, number: int) -> str:
    if number == 0:
        return TOP
    edges = feature.quantile_edges
    return f"Quantile {number} of {len(edges) - 1}: {edges[number - 1]:.3g} to {edges[number]:.3g}"


def _example(example: Example) -> dict[str, Any]:
    return {
        "tokens": example.tokens,
        "tokens_acts_list": [round(a, 4) for a in example.activations],
        "train_token_ind": example.peak,
        "is_repeated_datapoint": False,
    }


def _percentiles(feature: Feature) -> list[float]:
    """Compute percentiles of activations, interpolated in the bins of the linear histogram."""
    counts = np.array(feature.linear.counts, np.float64)
    if not counts.sum():
        return []
    reached = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    # Empty bins make the curve flat; use the first point of each height.
    at, first = np.unique(reached, return_index=True)
    values = np.interp(np.arange(1, 101) / 100, at, np.array(feature.linear.edges)[first])
    return np.clip(values, feature.min, feature.max).tolist()


def write_packed(
    bundle: FeatureBundle, folder: Path, on_progress: Callable[[float], None] = lambda share: None
) -> Path:
    """Write a bundle as `features/` of a transcoder's folder, atomically.

    Raises:
        RunError: if the folder already has one.
    """
    target = folder / "features"
    if target.exists():
        raise RunError(f"{target} already exists; remove it, or give another -o")
    n = bundle.n_layers * bundle.n_features
    require_free_disk(folder, n * BYTES_A_RECORD, "give -o on another disk")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.mkdir()
        index = {}
        for layer in range(bundle.n_layers):
            name, offsets = f"layer_{layer}.bin", [0]
            with (temporary / name).open("wb") as file:
                for i in range(bundle.n_features):
                    body = zlib.compress(
                        json.dumps(record_of(bundle, bundle.feature(layer, i)), ensure_ascii=False).encode()
                    )
                    file.write(struct.pack("<I", len(body)) + body)
                    offsets.append(file.tell())
                    if i % 256 == 0:
                        on_progress((layer * bundle.n_features + i) / n)
            index[str(layer)] = {"filename": name, "offsets": offsets}
        (temporary / INDEX_FILE).write_bytes(gzip.compress(json.dumps(index).encode(), mtime=0))
    on_progress(1.0)
    return target


class Layer(NamedTuple):
    """A file of records and the offset of each record."""

    path: Path
    offsets: list[int]

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records in order.

        Raises:
            FormatError: for a truncated file or a malformed record.
        """
        with self.path.open("rb") as file:
            for number, (begin, end) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
                file.seek(begin)
                yield _decoded(file.read(max(end - begin, 0)), f"{self.path.name}, record {number}")


def _decoded(raw: bytes, where: str) -> dict[str, Any]:
    remedy = "fetch or write it again"
    if len(raw) < 4 or len(raw) - 4 != struct.unpack("<I", raw[:4])[0]:
        raise FormatError(
            f"{where}: {max(len(raw) - 4, 0)} bytes do not match the record's length; the file is incomplete, {remedy}"
        )
    try:
        record = json.loads(zlib.decompress(raw[4:]))
    except (zlib.error, ValueError, RecursionError) as error:
        raise FormatError(f"{where} cannot be read ({error}); {remedy}") from error
    if not isinstance(record, dict) or not isinstance(record.get("examples_quantiles"), list):
        raise FormatError(f"{where} has no list 'examples_quantiles'; {remedy}")
    return record


def read_packed(name: str, fetch: Callable[[str], Path]) -> list[Layer]:
    """Open the layers of packed feature files.

    Args:
        name: name used in errors.
        fetch: returns the local path of a file of `features/`.

    Raises:
        FormatError: for an unreadable index, or one that does not list layers from 0 with equally many features.
    """
    where = f"{name}/{INDEX_FILE}"
    try:
        index = json.loads(gzip.decompress(fetch(INDEX_FILE).read_bytes()))
        layers = [
            Layer(fetch(index[str(i)]["filename"]), [int(x) for x in index[str(i)]["offsets"]])
            for i in range(len(index))
        ]
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
        raise FormatError(
            f"{where} cannot be read as an index of packed features ({type(error).__name__}: {error}); fetch or write"
            " it again"
        ) from error
    counts = {len(layer.offsets) - 1 for layer in layers}
    if len(counts) != 1 or min(counts) < 1:
        raise FormatError(f"{where} lists layers of {sorted(counts)} features; expected one number, the same for all")
    return layers


class _Gathered:
    """A bundle's arrays, filled record by record."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.tokens: list[int] = []
        self.columns: dict[str, list[Any]] = {
            name: []
            for name in (
                "example_start",
                "example_length",
                "example_peak",
                "example_value",
                "example_bin",
                "example_active",
                "active_offset",
                "active_value",
            )
        }
        self.example, self.active = [0], [0]
        self.max: list[float] = []
        self.min: list[float] = []
        self.density: list[float] = []
        self.histogram: list[list[float]] = []
        self.quantiles: list[list[float]] = []
        self.top: list[list[int]] = []
        self.bottom: list[list[int]] = []
        self.fires: list[list[tuple[int, int]]] = []

    def id(self, text: object) -> int:
        return self.ids.setdefault(str(text), len(self.ids))

    def take(self, record: dict[str, Any], where: str) -> None:
        try:
            self._take(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"{where} is not as expected ({type(error).__name__}: {error}); fetch or write it again"
            ) from error

    def _take(self, record: dict[str, Any]) -> None:
        examples = [(number, e) for number, q in enumerate(record["examples_quantiles"]) for e in q["examples"]]
        max_activation = max((float(a) for _, e in examples for a in e["tokens_acts_list"]), default=0.0)
        max_activation = max(max_activation, float(record.get("act_max") or 0.0)) if not examples else max_activation
        peaks: dict[int, int] = {}
        for number, e in examples:
            texts, values = e["tokens"], [float(a) for a in e["tokens_acts_list"]]
            if len(texts) != len(values):
                raise ValueError(f"{len(texts)} tokens and {len(values)} activations")
            peak = int(e.get("train_token_ind", e.get("train_token_index", int(np.argmax(values)) if values else 0)))
            if not 0 <= peak < len(texts):
                raise ValueError(f"train_token_ind {peak} of {len(texts)} tokens")
            begin = min(max(0, peak - MAX_TOKENS // 2), max(0, len(texts) - MAX_TOKENS))
            texts, values = texts[begin : begin + MAX_TOKENS], values[begin : begin + MAX_TOKENS]
            active = [i for i, v in enumerate(values) if v > 0]
            row = (len(self.tokens), len(texts), peak - begin, values[peak - begin], number, len(active))
            for name, value in zip(list(self.columns)[:6], row, strict=True):
                self.columns[name].append(value)
            self.columns["active_offset"] += active
            self.columns["active_value"] += [
                min(255, max(1, int(np.ceil(values[i] / max_activation * 255)))) for i in active
            ]
            self.tokens += [self.id(t) for t in texts]
            if number == 0:
                token = self.tokens[row[0] + row[2]]
                peaks[token] = peaks.get(token, 0) + 1
        self.example.append(len(self.columns["example_start"]))
        self.active.append(len(self.columns["active_offset"]))
        self.max.append(max_activation)
        self.min.append(float(record.get("act_min") or 0.0))
        self.density.append(float(record.get("activation_frequency") or 0.0))
        self.histogram.append([float(x) for x in record.get("histogram") or []])
        self.quantiles.append([float(x) for x in record.get("quantile_values") or []])
        self.top.append([self.id(t) for t in record.get("top_logits") or []])
        self.bottom.append([self.id(t) for t in record.get("bottom_logits") or []])
        self.fires.append(sorted(peaks.items(), key=lambda p: (-p[1], p[0]))[:5])


def import_packed(
    name: str, fetch: Callable[[str], Path], out: Path, on_progress: Callable[[float], None] = lambda share: None
) -> FeatureBundle:
    """Import packed feature files as a bundle.

    Args:
        name: source of the files, stored in the bundle.
        fetch: returns the local path of a file of `features/`.

    Raises:
        FormatError: for incomplete files.
        RunError: if `out` already exists.
    """
    if out.exists():
        raise RunError(f"{out} already exists; remove it, or give another -o")
    layers = read_packed(name, fetch)
    gathered = _Gathered()
    for number, layer in enumerate(layers):
        for i, record in enumerate(layer.records()):
            gathered.take(record, f"{layer.path.name}, record {i}")
        on_progress(0.9 * (number + 1) / len(layers))
    folder = out.with_name(f".{out.name}.import")
    if building_folder(out).exists():
        raise RunError(
            f"a build of {out} was stopped and can be resumed; finish it, remove {building_folder(out)}, or give"
            " another -o"
        )
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        _write(folder, name, len(layers), len(layers[0].offsets) - 1, gathered)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    on_progress(1.0)
    return FeatureBundle(out)


def _write(folder: Path, name: str, n_layers: int, n_features: int, g: _Gathered) -> None:
    n = n_layers * n_features
    strings = list(g.ids)
    with (folder / TOKENS).open("wb") as file:
        np.save(file, np.array(g.tokens, np.uint32), allow_pickle=False)
    write_json(folder / VOCABULARY, strings)
    token_at, token_at_count = np.full((n, 4, 5), -1), np.zeros((n, 4, 5))
    for f, pairs in enumerate(g.fires):
        for k, (token, count) in enumerate(pairs):
            token_at[f, 0, k], token_at_count[f, 0, k] = token, count
    arrays = {name: np.array(column) for name, column in g.columns.items()} | {
        "example": np.array(g.example),
        "active": np.array(g.active),
        "max": np.array(g.max),
        "min": np.array(g.min),
        "linear_histogram": _table(g.histogram, 0),
        "quantile_edge": _table(g.quantiles, 0),
        "top_id": _table(g.top, -1),
        "bottom_id": _table(g.bottom, -1),
        "token_at": token_at,
        "token_at_count": token_at_count,
        "count": np.array([[sum(h)] for h in g.histogram]),
    }
    assert set(arrays) <= set(ARRAYS)
    for key, array in arrays.items():
        save_array(folder, key, array)
    texts = lambda ids: (" ".join(strings[t] for t in row) for row in ids)  # noqa: E731
    metrics = {"density": np.array(g.density), "max": np.array(g.max)}
    nothing = (Row(None, None, None) for _ in range(n))
    write_index(
        folder / INDEX, n_features, metrics, nothing, texts([[t for t, _ in p] for p in g.fires]), texts(g.top), []
    )
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
    manifest = BundleManifest(
        whole=True,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        host="",
        host_hash="",
        clt=name,
        scan=name,
        clt_hash="",
        tokenizer_hash="",
        text=[Stream(name=name, n_rows=len(g.tokens), digest="")],
        policy=FirstPosition(n_skip=0),
        n_layers=n_layers,
        n_features=n_features,
        context=1,
        n_tokens=0,
        settings={},
        sample_tokens=0,
        files=files,
        imported=name,
        versions={"crosslayer": version("crosslayer")},
    )
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=2), encoding="utf-8")


def _table(rows: Sequence[Sequence[float]], filler: float) -> np.ndarray:
    """Pad rows of different lengths to a table."""
    table = np.full((len(rows), max(map(len, rows), default=0)), filler, np.float64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
