"""Where a transcoder's files are: a local folder, or a repository of the Hugging Face hub of which each file is fetched
when first needed.

runs/mine                                a local folder, or a run, whose clt/ is meant
owner/name                               a repository
owner/name@v1.2                          at a branch, tag or commit
owner/name@v1.2//width_262k              a subfolder of it
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from crosslayer.core.errors import FormatError

_REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^@]+?))?(?://(?P<under>[^@]+?))?/?")


MOST_CHARACTERS = 1000
"""Of a name: more is no path."""


class Folder(NamedTuple):
    """File names, and how to get a file."""

    name: str
    """As it was asked for."""
    names: frozenset[str]
    fetch: Callable[[str], Path]
    local: bool
    """Whether every file is here already."""

    def path(self, file: str) -> Path:
        """The local path of a file, fetched now if it has to be.

        Raises:
            FormatError: for a file that is not there, or cannot be fetched.
        """
        if file not in self.names:
            raise FormatError(f"{self.name}: {file} is missing; the folder is not whole, fetch or write it again")
        return self.fetch(file)

    def numbered(self, pattern: str) -> list[int]:
        """The numbers, in order, of files whose name is `pattern` with a number in place of `{}`."""
        matcher = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
        return sorted(int(m[1]) for name in self.names if (m := matcher.fullmatch(name)))


def open_folder(name: str | Path) -> Folder:
    """A local folder if there is one of that name, and a repository of the hub otherwise.

    Raises:
        FormatError: for what is neither, and for a repository that cannot be reached.
    """
    if not str(name):
        raise FormatError("no transcoder was named; give a folder, a run, or owner/name on the hub")
    path = Path(name).expanduser()
    if len(str(name)) < MOST_CHARACTERS and path.is_dir():
        path = clt_folder(path)
        # No format has files deeper than in one folder; another's home may have millions.
        names = frozenset(
            p.relative_to(path).as_posix() for depth in ("*", "*/*") for p in path.glob(depth) if p.is_file()
        )
        return Folder(str(path), names, path.joinpath, local=True)
    if len(str(name)) < MOST_CHARACTERS and path.exists():
        raise FormatError(f"{name} is a file; give the folder that holds the transcoder's files")
    match = _REPOSITORY.fullmatch(str(name)) if len(str(name)) < MOST_CHARACTERS else None
    if match is None or str(name).startswith((".", "~")):
        raise FormatError(
            f"no folder {str(name)[:200]}; give a local folder, or a repository of the hub as"
            " owner/name[@revision][//subfolder]"
        )
    return _open_repository(str(name), match["repo"], match["revision"], match["under"])


def clt_folder(path: Path) -> Path:
    """The transcoder's folder: the path itself, or `clt/` of a run."""
    if (path / "run.json").is_file():
        if not (path / "clt").is_dir():
            if (path / "eval.json").is_file():
                raise FormatError(f"{path} is a finished run whose clt/ is missing; put it back, or train it again")
            raise FormatError(f"{path} is a run that has not finished; go on with crosslayer train --resume {path}")
        return path / "clt"
    return path


def _open_repository(name: str, repo: str, revision: str | None, under: str | None) -> Folder:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    unreachable = hub_errors()
    prefix = f"{under.strip('/')}/" if under else ""
    try:
        info = HfApi().model_info(repo, revision=revision)
        files, commit = [s.rfilename for s in info.siblings or []], info.sha
    except RevisionNotFoundError as error:
        raise FormatError(
            f"{name}: {repo} has no revision {revision!r} on the hub; give a branch, tag or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise FormatError(
            f"no folder {name}, and no repository {repo} on the hub that this token may read; check the name, or log in"
            " with: hf auth login"
        ) from error
    except unreachable as error:
        try:
            snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except OSError:
            at = f" at revision {revision!r}" if revision else ""
            raise FormatError(
                f"no folder {name}, and the hub cannot be reached ({type(error).__name__}) and {repo}{at} is not in its"
                " cache; check the name, or the network"
            ) from error
        files = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
        commit = snapshot.name

    def fetch(file: str) -> Path:
        try:
            return Path(hf_hub_download(repo, f"{prefix}{file}", revision=commit))
        except unreachable as error:
            first_line = str(error).strip().splitlines()[0]
            raise FormatError(
                f"{name}: {file} cannot be fetched from the hub ({first_line}); check the network and try again"
            ) from error

    names = frozenset(f.removeprefix(prefix) for f in files if f.startswith(prefix))
    if not names:
        raise FormatError(f"{name}: {repo} has no files under {under}; its folders are {_folders(files)}")
    return Folder(name, names, fetch, local=False)


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises when it cannot be reached: its own errors, and those of the HTTP library that it is
    built on.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if base is not Exception))


def _folders(files: list[str]) -> str:
    folders = sorted({f.rpartition("/")[0] for f in files} - {""})
    return ", ".join(folders[:8]) + (", …" if len(folders) > 8 else "") or "none"
