"""What a format of transcoder folders is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from crosslayer.clt.folder import Folder
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.formats.writing import FilePlan

Plan = Callable[[Opened, torch.dtype | None], list[FilePlan]]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of transcoder folders.

    Attributes:
        name: name that `inspect` prints.
        target: name that `convert --to` takes; None for a format that is only read.
        marker: file by which its folders are known.
        recognises: whether a folder has this format.
        open: open a folder; as_loader interprets it as the format's own loader does, where that differs.
        plan: files to write for a transcoder; None without a target.
        holds_skip: whether other tools open an affine skip in this format.
    """

    name: str
    target: str | None = None
    marker: str
    recognises: Callable[[Folder], bool]
    open: Callable[[Folder, bool], Opened]
    plan: Plan | None = None
    holds_skip: bool = True
