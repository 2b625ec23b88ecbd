"""Every format has the features and the reconstruction of its authors' formulas."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clt import foreign
from clt.test_transcoder import inputs
from crosslayer.clt.convert import convert
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.open import load_clt, open_format
from crosslayer.core.errors import ConfigError, FormatError

LAYOUTS, ACTIVATIONS = ("input_layer", "output_layer"), ("relu", "jumprelu", "topk", "topk_all")


def check_means(opened: Opened, meaning: foreign.Meaning, rtol: float = 1e-6) -> None:
    x_BLD = inputs()
    expected_y, features = meaning.reconstruct(x_BLD), meaning.features(x_BLD)
    for found, expected in zip(opened.clt.encode(x_BLD), features, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol)
    sparse = opened.clt.encode_sparse(x_BLD)
    for found, expected in zip(sparse, features, strict=True):
        torch.testing.assert_close(found.dense().double(), expected, rtol=rtol, atol=rtol)
    for f in (sparse, opened.clt.encode(x_BLD)):
        torch.testing.assert_close(opened.clt.decode(f, x_BLD).double(), expected_y, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("layout", "activation"), list(product(LAYOUTS, ACTIVATIONS)))
def test_bluelight(tmp_path: Path, version: int, sharded: bool, layout: str, activation: str):
    meaning = foreign.bluelight(tmp_path / "x", version, sharded, layout, activation)
    name, opened = open_format(tmp_path / "x")
    assert name == "BluelightAI"
    assert (opened.provenance.model_name, opened.provenance.input_hook) == ("some/model", "mlp.hook_in")
    check_means(opened, meaning)
    if activation in ("relu", "jumprelu"):
        convert(tmp_path / "x", tmp_path / "ours")
        check_means(load_clt(tmp_path / "ours"), meaning)
    else:
        with pytest.raises(ConfigError, match="convert to JumpReLU"):
            convert(tmp_path / "x", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_bluelight_on_some_layers(tmp_path: Path, sharded: bool):
    meaning = foreign.bluelight(tmp_path / "x", 2, sharded, "input_layer", "jumprelu", layers=[1, 4, 6])
    opened = load_clt(tmp_path / "x")
    assert opened.provenance.layers == (1, 4, 6)
    check_means(opened, meaning)
    with pytest.raises(ConfigError, match="layers 1, 4, 6"):
        convert(tmp_path / "x", tmp_path / "ours")


def test_bluelight_topk_all_as_in_its_loader(tmp_path: Path):
    foreign.bluelight(tmp_path / "x", 1, False, "input_layer", "topk_all")
    own, as_loader = load_clt(tmp_path / "x"), load_clt(tmp_path / "x", as_loader=True)
    x_BLD = inputs()
    for i, f_BF in enumerate(as_loader.clt.encode(x_BLD)):
        values, places = own.clt.pre(x_BLD[:, i], i).flatten().topk(4)
        expected = torch.zeros(f_BF.numel(), dtype=f_BF.dtype).scatter(0, places, values).view_as(f_BF)
        torch.testing.assert_close(f_BF, expected)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_transcoder_set_and_back(tmp_path: Path, activation: str, skip: bool):
    meaning = foreign.transcoder_set(tmp_path / "x", activation, skip)
    name, opened = open_format(tmp_path / "x")
    assert (name, opened.clt.config.cross_layer) == ("per-layer set", False)
    check_means(opened, meaning)
    convert(tmp_path / "x", tmp_path / "again", to="per-layer")
    for file in sorted((tmp_path / "x").glob("*.safetensors")):
        before, after = load_file(file), load_file(tmp_path / "again" / file.name)
        assert sorted(before) == sorted(after)
        assert all(torch.equal(before[k], after[k]) for k in before)
    if activation != "topk":
        convert(tmp_path / "x", tmp_path / "ours", skip="keep")
        check_means(load_clt(tmp_path / "ours"), meaning)
    if skip and activation != "topk":
        with pytest.raises(ConfigError, match="--drop-skip"):
            convert(tmp_path / "x", tmp_path / "refused")
        convert(tmp_path / "x", tmp_path / "dropped", skip="drop")
        assert not load_clt(tmp_path / "dropped").clt.config.skip


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope(tmp_path: Path, skip: bool):
    meaning = foreign.gemma_scope(tmp_path / "x", skip)
    name, opened = open_format(tmp_path / "x")
    assert name == "Gemma Scope 2"
    assert opened.provenance.policy.n_skip == 4
    check_means(opened, meaning)
    convert(tmp_path / "x", tmp_path / "ours", skip="keep")
    check_means(load_clt(tmp_path / "ours"), meaning)


def by_columns(path: Path, **arrays: np.ndarray) -> None:
    """Write an archive whose matrices lie by columns, as NumPy writes transposed ones."""
    np.savez(path, **{name: np.asfortranarray(a) for name, a in arrays.items()})  # type: ignore[arg-type]


@pytest.mark.parametrize(("archive", "skip"), [(np.savez, False), (by_columns, False), (None, False), (None, True)])
def test_a_list_of_gemma_scope_files(tmp_path: Path, archive, skip: bool):
    meaning = foreign.gemma_scope_set(tmp_path / "x", archive, skip)
    name, opened = open_format(tmp_path / "x")
    p = opened.provenance
    assert (name, p.scan, p.input_hook) == ("per-layer set", "gemmascope-transcoder-16k", "ln2.hook_normalized")
    check_means(opened, meaning)
    convert(tmp_path / "x", tmp_path / "ours", skip="keep")
    check_means(load_clt(tmp_path / "ours"), meaning)


def test_a_list_of_files_of_a_cross_layer_transcoder(tmp_path: Path):
    meaning = foreign.gemma_scope(tmp_path / "x", skip=True)
    (tmp_path / "x" / "config.json").unlink()
    for i in range(foreign.L):
        (tmp_path / "x" / f"layer_{i}_width_262k").mkdir()
        file = tmp_path / "x" / f"params_layer_{i}.safetensors"
        file.rename(tmp_path / "x" / f"layer_{i}_width_262k" / "params.safetensors")
    said = "model_kind: cross_layer_transcoder\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    said += "transcoders:\n" + "".join(f"- layer_{i}_width_262k/params.safetensors\n" for i in range(foreign.L))
    (tmp_path / "x" / "config.yaml").write_text(said)
    name, opened = open_format(tmp_path / "x")
    assert name == "Gemma Scope 2"
    check_means(opened, meaning)


def test_files_listed_on_the_hub_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    meaning = foreign.gemma_scope_set(tmp_path / "x", np.savez, skip=False)
    config = (tmp_path / "x" / "config.yaml").read_text()
    there = tmp_path / "hub"
    (tmp_path / "x").rename(there)
    (tmp_path / "x").mkdir()
    on_hub = config.replace("- layer_", "- hf://google/gemma-scope-2b-pt-transcoders/layer_")
    (tmp_path / "x" / "config.yaml").write_text(on_hub.replace(".npz", ".npz?revision=v1"))
    asked = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, revision))
        return str(there / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    check_means(load_clt(tmp_path / "x"), meaning)
    assert set(asked) == {("google/gemma-scope-2b-pt-transcoders", "v1")}


def test_relu_of_a_config_ignores_thresholds(tmp_path: Path):
    foreign.transcoder_set(tmp_path / "x", "jumprelu", skip=False)
    meaning = foreign.transcoder_set(tmp_path / "same", "relu", skip=False)
    with (tmp_path / "x" / "config.yaml").open("a") as file:
        file.write("activation: relu\n")
    check_means(load_clt(tmp_path / "x"), meaning)


@pytest.mark.parametrize("stored", [False, True])
def test_k_that_the_config_does_not_say(tmp_path: Path, stored: bool):
    meaning = foreign.transcoder_set(tmp_path / "x", "topk", skip=False)
    config = tmp_path / "x" / "config.yaml"
    config.write_text(config.read_text().replace("k: 4\n", ""))
    if stored:
        for file in (tmp_path / "x").glob("*.safetensors"):
            save_file(load_file(file) | {"k": torch.tensor(4)}, file)
        check_means(load_clt(tmp_path / "x"), meaning)
        with pytest.raises(ConfigError, match=r"k=5: .* has k=4; omit k"):
            load_clt(tmp_path / "x", k=5)
        return
    with pytest.raises(FormatError, match="needs k, which it does not say; write one that does"):
        load_clt(tmp_path / "x")
    check_means(load_clt(tmp_path / "x", k=4), meaning)
    convert(tmp_path / "x", tmp_path / "said", to="per-layer", k=4)
    check_means(load_clt(tmp_path / "said"), meaning)


def test_k_is_refused_where_nothing_needs_it(tmp_path: Path):
    foreign.transcoder_set(tmp_path / "x", "relu", skip=False)
    with pytest.raises(ConfigError, match=r"k=4: .* is relu and has no k; omit k"):
        load_clt(tmp_path / "x", k=4)


DAMAGE = {
    "no list": (lambda d, c: c | {"transcoders": "layer_0"}, "transcoders is 'layer_0', expected a list"),
    "empty list": (lambda d, c: c | {"transcoders": []}, "expected a list with a path or URI"),
    "missing file": (lambda d, c: c | {"transcoders": ["a.npz"]}, r"lists a\.npz, which is not there"),
    "no path": (lambda d, c: c | {"transcoders": ["hf://google/x"]}, "is not hf://owner/name/path/to/file"),
    "activation": (lambda d, c: c | {"activation": "gelu"}, "activation 'gelu' is unknown; known: topk, relu"),
    "k": (lambda d, c: c | {"activation": "topk", "k": True}, "positive integer, not True"),
    "compressed": (
        lambda d, c: np.savez_compressed(d / c["transcoders"][0], W_enc=np.ones(3)),
        r"W_enc\.npy is compressed; write it with numpy\.savez",
    ),
    "no archive": (lambda d, c: (d / c["transcoders"][0]).write_bytes(b"x"), "cannot be read as a NumPy archive"),
    "objects": (
        lambda d, c: np.savez(d / c["transcoders"][0], W_enc=np.array([{}, 1], dtype=object)),
        "W_enc has dtype .*O, expected one of",
    ),
    "cut off": (lambda d, c: cut(d / c["transcoders"][1]), "cannot be read as a NumPy archive"),
    "shape": (
        lambda d, c: np.savez(d / c["transcoders"][1], W_enc=np.ones((3, 3))),
        r"W_enc has shape \(3, 3\), expected",
    ),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_lists_are_one_sentence(tmp_path: Path, damage: str):
    foreign.gemma_scope_set(tmp_path / "x", np.savez, skip=False)
    path = tmp_path / "x" / "config.yaml"
    change, words = DAMAGE[damage]
    config = change(tmp_path / "x", yaml.safe_load(path.read_text()))
    if isinstance(config, dict):
        path.write_text(yaml.safe_dump(config))
    with pytest.raises(FormatError, match=words):
        load_clt(tmp_path / "x")


def test_a_bfloat16_folder_serves_float32_inputs_in_float32(tmp_path: Path):
    foreign.gemma_scope(tmp_path / "x", skip=False)
    convert(tmp_path / "x", tmp_path / "half", dtype=torch.bfloat16)
    half, exact = load_clt(tmp_path / "half"), load_clt(tmp_path / "half", dtype=torch.float64)
    assert (half.clt.dtype, exact.clt.dtype) == (torch.bfloat16, torch.float64)
    x_BLD = inputs().float()
    found = half.clt.decode(half.clt.encode_sparse(x_BLD))
    assert found.dtype == torch.float32
    expected = exact.clt.decode(exact.clt.encode_sparse(x_BLD.double()))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
