"""`crosslayer train`: train a transcoder in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crosslayer.cli.settings import GroupedHelp, config_flags, config_from, given_flags
from crosslayer.core.console import progress, results
from crosslayer.core.errors import ConfigError


@click.command(cls=GroupedHelp)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="run folder to create")
@click.option("--resume", type=click.Path(path_type=Path), help="run folder to resume, with its saved settings")
@click.option("--step", type=int, help="with --resume: resume from the checkpoint of this step; default: the last")
@config_flags
def command(out: Path | None, resume: Path | None, step: int | None, recipe: str | None, **flags: Any) -> None:
    """Train a cross-layer transcoder.

    \b
    crosslayer train --model PATH --text PATH -o runs/mine
    crosslayer train --recipe stdlib -o runs/mine
    crosslayer train --resume runs/mine
    torchrun --nproc-per-node 8 -m crosslayer train --recipe gpt2-32k -o runs/gpt2
    """
    from crosslayer import parallel
    from crosslayer.eval.report import print_table
    from crosslayer.schemas.run import read_manifest
    from crosslayer.training.run_folder import resumed_config
    from crosslayer.training.trainer import train

    if (out is None) == (resume is None):
        raise ConfigError("give --out for a new run, or --resume for an existing one")
    if resume is not None:
        config = resumed_config(read_manifest(resume).config, given_flags(flags))
    else:
        if step is not None:
            raise ConfigError(f"--step={step} needs --resume; omit it for a new run")
        config = config_from(flags, recipe)
    done = train(config, resume or out or Path(), resume=resume is not None, step=step, console=progress())
    if parallel.is_first():
        click.echo(f"saved in {done.folder}/clt; metrics in {done.folder}/eval.json")
        print_table(results(), done.evaluation)
    parallel.stop()
