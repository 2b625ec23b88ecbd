"""A stand-in for a language model's server, on a thread: it answers as configured and records every request."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple

MARKED = re.compile("«(.*?)»")


class Reply(NamedTuple):
    """A response: status, content of the message, and other fields."""

    status: int = 200
    content: str = ""
    headers: Mapping[str, str] = MappingProxyType({})
    finish: str = "stop"
    raw: bytes | None = None
    """Replaces everything else."""
    logprobs: Any = None


Answering = Callable[[dict[str, Any], int], Reply]
"""From the body of a request and the number of earlier requests."""


class StandIn:
    """Attributes: bodies and headers of all requests, and the number of answers."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw)
                with outer.lock:
                    n = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                try:
                    reply = outer.answering(body, n)
                    self.send(reply)
                    with outer.lock:
                        outer.answered.append(digest(body))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with outer.lock:
                        outer.at_once -= 1

            def send(self, reply: Reply) -> None:
                sent = reply.raw
                if sent is None:
                    content: dict[str, Any] = {"error": {"message": reply.content}}
                    if reply.status == 200:
                        message = {"role": "assistant", "content": reply.content}
                        choice = {
                            "index": 0,
                            "message": message,
                            "finish_reason": reply.finish,
                            "logprobs": reply.logprobs,
                        }
                        content = {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
                    sent = json.dumps(content).encode()
                self.send_response(reply.status)
                for name, value in ({"Content-Length": str(len(sent))} | dict(reply.headers)).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def users(self) -> list[dict[str, Any]]:
        """Parse the user messages as JSON."""
        return [user_of(b) for b in self.bodies]


@contextmanager
def serving(answering: Answering) -> Iterator[StandIn]:
    """Run a stand-in that answers while the block runs."""
    stand_in = StandIn(answering)
    thread = threading.Thread(target=stand_in.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        stand_in.server.shutdown()
        stand_in.server.server_close()
        thread.join()


def digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def user_of(body: dict[str, Any]) -> dict[str, Any]:
    return json.loads(body["messages"][1]["content"])


def well(body: dict[str, Any], n: int = 0) -> Reply:
    """Answer like a careful person: name few marked words, find named words, and guess otherwise."""
    user = user_of(body)
    if "fires" in user:
        words = sorted({w for x in user["fires"].values() for m in MARKED.findall(x["text"]) for w in m.split()})
        label = f"the words {', '.join(words)}" if len(words) <= 3 else "nothing that can be named"
        return json_reply({"label": label, "explanation": f"It fires on {label}."})
    if "members" in user:
        return json_reply(
            {"label": f"a group of {len(user['members'])}", "explanation": "They have something in common."}
        )
    if "feature" in user:
        return judged(
            {k: fits(user["feature"], v) for k, v in user["texts"].items()}, logprobs=body.get("logprobs", False)
        )
    marks = {k: set(MARKED.findall(v)) for k, v in user["texts"].items()}
    common = lambda k: sum(bool(marks[k] & marks[j]) for j in marks if j != k)  # noqa: E731
    return json_reply({"intruder": int(min(marks, key=lambda k: (common(k), k)))})


def fits(feature: str, text: str) -> bool:
    """Whether the text, or its marked tokens if any, contains a named word; random if the label names none."""
    named = re.search(r"the words ([a-z, ]*)", feature) or re.search("“ ([a-z]+)”", feature)
    if named is None:
        return bool(hashlib.sha256(text.encode()).digest()[0] % 2)
    looked_at = " ".join(MARKED.findall(text)) if "«" in text else text
    return bool(set(named[1].replace(",", " ").split()) & set(looked_at.split()))


def json_reply(value: object) -> Reply:
    return Reply(content=json.dumps(value))


def judged(answers: dict[str, bool], *, logprobs: bool) -> Reply:
    """Return judgements with probability 0.9 each, in tokens of a few characters."""
    content = json.dumps({k: int(v) for k, v in answers.items()})
    if not logprobs:
        return Reply(content=content)
    tokens = re.findall(r'": [01]|.', content)
    places = []
    for token in tokens:
        place: dict[str, Any] = {"token": token, "logprob": -0.01, "top_logprobs": []}
        if token.startswith('": '):
            other = token[:-1] + ("0" if token[-1] == "1" else "1")
            place |= {
                "logprob": math.log(0.9),
                "top_logprobs": [
                    {"token": token, "logprob": math.log(0.9)},
                    {"token": other, "logprob": math.log(0.1)},
                ],
            }
        places.append(place)
    return Reply(content=content, logprobs={"content": places})


def slowly(answering: Answering, seconds: float) -> Answering:
    def answer(body: dict[str, Any], n: int) -> Reply:
        time.sleep(seconds)
        return answering(body, n)

    return answer
