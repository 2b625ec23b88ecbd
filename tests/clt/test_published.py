"""The published format: back bit-equal, and every damage named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from clt.test_transcoder import make
from crosslayer.clt.config import Provenance
from crosslayer.clt.formats import published
from crosslayer.clt.inspect import describe
from crosslayer.clt.open import load_clt
from crosslayer.core.errors import ConfigError, FormatError
from crosslayer.records.policy import FirstPosition

PROVENANCE = Provenance(model_name="some/model", scan="test", policy=FirstPosition(n_skip=4), extra={"trained_as": "x"})


@settings(max_examples=10, deadline=None)
@given(
    activation=st.sampled_from(["jumprelu", "relu"]), cross_layer=st.booleans(), skip=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_comes_back_bit_equal(tmp_path_factory, activation: str, cross_layer: bool, skip: bool, dtype: torch.dtype):
    clt = make(activation, dtype=dtype, cross_layer=cross_layer, skip=skip)
    folder = tmp_path_factory.mktemp("clt") / "one"
    published.save(clt, PROVENANCE, folder)
    back, provenance = load_clt(folder)
    assert back.config == clt.config
    assert provenance == PROVENANCE
    for (name, a), (_, b) in zip(clt.named_parameters(), back.named_parameters(), strict=True):
        assert (a.dtype, torch.equal(a, b)) == (b.dtype, True), name
    assert not describe(folder).faults


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    published.save(make(dtype=torch.float32), PROVENANCE, tmp_path / "clt")
    return tmp_path / "clt"


def test_files_are_those_circuit_tracer_reads(folder: Path):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["model_kind"], config["model_name"]) == ("cross_layer_transcoder", "some/model")
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "mlp.hook_out")
    assert len(list(folder.glob("W_enc_*.safetensors"))) == 3
    for i in range(3):
        assert load_file(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"].shape == (24, 3 - i, 8)
        assert load_file(folder / f"W_enc_{i}.safetensors")[f"threshold_{i}"].shape == (24,)


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {k: v for k, v in (load_file(path) | changes).items() if v is not None}
    save_file(tensors, path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "missing decoder": (lambda d: (d / "W_dec_1.safetensors").unlink(), "W_dec_1.safetensors is missing"),
    "truncated": (lambda d: cut_short(d / "W_enc_2.safetensors"), "W_enc_2.safetensors cannot be read"),
    "pickle": (lambda d: torch.save({}, d / "W_dec_0.safetensors"), "W_dec_0.safetensors cannot be read"),
    "shape": (
        lambda d: rewrite(d / "W_dec_1.safetensors", W_dec_1=torch.zeros(24, 3, 8)),
        r"W_dec_1 has shape \(24, 3, 8\), expected \(24, 2, 8\)",
    ),
    "nan": (lambda d: rewrite(d / "W_enc_1.safetensors", b_enc_1=torch.full((24,), torch.nan)), "b_enc_1 holds NaN"),
    "integers": (lambda d: rewrite(d / "W_enc_1.safetensors", b_enc_1=torch.ones(24, dtype=torch.int32)), "int32"),
    "no tensor": (lambda d: rewrite(d / "W_enc_1.safetensors", threshold_1=None), "no tensor threshold_1"),
    "kind": (
        lambda d: (d / "config.yaml").write_text("model_kind: transcoder_set"),
        "expected 'cross_layer_transcoder'",
    ),
    "not yaml": (lambda d: (d / "config.yaml").write_text("{:"), "not YAML"),
    "no config": (lambda d: (d / "config.yaml").unlink(), "no config.yaml"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(folder: Path, name: str):
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(FormatError, match=words):
        load_clt(folder)


def test_topk_is_refused_and_nothing_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="convert to JumpReLU"):
        published.save(make("topk"), PROVENANCE, tmp_path / "clt")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(folder: Path):
    before = sorted(folder.iterdir())
    with pytest.raises(FormatError, match="not empty"):
        published.save(make(dtype=torch.float32), PROVENANCE, folder)
    assert sorted(folder.iterdir()) == before
