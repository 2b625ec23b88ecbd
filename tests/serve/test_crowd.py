"""The server still answers with a hundred open connections and idle sockets."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from serve.served import Served


@pytest.fixture
def crowded(root: Path):
    one = Served(root)
    yield one
    one.stop()


def ask(served: Served, path: str, extra: str = "", method: str = "GET") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n{extra}\r\n".encode())
    return connection


def test_streams_and_sockets_left_open(crowded: Served):
    run = crowded.id("run")
    body = json.dumps({"run": run, "text": "def"}).encode()
    started = urllib.request.Request(f"{crowded.url}/api/jobs/activations", body, {"content-type": "application/json"})
    with urllib.request.urlopen(started) as answer:
        job = json.load(answer)["job"]
    left = [ask(crowded, f"/api/jobs/{job}/events") for _ in range(100)]
    answers = [c.recv(64).split(b" ")[1] for c in left]
    assert set(answers) <= {b"200", b"503"}
    upgrade = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key:"
        " AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    )
    left += [ask(crowded, "/api/jobs/1/events", upgrade) for _ in range(100)]
    # Started and never finished.
    for _ in range(100):
        left.append(socket.create_connection(("127.0.0.1", crowded.port), timeout=20))
        left[-1].sendall(b"GET /api/lib")
    assert crowded.get("library")
    for connection in left:
        connection.close()
    assert crowded.get("library")


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "//etc/passwd",
        "/page.js/../../secret.txt",
        "/static/../app.py",
        "/page.txt",
        "/api/runs/..%2f..",
        "http://evil.example/",
    ],
)
def test_no_path_leads_out(crowded: Served, path: str):
    with ask(crowded, path, "Connection: close\r\n") as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split(b" ")[1] in (b"404", b"400", b"422", b"421"), answer[:200]
    assert b"secret\n" not in answer
    with pytest.raises(urllib.error.HTTPError, match="404"):
        crowded.get("bundles/none")


def test_killed_while_saving(root: Path):
    """Everything that the server reported as saved is complete on disk, whenever it is killed."""
    for delay_s in (0.02, 0.05, 0.11):
        served = Served(root)
        at = f"graphs/{served.id('graph', 'one')}/views/killed"
        saved: list[int] = []

        def save(served: Served = served, at: str = at, saved: list[int] = saved) -> None:
            for n in itertools.count():
                try:
                    served.put(at, {"value": {"pins": [n] * 50}})
                except OSError:
                    return
                saved.append(n)

        saving = threading.Thread(target=save)
        saving.start()
        while not saved:
            time.sleep(0.001)
        time.sleep(delay_s)
        served.stop(signal.SIGKILL)
        saving.join()
        served.start()
        pins = served.get(at)["value"]["pins"]  # type: ignore[index]
        assert len(pins) == 50
        assert len(set(pins)) == 1
        assert pins[0] >= saved[-1]
        served.stop()
