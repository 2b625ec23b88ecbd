"""Shapes are checked in every test: jaxtyping with beartype on all of the package."""

import os
from pathlib import Path

import jaxtyping

jaxtyping.install_import_hook("crosslayer", "typechecker.check").__enter__()
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton's kernels run on the processor where there is no GPU; it reads this when it is imported, which PyTorch may do.
if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

import tiny  # noqa: E402
from crosslayer.host.host import Host  # noqa: E402
from crosslayer.training.config import TrainConfig  # noqa: E402
from pairs import Pair, make_pair  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a GPU or the network is skipped, with the reason, where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        if item.get_closest_marker("network"):
            item.add_marker(pytest.mark.skip(reason="the tests run offline"))


@pytest.fixture(scope="session")
def host_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_host(tmp_path_factory.mktemp("hosts") / "tiny-qwen3")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text_folder(tmp_path_factory.mktemp("text") / "words")


@pytest.fixture(scope="session")
def host(host_folder: Path) -> Host:
    from crosslayer.host.host import load_host

    return load_host(host_folder)


@pytest.fixture(scope="session")
def tiny_config(host_folder: Path, text_folder: Path) -> TrainConfig:
    """A run of a second or two."""
    return TrainConfig(
        model=str(host_folder),
        text=(str(text_folder),),
        tokens=12_000,
        n_features=64,
        l0_per_layer=4.0,
        batch=200,
        context=33,
        buffer_tokens=1024,
        rows_per_forward=8,
        scale_tokens=2000,
        calibration_tokens=8000,
        lr=3e-3,
        dead_after=2000,
        warmup=0.03,
        beta2=0.99,
        eval_tokens=1500,
        checkpoint_every=20,
        log_every=5,
        l0_start=4.0,
        l0_ramp=0.4,
    )


@pytest.fixture(scope="session")
def pair() -> Pair:
    """One host and transcoder for all tests of graphs."""
    return make_pair()
