"""A bundle as one Parquet table with one row per feature, for pandas, polars or DuckDB."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.bundles.schema import NEIGHBOURS
from crosslayer.core.files import replacing

ROWS_AT_ONCE = 2048


def write_parquet(
    bundle: FeatureBundle,
    path: Path,
    *,
    examples: bool = True,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Path:
    """Write the table atomically.

    Args:
        examples: include the text of the examples, which is most of the size.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(pa, examples)
    n = bundle.n_layers * bundle.n_features
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for at in range(0, n, ROWS_AT_ONCE):
            rows = [_row(bundle, f, examples) for f in range(at, min(at + ROWS_AT_ONCE, n))]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            on_progress(min(at + ROWS_AT_ONCE, n) / n)
    return path


def _schema(pa: Any, examples: bool) -> Any:
    text, number, whole = pa.string(), pa.float32(), pa.int64()
    logits = pa.list_(pa.struct([("token", text), ("value", number), ("z", number)]))
    counts = pa.list_(pa.struct([("token", text), ("count", whole)]))
    near = pa.list_(pa.struct([("layer", pa.int32()), ("index", pa.int32()), ("value", number)]))
    fields = [
        ("layer", pa.int32()),
        ("index", pa.int32()),
        ("label", text),
        ("label_from", text),
        ("rule", text),
        ("precision", number),
        ("recall", number),
        ("auroc", number),
        ("count", whole),
        ("density", pa.float64()),
        ("mean", number),
        ("min", number),
        ("max", number),
        ("promotes", logits),
        ("suppresses", logits),
        ("at_peak", counts),
        ("before_peak", counts),
        ("decoder_norms", pa.list_(number)),
        ("groups", pa.list_(pa.int32())),
        *((name, near) for name in NEIGHBOURS),
    ]
    if examples:
        example = [
            ("tokens", pa.list_(text)),
            ("activations", pa.list_(number)),
            ("peak", pa.int32()),
            ("value", number),
            ("bin", pa.int32()),
            ("source", text),
        ]
        fields.append(("examples", pa.list_(pa.struct(example))))
    return pa.schema(fields)


def _row(bundle: FeatureBundle, feature: int, examples: bool) -> dict[str, Any]:
    layer, index = bundle.place(feature)
    f = bundle.feature(layer, index, examples=None if examples else 0)
    plain = lambda items: [x._asdict() for x in items]  # noqa: E731
    near = {
        name: [{"layer": x.layer, "index": x.index, "value": x.value} for x in bundle.neighbours(layer, index, name)]
        for name in NEIGHBOURS
    }
    row = {
        "layer": layer,
        "index": index,
        "label": f.label,
        "label_from": f.label_from,
        "rule": f.rule.kind if f.rule else None,
        "precision": f.rule.precision if f.rule else None,
        "recall": f.rule.recall if f.rule else None,
        "auroc": f.rule.auroc if f.rule else None,
        "count": f.count,
        "density": f.density,
        "mean": f.mean,
        "min": f.min,
        "max": f.max,
        "promotes": plain(f.promotes),
        "suppresses": plain(f.suppresses),
        "at_peak": plain(f.at.get("peak", [])),
        "before_peak": plain(f.at.get("before", [])),
        "decoder_norms": f.decoder_norms,
        "groups": f.groups,
        **near,
    }
    if examples:
        row["examples"] = [
            {
                "tokens": e.tokens,
                "activations": e.activations,
                "peak": e.peak,
                "value": e.value,
                "bin": e.bin,
                "source": e.source,
            }
            for e in f.examples
        ]
    return row
