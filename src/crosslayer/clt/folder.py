"""Locate the files of a transcoder: a local folder, or a Hugging Face repository, downloaded file by file.

runs/mine                                a local folder, or a run folder (its clt/)
owner/name                               a repository
owner/name@v1.2                          a branch, tag or commit
owner/name@v1.2//width_262k              a subfolder
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from crosslayer.core.errors import FormatError

_REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^@]+?))?(?://(?P<under>[^@]+?))?/?")


MAX_CHARACTERS = 1000
"""Maximum length of a path."""


class Folder(NamedTuple):
    """File names of a folder or repository, and a function that gets a file."""

    name: str
    """Name as given by the caller."""
    names: frozenset[str]
    fetch: Callable[[str], Path]
    local: bool
    """Whether the folder is local."""

    def path(self, file: str) -> Path:
        """Return the local path of a file; download it if needed.

        Raises:
            FormatError: for a file that is missing or cannot be downloaded.
        """
        if file not in self.names:
            raise FormatError(f"{self.name}: {file} is missing; the folder is incomplete; download or write it again")
        return self.fetch(file)

    def numbered(self, pattern: str) -> list[int]:
        """Return the sorted numbers of files that match `pattern`, with a number for `{}`."""
        matcher = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
        return sorted(int(m[1]) for name in self.names if (m := matcher.fullmatch(name)))


def open_folder(name: str | Path) -> Folder:
    """Open a local folder of that name, or else a repository on the Hub.

    Raises:
        FormatError: if there is neither, or the repository cannot be reached.
    """
    if not str(name):
        raise FormatError("no transcoder was named; give a folder, a run folder, or owner/name on the Hub")
    path = Path(name).expanduser()
    if len(str(name)) < MAX_CHARACTERS and path.is_dir():
        path = clt_folder(path)
        # Formats use at most one level of subfolders; deeper folders may hold millions of files.
        names = frozenset(
            p.relative_to(path).as_posix() for depth in ("*", "*/*") for p in path.glob(depth) if p.is_file()
        )
        return Folder(str(path), names, path.joinpath, local=True)
    if len(str(name)) < MAX_CHARACTERS and path.exists():
        raise FormatError(f"{name} is a file; give the folder with the transcoder's files")
    match = _REPOSITORY.fullmatch(str(name)) if len(str(name)) < MAX_CHARACTERS else None
    if match is None or str(name).startswith((".", "~")):
        raise FormatError(
            f"no folder {str(name)[:200]}; give a local folder, or a Hub repository as"
            " owner/name[@revision][//subfolder]"
        )
    return _open_repository(str(name), match["repo"], match["revision"], match["under"])


def clt_folder(path: Path) -> Path:
    """Return the folder of a transcoder: the path itself, or `clt/` of a run folder."""
    if (path / "run.json").is_file():
        if not (path / "clt").is_dir():
            if (path / "eval.json").is_file():
                raise FormatError(f"{path} is a finished run without clt/; restore it, or train again")
            raise FormatError(f"{path} is a run that has not finished; resume it with crosslayer train --resume {path}")
        return path / "clt"
    return path


def _open_repository(name: str, repo: str, revision: str | None, under: str | None) -> Folder:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    unreachable = hub_errors()
    prefix = f"{under.strip('/')}/" if under else ""
    try:
        info = HfApi().model_info(repo, revision=revision)
        files, commit = [s.rfilename for s in info.siblings or []], info.sha
    except RevisionNotFoundError as error:
        raise FormatError(
            f"{name}: {repo} has no revision {revision!r} on the Hub; give a branch, tag or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise FormatError(
            f"no folder {name}, and no repository {repo} on the Hub that this token can read; check the name, or log in"
            " with: hf auth login"
        ) from error
    except unreachable as error:
        try:
            snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except OSError:
            at = f" at revision {revision!r}" if revision else ""
            raise FormatError(
                f"no folder {name}, and the Hub cannot be reached ({type(error).__name__}) and {repo}{at} is not in its"
                " cache; check the name, or the network"
            ) from error
        files = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
        commit = snapshot.name

    def fetch(file: str) -> Path:
        return hub_file(name, repo, f"{prefix}{file}", commit)

    names = frozenset(f.removeprefix(prefix) for f in files if f.startswith(prefix))
    if not names:
        raise FormatError(f"{name}: {repo} has no files under {under}; its folders are {_folders(files)}")
    return Folder(name, names, fetch, local=False)


def hub_file(where: str, repo: str, file: str, revision: str | None) -> Path:
    """Return the local path of a file on the Hub; download it if needed.

    Args:
        where: what names the file, for messages.

    Raises:
        FormatError: for a file that cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except hub_errors() as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FormatError(
            f"{where}: {file} of {repo} cannot be downloaded from the Hub ({first_line}); check the network and try"
            " again"
        ) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors of an unreachable Hub: those of its client and of the client's HTTP library."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if base is not Exception))


def _folders(files: list[str]) -> str:
    folders = sorted({f.rpartition("/")[0] for f in files} - {""})
    return ", ".join(folders[:8]) + (", …" if len(folders) > 8 else "") or "none"
