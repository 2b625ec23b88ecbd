"""The published format: a bitwise identical round trip, and an error for every kind of damage."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from clt.test_transcoder import inputs, make
from crosslayer.clt.config import Provenance
from crosslayer.clt.formats import published
from crosslayer.clt.inspect import describe
from crosslayer.clt.open import load_clt
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError, FormatError
from crosslayer.schemas.policy import FirstPosition

PROVENANCE = Provenance(model_name="some/model", scan="test", policy=FirstPosition(n_skip=4), extra={"trained_as": "x"})


def all_tensors(clt: CLT) -> dict[str, torch.Tensor]:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
    return {f"{name}.{i}": t.detach() for name in names for i, t in enumerate(getattr(clt, name))}


@settings(max_examples=10, deadline=None)
@given(
    activation=st.sampled_from(["jumprelu", "relu"]),
    cross_layer=st.booleans(),
    skip=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_round_trip_is_bitwise_identical(
    tmp_path_factory, activation: str, cross_layer: bool, skip: bool, dtype: torch.dtype
):
    clt = make(activation, dtype=dtype, cross_layer=cross_layer, skip=skip)
    folder = tmp_path_factory.mktemp("clt") / "one"
    published.save(clt, PROVENANCE, folder)
    back, provenance = load_clt(folder)
    assert back.config == clt.config
    assert provenance == PROVENANCE
    before, after = all_tensors(clt), all_tensors(back)
    assert list(before) == list(after)
    for name in before:
        assert (before[name].dtype, torch.equal(before[name], after[name])) == (after[name].dtype, True), name
    assert not describe(folder, deep=True).faults


def test_matrices_are_loaded_lazily_and_rows_read_alone(folder: Path):
    clt = load_clt(folder).clt
    rows = clt.decoder_rows(1, torch.tensor([5, 6, 7, 2, 23]))
    f = clt.encode_sparse(inputs(3).float())
    assert all((a.value_K > 0).all() for a in f)
    clt.decode(f)
    assert [clt.W_dec.here(i) for i in range(3)] == [False] * 3
    expected = load_file(folder / "W_dec_1.safetensors")["W_dec_1"][torch.tensor([5, 6, 7, 2, 23])]
    assert torch.equal(rows, expected)
    assert torch.equal(clt.W_dec[1].detach()[5], rows[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    published.save(make(dtype=torch.float32), PROVENANCE, tmp_path / "clt")
    return tmp_path / "clt"


def test_files_are_those_that_circuit_tracer_loads(folder: Path):
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


def config(folder: Path, **changes: object) -> None:
    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))


def long_header(path: Path) -> None:
    path.write_bytes((10**9).to_bytes(8, "little") + path.read_bytes()[8:])


nan = torch.full((24,), torch.nan)
DAMAGES = {
    "missing decoder": (lambda d: (d / "W_dec_1.safetensors").unlink(), "W_dec_1.safetensors is missing"),
    "missing layer": (lambda d: (d / "W_enc_1.safetensors").unlink(), "W_enc_1.safetensors is missing"),
    "missing last layer": (lambda d: (d / "W_enc_2.safetensors").unlink(), "W_enc_2.safetensors is missing"),
    "truncated": (lambda d: cut_short(d / "W_enc_2.safetensors"), "W_enc_2.safetensors cannot be read"),
    "long header": (lambda d: long_header(d / "W_dec_2.safetensors"), "W_dec_2.safetensors cannot be read"),
    "pickle": (lambda d: torch.save({}, d / "W_dec_0.safetensors"), "W_dec_0.safetensors cannot be read"),
    "shape": (
        lambda d: rewrite(d / "W_dec_1.safetensors", W_dec_1=torch.zeros(24, 3, 8)),
        r"W_dec_1 has shape \(24, 3, 8\), expected \(24, 2, 8\)",
    ),
    "different number of features": (
        lambda d: rewrite(d / "W_enc_1.safetensors", W_enc_1=torch.zeros(23, 8)),
        r"W_enc_1 has shape \(23, 8\), expected \(24, 8\)",
    ),
    "nan": (lambda d: rewrite(d / "W_enc_1.safetensors", b_enc_1=nan), "b_enc_1 holds NaN"),
    "negative threshold": (
        lambda d: rewrite(d / "W_enc_1.safetensors", threshold_1=-torch.ones(24)),
        "no negative values",
    ),
    "integers": (lambda d: rewrite(d / "W_enc_1.safetensors", b_enc_1=torch.ones(24, dtype=torch.int32)), "I32"),
    "no tensor": (lambda d: rewrite(d / "W_enc_1.safetensors", threshold_1=None), "no tensor threshold_1"),
    "kind": (lambda d: config(d, model_kind="sae"), "expected 'cross_layer_transcoder' or 'transcoder_set'"),
    "no hook": (lambda d: config(d, feature_input_hook=None), "no feature_input_hook; name one of mlp.hook_in"),
    "unknown hook": (lambda d: config(d, feature_output_hook="attn.z"), "'attn.z' is unknown; known: mlp.hook_out"),
    "policy": (lambda d: config(d, crosslayer={"policy": {"n_skip": -1}}), "expected prepend and n_skip"),
    "not yaml": (lambda d: (d / "config.yaml").write_text("{:"), "not YAML"),
    "a list": (lambda d: (d / "config.yaml").write_text("[1]"), "holds list, expected a mapping"),
    "no config": (lambda d: (d / "config.yaml").unlink(), "no config.yaml"),
    "empty": (lambda d: [p.unlink() for p in d.iterdir()], "is not a transcoder folder"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(folder: Path, name: str):
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(FormatError, match=words):
        load_clt(folder)


def test_a_file_is_refused(folder: Path):
    with pytest.raises(FormatError, match="is a file; give the folder"):
        load_clt(folder / "config.yaml")


@pytest.mark.parametrize(("file", "tensor"), [("W_enc_1", "W_enc_1"), ("W_dec_0", "W_dec_0")])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_with_nan_is_named_when_it_is_used(folder: Path, file: str, tensor: str, bad: float):
    path = folder / f"{file}.safetensors"
    weights = load_file(path)[tensor]
    weights[3] = bad
    rewrite(path, **{tensor: weights})
    clt = load_clt(folder).clt
    with pytest.raises(FormatError, match=f"{tensor} holds NaN or infinity"):
        clt.decoder_rows(0, torch.arange(24)) if "dec" in tensor else clt.encode(inputs(3).float())
    assert f"{tensor} holds NaN" in describe(folder, deep=True).faults[0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), whole_file=st.booleans())
def test_random_damage_gives_an_error_or_the_right_result(tmp_path_factory, seed: int, whole_file: bool):
    folder = tmp_path_factory.mktemp("damaged") / "clt"
    clt = make(dtype=torch.float32)
    published.save(clt, PROVENANCE, folder)
    chance = random.Random(seed)
    victim = chance.choice(sorted(folder.iterdir()))
    data = bytearray(victim.read_bytes())
    if whole_file:
        del data[chance.randrange(len(data)) :]
    else:
        # In the header or the config, where a flipped byte changes the meaning.
        end = len(data) if victim.suffix == ".yaml" else 8 + int.from_bytes(data[:8], "little")
        data[chance.randrange(end)] = chance.randrange(256)
    victim.write_bytes(bytes(data))
    x_BLD = inputs(5).float()
    try:
        back = load_clt(folder).clt
        found = back.decode(back.encode_sparse(x_BLD))
    except FormatError:
        return
    torch.testing.assert_close(found, clt.decode(clt.encode_sparse(x_BLD)).detach())


def test_topk_is_refused_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="convert to JumpReLU"):
        published.save(make("topk"), PROVENANCE, tmp_path / "clt")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_refused(folder: Path):
    before = sorted(folder.iterdir())
    with pytest.raises(FormatError, match="not empty"):
        published.save(make(dtype=torch.float32), PROVENANCE, folder)
    assert sorted(folder.iterdir()) == before
