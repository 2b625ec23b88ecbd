"""Files of a transcoder that its `config.yaml` lists under `transcoders`, one per layer, as circuit-tracer reads them.

hf://owner/name/path/to/file?revision=R    a file on the Hub
path/to/file                               a file of the folder itself, or an absolute path
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

from crosslayer.clt.folder import Folder, hub_file
from crosslayer.core.errors import FormatError

KEY = "transcoders"


def listed_files(folder: Folder, config: Mapping[str, Any], where: str) -> list[Path]:
    """Return the local path of each listed file, in order of layers; download what is on the Hub.

    Args:
        where: name of the config in messages.

    Raises:
        FormatError: for an empty list, an entry that is no path or URI, or a file that cannot be had.
    """
    entries = config[KEY]
    if not isinstance(entries, list) or not entries or not all(isinstance(e, str) and e for e in entries):
        raise FormatError(f"{where}: {KEY} is {str(entries)[:80]!r}, expected a list with a path or URI for each layer")
    return [_file(folder, entry, where) for entry in entries]


def _file(folder: Folder, entry: str, where: str) -> Path:
    if entry.startswith("hf://"):
        uri = urlparse(entry)
        repo, _, path = uri.path.lstrip("/").partition("/")
        if not (uri.netloc and repo and path):
            raise FormatError(f"{where}: {entry} is not hf://owner/name/path/to/file; correct it")
        revision = parse_qs(uri.query).get("revision", [None])[0]
        return hub_file(where, f"{uri.netloc}/{repo}", path, revision)
    if not folder.local:
        return folder.path(entry)
    path = Path(folder.name) / entry
    if not path.is_file():
        raise FormatError(f"{where} lists {entry}, which is not there; download it, or correct the path")
    return path
