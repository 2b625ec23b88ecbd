"""A build that was killed, or shared among ranks, makes the same bundle; invalid input is reported."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from crosslayer.bundles.bundle import load_features
from crosslayer.bundles.schema import building_folder
from crosslayer.clt.open import load_clt
from crosslayer.core.errors import ConfigError, CrosslayerError, FormatError, ResourceError, RunError, SourceError
from crosslayer.features import build as build_module
from crosslayer.features import scan as scan_module
from crosslayer.features.build import build_features
from crosslayer.features.sketch import LayerSketch
from made_bundle import CONTEXT, SETTINGS, TOKENS, Made, contents, write_clt

BUILD = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from crosslayer import parallel
from crosslayer.features import scan
from crosslayer.features.build import build_features
sys.path.insert(0, {tests!r})
from made_bundle import CONTEXT, SETTINGS, TOKENS
scan.SAVE_EVERY_S = 0.0
parallel.start()
build_features({clt!r}, text=[{text!r}], out=Path({out!r}), tokens=TOKENS, context=CONTEXT, settings=SETTINGS, \
rows_at_once=5)
parallel.stop()
"""


def build(made: Made, out: Path, **changes: object) -> Path:
    settings = {
        "text": [str(made.text)],
        "tokens": TOKENS,
        "context": CONTEXT,
        "settings": SETTINGS,
        "rows_at_once": 5,
    } | changes
    return build_features(load_clt(made.folder), out=out, model=made.host, **settings).path  # type: ignore[arg-type]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 4, 9, 15])
def test_build_stopped_in_the_pass_resumes(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    taken, take = [], scan_module.take

    def fragile(*args: object) -> None:
        if len(taken) == at:
            raise Killed
        taken.append(args[-1])
        take(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(scan_module, "take", fragile)
    with pytest.raises(Killed):
        build(made, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    with pytest.raises(FormatError, match="is not whole: its build was stopped"):
        load_features(tmp_path / "cut")
    monkeypatch.setattr(scan_module, "take", take)
    assert contents(build(made, tmp_path / "cut")) == contents(made.bundle.path)
    assert not building_folder(tmp_path / "cut").exists()


def test_build_stopped_within_a_batch_counts_no_token_twice(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    added, add = [], LayerSketch.add

    def fragile(*args: object) -> None:
        added.append(0)
        if len(added) == 3 * 4 + 2:  # the second layer of the fifth batch
            raise Killed
        add(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(LayerSketch, "add", fragile)
        with pytest.raises(Killed):
            build(made, tmp_path / "cut")
    assert contents(build(made, tmp_path / "cut")) == contents(made.bundle.path)


@pytest.mark.parametrize("stage", ["coactivation", "rules", "write_index", "shutil.rmtree"])
def test_build_stopped_in_a_later_stage_resumes(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    def killed(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"crosslayer.features.build.{stage}", killed)
        with pytest.raises(Killed):
            build(made, tmp_path / "cut")
        assert not (tmp_path / "cut").exists()
    assert contents(build(made, tmp_path / "cut")) == contents(made.bundle.path)


def script(made: Made, out: Path) -> str:
    return BUILD.format(
        tests=str(Path(__file__).parent.parent), clt=str(made.folder), text=str(made.text), out=str(out)
    )


def test_killed_build_resumes_on_two_ranks(made: Made, tmp_path: Path):
    out = tmp_path / "cut"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script(made, out)], stderr=subprocess.PIPE, text=True, env=environment
    )
    parts = building_folder(out) / "parts"
    while not list(parts.glob("part-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script(made, out)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment
            | {
                "RANK": str(r),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(r),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for r in range(2)
    ]
    for rank in ranks:
        _, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
    torch.set_num_threads(torch.get_num_threads())
    assert contents(out) == contents(made.bundle.path)


def test_lost_part_is_processed_again(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    finish = build_module._finish
    monkeypatch.setattr(build_module, "_finish", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        build(made, tmp_path / "cut")
    (part,) = (building_folder(tmp_path / "cut") / "parts").glob("part-*")
    part.unlink()
    monkeypatch.setattr(build_module, "_finish", finish)
    assert contents(build(made, tmp_path / "cut")) == contents(made.bundle.path)


def test_streams_are_counted_separately_and_merged(made: Made, tmp_path: Path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    files = sorted(made.text.iterdir())
    one.write_text("\n\n".join(p.read_text() for p in files[:60]))
    two.write_text("\n\n".join(p.read_text() for p in files[60:]))
    out = build(made, tmp_path / "both", text=[f"{one}=3", f"{two}=1"], tokens=1200)
    bundle = load_features(out)
    sizes = [s.n_rows for s in bundle.manifest.text]
    assert len(sizes) == 2
    assert sizes[0] > 2 * sizes[1]
    feature = bundle.feature(2, 7)
    counts = bundle.array("count")[bundle.id(2, 7)]
    assert feature.count == counts.sum() > 0
    assert set(feature.density_by_source) == {str(one), str(two)}
    for e in bundle.examples(bundle.id(2, 7)):
        row = e.position // CONTEXT
        assert e.source == str(one if row < sizes[0] else two)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tokens": 0}, ConfigError, "tokens=0"),
        ({"context": 1000}, ConfigError, "context=1000 must be between 3 and that of"),
        ({"cluster_weights": {"encoder": -1.0}}, ConfigError, "encoder=-1.0"),
        ({"cluster_weights": {"looks": 1.0}}, ConfigError, "'looks'"),
        ({"cluster_weights": {"encoder": 0.0}}, ConfigError, "all cluster weights are 0"),
        ({"text": []}, SourceError, "no text was given"),
    ],
)
def test_invalid_settings(made: Made, tmp_path: Path, changes: dict[str, object], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        build(made, tmp_path / "none", **changes)
    assert list(tmp_path.iterdir()) == []


def test_text_without_held_out_documents(made: Made, tmp_path: Path):
    from crosslayer.data.documents import split_of, text_hash

    text = next(t for t in (f"def value {i}\n" * 30 for i in range(100)) if split_of(text_hash(t)) == "train")
    (tmp_path / "all.txt").write_text(text)
    with pytest.raises(SourceError, match="has no held-out text: 1 document; give more text"):
        build(made, tmp_path / "none", text=[str(tmp_path / "all.txt")])


def test_full_disk_is_reported_before_starting(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10, 9, 1))
    with pytest.raises(ResourceError, match=r"GiB of disk but 0\.00 GiB are free; lower --tokens"):
        build(made, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_existing_output_is_not_overwritten(made: Made, tmp_path: Path):
    with pytest.raises(RunError, match="holds a feature bundle already"):
        build(made, made.bundle.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    with pytest.raises(RunError, match="is not empty"):
        build(made, tmp_path / "full")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        build(made, tmp_path / "file")


def test_resuming_with_other_settings_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_folder: Path
):
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_finish", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build(made, tmp_path / "cut")
    with pytest.raises(RunError, match="a stopped build with another text"):
        build(made, tmp_path / "cut", tokens=300)
    other = load_clt(write_clt(tmp_path / "other", host_folder, seed=9))
    with pytest.raises(RunError, match="a stopped build with another clt"):
        build_features(
            other,
            out=tmp_path / "cut",
            model=made.host,
            text=[str(made.text)],
            tokens=TOKENS,
            context=CONTEXT,
            settings=SETTINGS,
            rows_at_once=5,
        )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda p: (p / "top_id.npy").write_bytes((p / "top_id.npy").read_bytes()[:-4]),
            "top_id.npy has .* bytes, expected",
        ),
        (lambda p: (p / "example.npy").unlink(), "example.npy is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "is not valid JSON"),
        (lambda p: (p / "manifest.json").unlink(), "is no feature bundle"),
        (lambda p: (p / "manifest.json").write_text("[]"), "is not as expected"),
        (lambda p: rewrite(p, whole=False), "is not whole"),
        (lambda p: rewrite(p, n_layers="many"), "n_layers is not as expected"),
    ],
)
def test_damaged_bundle_raises_an_error(made: Made, tmp_path: Path, damage, words: str):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(made.bundle.path, copy)
    load_features(copy)
    damage(copy)
    with pytest.raises(CrosslayerError, match=words):
        load_features(copy)


def rewrite(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))
