"""Open a transcoder by the path of its folder, or of the run that trained it."""

from __future__ import annotations

from pathlib import Path

import torch

from crosslayer.clt.formats import published
from crosslayer.clt.formats.published import Opened
from crosslayer.core.errors import FormatError


def load_clt(path: str | Path, *, dtype: torch.dtype | None = None) -> Opened:
    """A transcoder in the published format, with what its folder says of it.

    Args:
        path: the folder that holds `config.yaml`, or a run folder, whose `clt/` is opened.
        dtype: of the weights; that of the files unless given.

    Raises:
        FormatError: naming the file, the tensor, what was found and what was expected.
    """
    return published.load(clt_folder(Path(path)), dtype=dtype)


def clt_folder(path: Path) -> Path:
    """The transcoder's folder: the path itself, or `clt/` of a run."""
    if (path / "run.json").is_file():
        if not (path / "clt").is_dir():
            raise FormatError(f"{path} is a run that has not finished; go on with crosslayer train --resume {path}")
        return path / "clt"
    return path
