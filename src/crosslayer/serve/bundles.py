"""`/api/bundles`: lists of features, one feature, search, the feature map, labels and pins."""

from __future__ import annotations

import re
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Query, Request, Response
from fastapi import Path as PathParameter

from crosslayer.bundles.bundle import MOST_LABEL, FeatureBundle
from crosslayer.bundles.report import scores_in_words
from crosslayer.bundles.schema import NEIGHBOURS
from crosslayer.core.errors import ConfigError
from crosslayer.serve.opened import library, opened

router = APIRouter(tags=["features"])
MOST = 500


def _bundle(request: Request, id: str) -> FeatureBundle:
    return opened(request).bundle(library(request).find("bundle", id).path)


@router.get("/bundles/{id}")
def bundle(request: Request, id: str) -> dict[str, Any]:
    """Return the manifest data of a bundle."""
    found = _bundle(request, id)
    return found.manifest.model_dump(exclude={"files"}) | {"levels": _levels(found)}


def _levels(found: FeatureBundle) -> int:
    return found.array("group").shape[1] if found.has("group") else 0


@router.get("/bundles/{id}/features")
def features(
    request: Request,
    id: str,
    sort: str = "rank",
    descending: bool = False,
    limit: Annotated[int, Query(ge=1, le=MOST)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**40)] = 0,
    filters: Annotated[list[str], Query(alias="filter", max_length=20)] = [],  # noqa: B006
) -> list[dict[str, Any]]:
    """Return one page of the feature list. A filter is `column:min:max`; either bound may be empty."""
    bounds = dict(map(_filter, filters))
    found = _bundle(request, id).page(sort, descending=descending, limit=limit, offset=offset, filters=bounds)
    return [x._asdict() for x in found]


def _filter(text: str) -> tuple[str, tuple[float | None, float | None]]:
    parts = text.split(":")
    try:
        column, least, greatest = parts[0], *(float(p) if p else None for p in parts[1:])
    except ValueError as error:
        raise ConfigError(f"the filter {text!r} is invalid; write column:min:max") from error
    return column, (least, greatest)


@router.get("/bundles/{id}/search")
def search(
    request: Request,
    id: str,
    q: Annotated[str, Query(max_length=500)],
    limit: Annotated[int, Query(ge=1, le=MOST)] = 50,
) -> list[dict[str, Any]]:
    """Find features that match all words; see `FeatureBundle.search`."""
    return [x._asdict() for x in _bundle(request, id).search(q, limit)]


@router.get("/bundles/{id}/features/{layer}/{index}")
def feature(request: Request, id: str, layer: int, index: int) -> dict[str, Any]:
    """Return one feature with all its neighbours and labels."""
    found = _bundle(request, id)
    n = found.id(layer, index)
    near = {by: [x._asdict() for x in found.neighbours(layer, index, by)] for by in NEIGHBOURS}
    labels = found.user.labels([n]).get(n, [])
    given = [_plain(x) | {"scored": scores_in_words(x.scores or {})} for x in labels]
    return _plain(found.feature(layer, index)) | {"neighbours": near, "labels": given, "pinned": n in found.user.pins()}


def _plain(value: Any) -> Any:
    """Convert nested named tuples to objects; NaN becomes null."""
    if hasattr(value, "_asdict"):
        return {k: _plain(v) for k, v in value._asdict().items()}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and value != value else value


@router.get("/bundles/{id}/labels")
def labels(request: Request, id: str, of: Annotated[list[str], Query(max_length=MOST)]) -> dict[str, str]:
    """Return labels of features, each given as `layer/index`; features without a label are left out."""
    found = _bundle(request, id)
    ids = {}
    for name in of:
        layer, slash, index = name.partition("/")
        if not (slash and re.fullmatch("[0-9]{1,9}", layer) and re.fullmatch("[0-9]{1,9}", index)):
            raise ConfigError(f"{name!r} is not a feature; write layer/index, as in 3/120")
        ids[found.id(int(layer), int(index))] = name
    return {ids[n]: label for n, (label, _) in found.labels(list(ids)).items() if label}


@router.put("/bundles/{id}/features/{layer}/{index}/label")
def set_label(
    request: Request,
    id: str,
    layer: int,
    index: int,
    label: Annotated[str, Body(max_length=MOST_LABEL)],
    over: Annotated[str | None, Body(max_length=MOST_LABEL)] = None,
) -> dict[str, str | None]:
    """Save a person's label; an empty one deletes it. Return the label that is shown now.

    `over` is the label that it replaces, if given; 409 if the stored label differs.
    """
    found = _bundle(request, id)
    n = found.id(layer, index)
    found.set_label(layer, index, label, over=over)
    shown, source = found.labels([n])[n]
    return {"label": shown, "label_from": source}


@router.put("/bundles/{id}/features/{layer}/{index}/pin")
def pin(
    request: Request, id: str, layer: int, index: int, pinned: Annotated[bool, Body(embed=True)]
) -> dict[str, bool]:
    """Pin a feature, or unpin it."""
    found = _bundle(request, id)
    found.user.pin(found.id(layer, index), pinned=pinned)
    return {"pinned": pinned}


@router.get("/bundles/{id}/pins")
def pins(request: Request, id: str) -> list[dict[str, Any]]:
    """Return pinned features."""
    found = _bundle(request, id)
    return [x._asdict() for x in found.found(found.user.pins())]


@router.get("/bundles/{id}/groups/{level}")
def groups(
    request: Request,
    id: str,
    level: Annotated[int, PathParameter(ge=0, le=100)],
    only: Annotated[int | None, Query(ge=0, le=2**40)] = None,
) -> list[dict[str, Any]]:
    """Return clusters of the feature map at one level, the largest first, or one of them."""
    return [x._asdict() for x in _bundle(request, id).groups(level, only)]


@router.get("/bundles/{id}/map")
def feature_map(request: Request, id: str, level: Annotated[int, Query(ge=0, le=100)] = 0) -> Response:
    """Return the feature map as bytes, little-endian.

    A count n, then n ids (uint32), x (float32), y (float32), clusters (int32), densities (float32).
    """
    found = _bundle(request, id)
    if not found.has("map") or level >= _levels(found):
        raise ConfigError(f"the bundle has no feature map with clusters at level {level}; imported bundles have none")
    xy = np.asarray(found.array("map"))
    at = np.flatnonzero(np.isfinite(xy[:, 0]))
    density = found.array("count")[at].sum(1) / max(found.manifest.n_tokens, 1)
    columns = [
        at.astype("<u4"),
        xy[at, 0].astype("<f4"),
        xy[at, 1].astype("<f4"),
        found.array("group")[at, level].astype("<i4"),
        density.astype("<f4"),
    ]
    return Response(
        b"".join([np.uint32(len(at)).tobytes(), *(c.tobytes() for c in columns)]),
        media_type="application/octet-stream",
        # Compressing a map of a large transcoder takes longer than reading it.
        headers={"content-encoding": "identity"},
    )
