"""Names of folders and repositories, against a Hub cache on disk, without network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clt.test_published import PROVENANCE
from clt.test_transcoder import make
from crosslayer.clt.formats import published
from crosslayer.clt.open import load_clt
from crosslayer.core.errors import FormatError

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of `owner/name` at main and at v1; v1 has a subfolder without one decoder."""
    root = tmp_path_factory.mktemp("hub")
    repo = root / "models--owner--name"
    published.save(make(dtype=torch.float32), PROVENANCE, repo / "snapshots" / COMMITS["main"])
    under = repo / "snapshots" / COMMITS["v1"] / "small"
    under.parent.mkdir()
    shutil.copytree(repo / "snapshots" / COMMITS["main"], under)
    (under / "W_dec_2.safetensors").unlink()
    (repo / "refs").mkdir()
    for revision, commit in COMMITS.items():
        (repo / "refs" / revision).write_text(commit)
    return root


def crosslayer(hub: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"} | env
    return subprocess.run(
        [sys.executable, "-m", "crosslayer", *args], capture_output=True, text=True, check=False, env=environment
    )


def test_a_repository_in_the_cache_is_opened_without_network(hub: Path):
    for name in ("owner/name", "owner/name@main", f"owner/name@{COMMITS['main']}"):
        done = crosslayer(hub, "inspect", name)
        assert done.returncode == 0, done.stderr
        assert "3 × 24 × 8" in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/name@v1//small", "owner/name@v1//small: W_dec_2.safetensors is missing"),
        ("owner/name@v1//large", "owner/name has no files under large; its folders are small"),
        ("owner/name@v2", "owner/name at revision 'v2' is not in its cache"),
        ("owner/other", "the Hub cannot be reached"),
        ("no/such/folder", "no folder no/such/folder; give a local folder, or a Hub repository"),
        ("./nowhere", "no folder ./nowhere; give a local folder"),
        ("nowhere", "no folder nowhere; give a local folder, or a Hub repository as owner/name"),
    ],
)
def test_errors_of_names_are_one_sentence(hub: Path, name: str, words: str):
    done = crosslayer(hub, "inspect", name)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_errors_of_an_unreachable_hub_are_one_sentence(hub: Path):
    """Nothing listens on the endpoint; errors of the HTTP library are not OSErrors."""
    nobody = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    cached = crosslayer(hub, "inspect", "owner/name", **nobody)
    assert cached.returncode == 0, cached.stderr
    done = crosslayer(hub, "inspect", "owner/other", **nobody)
    assert done.returncode == 2
    assert "the Hub cannot be reached (ConnectError)" in done.stderr or "ConnectionError" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    (hub / "clt").mkdir()
    published.save(make(dtype=torch.float32), PROVENANCE, hub / "clt")
    (hub / "clt" / "README.md").write_text("card")
    done = crosslayer(hub, "push", str(hub / "clt"), "me/mine", **nobody)
    assert done.returncode == 2
    assert "the Hub refused me/mine" in done.stderr


def test_a_relative_path_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    published.save(make(dtype=torch.float32), PROVENANCE, tmp_path / "some" / "clt")
    monkeypatch.chdir(tmp_path)
    assert load_clt("some/clt").provenance == PROVENANCE
    with pytest.raises(FormatError, match="is a file"):
        load_clt("some/clt/config.yaml")


def test_files_of_the_hub_are_downloaded_when_used(hub: Path, monkeypatch: pytest.MonkeyPatch):
    from types import SimpleNamespace

    import huggingface_hub

    snapshot = hub / "models--owner--name" / "snapshots" / COMMITS["main"]
    siblings = [SimpleNamespace(rfilename=p.name) for p in snapshot.iterdir()]
    fetched: list[str] = []

    class Api:
        def model_info(self, repo: str, revision: str | None) -> SimpleNamespace:
            assert (repo, revision) == ("owner/name", "v9")
            return SimpleNamespace(siblings=siblings, sha="c" * 40)

    def download(repo: str, file: str, revision: str) -> str:
        assert (repo, revision) == ("owner/name", "c" * 40)
        fetched.append(file)
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    clt = load_clt("owner/name@v9").clt
    assert not [f for f in fetched if f.startswith("W_dec")]
    clt.decoder_rows(1, torch.tensor([3]))
    assert [f for f in fetched if f.startswith("W_dec")] == ["W_dec_1.safetensors"]
