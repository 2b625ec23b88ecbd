"""One pass of text through host and encoder, into a sketch of each layer and a sample of tokens.

The work is a list of batches of whole rows, the same whatever the number of ranks. Each process keeps one *part*: what
it has seen, and which batches that were; it is saved now and then. A pass that was killed goes on with the batches that
no saved part has, on as many ranks as there are then; parts are merged at the end, in any order to the same result.
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
"""Of the time, at most, that saving may take."""


class Batch(NamedTuple):
    """Whole rows of one stream."""

    stream: int
    first_row: int
    n_rows: int


def batches_of(rows_of_streams: Sequence[int], rows_at_once: int) -> list[Batch]:
    """Cut the rows of streams that follow one another in the token file into batches that mix no two."""
    batches, first = [], 0
    for stream, n_rows in enumerate(rows_of_streams):
        batches += [Batch(stream, first + at, min(rows_at_once, n_rows - at)) for at in range(0, n_rows, rows_at_once)]
        first += n_rows
    return batches


class Seen(NamedTuple):
    """What a pass, or a part of it, has seen."""

    sketches: list[LayerSketch]
    sample: TokenSample
    done: set[int]
    """Numbers of the batches."""

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
        assert not self.done & other.done, "two parts have seen the same text"
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
    on_progress: Update = lambda done, figures="": None,
) -> Seen:
    """Take all rows in, going on from the parts in `folder`; on several ranks each takes its share, and all get the
    whole.

    Args:
        tokens_BT: rows of token ids, stream after stream.
        rows_of_streams: how many of each.
        folder: where parts are saved, on a disk that all ranks see.
    """
    context = tokens_BT.shape[1]
    nothing = lambda: Seen.nothing(clt, len(rows_of_streams), context, settings, host.device)  # noqa: E731
    batches = batches_of(rows_of_streams, rows_at_once)
    found = parallel.gather_objects(sorted(p.name for p in folder.glob("part-*.safetensors")))[0]
    saved: set[int] = set()
    for name in found:
        saved.update(load_file(folder / name)["done"].tolist())
    left = [i for i in range(len(batches)) if i not in saved]
    # Numbers may have gaps, where a rank died before its first part.
    first = 1 + max((int(name[5:10]) for name in found), default=-1)
    mine, path = nothing(), folder / f"part-{first + parallel.rank():05d}.safetensors"
    _keep_encoders(clt, tokens=len(left) * rows_at_once * context)
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
        # Also where a person interrupts: what was seen is not lost, but for a batch half taken, which would count
        # twice.
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
    assert len(whole.done) == len(batches), "a part of the text was not seen"
    return whole


def take(seen: Seen, host: Host, clt: CLT, tokens_BT: NDArray, batch: Batch, number: int) -> None:
    """Take one batch in."""
    rows = slice(batch.first_row, batch.first_row + batch.n_rows)
    x_BLD, _ = collect_activations(host, torch.from_numpy(tokens_BT[rows].astype(np.int64)))
    active = clt.encode_sparse(x_BLD)
    n_skip = host.policy.n_skip
    for sketch, a in zip(seen.sketches, active, strict=True):
        sketch.add(a, batch.stream, batch.first_row, n_skip)
    seen.sample.add(active, batch.first_row, tokens_BT.shape[1], n_skip)
    seen.done.add(number)


def _keep_encoders(clt: CLT, tokens: int) -> None:
    """A prompt need not keep the encoders in memory; a pass reads them again with each batch, so it should."""
    if tokens and clt.W_enc.reader is not None:
        clt.W_enc.read_all()
