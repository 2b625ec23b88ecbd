"""Listen on an address, print it, and serve until stopped."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import click

from crosslayer.core.errors import ConfigError
from crosslayer.serve.app import create_app

TRIES = 20


def listen(roots: Sequence[Path], *, host: str, port: int, show: bool = False) -> None:
    """Serve until interrupted.

    Args:
        show: open the page in a browser, if there is a screen.

    Raises:
        ConfigError: for a path that does not exist, or an address that cannot be bound.
    """
    import uvicorn

    bound, port = _bind(host, port)
    local = host in ("127.0.0.1", "localhost", "::1")
    token = None if local else secrets.token_urlsafe(24)
    shown = f"[{host}]" if ":" in host else host
    names = [] if local else [shown, *([socket.gethostname(), *_addresses()] if host in ("0.0.0.0", "::") else [])]
    app = create_app(roots, hosts=names, port=port, token=token)
    bound.listen()  # a client may read the address before the server is up
    click.echo(f"serving {', '.join(map(str, roots))} at http://{shown}:{port}/" + (f"?token={token}" if token else ""))
    if show and (sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(f"http://{shown}:{port}/" + (f"?token={token}" if token else ""))
    with bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))
        server.run(sockets=[bound])


def _bind(host: str, port: int) -> tuple[socket.socket, int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    error: OSError | None = None
    for candidate in range(port, min(port + TRIES, 65536)):
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, candidate))
        except OSError as failed:
            bound.close()
            error = failed
            continue
        return bound, candidate
    assert error is not None
    raise ConfigError(
        f"cannot listen on {host}, ports {port} to {port + TRIES - 1} ({error.strerror or error}); "
        "give another --host or --port"
    ) from error


def _addresses() -> list[str]:
    """Return this machine's own addresses, as used in requests from other machines."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)})
    except OSError:
        return []
