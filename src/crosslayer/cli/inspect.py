"""`crosslayer inspect`: what a folder holds."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from crosslayer.core.errors import FormatError


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def command(path: Path) -> None:
    """Print sizes, dtype, activation, hooks, host and norms of the transcoder in PATH (or of the run PATH).

    Ends with exit code 2 if the folder is not whole.
    """
    from crosslayer.clt.inspect import describe
    from crosslayer.clt.open import clt_folder

    folder = clt_folder(path)
    d = describe(folder)
    table = Table(title=str(folder), title_justify="left", show_header=False)
    for name, value in (
        ("kind", d.config["model_kind"]),
        ("host", d.config.get("model_name", "not said")),
        ("reads, writes", f"{d.config['feature_input_hook']}, {d.config['feature_output_hook']}"),
        ("layers × features × width", f"{d.n_layers} × {d.n_features:,} × {d.d_model:,}"),
        ("activation", d.activation + (", with affine skip" if d.skip else "")),
        ("dtype", d.dtype),
        ("size", f"{d.n_bytes / 2**20:,.1f} MiB"),
        ("policy", str(d.config.get("crosslayer", {}).get("policy", "not said"))),
        ("whole", "no" if d.faults else "yes"),
    ):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    if d.norms:
        table = Table(title="Means over features", title_justify="left")
        for name in ("layer", "‖W_enc‖", "‖W_dec‖", "to own layer", "threshold"):
            table.add_column(name, justify="right")
        for i, n in enumerate(d.norms):
            shown = "" if n.threshold is None else f"{n.threshold:.4f}"
            table.add_row(str(i), f"{n.encoder:.3f}", f"{n.decoder:.3f}", f"{n.own_share:.0%}", shown)
        console.print(table)
    if d.faults:
        raise FormatError(f"{folder} is not whole: {'; '.join(d.faults)}; fetch or write these files again")
