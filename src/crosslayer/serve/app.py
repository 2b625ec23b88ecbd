"""The page at `/` and the routes under `/api`, described at `/api/openapi.json`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import FileResponse, JSONResponse

from crosslayer.core.errors import ConflictError, CrosslayerError
from crosslayer.serve import bundles, graphs, runs, work
from crosslayer.serve.guard import Guard
from crosslayer.serve.jobs import Busy, Jobs
from crosslayer.serve.library import Library, Unknown
from crosslayer.serve.opened import Opened

STATUS = {Unknown: 404, ConflictError: 409, Busy: 503}
PAGE = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def create_app(roots: Sequence[Path], *, hosts: Sequence[str] = (), port: int = 8000, token: str | None = None) -> Any:
    """Create the ASGI application.

    Args:
        roots: folders and files in which runs, bundles and graphs are found.
        hosts: names, without port, accepted in requests besides the loopback names.
        port: the port in requests.
        token: token that each request must carry.

    Raises:
        ConfigError: for a path that does not exist.
    """
    library = Library(roots)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await app.state.jobs.close()
        app.state.opened.close()

    app = FastAPI(title="crosslayer", openapi_url="/api/openapi.json", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.library, app.state.opened, app.state.jobs = library, Opened(), Jobs()

    @app.exception_handler(CrosslayerError)
    async def error_response(request: Request, error: CrosslayerError) -> JSONResponse:
        """Return errors with a message for users as JSON."""
        status = next((s for kind, s in STATUS.items() if isinstance(error, kind)), 422)
        return JSONResponse({"detail": str(error)}, status_code=status)

    @app.get("/api/library")
    def listed() -> list[dict[str, Any]]:
        """List runs, feature bundles and graphs, each with its id."""
        return [{"id": e.id, "kind": e.kind, "name": e.name, "run": e.run} for e in library.entries()]

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/page.{kind}", include_in_schema=False)
    def asset(kind: Literal["js", "css"]) -> FileResponse:
        return FileResponse(PAGE / f"page.{kind}")

    for part in (runs, bundles, graphs, work):
        app.include_router(part.router, prefix="/api")
    app.add_middleware(GZipMiddleware, minimum_size=2048)
    names = [*LOOPBACK, *hosts]
    return Guard(
        app, {f"{name}:{port}" for name in names} | ({*names} if port == 80 else set()), token, {"/api/graphs"}
    )
