"""`crosslayer inspect`: describe a transcoder and check its files."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.table import Table

from crosslayer.core.console import progress, results
from crosslayer.core.errors import FormatError

if TYPE_CHECKING:
    from crosslayer.clt.inspect import Description


@click.command()
@click.argument("clt")
@click.option("--deep", is_flag=True, help="read all weights: norms, decoder norm by layer distance, NaN and infinity")
@click.option("--k", type=int, help="active features per token and layer, for a TopK set that does not say")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of tables")
def command(clt: str, deep: bool, k: int | None, as_json: bool) -> None:
    """Describe the transcoder CLT: a folder, a run folder, or owner/name[@revision][//subfolder] on the Hub.

    Supports the published format, per-layer sets (Gemma Scope's among them), BluelightAI's format and Gemma Scope 2.
    Reads only file headers and small tensors unless --deep is given. The exit code is 2 if files are missing or
    damaged.
    """
    from crosslayer.clt.inspect import describe
    from crosslayer.core.progress import track

    if deep:
        with track(progress(), "read", 1.0) as update:
            d = describe(clt, deep=True, k=k, on_progress=update)
    else:
        d = describe(clt, k=k)
    if as_json:
        click.echo(json.dumps(asdict(d), indent=2))
    else:
        _print(d)
    if d.faults:
        raise FormatError(f"{'; '.join(d.faults)}; download or write these files again")


def _print(d: Description) -> None:
    console = results()
    table = Table(title=d.name, title_justify="left", show_header=False)
    kind = "cross-layer transcoder" if d.cross_layer else "per-layer transcoder"
    ranked = f", k = {d.k} {'in total' if d.scope == 'all' else 'per layer'}" if d.k else ""
    special = "special token prepended; " if d.prepend else ""
    rows = [
        ("kind", f"{kind}, {d.format} format"),
        ("host", d.model_name or "not named"),
        ("reads, writes", f"{d.input_hook}, {d.output_hook}"),
        ("layers × features × width", f"{d.n_layers} × {d.n_features:,} × {d.d_model:,}"),
        ("parameters", f"{d.n_parameters:,}"),
        ("activation", d.activation + ranked + (", with affine skip" if d.skip else "")),
        ("dtype", d.dtype),
        ("size", "on the hub" if d.n_bytes is None else _size(d.n_bytes)),
        ("first position", f"{special}first {d.n_skip} without features"),
        ("complete", "no" if d.faults else "yes, all weights" if d.layers else "yes, by headers and small tensors"),
    ]
    if d.host_layers:
        rows.insert(4, ("host layers", ", ".join(map(str, d.host_layers))))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if not d.thresholds and not d.layers:
        return
    table = Table(title="Per layer", title_justify="left")
    names = ["layer"] + (["threshold: min", "median", "max"] if d.thresholds else [])
    names += ["‖W_enc‖", "‖W_dec‖", "share of decoder norm at distance 0, 1, 2, …"] if d.layers else []
    for name in names:
        table.add_column(name, justify="left" if "share" in name else "right")
    for i in range(d.n_layers):
        cells = [str(i)] + ([f"{t:.4f}" for t in d.thresholds[i]] if d.thresholds else [])
        if i < len(d.layers) and (w := d.layers[i]) is not None:
            shares = " ".join(f"{s:.0%}" for s in w.share_by_distance[:6])
            more = " …" if len(w.share_by_distance) > 6 else ""
            cells += [f"{w.encoder_norm:.3f}", f"{w.decoder_norm:.3f}", shares + more]
        table.add_row(*cells)
    console.print(table)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"
