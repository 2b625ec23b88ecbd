"""Folders to serve, and a browser."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

import crosslayer as xl
from made_bundle import Made, clt_folder, made, texts

__all__ = ["clt_folder", "made", "texts"]
PROMPT = "def class return value"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, made: Made) -> Path:
    """A folder with a run that has a bundle and a graph, and with unrelated files."""
    root = tmp_path_factory.mktemp("served")
    run = root / "runs" / "mine"
    (run / "graphs").mkdir(parents=True)
    shutil.copytree(made.folder, run / "clt")
    shutil.copytree(made.bundle.path, run / "features")
    (run / "run.json").write_text(json.dumps({"state": "finished", "config": {"l0": 8}}))
    (run / "clt" / "README.md").write_text("# A card")
    (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    xl.attribute(made.host, run, PROMPT, tolerance=0.0).save(run / "graphs" / "one")
    (root / "notes.json").write_text('{"metadata": 1}')
    (root / "broken.json").write_text('{"metadata": {')
    (root / "secret.txt").write_text("secret")
    (root / "link").symlink_to("/")
    return root


def chromium() -> str:
    """Debian's Chromium, installed where it is missing."""
    names = ("chromium", "chromium-browser", "google-chrome")
    with (Path(tempfile.gettempdir()) / "crosslayer-chromium.lock").open("w") as lock:
        # Another process of the same test run may be installing it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _found_or_installed(names)


def _found_or_installed(names: tuple[str, ...]) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and shutil.which("apt-get"):
        sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run([*sudo, "apt-get", *words], check=True, env=environment, stdout=sys.stderr)
        found = shutil.which("chromium")
    if found is None:
        pytest.skip("there is no Chromium, and no apt-get to install it with")
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield started
        started.close()
