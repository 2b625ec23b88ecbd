"""`crosslayer plan`: estimate memory, disk and time of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from crosslayer.cli.settings import GroupedHelp, config_flags, config_from
from crosslayer.core.console import results


@click.command(cls=GroupedHelp)
@click.option(
    "--flops",
    type=click.FloatRange(min=0, min_open=True),
    help=(
        "estimate the time from this number of FLOP/s, for another machine (H200, bf16: 6e14); default: time a few"
        " steps on this machine"
    ),
)
@config_flags
def command(flops: float | None, recipe: str | None, **flags: Any) -> None:
    """Print parameters, memory, FLOPs per token and estimated time of a run, without allocating it.

    The time is estimated from a few steps on random inputs, at reduced size, on this machine.

    If the run does not fit this machine, the exit code is 2 and the message names the setting to change.
    """
    from crosslayer.clt.precision import dtype_of
    from crosslayer.core.errors import ResourceError
    from crosslayer.host.host import choose_device
    from crosslayer.training.plan import GIB, budget_of, check_fits, host_shape
    from crosslayer.training.settings import by_budget, print_choices
    from crosslayer.training.share import plan_of_one_rank
    from crosslayer.training.trial import trial

    given = config_from(flags, recipe)
    shape = host_shape(given.model)
    config, choices = by_budget(given, budget_of(given, shape))
    print_choices(results(), choices)
    plan = plan_of_one_rank(config, shape)
    of = f"; each of {config.feature_ranks} ranks" if config.feature_ranks > 1 else ""
    table = Table(
        title=f"{shape.name}: {shape.n_layers} layers of width {shape.d_model}{of}",
        title_justify="left",
        show_header=False,
    )
    table.add_row("transcoder parameters", f"{plan.n_parameters:,}")
    table.add_section()
    for part, size in plan.memory_bytes.items():
        table.add_row(part, f"{size / GIB:.2f} GiB")
    table.add_row("memory in total", f"{plan.total_bytes / GIB:.2f} GiB")
    table.add_row("disk", f"{plan.disk_bytes / GIB:.2f} GiB")
    table.add_section()
    for name, value in (
        ("host", plan.host_flops),
        ("dense step", plan.dense_flops),
        ("sparse step", plan.sparse_flops),
    ):
        table.add_row(f"{name}, per token", f"{value / 1e9:.3f} GFLOP")
    if flops:
        for name, sparse in (("dense", False), ("sparse", True)):
            hours = plan.seconds(flops, sparse=sparse) / 3600
            table.add_row(f"time, {name}", f"{hours:.2f} h for {plan.tokens:,} tokens at {flops / 1e9:,.0f} GFLOP/s")
    try:
        check_fits(plan, config, Path())
    except ResourceError:
        results().print(table)
        raise
    if not flops:
        device = choose_device(config.device)
        timed = trial(
            config.share(1),
            shape,
            device,
            dtype_of(config.precision, device),
            dtype_of(config.host_precision, device),
        )
        hours = timed.seconds(replace(config, tokens=plan.tokens)) / 3600
        table.add_row(
            "time, from steps timed here",
            f"{hours:.2f} h for {plan.tokens:,} tokens: {1 / timed.collect_s:,.0f} tokens/s collecting activations,"
            f" {1 / timed.step_s:,.0f} training",
        )
    results().print(table)
