"""One pass of text through host and encoder, into a sketch of each layer and a sample of tokens.

The work is a list of batches of whole rows, the same for any number of ranks. Each process saves one *part* at
intervals: its results, and the batches that they cover. A killed pass resumes with the batches that no saved part
covers, on any number of ranks. Parts are merged at the end; the order does not change the result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from crosslayer import parallel
from crosslayer.bundles.settings import ScanSettings
from crosslayer.clt.transcoder import CLT
from crosslayer.core.files import replacing
from crosslayer.core.progress import Update
from crosslayer.data.stream import collect_activations
from crosslayer.features.sample import TokenSample
from crosslayer.features.sketch import LayerSketch
from crosslayer.host.host import Host

SAVE_EVERY_S = 60.0
SAVE_SHARE = 0.05
"""Max share of time spent on saving."""


class Batch(NamedTuple):
    """Whole rows of one stream."""

    stream: int
    first_row: int
    n_rows: int


def batches_of(rows_of_streams: Sequence[int], rows_at_once: int) -> list[Batch]:
    """Cut the rows of consecutive streams in the token file into batches, each of one stream."""
    batches, first = [], 0
    for stream, n_rows in enumerate(rows_of_streams):
        batches += [Batch(stream, first + at, min(rows_at_once, n_rows - at)) for at in range(0, n_rows, rows_at_once)]
        first += n_rows
    return batches


class Seen(NamedTuple):
    """Results of a pass, or of a part of it."""

    sketches: list[LayerSketch]
    sample: TokenSample
    done: set[int]
    """Numbers of the covered batches."""

    @classmethod
    def nothing(cls, clt: CLT, n_streams: int, context: int, settings: ScanSettings, device: torch.device) -> Seen:
        c = clt.config
        sketches = [LayerSketch(i, c.n_features, n_streams, context, settings, device) for i in range(c.n_layers)]
        return cls(sketches, TokenSample(settings.sample_entries), set())

    def save(self, path: Path) -> None:
        arrays = self.sample.state() | {"done": np.array(sorted(self.done), np.int64)}
        for sketch in self.sketches:
            arrays |= {f"{sketch.layer}.{name}": array for name, array in sketch.state().items()}
        with replacing(path) as temporary:
            save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, temporary)

    def restore(self, path: Path) -> None:
        arrays = load_file(path)
        self.sample.restore(arrays)
        self.done.update(arrays["done"].tolist())
        for sketch in self.sketches:
            prefix = f"{sketch.layer}."
            sketch.restore({name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)})

    def merge(self, other: Seen) -> None:
        assert not self.done & other.done, "two parts cover the same text"
        for mine, theirs in zip(self.sketches, other.sketches, strict=True):
            mine.merge(theirs)
        self.sample.merge(other.sample)
        self.done.update(other.done)


@torch.no_grad()
def scan(
    host: Host,
    clt: CLT,
    tokens_BT: NDArray,
    rows_of_streams: Sequence[int],
    settings: ScanSettings,
    folder: Path,
    *,
    rows_at_once: int = 16,
    on_progress: Update = lambda done, metrics="": None,
) -> Seen:
    """Process all rows, resuming from the parts in `folder`; ranks share the work, and all get the full result.

    Args:
        tokens_BT: rows of token ids, stream after stream.
        rows_of_streams: number of rows per stream.
        folder: where parts are saved, on a disk that all ranks can access.
    """
    context = tokens_BT.shape[1]
    nothing = lambda: Seen.nothing(clt, len(rows_of_streams), context, settings, host.device)  # noqa: E731
    batches = batches_of(rows_of_streams, rows_at_once)
    found = parallel.gather_objects(sorted(p.name for p in folder.glob("part-*.safetensors")))[0]
    saved: set[int] = set()
    for name in found:
        saved.update(load_file(folder / name)["done"].tolist())
    left = [i for i in range(len(batches)) if i not in saved]
    # Numbers may have gaps, if a rank died before its first part.
    first = 1 + max((int(name[5:10]) for name in found), default=-1)
    mine, path = nothing(), folder / f"part-{first + parallel.rank():05d}.safetensors"
    _load_encoders(clt, tokens=len(left) * rows_at_once * context)
    saved_at, pause_s = time.monotonic(), SAVE_EVERY_S
    share = left[parallel.rank() :: parallel.world_size()]
    whole_batches = True
    try:
        for n, i in enumerate(share, 1):
            whole_batches = False
            take(mine, host, clt, tokens_BT, batches[i], i)
            whole_batches = True
            on_progress((len(saved) + n * parallel.world_size()) / len(batches))
            if time.monotonic() - saved_at > pause_s:
                began = time.monotonic()
                mine.save(path)
                saved_at = time.monotonic()
                pause_s = max(SAVE_EVERY_S, (saved_at - began) / SAVE_SHARE)
    finally:
        # Save on interruption too, without a half-processed batch, which would count twice.
        if mine.done and whole_batches:
            mine.save(path)
    parallel.barrier()
    whole = nothing()
    for part in sorted(folder.glob("part-*.safetensors")):
        if part == path:
            whole.merge(mine)
        else:
            other = nothing()
            other.restore(part)
            whole.merge(other)
    assert len(whole.done) == len(batches), "a part of the text is missing"
    return whole


def take(seen: Seen, host: Host, clt: CLT, tokens_BT: NDArray, batch: Batch, number: int) -> None:
    """Process one batch."""
    rows = slice(batch.first_row, batch.first_row + batch.n_rows)
    x_BLD, _ = collect_activations(host, torch.from_numpy(tokens_BT[rows].astype(np.int64)))
    active = clt.encode_sparse(x_BLD)
    n_skip = host.policy.n_skip
    for sketch, a in zip(seen.sketches, active, strict=True):
        sketch.add(a, batch.stream, batch.first_row, n_skip)
    seen.sample.add(active, batch.first_row, tokens_BT.shape[1], n_skip)
    seen.done.add(number)


def _load_encoders(clt: CLT, tokens: int) -> None:
    """Load the encoders into memory: a pass reads them again with each batch."""
    if tokens and clt.W_enc.reader is not None:
        clt.W_enc.read_all()
