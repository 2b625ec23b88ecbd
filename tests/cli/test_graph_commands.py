"""The commands `graph`, `intervene` and `graph-diff`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import crosslayer as xl
import tiny
from crosslayer.cli.main import app
from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.formats import published
from crosslayer.clt.init import initialise
from crosslayer.clt.open import load_clt
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import CrosslayerError
from crosslayer.host.host import load_host

PROMPT = "def class return"


@pytest.fixture(scope="module")
def clt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("traced")
    host = tiny.write_host(root / "host")
    clt = CLT(CLTConfig(n_layers=tiny.N_LAYERS, d_model=tiny.D_MODEL, n_features=64))
    initialise(clt, seed=0, threshold=0.2)
    published.save(clt, Provenance(model_name=str(host), scan="tiny"), root / "clt")
    return root / "clt"


def run(*args: object) -> tuple[int, str, str]:
    """Return the exit code, standard output, and the error message of `main`."""
    result = CliRunner().invoke(app, [str(a) for a in args], standalone_mode=False, env={"COLUMNS": "160"})
    if isinstance(result.exception, CrosslayerError):
        return 2, result.output, str(result.exception)
    if result.exception is not None:
        return 2, result.output, getattr(result.exception, "message", "") or repr(result.exception)
    return 0, result.output, ""


def test_a_prompt_is_traced_saved_exported_and_compared(clt_folder: Path, tmp_path: Path):
    out, export = tmp_path / "g", tmp_path / "g view.json"
    code, printed, error = run("graph", "--clt", clt_folder, "--prompt", PROMPT, "-o", out, "--export", export)
    assert code == 0, error
    for words in (
        "most influential features",
        "replacement score",
        "completeness score",
        "influence accounted for",
        "sum to pre-activations",
    ):
        assert words in printed
    graph = xl.Graph.load(out)
    assert graph.header.prompt == PROMPT
    assert graph.unexpanded <= 0.02
    assert json.loads(export.read_text())["metadata"]["slug"] == "g-view"
    run("graph", "--clt", clt_folder, "--prompt", PROMPT + " value", "-o", tmp_path / "h", "--tolerance", "0.1")
    code, printed, error = run("graph-diff", out, tmp_path / "h")
    assert code == 0, error
    assert "features carry influence in both" in printed


def test_targets_and_precision(clt_folder: Path):
    code, printed, error = run(
        "graph",
        "--clt",
        clt_folder,
        "--prompt",
        PROMPT,
        "--target",
        "#5-minus-#9",
        "--target",
        "#7@2",
        "--precision",
        "bf16",
        "--max-nodes",
        "20",
    )
    assert code == 0, error
    assert "bf16" in printed
    assert " - " in printed


def test_an_intervention_prints_before_and_after(clt_folder: Path):
    code, printed, error = run(
        "intervene",
        "--clt",
        clt_folder,
        "--prompt",
        PROMPT,
        "--set",
        "L0/3@1:=4",
        "--ablate",
        "1/5",
        "--scale",
        "L2/6@-1=2",
        "--generate",
        "3",
        "--freeze",
        "attention",
        "--hold",
        "0-1",
    )
    assert code == 0, error
    for words in ("before", "after", "KL(before || after)"):
        assert words in printed


def test_ablating_a_silent_feature_is_said(clt_folder: Path):
    host = load_host(load_clt(clt_folder).provenance.model_name)
    x_TD = host.tap(host.encode(PROMPT)).x_BTLD[0, :, 0]
    active_F = load_clt(clt_folder).clt.encode_layer(x_TD, 0)[2] > 0
    changes = [part for i in range(len(active_F)) for part in ("--ablate", f"L0/{i}@2")]
    code, printed, error = run("intervene", "--clt", clt_folder, "--prompt", PROMPT, *changes)
    assert code == 0, error
    for i, active in enumerate(active_F.tolist()):
        assert (f"note: --ablate L0/{i}@2 changes nothing: the feature is not active there" in printed) == (not active)
    assert 0 < active_F.sum() < len(active_F)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("graph", "--prompt", ""), "the prompt is empty"),
        (("graph", "--prompt", PROMPT, "--target", "def class"), "tokens of"),
        (("graph", "--prompt", PROMPT, "--target", "#5@99"), "position 99 is not among"),
        (("graph", "--prompt", PROMPT, "--tolerance", "2"), "tolerance=2.0 must be between 0 and 1"),
        (("graph", "--prompt", PROMPT, "--max-nodes", "0"), "max_nodes=0 must be at least 1"),
        (("graph", "--prompt", PROMPT * 40), "exceed the context"),
        (("graph", "--prompt", PROMPT, "-o", f"{__file__}/place"), "is a file, not a folder"),
        (("graph", "--prompt", PROMPT, "--export", "."), "it is a folder"),
        (("graph", "--prompt", PROMPT, "--node-threshold", "7"), "--node-threshold=7.0 must be between 0 and 1"),
        (("graph", "--prompt", PROMPT, "--model", "stdlib-qwen3"), "layers"),
        (("intervene", "--prompt", PROMPT), "no intervention was given"),
        (("intervene", "--prompt", PROMPT, "--set", "3"), "is not understood; write LAYER/INDEX=VALUE"),
        (("intervene", "--prompt", PROMPT, "--set", "L0/3=x"), "is not understood"),
        (("intervene", "--prompt", PROMPT, "--ablate", "L7/3"), "there is no feature 3 in layer 7"),
        (("intervene", "--prompt", PROMPT, "--ablate", "L0/3@0"), "which have no features"),
        (("intervene", "--prompt", PROMPT, "--ablate", "L0/3", "--hold", "1-9"), "is outside the 3 layers"),
    ],
)
def test_bad_input_is_one_sentence(clt_folder: Path, args: tuple[str, ...], words: str):
    code, _, error = run(args[0], "--clt", clt_folder, *args[1:])
    assert code == 2
    assert words in error
    assert "\n" not in error


def test_a_graph_is_not_exported_over_itself(clt_folder: Path, tmp_path: Path):
    code, _, error = run(
        "graph", "--clt", clt_folder, "--prompt", PROMPT, "-o", tmp_path / "g", "--export", tmp_path / "g.json"
    )
    assert code == 2
    assert "write the same file" in error
    assert not list(tmp_path.iterdir())


def test_missing_graphs_are_reported(tmp_path: Path):
    code, _, error = run("graph-diff", tmp_path / "a", tmp_path / "b")
    assert code == 2
    assert "there is no graph" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--ablate", "L0/1@2-4"), "--ablate 'L0/1@2-4' is not understood"),
        (("--ablate", "L0/1@"), "is not understood"),
        (("--ablate", "garbage"), "write LAYER/INDEX, as L3/1204"),
        (("--ablate", "L0/1=2"), "--ablate 'L0/1=2' is not understood"),
        (("--scale", "L0/1"), "write LAYER/INDEX=VALUE"),
        (("--set", "L0/1=1e39"), "a finite number of at most"),
        (("--ablate", "L0/1@99:"), "hold none of the prompt"),
        (("--ablate", "L0/1", "--scale", "L0/1=3"), "is changed twice"),
    ],
)
def test_invalid_changes_are_refused(clt_folder: Path, change: tuple[str, ...], words: str):
    code, _, error = run("intervene", "--clt", clt_folder, "--prompt", PROMPT, *change)
    assert (code, words in error) == (2, True), error


def test_top_may_exceed_the_vocabulary(clt_folder: Path):
    assert run("intervene", "--clt", clt_folder, "--prompt", PROMPT, "--ablate", "L0/1", "--top", 100_000)[0] == 0


def test_outputs_that_coincide_or_cannot_be_written(clt_folder: Path, tmp_path: Path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "folder.json").mkdir()
    for arguments, words in (
        (("-o", tmp_path / "g", "--export", tmp_path / "x" / ".." / "g.json"), "write the same file"),
        (("-o", tmp_path / "g", "--export", f"{tmp_path}/../{tmp_path.name}/g.json"), "write the same file"),
        (("-o", tmp_path / "run"), "is no saved graph"),
        (("-o", tmp_path / "folder"), "it is a folder"),
        (("--export", tmp_path / ("x" * 300)), "cannot be written"),
    ):
        code, _, error = run("graph", "--clt", clt_folder, "--prompt", PROMPT, *arguments)
        assert (code, words in error) == (2, True), error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.json", "run.json"]
