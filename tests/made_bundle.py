"""A tiny host with a transcoder, and the bundle of it on a folder of text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny
from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.bundles.settings import ScanSettings
from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.formats import published
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.init import initialise
from crosslayer.clt.transcoder import CLT
from crosslayer.features.build import build_features
from crosslayer.host.host import Host, load_host

CONTEXT, TOKENS, N_FEATURES = 32, 2_400, 24
SETTINGS = ScanSettings(
    n_top=3,
    n_quantiles=2,
    per_quantile=2,
    n_reservoir=8,
    window=12,
    before=7,
    n_logits=5,
    n_neighbours=4,
    n_coactive=3,
    n_virtual=4,
)


class Made(NamedTuple):
    """A bundle with all that it was made of."""

    bundle: FeatureBundle
    host: Host
    clt: CLT
    folder: Path
    """Of the transcoder."""
    text: Path

    @property
    def rows_BT(self) -> NDArray:
        return np.asarray(self.bundle.tokens).reshape(-1, CONTEXT).astype(np.int64)

    def activations(self) -> NDArray:
        """(rows, T, features by flat id), 0 where there are none: by the dense path."""
        with torch.no_grad():
            x = self.host.tap(torch.from_numpy(self.rows_BT)).x_BTLD
            dense = self.clt.encode(x.flatten(0, 1))
        f = torch.cat(dense, dim=1).view(*x.shape[:2], -1)
        f[:, : self.host.policy.n_skip] = 0
        return f.numpy()


def write_clt(folder: Path, host: Path, seed: int = 0, threshold: float = 0.45) -> Path:
    clt = CLT(CLTConfig(n_layers=tiny.N_LAYERS, d_model=tiny.D_MODEL, n_features=N_FEATURES))
    initialise(clt, seed=seed, threshold=threshold)
    # One feature that never fires, and one that nearly always does.
    clt.threshold[1].data[5] = 1e6
    clt.b_enc[2].data[7] = 50.0
    published.save(clt, Provenance(model_name=str(host), scan="tiny"), folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text_folder(tmp_path_factory.mktemp("held") / "words", n_files=120)


@pytest.fixture(scope="session")
def clt_folder(tmp_path_factory: pytest.TempPathFactory, host_folder: Path) -> Path:
    return write_clt(tmp_path_factory.mktemp("features") / "clt", host_folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, clt_folder: Path, texts: Path) -> Made:
    from crosslayer.clt.open import load_clt

    opened: Opened = load_clt(clt_folder)
    host = load_host(opened.provenance.model_name)
    out = tmp_path_factory.mktemp("bundles") / "whole"
    bundle = build_features(
        opened,
        text=[str(texts)],
        out=out,
        model=host,
        tokens=TOKENS,
        context=CONTEXT,
        settings=SETTINGS,
        rows_at_once=5,
    )
    return Made(bundle, host, opened.clt, clt_folder, texts)


def contents(bundle: Path) -> dict[str, bytes]:
    """Every file of a bundle but its manifest, whose times differ."""
    return {p.name: p.read_bytes() for p in sorted(bundle.iterdir()) if p.name != "manifest.json"}
