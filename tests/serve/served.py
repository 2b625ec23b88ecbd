"""`crosslayer serve` in a subprocess."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path


class Served:
    """`crosslayer serve` in a subprocess."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root = root
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "crosslayer", "serve", str(self.root), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = re.search(r"http://\S+", self.process.stdout.readline())[0].rstrip("/")  # type: ignore[index]
        assert self.url.endswith(f":{self.port}")

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def get(self, path: str) -> object:
        with urllib.request.urlopen(f"{self.url}/api/{path}") as answer:
            return json.load(answer)

    def put(self, path: str, body: object) -> None:
        asked = urllib.request.Request(f"{self.url}/api/{path}", json.dumps(body).encode(), method="PUT")
        asked.add_header("content-type", "application/json")
        urllib.request.urlopen(asked).close()

    def id(self, kind: str, name: str = "") -> str:
        return next(e["id"] for e in self.get("library") if e["kind"] == kind and name in e["name"])  # type: ignore[union-attr]
