"""The commands of `features`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import crosslayer as xl
from cli.test_graph_commands import run
from made_bundle import CONTEXT, N_FEATURES, TOKENS, Made, clt_folder, made, texts, write_clt

__all__ = ["clt_folder", "made", "texts"]


def test_build_show_search_top_and_exchange(made: Made, tmp_path: Path):
    out = tmp_path / "bundle"
    common = (
        "--clt",
        made.folder,
        "--text",
        made.text,
        "--tokens",
        TOKENS,
        "--context",
        CONTEXT,
        "--window",
        16,
        "-o",
        out,
    )
    code, printed, error = run("features", "build", *common)
    assert (code, error) == (0, "")
    assert "labelled by rules" in printed
    bundle = xl.load_features(out)
    assert bundle.manifest.context == CONTEXT
    code, printed, _ = run("features", "show", "L2/7", "--bundle", out)
    assert code == 0
    for words in ("L2/7", "fires on", "promotes", "writes to", "encoder", "upstream"):
        assert words in printed
    assert run("features", "show", "1/5", "--bundle", out)[1].startswith("L1/5  dead: did not fire")
    code, printed, _ = run("features", "search", "fires:def", "--bundle", out)
    assert code == 0
    assert "no feature matches" in run("features", "search", "qqqqqq", "--bundle", out)[1]
    code, printed, error = run("features", "top", "--prompt", "def class return", "--bundle", out, "--clt", made.folder)
    assert (code, error) == (0, "")
    assert "L2/7" in printed
    assert run("features", "label", "2/7", "always on", "--bundle", out)[1] == "L2/7: always on\n"
    assert "always on" in run("features", "top", "--prompt", "def", "--bundle", out, "--clt", made.folder)[1]
    viewer_shows_features(out, made, tmp_path / "viewer")
    code, printed, error = run("features", "export", "--bundle", out, "-o", tmp_path / "packed")
    assert (code, error) == (0, "")
    code, printed, error = run("features", "import", tmp_path / "packed", "-o", tmp_path / "back")
    assert (code, error) == (0, "")
    assert "q" in run("features", "show", "L2/7", "--bundle", tmp_path / "back")[1]
    assert run("features", "export", "--to", "parquet", "--bundle", out, "-o", tmp_path / "t.parquet")[0] == 0


def viewer_shows_features(bundle: Path, made: Made, folder: Path):
    """Circuit-tracer 0.5 fetches `SCAN/FEATURE.json` where a graph has a scan that begins with `./data/`."""
    for prompt in ("def class return", "import os as"):
        code, printed, error = run(
            "graph", "--clt", made.folder, "--features", bundle, "--prompt", prompt, "--viewer", folder
        )
        assert (code, error) == (0, "")
        assert f"start-server --graph_file_dir {folder}" in printed
    slugs = ["def-class-return", "import-os-as"]
    assert [g["slug"] for g in json.loads((folder / "graph-metadata.json").read_text())["graphs"]] == slugs
    opened = xl.load_features(bundle)
    for slug in slugs:
        graph = json.loads((folder / f"{slug}.json").read_text())
        root, name = graph["metadata"]["scan"].split("/data/")
        assert root == "."
        nodes = [n for n in graph["nodes"] if n["feature_type"] == "cross layer transcoder"]
        assert nodes
        for node in nodes:
            record = json.loads((folder / name / f"{node['feature']}.json").read_text())
            layer, index = (int(x) for x in node["node_id"].split("_")[:2])
            assert record["index"] == index
            assert record["transcoder_id"].endswith(f"-{layer}")
            assert len(record["examples_quantiles"][0]["examples"]) == min(
                len([e for e in opened.feature(layer, index).examples if e.bin == 0]), 99
            )
    assert run("graph", "--clt", made.folder, "--prompt", "def", "--viewer", bundle / "manifest.json")[0] != 0
    broken = folder.with_name("broken")
    broken.mkdir()
    for text in ('{"graphs": [', '{"graphs": [1]}', '{"graphs": {}}', "[]", "1"):
        (broken / "graph-metadata.json").write_text(text)
        code, _, error = run("graph", "--clt", made.folder, "--features", bundle, "--prompt", "def", "--viewer", broken)
        assert code != 0
        assert "is not a list of graphs" in error
        assert [p.name for p in broken.iterdir()] == ["graph-metadata.json"]


def test_the_only_bundle_is_the_default(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run("features", "show", "L0/0")
    assert code == 2
    assert "no feature bundle here" in error
    shutil.copytree(made.bundle.path, tmp_path / "runs" / "one" / "features")
    assert run("features", "show", "L0/0")[0] == 0
    shutil.copytree(made.bundle.path, tmp_path / "runs" / "two" / "features")
    assert "several feature bundles" in run("features", "show", "L0/0")[2]


def test_bad_input_is_one_sentence(made: Made, tmp_path: Path, host_folder: Path):
    bundle = made.bundle.path
    other = write_clt(tmp_path / "other", host_folder, seed=4)
    (tmp_path / "file").write_text("x")
    cases = [
        (("show", "nonsense", "--bundle", bundle), "'nonsense' is not a feature; write LAYER/INDEX"),
        (("show", "L-1/2", "--bundle", bundle), "is not a feature"),
        (("show", "L²/3", "--bundle", bundle), "is not a feature"),
        (("show", "L9/0", "--bundle", bundle), "there is no layer 9"),
        (("show", f"L0/{N_FEATURES}", "--bundle", bundle), f"there is no feature L0/{N_FEATURES}"),
        (("show", "L0/0", "--bundle", tmp_path / "no"), "no feature bundle at"),
        (("show", "L0/0", "--bundle", tmp_path / "file"), "no feature bundle at"),
        (("top", "--prompt", "def", "--bundle", bundle, "--clt", other), "is of another transcoder than"),
        (("top", "--prompt", "def", "--bundle", bundle), "does not lie in a run; give its transcoder with --clt"),
        (("top", "--prompt", "", "--bundle", bundle, "--clt", made.folder), "the prompt is empty"),
        (("build", "--clt", made.folder, "-o", tmp_path / "b"), "no text was given"),
        (("build", "--clt", made.folder, "--text", made.text), "no output folder was given"),
        (
            ("build", "--clt", made.folder, "--text", made.text, "-o", tmp_path / "file" / "where"),
            "is a file, not a folder",
        ),
        (
            ("build", "--clt", made.folder, "--text", tmp_path / "nothing", "-o", tmp_path / "b"),
            "no such file or folder",
        ),
        (
            (
                "build",
                "--clt",
                made.folder,
                "--text",
                made.text,
                "-o",
                tmp_path / "b",
                "--cluster-weight",
                "encoder=much",
            ),
            "write KIND=WEIGHT",
        ),
        (("build", "--clt", made.folder, "--text", made.text, "-o", bundle), "holds a feature bundle already"),
        (("export", "--bundle", bundle, "-o", tmp_path / "file"), "is a file"),
        (("export", "--to", "parquet", "--bundle", bundle, "-o", tmp_path), "it is a folder"),
        (("import", made.folder, "-o", tmp_path / "b"), "index.json.gz is missing"),
        (("import", tmp_path / "none", "-o", tmp_path / "b"), "no folder"),
    ]
    for arguments, words in cases:
        code, _, error = run("features", *arguments)
        assert (code, words in error) == (2, True), (arguments, error)
        assert "\n" not in error
