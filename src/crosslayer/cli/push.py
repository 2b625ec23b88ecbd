"""`crosslayer push`: upload a transcoder to the Hugging Face Hub."""

from __future__ import annotations

import click


@click.command()
@click.argument("folder")
@click.argument("repo")
@click.option("--revision", help="branch to push to; default: main")
@click.option("--private", is_flag=True, help="create a new repository as private")
@click.option("--dry-run", is_flag=True, help="list the files without uploading them")
def command(folder: str, repo: str, revision: str | None, private: bool, dry_run: bool) -> None:
    """Upload the transcoder in FOLDER (or the run FOLDER) with its model card to REPO (owner/name) on the Hub.

    Uses the token of `hf auth login`, or of the environment variable HF_TOKEN.
    """
    import re
    from pathlib import Path

    from crosslayer.clt.folder import clt_folder
    from crosslayer.clt.open import open_format
    from crosslayer.core.errors import ConfigError, FormatError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(f"{repo!r} is not a Hub repository; give owner/name")
    if not Path(folder).is_dir():
        raise FormatError(f"no folder {folder}; give the folder of a transcoder, or a run folder")
    path = clt_folder(Path(folder))
    open_format(path)
    if not (path / "README.md").is_file():
        raise FormatError(f"{path} has no README.md (the model card); write one first")
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    for file in files:
        click.echo(f"{file.stat().st_size / 2**20:10,.1f} MiB  {file.relative_to(path).as_posix()}")
    click.echo(f"{sum(f.stat().st_size for f in files) / 2**20:10,.1f} MiB  in {len(files)} files, to {repo}")
    if dry_run:
        return
    from huggingface_hub import HfApi

    from crosslayer.clt.folder import hub_errors

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=path,
            revision=revision,
            ignore_patterns=[".*"],
            commit_message=f"{path.name}, by crosslayer",
        )
    except hub_errors() as error:
        first_line = str(error).strip().splitlines()[0]
        raise FormatError(
            f"the Hub refused {repo} ({first_line}); check the name, the network and hf auth whoami"
        ) from error
    click.echo(f"pushed: {done.commit_url}")
