"""`ReplacementModel` agrees with host and transcoder used separately."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import crosslayer as xl
import tiny
from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.formats import published
from crosslayer.clt.init import initialise
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError, HostError
from crosslayer.eval.replacement_model import tokens_of
from crosslayer.host.host import load_host

PROMPT = "def f(self):\n    return"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    host = tiny.write_host(tmp_path / "host")
    clt = CLT(CLTConfig(n_layers=tiny.N_LAYERS, d_model=tiny.D_MODEL, n_features=64))
    initialise(clt, seed=0, threshold=0.2)
    published.save(clt, Provenance(model_name=str(host), scan="tiny"), tmp_path / "clt")
    return host, tmp_path / "clt"


def test_the_reference_cards_snippet(folders: tuple[Path, Path]):
    model = xl.ReplacementModel.from_pretrained(str(folders[0]), str(folders[1]), dtype=torch.float32)
    features = model.features(PROMPT)
    x_TLD, y_TLD = (t[0] for t in model.host.tap(model.host.encode(PROMPT)))
    assert features.shape == (tiny.N_LAYERS, len(x_TLD), 64)
    dense = features.to_dense()
    assert not dense[:, 0].any()
    for i, f_BF in enumerate(model.clt.encode(x_TLD[1:])):
        torch.testing.assert_close(dense[i, 1:], f_BF.detach())
    assert features.values().gt(0).all()
    reconstruction = model.reconstruct(PROMPT)
    assert torch.equal(reconstruction[0], y_TLD[0])
    torch.testing.assert_close(reconstruction[1:], model.clt(x_TLD[1:]).detach())


def test_logits_with_errors_equal_the_hosts(folders: tuple[Path, Path]):
    model = xl.ReplacementModel.from_pretrained(*folders)
    own = model.host.run(model.host.encode(PROMPT))
    assert own is not None
    torch.testing.assert_close(model.logits(PROMPT, replace=False), own[0])
    torch.testing.assert_close(model.logits(PROMPT, errors=True), own[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(PROMPT, replace=[1], errors=True), own[0], rtol=1e-4, atol=1e-4)
    replaced, last = model.logits(PROMPT), model.logits(PROMPT, replace=[tiny.N_LAYERS - 1])
    assert (replaced - own[0]).abs().max() > 0.1
    assert (last - own[0]).abs().max() > 0.1
    assert not torch.allclose(last, replaced)


def test_token_ids_are_unchanged(folders: tuple[Path, Path]):
    model = xl.ReplacementModel.from_pretrained(*folders)
    ids = model.host.encode(PROMPT)[0]
    torch.testing.assert_close(model.logits(ids.tolist()), model.logits(PROMPT))
    with pytest.raises(ConfigError, match="token 320 is not among the 320"):
        model.features([1, 320])
    with pytest.raises(ConfigError, match="no tokens"):
        model.features([])
    with pytest.raises(ConfigError, match="no layer 7"):
        model.logits(PROMPT, replace=[7])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (torch.tensor([1.5, 2.0]), "token ids are whole numbers, not 1.5"),
        (torch.tensor([True, False]), "token ids are whole numbers, not True"),
        (torch.ones(2, 3, dtype=torch.long), "one row of token ids"),
        (torch.zeros(0), "no tokens"),
        ([9999], "token 9999 is not among"),
    ],
)
def test_what_is_no_row_of_token_ids_is_refused(folders: tuple[Path, Path], prompt: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        tokens_of(load_host(folders[0]), prompt)


def test_another_host_of_the_same_shape_is_used_with_a_warning(folders: tuple[Path, Path], tmp_path: Path):
    other = tiny.write_host(tmp_path / "other")
    with pytest.warns(UserWarning, match=f"was trained on {folders[0]}; it is used with {other}"):
        xl.ReplacementModel.from_pretrained(other, folders[1])


def test_a_host_with_some_layers_taps_those(folders: tuple[Path, Path]):
    whole, some = load_host(folders[0]), load_host(folders[0], layers=[0, 2])
    tokens_BT = whole.encode(PROMPT)
    assert some.n_layers == 2
    assert torch.equal(some.tap(tokens_BT).x_BTLD, whole.tap(tokens_BT).x_BTLD[:, :, [0, 2]])
    with pytest.raises(HostError, match="no layer 9"):
        load_host(folders[0], layers=[9])
