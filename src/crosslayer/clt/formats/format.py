"""What a format of transcoder folders is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from crosslayer.clt.folder import Folder
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.formats.writing import FilePlan


class Reading(NamedTuple):
    """How to read what a format leaves open.

    Attributes:
        as_loader: as the format's own loader does, where that differs.
        k: active features per token and layer of a TopK set that does not say.
    """

    as_loader: bool = False
    k: int | None = None


Plan = Callable[[Opened, torch.dtype | None], list[FilePlan]]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of transcoder folders.

    Attributes:
        name: name that `inspect` prints.
        target: name that `convert --to` takes; None for a format that is only read.
        marker: file by which its folders are known.
        recognises: whether a folder has this format.
        open: open a folder.
        plan: files to write for a transcoder; None without a target.
        holds_skip: whether other tools open an affine skip in this format.
    """

    name: str
    target: str | None = None
    marker: str
    recognises: Callable[[Folder], bool]
    open: Callable[[Folder, Reading], Opened]
    plan: Plan | None = None
    holds_skip: bool = True
