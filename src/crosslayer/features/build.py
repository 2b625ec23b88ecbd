"""Build a feature bundle: a pass over text, then weight analysis, rules, clusters, the feature map and the index.

A bundle is built in a temporary folder beside its destination and renamed when complete. Running a stopped build again
resumes it: the pass continues with the remaining text, later stages with the first whose arrays are missing.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from crosslayer import parallel
from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.bundles.index import Group, Row, write_index
from crosslayer.bundles.row_files import save_array
from crosslayer.bundles.schema import INDEX, MANIFEST, PLACES, TOKENS, VOCABULARY, building_folder
from crosslayer.bundles.settings import LINEAR_BINS, LOG_BINS, ScanSettings
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.open import load_clt
from crosslayer.core.errors import ConfigError, RunError
from crosslayer.core.files import locked, read_json, replacing, require_free_disk, require_writable, write_json
from crosslayer.core.progress import track
from crosslayer.data.rows import held_out_rows
from crosslayer.data.sources import open_sources
from crosslayer.eval.api import host_dtype
from crosslayer.eval.replacement_model import host_of
from crosslayer.features import clusters, direct, feature_map, neighbour_graph
from crosslayer.features.attributes import Vocabulary, attributes_of
from crosslayer.features.coactivation import Coactive, coactivation
from crosslayer.features.examples import N_COUNTED, Examples, examples_of
from crosslayer.features.identity import clt_hash, host_hash, tokenizer_hash, tokens_hash
from crosslayer.features.rules import Rules, rules
from crosslayer.features.scan import Seen, batches_of, scan, take
from crosslayer.features.sketch import FIXED_POINT
from crosslayer.host.host import Host, choose_device
from crosslayer.schemas.bundle import BundleManifest, Stream

PLAN, PARTS = "plan.json", "parts"
N_TOKENS = 1_048_576
REACH = 0.9
"""A feature's reach is the number of written layers that hold this share of its decoder's squared norm, at least."""
CLUSTER_WEIGHTS = {"coactivation": 1.0, "encoder": 0.5, "decoder": 1.0}
"""Weights of the kinds of neighbours in clustering."""


class Text(NamedTuple):
    """The rows of all streams."""

    tokens_BT: NDArray
    streams: list[Stream]


class Estimate(NamedTuple):
    """Estimated cost of a build."""

    n_bytes: int
    seconds: float


def build_features(
    clt: str | Path | Opened,
    *,
    text: Sequence[str],
    column: str = "",
    out: str | Path,
    model: str | Path | Host | None = None,
    tokens: int = N_TOKENS,
    context: int | None = None,
    settings: ScanSettings | None = None,
    cluster_weights: dict[str, float] | None = None,
    rows_at_once: int = 16,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> FeatureBundle:
    """Build the feature bundle of a transcoder on held-out text, or resume a stopped build.

    Args:
        clt: a transcoder by folder, run or name on the hub, or opened.
        text: sources, as named in `crosslayer.data.sources`; each is a stream of its own.
        column: column of records that holds the text; by default the usual names.
        out: folder of the new bundle; it must not exist.
        model: the host; by default the one that the transcoder names.
        tokens: total tokens of text, divided among sources by weight; fewer if the held-out text is shorter.
        context: tokens per row; by default 256, or the host's context if that is smaller.
        cluster_weights: weights of `coactivation`, `encoder` and `decoder` neighbours in clustering.
        rows_at_once: batch size in rows.
        dtype: dtype of the host.

    Raises:
        CrosslayerError: for unusable input or too little free disk space, before the build starts.
    """
    began = time.perf_counter()
    console = console or Console(quiet=True)
    out, settings = Path(out).expanduser(), settings or ScanSettings()
    weights = dict(CLUSTER_WEIGHTS if cluster_weights is None else cluster_weights)
    neighbour_graph.check_weights(weights)
    if tokens < 1 or rows_at_once < 1:
        raise ConfigError(f"tokens={tokens} and rows_at_once={rows_at_once} must be at least 1")
    refuse_unless_new(out)
    device = choose_device(device)
    opened = clt if isinstance(clt, Opened) else load_clt(clt, device=device)
    dtype = dtype or host_dtype(clt, device)
    host = host_of(opened, model, dtype=dtype, device=device)
    context = context or min(256, host.max_positions)
    if not host.policy.n_skip + 2 <= context <= host.max_positions:
        raise ConfigError(
            f"context={context} must be between {host.policy.n_skip + 2} and that of {host.name},"
            f" {host.max_positions}; change --context"
        )
    found = rows_of(host, text, context, tokens, column)
    vocabulary = _vocabulary(host)
    folder = building_folder(out)
    with _alone(folder):
        plan = _plan(opened, host, vocabulary, found, settings, weights, rows_at_once, dtype)
        _start_or_resume(folder, plan, found, vocabulary)
        seen = _estimate_and_scan(host, opened, found, settings, folder, rows_at_once, out, console)
        if parallel.is_first():
            _finish(folder, out, opened, host, found, vocabulary, seen, settings, weights, console, began)
        parallel.barrier()
    return FeatureBundle(out)


def refuse_unless_new(out: Path) -> None:
    """Refuse an output folder that already has content."""
    if out.is_file():
        raise RunError(f"{out} is a file; give the name of a new folder with -o")
    if (out / MANIFEST).exists():
        raise RunError(f"{out} holds a feature bundle already; remove it, or give another -o")
    if out.is_dir() and any(out.iterdir()):
        raise RunError(f"{out} is not empty; give another -o")
    require_writable(out / MANIFEST)


def rows_of(host: Host, names: Sequence[str], context: int, n_tokens: int, column: str = "") -> Text:
    """Return held-out rows of each source, with tokens by weight, or fewer if a source has less text."""
    sources = open_sources(names, column)
    total = sum(s.weight for s in sources)
    parts, streams = [], []
    kind = np.uint16 if host.n_vocab <= 1 << 16 else np.uint32
    for source in sources:
        rows = held_out_rows(host, [source], context, max(1, round(n_tokens * source.weight / total))).numpy()
        parts.append(rows.astype(kind))
        streams.append(Stream(name=source.source.name, n_rows=len(rows), digest=tokens_hash(rows)))
    tokens_BT = np.concatenate(parts)
    if tokens_BT.size >= 1 << 32:
        raise ConfigError(f"{tokens_BT.size} tokens exceed the 4,294,967,295 of the bundle format; lower --tokens")
    return Text(tokens_BT, streams)


class Words(NamedTuple):
    """Token strings, and which tokens are special."""

    strings: list[str]
    special: list[int]


def _vocabulary(host: Host) -> Words:
    n = min(len(host.tokenizer), host.n_vocab)
    return Words(
        host.tokenizer.batch_decode([[t] for t in range(n)]), [t for t in host.tokenizer.all_special_ids if t < n]
    )


def _alone(folder: Path) -> Any:
    """Allow one build at a time in a folder; the ranks of one build share the first rank's lock."""
    from contextlib import nullcontext

    return locked(folder) if parallel.is_first() else nullcontext()


def _plan(
    opened: Opened,
    host: Host,
    vocabulary: Words,
    text: Text,
    settings: ScanSettings,
    weights: dict[str, float],
    rows_at_once: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the settings that a resumed build must share with the original."""
    return {
        "clt": clt_hash(opened.clt),
        "host": host_hash(host),
        "tokenizer": tokenizer_hash(vocabulary.strings),
        "text": [s.model_dump() for s in text.streams],
        "context": int(text.tokens_BT.shape[1]),
        "policy": host.policy.model_dump(),
        "settings": asdict(settings),
        "cluster_weights": weights,
        "rows_at_once": rows_at_once,
        "precision": str(dtype).removeprefix("torch."),
        "version": version("crosslayer"),
    }


def _start_or_resume(folder: Path, plan: dict[str, Any], text: Text, vocabulary: Words) -> None:
    if parallel.is_first():
        path = folder / PLAN
        if path.exists():
            there = read_json(path, missing="", remedy=f"remove {folder} and build again")
            for key, value in plan.items():
                if there.get(key) != value:
                    raise RunError(
                        f"{folder} holds a stopped build with another {key}; run it with the same settings and files,"
                        " or remove that folder to start over"
                    )
        (folder / PARTS).mkdir(exist_ok=True)
        if not (folder / TOKENS).exists():
            with replacing(folder / TOKENS) as temporary, temporary.open("wb") as file:
                np.save(file, text.tokens_BT.reshape(-1), allow_pickle=False)
        write_json(folder / VOCABULARY, vocabulary.strings)
        # Last, so that a plan on disk implies its text.
        write_json(path, plan)
    parallel.barrier()


def _estimate_and_scan(
    host: Host,
    opened: Opened,
    text: Text,
    settings: ScanSettings,
    folder: Path,
    rows_at_once: int,
    out: Path,
    console: Console,
) -> Seen:
    clt, rows = opened.clt, [s.n_rows for s in text.streams]
    estimate = _estimate(host, opened, text, settings, rows_at_once)
    n_features = clt.config.n_layers * clt.config.n_features
    quiet = console if parallel.is_first() else Console(quiet=True)
    body = text.tokens_BT.shape[1] - host.policy.n_skip
    quiet.print(
        f"{n_features:,} features on {len(text.tokens_BT) * body:,} held-out tokens: about {_minutes(estimate.seconds)}"
        f" and {estimate.n_bytes / 2**20:,.0f} MiB",
        highlight=False,
    )
    require_free_disk(folder, estimate.n_bytes, "lower --tokens or the number of examples, or give -o on another disk")
    with track(quiet, "text", 1.0) as update:
        return scan(
            host, clt, text.tokens_BT, rows, settings, folder / PARTS, rows_at_once=rows_at_once, on_progress=update
        )


def _minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _estimate(host: Host, opened: Opened, text: Text, settings: ScanSettings, rows_at_once: int) -> Estimate:
    """Estimate time and disk space from one batch, a matrix product, and the data stored per feature."""
    clt, c = opened.clt, opened.clt.config
    batch = batches_of([s.n_rows for s in text.streams], rows_at_once)[0]
    nothing = Seen.nothing(clt, len(text.streams), text.tokens_BT.shape[1], settings, host.device)
    take(nothing, host, clt, text.tokens_BT, batch, 0)
    began = time.perf_counter()
    take(nothing, host, clt, text.tokens_BT, batch, 1)
    batch_s = time.perf_counter() - began
    n_batches = -(-len(text.tokens_BT) // rows_at_once)
    a = torch.randn(1024, 1024, device=host.device)
    began = time.perf_counter()
    for _ in range(4):
        a = (a @ a).clamp(-1, 1)
    float(a[0, 0])
    flops = 4 * 2 * 1024**3 / (time.perf_counter() - began)
    n = c.n_layers * c.n_features
    products = 2.0 * n * c.d_model * (2.5 * n + host.n_vocab)
    # Examples: a feature has at most one per row, and most features far fewer than there are rows.
    firing = min(settings.n_examples, len(text.tokens_BT))
    per_feature = firing * 22 + 8 * (
        2 * settings.n_logits + 2 * settings.n_neighbours + 2 * settings.n_coactive + 2 * settings.n_virtual
    )
    per_feature += 4 * (LINEAR_BINS + LOG_BINS) + 6 * len(PLACES) * N_COUNTED + 4 * c.n_layers + 600
    parts = (settings.n_top + settings.n_reservoir) * 40 + 8 * (LINEAR_BINS + LOG_BINS)
    n_bytes = n * (per_feature + parts) + 6 * settings.sample_entries // 8 + text.tokens_BT.nbytes
    # Rules, clusters and index take about a millisecond per feature, independent of the text.
    return Estimate(int(n_bytes), batch_s * n_batches / parallel.world_size() + products / flops + n * 1e-3)


def _finish(
    folder: Path,
    out: Path,
    opened: Opened,
    host: Host,
    text: Text,
    vocabulary: Words,
    seen: Seen,
    settings: ScanSettings,
    weights: dict[str, float],
    console: Console,
    began: float,
) -> None:
    """Run all stages after the pass; skip stages whose arrays exist."""
    c = opened.clt.config
    n_tokens = len(text.tokens_BT) * (text.tokens_BT.shape[1] - host.policy.n_skip)
    sampled = seen.sample.collected()
    if not (folder / MANIFEST).exists():
        with track(console, "examples", 1.0) as update:
            _stage(folder, _FROM_TEXT, lambda: _from_text(seen, text, settings, update))
        with track(console, "weights", 1.0) as update:
            _from_weights(folder, opened, host, len(vocabulary.strings), settings, update)
        with track(console, "together", 1.0) as update:
            _stage(
                folder,
                _TOGETHER,
                lambda: _together(coactivation(sampled, c.n_layers, c.n_features, settings.n_coactive, update)),
            )
        read = lambda name: np.load(folder / f"{name}.npy", mmap_mode="r")  # noqa: E731
        density = read("count").sum(1) / n_tokens
        with track(console, "rules", 1.0) as update:
            ruled = _rules(sampled, text, vocabulary, read("top_id"), c.n_layers, density, update)
        with track(console, "clusters", 1.0) as update:
            groups = _clusters(folder, read, ruled, density, c.n_features, weights, update)
        with track(console, "index", 1.0) as update:
            _index(folder, read, ruled, density, c.n_features, vocabulary, groups)
            update(1.0)
        files = {
            p.name: p.stat().st_size
            for p in sorted(folder.iterdir())
            if p.suffix == ".npy" or p.name in (VOCABULARY, INDEX)
        }
        write_json(
            folder / MANIFEST,
            BundleManifest(
                whole=True,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                host=host.name,
                host_hash=host_hash(host),
                clt=str(opened.provenance.model_name),
                scan=opened.provenance.scan or "",
                clt_hash=clt_hash(opened.clt),
                tokenizer_hash=tokenizer_hash(vocabulary.strings),
                text=text.streams,
                policy=host.policy,
                n_layers=c.n_layers,
                n_features=c.n_features,
                context=text.tokens_BT.shape[1],
                n_tokens=n_tokens,
                settings=asdict(settings) | {"cluster_weights": weights},
                sample_tokens=len(sampled.position),
                files=files,
                versions={
                    name: version(name) for name in ("crosslayer", "torch", "transformers", "igraph", "openTSNE")
                },
                wall_s=round(time.perf_counter() - began, 1),
            ).model_dump(),
        )
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for left in folder.glob(".*.tmp"):
        # Left by a process that was killed while writing.
        left.unlink()
    if out.is_dir():
        if any(out.iterdir()):
            raise RunError(f"{out} was filled by another process during the build; empty it, then run the build again")
        out.rmdir()
    # The plan moves with the rename: without it the folder would look like another build's.
    os.replace(folder, out)
    (out / PLAN).unlink(missing_ok=True)
    (out / ".lock").unlink(missing_ok=True)


_FROM_TEXT = (
    "count",
    "mean",
    "min",
    "max",
    "linear_histogram",
    "linear_exponent",
    "log_histogram",
    "quantile_edge",
    "token_at",
    "token_at_count",
    "example",
    "example_start",
    "example_length",
    "example_peak",
    "example_value",
    "example_bin",
    "example_active",
    "active",
    "active_offset",
    "active_value",
)
_LOGITS = ("top_id", "top", "bottom_id", "bottom", "logit_mean", "logit_std", "decoder_norm")
_TOGETHER = ("own_id", "own_count", "other_id", "other_count", "sample_count")
_CLUSTERS = ("group", "map")


def _stage(folder: Path, names: Sequence[str], make: Callable[[], dict[str, NDArray]]) -> None:
    """Compute and write these arrays if one of them is missing."""
    if all((folder / f"{name}.npy").exists() for name in names):
        return
    made = make()
    assert set(made) == set(names)
    for name, array in made.items():
        save_array(folder, name, array)


def _from_text(seen: Seen, text: Text, settings: ScanSettings, update: Callable[[float], None]) -> dict[str, NDArray]:
    flat, context = text.tokens_BT.reshape(-1), text.tokens_BT.shape[1]
    parts: list[Examples] = []
    for n, sketch in enumerate(seen.sketches, 1):
        parts.append(examples_of(sketch.candidates(), sketch.n_features, flat, context, settings))
        update(n / len(seen.sketches))
    each = lambda name: [getattr(s, name).cpu().numpy() for s in seen.sketches]  # noqa: E731
    numpy = lambda name: np.concatenate(each(name))  # noqa: E731
    every = lambda name: np.concatenate([getattr(p, name) for p in parts])  # noqa: E731
    count = np.concatenate(each("count_SF"), axis=1).T
    least = numpy("min_F")
    n_active = every("n_active")
    example = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(p.indptr) for p in parts]))])
    return {
        "count": count,
        "mean": numpy("sum_F") / FIXED_POINT / np.maximum(count.sum(1), 1),
        "min": np.where(np.isinf(least), 0, least),
        "max": numpy("max_F"),
        "linear_histogram": numpy("linear_FX"),
        "linear_exponent": numpy("exponent_F"),
        "log_histogram": numpy("log_FX"),
        "quantile_edge": every("edge_FQ"),
        "token_at": every("token"),
        "token_at_count": every("token_count"),
        "example": example,
        "example_start": every("start"),
        "example_length": every("length"),
        "example_peak": every("peak"),
        "example_value": every("value"),
        "example_bin": every("bin"),
        "example_active": n_active,
        "active": np.concatenate([[0], np.cumsum(n_active, dtype=np.int64)])[example],
        "active_offset": every("offset"),
        "active_value": every("activation"),
    }


def _from_weights(
    folder: Path, opened: Opened, host: Host, n_tokens: int, settings: ScanSettings, update: Callable[[float], None]
) -> None:
    clt = opened.clt
    wiring = direct.Wiring(host, clt, n_tokens)
    numpy = lambda tensors: torch.cat(list(tensors)).cpu().numpy()  # noqa: E731

    def logits() -> dict[str, NDArray]:
        found = []
        for layer in wiring.layers:
            found.append(direct.logits(wiring, layer, settings.n_logits))
            update(0.25 * (layer + 1) / len(wiring.layers))
        columns = [numpy(column) for column in zip(*found, strict=True)]
        norms = numpy(direct.decoder_norms(clt, layer) for layer in wiring.layers)
        return dict(zip(_LOGITS, [*columns, norms], strict=True))

    def near(name: str, vectors: list[torch.Tensor], done: float) -> dict[str, NDArray]:
        found = direct.nearest(vectors, settings.n_neighbours, lambda share: update(done + 0.25 * share))
        return {f"{name}_id": found.id.cpu().numpy(), name: found.value.cpu().numpy()}

    def virtual() -> dict[str, NDArray]:
        up, down = direct.virtual_weights(wiring, settings.n_virtual, lambda share: update(0.75 + 0.25 * share))
        return {
            "upstream_id": up.id.cpu().numpy(),
            "upstream": up.value.cpu().numpy(),
            "downstream_id": down.id.cpu().numpy(),
            "downstream": down.value.cpu().numpy(),
        }

    _stage(folder, _LOGITS, logits)
    encoders = lambda: [clt.W_enc.passing(i).to(clt.device).float() for i in wiring.layers]  # noqa: E731
    _stage(folder, ("encoder_id", "encoder"), lambda: near("encoder", encoders(), 0.25))
    _stage(folder, ("decoder_id", "decoder"), lambda: near("decoder", [wiring.written(i) for i in wiring.layers], 0.5))
    _stage(folder, ("upstream_id", "upstream", "downstream_id", "downstream"), virtual)


def _together(found: Coactive) -> dict[str, NDArray]:
    return dict(zip(_TOGETHER, found, strict=True))


def _rules(
    sampled: Any,
    text: Text,
    words: Words,
    promoted: NDArray,
    n_layers: int,
    density: NDArray,
    update: Callable[[float], None],
) -> Rules:
    vocabulary = Vocabulary(words.strings, words.special)
    attributes = attributes_of(sampled.position, text.tokens_BT, vocabulary)
    say = lambda ids: ", ".join(vocabulary.quoted(t) for t in ids)  # noqa: E731
    return rules(sampled, attributes, text.tokens_BT, promoted, n_layers, density, say, update)


def _clusters(
    folder: Path,
    read: Callable[[str], NDArray],
    ruled: Rules,
    density: NDArray,
    n_features: int,
    weights: dict[str, float],
    update: Callable[[float], None],
) -> list[Group]:
    live = density > 0
    upstream = read("upstream_id"), read("upstream")

    def clusters_and_map() -> dict[str, NDArray]:
        graph = neighbour_graph.neighbour_graph(_lists(read), weights, live)
        update(0.2)
        groups_GN = clusters.groups(graph)
        update(0.5)
        return {"group": groups_GN.T, "map": feature_map.layout(graph, groups_GN[0])}

    _stage(folder, _CLUSTERS, clusters_and_map)
    layer_N = np.arange(len(density)) // n_features
    score_N = np.nan_to_num(ruled.auroc)
    groups = []
    for level, groups_N in enumerate(np.asarray(read("group")).T):
        labels = clusters.group_labels(groups_N, ruled.label, score_N)
        fed = clusters.lineage(groups_N, layer_N, *upstream)
        sizes = np.bincount(groups_N[groups_N >= 0], minlength=len(labels)).tolist()
        for number, label in enumerate(labels):
            pairs = zip(fed.ids_GK[number].tolist(), fed.share_GK[number].tolist(), strict=True)
            groups.append(Group(level, number, sizes[number], label, [(i, s) for i, s in pairs if i >= 0]))
    update(1.0)
    return groups


def _lists(read: Callable[[str], NDArray]) -> dict[str, tuple[NDArray, NDArray]]:
    """Return the lists of neighbours of each kind, for clustering."""
    ids = np.concatenate([read("own_id"), read("other_id")], axis=1)
    counts = np.concatenate([read("own_count"), read("other_count")], axis=1)
    n_N = np.asarray(read("sample_count"))
    together = Coactive(ids, counts, ids, counts, n_N).cosine(ids, counts)
    near = {
        name: (np.asarray(read(f"{name}_id")), np.asarray(read(name)).astype(np.float32))
        for name in ("encoder", "decoder")
    }
    return {"coactivation": (ids, together)} | near


def _index(
    folder: Path,
    read: Callable[[str], NDArray],
    ruled: Rules,
    density: NDArray,
    n_features: int,
    vocabulary: Words,
    groups: list[Group],
) -> None:
    if (folder / INDEX).exists():
        return
    squares = np.sort(np.square(read("decoder_norm").astype(np.float64)), axis=1)[:, ::-1]
    share = np.cumsum(squares, axis=1) / np.maximum(squares.sum(1, keepdims=True), 1e-30)
    metrics = {
        "density": density,
        "mean": np.asarray(read("mean")),
        "max": np.asarray(read("max")),
        "auroc": ruled.auroc,
        "precision": ruled.precision,
        "recall": ruled.recall,
        "norm": np.sqrt(squares.sum(1)),
        "reach": (share < REACH).sum(1) + 1,
    }
    strings = vocabulary.strings
    texts = lambda ids: (" ".join(strings[t] for t in row if t >= 0) for row in ids.tolist())  # noqa: E731
    rows = (Row(*row) for row in zip(ruled.label, ruled.kind, ruled.values, strict=True))
    write_index(folder / INDEX, n_features, metrics, rows, texts(read("token_at")[:, 0]), texts(read("top_id")), groups)
