"""`crosslayer plan`: what a run will take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from crosslayer.cli.settings import GroupedHelp, config_flags, config_from


@click.command(cls=GroupedHelp)
@click.option("--flops", type=click.FloatRange(min=0, min_open=True), help="matrix products a second to reckon with; measured here unless given (H200, bf16: 6e14)")  # fmt: skip
@config_flags
def command(flops: float | None, recipe: str | None, **flags: Any) -> None:
    """Print parameters, memory by part, FLOPs a token and estimated time of a run, without allocating it.

    Ends with exit code 2 where the run would not fit here, naming the setting to change.
    """
    from crosslayer.train.loop import DTYPES
    from crosslayer.train.plan import GIB, check_fits, host_shape, measured_flops_per_s
    from crosslayer.train.share import plan_of_one_rank

    config = config_from(flags, recipe)
    shape = host_shape(config.model)
    plan = plan_of_one_rank(config, shape)
    of = f"; what each of {config.feature_ranks} ranks takes" if config.feature_ranks > 1 else ""
    rate = flops or measured_flops_per_s(DTYPES[config.precision], "cpu")
    table = Table(
        title=f"{shape.name}: {shape.n_layers} layers of width {shape.d_model}{of}",
        title_justify="left",
        show_header=False,
    )
    table.add_row("transcoder parameters", f"{plan.n_parameters:,}")
    table.add_section()
    for part, size in plan.memory_bytes.items():
        table.add_row(part, f"{size / GIB:.2f} GiB")
    table.add_row("memory in all", f"{plan.total_bytes / GIB:.2f} GiB")
    table.add_row("disk", f"{plan.disk_bytes / GIB:.2f} GiB")
    table.add_section()
    for name, value in (
        ("host", plan.host_flops),
        ("dense step", plan.dense_flops),
        ("sparse step", plan.sparse_flops),
    ):
        table.add_row(f"{name}, a token", f"{value / 1e9:.3f} GFLOP")
    source = "as given" if flops else "measured here"
    for name, sparse in (("dense", False), ("sparse", True)):
        hours = plan.seconds(rate, sparse=sparse) / 3600
        table.add_row(
            f"time, {name}", f"{hours:.2f} h for {plan.tokens:,} tokens at {rate / 1e9:,.0f} GFLOP/s ({source})"
        )
    Console().print(table)
    check_fits(plan, config, Path())
