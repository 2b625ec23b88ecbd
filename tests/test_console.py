"""What commands print: defaults in their help, nothing wrapped in a pipe, progress by tenths."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import fields

import click
import pytest
from rich.console import Console
from rich.table import Table

from crosslayer.cli.main import VERBS, app
from crosslayer.core import console as consoles
from crosslayer.core.progress import track
from crosslayer.training.config import TrainConfig


def commands(group: click.Group, names: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Return all commands below a group with the words that call them."""
    found = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        found += commands(command, (*names, name)) if isinstance(command, click.Group) else [((*names, name), command)]
    return found


def help_of(*words: str) -> str:
    """Return the help of a command, on one line."""
    command = [sys.executable, "-m", "crosslayer", *words, "--help"]
    return " ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_every_verb_is_a_command():
    assert {words[0] for words, _ in commands(app)} == set(VERBS)


@pytest.mark.parametrize("words", [words for words, _ in commands(app)], ids=" ".join)
def test_help_gives_every_default(words: tuple[str, ...]):
    (command,) = [c for w, c in commands(app) if w == words]
    context = app.make_context("crosslayer", list(words), resilient_parsing=True)
    for option in command.params:
        default = option.to_info_dict().get("default")
        if isinstance(option, click.Option) and default not in (None, (), [], False) and not option.required:
            record = option.get_help_record(click.Context(command, parent=context))
            assert record is not None
            assert "[default: " in record[1], option.name


def test_help_of_train_gives_the_defaults_of_the_settings():
    text = help_of("train").replace("- ", "-")
    for f in fields(TrainConfig):
        if f.default in ("", ()) or f.name == "l0" or isinstance(f.default, bool):
            continue
        shown = f"{f.default:,}" if isinstance(f.default, int) else str(f.default)
        shown = "by budget" if f.metadata.get("by_budget") else shown
        start = text.rindex(f"--{f.name.replace('_', '-')} ")
        assert f"[default: {shown}]" in text[start : start + 400], f.name


def test_a_table_in_a_pipe_is_as_wide_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console = consoles.results()
    table = Table()
    for name in range(12):
        table.add_column(f"a column of some width, number {name}")
    console.print(table)
    console.print("word " * 60, highlight=False)
    lines = sys.stdout.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines[0]) > 300
    assert all("number 11" in line for line in lines[1:2])
    assert lines[-1].count("word") == 60


def test_progress_in_a_pipe_is_one_line_per_tenth():
    file = io.StringIO()
    with track(Console(file=file), "work", 1000.0) as update:
        for done in range(1001):
            update(float(done), "FVU 0.1")
    lines = file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("work  10%")
    assert lines[-1].startswith("work 100%")
    assert all(line.endswith("FVU 0.1") for line in lines)
