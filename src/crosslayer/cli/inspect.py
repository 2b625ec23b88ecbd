"""`crosslayer inspect`: what a transcoder is."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from crosslayer.core.errors import FormatError

if TYPE_CHECKING:
    from crosslayer.clt.inspect import Description


@click.command()
@click.argument("clt")
@click.option("--deep", is_flag=True, help="read every weight: norms, shares by distance, NaN and infinity")
@click.option("--json", "as_json", is_flag=True, help="print JSON in place of tables")
def command(clt: str, deep: bool, as_json: bool) -> None:
    """Print what the transcoder CLT is: a folder, a run, or owner/name[@revision][//subfolder] on the hub.

    Reads the published format, per-layer sets, BluelightAI's own and Gemma Scope 2, from file headers and small
    tensors alone. Ends with exit code 2 if the folder is not whole.
    """
    from crosslayer.clt.inspect import describe
    from crosslayer.core.progress import track

    if deep:
        with track(Console(stderr=True), "read", 1.0) as update:
            d = describe(clt, deep=True, on_progress=update)
    else:
        d = describe(clt)
    if as_json:
        click.echo(json.dumps(asdict(d), indent=2))
    else:
        _print(d)
    if d.faults:
        raise FormatError(f"{'; '.join(d.faults)}; fetch or write these files again")


def _print(d: Description) -> None:
    console = Console()
    table = Table(title=d.name, title_justify="left", show_header=False)
    kind = "cross-layer transcoder" if d.cross_layer else "per-layer transcoder"
    ranked = f", k = {d.k} {'in all' if d.scope == 'all' else 'a layer'}" if d.k else ""
    special = "a special token in front; " if d.prepend else ""
    rows = [
        ("what", f"{kind}, {d.format} format"),
        ("host", d.model_name or "not said"),
        ("reads, writes", f"{d.input_hook}, {d.output_hook}"),
        ("layers × features × width", f"{d.n_layers} × {d.n_features:,} × {d.d_model:,}"),
        ("parameters", f"{d.n_parameters:,}"),
        ("activation", d.activation + ranked + (", with affine skip" if d.skip else "")),
        ("dtype", d.dtype),
        ("size", "on the hub" if d.n_bytes is None else _size(d.n_bytes)),
        ("first position", f"{special}the first {d.n_skip} without features"),
        ("whole", "no" if d.faults else "yes, by every weight" if d.layers else "yes, by headers and small tensors"),
    ]
    if d.host_layers:
        rows.insert(4, ("host's layers", ", ".join(map(str, d.host_layers))))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if not d.thresholds and not d.layers:
        return
    table = Table(title="By layer", title_justify="left")
    names = ["layer"] + (["threshold: least", "median", "greatest"] if d.thresholds else [])
    names += ["‖W_enc‖", "‖W_dec‖", "decoder's share at distance 0, 1, 2, …"] if d.layers else []
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
