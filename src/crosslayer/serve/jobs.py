"""Jobs that need host and transcoder: one worker process, a queue, and progress events.

The worker is the hidden command `crosslayer worker`. It reads one job per line from standard input and answers in
lines, each with the job's number. It caches loaded models for the next job. Cancelling a running job kills the worker,
the only way to stop a matrix product; the next job starts another worker.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from crosslayer.core.errors import CrosslayerError
from crosslayer.serve.library import Unknown

MOST_JOBS = 200
MOST_WAITING = 50
MOST_STREAMS = 50
MOST_LINE = 64 << 20
FINAL = ("done", "failed", "cancelled")


class Busy(CrosslayerError):
    """Too many requests at once; the server answers 503."""


class Job:
    """One job and its events.

    Attributes:
        state: waiting, running, done, failed or cancelled.
        events: all events in order; the last holds the result or the error.
    """

    def __init__(self, number: int, kind: str, arguments: dict[str, Any]) -> None:
        self.number, self.kind, self.arguments = number, kind, arguments
        self.state, self.events = "waiting", list[dict[str, Any]]()
        self._changed = asyncio.Event()

    def emit(self, **event: Any) -> None:
        if self.state in FINAL:
            return
        self.state = event.get("state", self.state)
        self.events.append({"state": self.state, **event})
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def all_events(self) -> AsyncIterator[dict[str, Any]]:
        """Yield every event, past ones first, until the last."""
        at = 0
        while True:
            changed = self._changed
            while at < len(self.events):  # more events may arrive while one is sent
                at += 1
                yield self.events[at - 1]
            if self.state in FINAL:
                return
            await changed.wait()


class Jobs:
    """The queue and its worker. Methods are called in the event loop."""

    def __init__(self, command: list[str] | None = None) -> None:
        self.command = command or [sys.executable, "-m", "crosslayer", "worker"]
        self.jobs: dict[int, Job] = {}
        self.streams = 0
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._process: asyncio.subprocess.Process | None = None
        self._runner: asyncio.Task[None] | None = None
        self._current: Job | None = None

    def add(self, kind: str, arguments: dict[str, Any]) -> Job:
        """Queue a job.

        Raises:
            Busy: if too many jobs are waiting.
        """
        if sum(j.state not in FINAL for j in self.jobs.values()) >= MOST_WAITING:
            raise Busy(f"{MOST_WAITING} jobs are already waiting; stop some, or wait")
        job = Job(max(self.jobs, default=0) + 1, kind, arguments)
        self.jobs[job.number] = job
        for old in [n for n, j in self.jobs.items() if j.state in FINAL][: max(0, len(self.jobs) - MOST_JOBS)]:
            del self.jobs[old]
        job.emit(state="waiting")
        self._queue.put_nowait(job)
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return job

    def job(self, number: int) -> Job:
        if number not in self.jobs:
            raise Unknown(f"there is no job {number}; start it again")
        return self.jobs[number]

    def cancel(self, number: int) -> None:
        """Stop a waiting or running job; a finished job stays as it is."""
        job = self.job(number)
        if job.state in FINAL:
            return
        job.emit(state="cancelled")
        if job is self._current and self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _run(self) -> None:
        while True:
            job = await self._queue.get()
            if job.state == "cancelled":
                continue
            self._current = job
            try:
                await self._do(job)
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                self._fail(job, f"the worker does not respond ({error}); start the job again")
            self._current = None

    async def _do(self, job: Job) -> None:
        process = await self._worker()
        if job.state in FINAL:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        job.emit(state="running", stage="starting")
        process.stdin.write(json.dumps({"job": job.number, "kind": job.kind, **job.arguments}).encode() + b"\n")
        await process.stdin.drain()
        while job.state not in FINAL:
            line = await process.stdout.readline()
            if not line:
                await process.wait()
                self._fail(
                    job,
                    f"the worker ended (exit code {process.returncode}), perhaps out of memory; start the job again",
                )
                return
            event = json.loads(line)
            if event.pop("job", None) == job.number and job.state not in FINAL:
                job.emit(**event)
        if job.state == "cancelled":
            await process.wait()  # killed: the next job must not write to it

    def _fail(self, job: Job, error: str) -> None:
        if job.state not in FINAL:
            job.emit(state="failed", error=error)

    async def _worker(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            self._process = await asyncio.create_subprocess_exec(
                *self.command, stdin=pipe, stdout=pipe, limit=MOST_LINE
            )
        return self._process

    async def close(self) -> None:
        """Stop the worker, the queue and the streams of events."""
        for job in self.jobs.values():
            job.emit(state="cancelled", error="the server was stopped")
        if self._runner is not None:
            self._runner.cancel()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
