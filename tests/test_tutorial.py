"""The tutorial runs, on any transcoder of the shipped host, and shows what it printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.formats import published
from crosslayer.clt.init import initialise
from crosslayer.clt.transcoder import CLT

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    clt = CLT(CLTConfig(n_layers=6, d_model=192, n_features=512))
    initialise(clt, seed=0, threshold=0.1)
    for weights in clt.W_dec:
        weights.data.mul_(20)
    published.save(clt, Provenance(model_name="stdlib-qwen3", scan="untrained"), tmp_path / "clt")
    monkeypatch.setenv("CROSSLAYER_RUN", str(tmp_path / "clt"))
    import run_tutorial

    kept = json.loads(TUTORIAL.read_text(encoding="utf-8"))
    done = run_tutorial.run(json.loads(TUTORIAL.read_text(encoding="utf-8")))
    for was, now in zip(kept["cells"], done["cells"], strict=True):
        assert was["source"] == now["source"]
        assert bool(was.get("outputs")) == bool(now.get("outputs")), "run scripts/run_tutorial.py on it and commit"
    sys.modules.pop("run_tutorial")
