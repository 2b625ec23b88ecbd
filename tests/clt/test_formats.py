"""Every format has the features and the reconstruction of its authors' formulas."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clt import foreign
from clt.test_transcoder import inputs
from crosslayer.clt.convert import convert
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.open import load_clt, open_format
from crosslayer.core.errors import ConfigError

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
