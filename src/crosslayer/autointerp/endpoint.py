"""Client of an OpenAI-compatible endpoint that adapts to what the server supports.

Temporary failures (broken connections, timeouts, 408, 409, 425, 429, 5xx) are retried after the time that the server
asks for, or with exponential backoff. Request options that the server refuses (a schema, log-probabilities, a
temperature) are left out of this and all later requests. The key comes from an environment variable and is sent in one
header. It never appears in errors, files or representations.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx

from crosslayer.core.errors import ConfigError, EndpointError

PASSING = (408, 409, 425, 429)
"""Statuses, besides 500 and above, after which the same request may succeed."""
REFUSED = (400, 415, 422, 501)
"""Statuses of a request that the server does not accept in this form."""
MOST_BYTES = 1 << 24
"""Max size of a response in bytes."""
MOST_WAIT_S = 300.0
ALTERNATIVES = 10
"""Number of alternative tokens with log-probabilities per position."""


class Request(NamedTuple):
    """A question for a model."""

    system: str
    user: str
    schema: dict[str, Any]
    most_tokens: int
    logprobs: bool = False
    attempt: int = 0
    """Number of unusable answers so far; a later attempt may get another answer."""

    def key(self, base: str, model: str) -> str:
        """Hash everything that the answer depends on."""
        parts = json.dumps([base, model, *self], sort_keys=True)
        return hashlib.blake2b(parts.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Answer(NamedTuple):
    """An answer of the model."""

    text: str
    finish: str
    """stop, length, or another reason given by the server."""
    logprobs: list[tuple[str, list[tuple[str, float]]]] | None
    """Each token of the answer, with alternatives and their log-probabilities."""
    prompt_tokens: int
    completion_tokens: int
    wall_s: float
    time: str
    """UTC, ISO 8601."""


class RequestFailed(Exception):
    """A request without an answer; the message is one of a few reasons, to be counted."""


class Interrupted(Exception):
    """The run is ending."""


class Ask(NamedTuple):
    """Options that the server accepts, as far as known."""

    format: Literal["json_schema", "json_object", "none"] = "json_schema"
    logprobs: bool = True
    temperature: bool = True
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Timeouts and retries.

    Attributes:
        timeout_s: timeout of an answer.
        retries: max retries of a request after temporary failures.
        base_s, most_s: first and longest wait. Waits double, and each is drawn between half of its value and the whole.
    """

    timeout_s: float = 120.0
    retries: int = 6
    base_s: float = 1.0
    most_s: float = 60.0

    def wait_s(self, n: int) -> float:
        """Return the wait before retry `n`, from 0."""
        return random.uniform(0.5, 1.0) * min(self.most_s, self.base_s * 2**n)


@dataclass
class Endpoint:
    """Sends requests to one model, from any number of threads.

    Attributes:
        url: base URL, which usually ends in /v1; `/chat/completions` is added.
        model: name of the model at the endpoint.
        key_env: environment variable with the key; without it, no key is sent.
        patience: timeouts and retries.
        n_sent: number of requests sent, including retries.

    Raises:
        ConfigError: for an unusable URL or key.
    """

    url: str
    model: str
    key_env: str | None = None
    patience: Patience = field(default_factory=Patience)
    n_sent: int = 0

    def __post_init__(self) -> None:
        self.url = base_url(self.url)
        parts = urlsplit(self.url)
        self.host = parts.netloc
        local = _loopback(parts.hostname or "")
        self._key = _key(self.key_env) if self.key_env else ""
        if self._key and parts.scheme == "http" and not local:
            raise ConfigError(
                f"the key in {self.key_env} would go unencrypted to {self.host}; give an https:// endpoint, or a tunnel"
                " to 127.0.0.1"
            )
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx.Timeout(self.patience.timeout_s, connect=10.0)
        # Ignore proxies of the environment. Do not follow redirects: they would receive the key.
        self._client = httpx.Client(
            headers=headers,
            timeout=timeout,
            trust_env=not local,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=None),
        )
        self._lock = threading.Lock()
        self._ask = Ask()
        self._not_before = 0.0
        self._reached = False
        self._ending = threading.Event()

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, model={self.model!r})"

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def end(self) -> None:
        """Stop waiting: requests that would be retried raise Interrupted."""
        self._ending.set()

    def send(self, request: Request) -> Answer:
        """Send a request and return the answer.

        Raises:
            RequestFailed: if this request failed but others may succeed.
            EndpointError: if no other request would succeed.
            Interrupted: after `end`.
        """
        ask = known = self._ask
        first: _Response | None = None
        while (response := self._waiting(request, ask)).status in REFUSED:
            first = first or response
            less = simpler(ask, response.message, logprobs=request.logprobs)
            if less is None:
                raise RequestFailed(f"refused (HTTP {first.status}: {first.message})")
            ask = less
        self._stop_at(response)
        if ask != known:
            self._ask = ask
        return response.answer()

    def _waiting(self, request: Request, ask: Ask) -> _Response:
        """Return the response, with retries after temporary failures."""
        why = ""
        for n in range(self.patience.retries + 1):
            self._pause()
            began = time.monotonic()
            try:
                response = self._post(self._body(request, ask), began)
            except httpx.HTTPError as error:
                self._stop_if_unreachable(error)
                why, given_s = _kind(error), 0.0
            else:
                self._reached = True
                if response.whole or not (response.status == 200 or response.passing):
                    return response
                why, given_s = response.why, response.retry_after_s
            if n < self.patience.retries:
                self._wait(self.patience.wait_s(n), given_s)
        raise RequestFailed(why)

    def _pause(self) -> None:
        """Wait until the server is ready, for the time that it gave, if any."""
        while (left_s := self._not_before - time.monotonic()) > 0:
            self._ending.wait(left_s)
            if self._ending.is_set():
                break
        if self._ending.is_set():
            raise Interrupted

    def _wait(self, wait_s: float, given_s: float) -> None:
        """Wait before the next attempt. A time given by the server holds for all threads."""
        if given_s:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + min(given_s, MOST_WAIT_S))
        self._ending.wait(wait_s)

    def _body(self, request: Request, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}],
            ask.limit: request.most_tokens * (1 + request.attempt),
            "stream": False,
        }
        if ask.temperature:
            # At temperature 0 a model would repeat its answer.
            body["temperature"] = 0.0 if request.attempt == 0 else 0.5
        if ask.format == "json_schema":
            schema = {"name": "answer", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif ask.format == "json_object":
            body["response_format"] = {"type": "json_object"}
        if request.logprobs and ask.logprobs:
            body |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
        return body

    def _post(self, body: dict[str, Any], began: float) -> _Response:
        with self._lock:
            self.n_sent += 1
        content = json.dumps(body, ensure_ascii=True).encode()
        raw = bytearray()
        with self._client.stream(
            "POST", f"{self.url}/chat/completions", content=content, headers={"Content-Type": "application/json"}
        ) as response:
            for part in response.iter_bytes():
                raw += part
                if len(raw) > MOST_BYTES:
                    raise httpx.DecodingError("too long")
            retry_s = retry_after_s(response.headers.get("Retry-After"))
        try:
            content = json.loads(bytes(raw))
        except (ValueError, RecursionError):
            content = None
        return _Response(
            response.status_code, content, retry_s, time.monotonic() - began, _clean(_message(content), self._key)
        )

    def _stop_if_unreachable(self, error: httpx.HTTPError) -> None:
        """Raise if the server never answered; keep retrying if it answered before."""
        if (
            isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol)
            and not self._reached
        ):
            raise EndpointError(
                f"nothing answers at {self.url} ({_kind(error)}); start the server, or give another --endpoint"
            ) from None

    def _stop_at(self, response: _Response) -> None:
        status, reply = response.status, f"HTTP {response.status}{': ' if response.message else ''}{response.message}"
        if status in (401, 403):
            remedy = (
                f"check that {self.key_env} holds the right key"
                if self.key_env
                else "name the variable that holds the key with --key-env"
            )
            raise EndpointError(f"{self.host} refuses access ({reply}); {remedy}")
        if status == 402 or response.no_credit:
            raise EndpointError(
                f"{self.host} asks for payment ({reply}); the answers are saved, so run the same command again later"
            )
        if 300 <= status < 400:
            raise EndpointError(f"{self.url} redirects ({reply}); give the target of the redirect")
        if status != 200:
            raise EndpointError(
                f"{self.url}/chat/completions has no model {self.model!r}, or is no such place ({reply}); see"
                " --endpoint, which usually ends in /v1, and --model"
            )


class _Response(NamedTuple):
    """An HTTP response of any content."""

    status: int
    content: Any
    retry_after_s: float
    wall_s: float
    message: str

    @property
    def no_credit(self) -> bool:
        return self.status == 429 and "insufficient_quota" in json.dumps(self.content)

    @property
    def passing(self) -> bool:
        return (self.status in PASSING or self.status >= 500) and self.status not in REFUSED and not self.no_credit

    @property
    def whole(self) -> bool:
        """Whether the response holds an answer."""
        return self.status == 200 and self._choice() is not None

    @property
    def why(self) -> str:
        return "no answer in the response" if self.status == 200 else f"HTTP {self.status}"

    def _choice(self) -> dict[str, Any] | None:
        match self.content:
            case {"choices": [{"message": dict()} as choice, *_]}:
                return choice
        return None

    def answer(self) -> Answer:
        choice = self._choice()
        assert choice is not None
        content = choice["message"].get("content")
        used = self.content.get("usage")
        count = lambda name: n if isinstance(used, dict) and isinstance(n := used.get(name), int) else 0  # noqa: E731
        return Answer(
            _storable(content),
            _storable(choice.get("finish_reason")),
            _logprobs(choice),
            count("prompt_tokens"),
            count("completion_tokens"),
            self.wall_s,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )


def base_url(text: str) -> str:
    """Normalise an endpoint's base URL.

    Raises:
        ConfigError: for anything but a plain http or https address.
    """
    base = text.strip().rstrip("/").removesuffix("/chat/completions").rstrip("/")
    try:
        parts = urlsplit(base)
        usable = bool(httpx.URL(base).host) and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        usable, parts = False, urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or not usable:
        raise ConfigError(
            f"the endpoint {_without_secrets(text)!r} is no address; write for example http://HOST:PORT/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"the endpoint at {parts.hostname} has a name, a password or a query in its address, which could be a key;"
            " name the variable that holds the key with --key-env"
        )
    return base


def simpler(ask: Ask, message: str, *, logprobs: bool) -> Ask | None:
    """Return options without those that the server refused; None if nothing is left to leave out.

    Options named in the message are left out, else the next in order.

    Args:
        logprobs: whether log-probabilities were requested.
    """
    refusal = message.lower()
    ways: list[tuple[tuple[str, ...], Ask]] = []
    if ask.format != "none":
        less = ask._replace(format="json_object" if ask.format == "json_schema" else "none")
        ways.append((("response_format", "schema", "grammar", "guided", "structured", "json"), less))
    if logprobs and ask.logprobs:
        ways.append((("logprob",), ask._replace(logprobs=False)))
    if ask.temperature:
        ways.append((("temperature",), ask._replace(temperature=False)))
    if ask.limit == "max_tokens":
        ways.append((("max_tokens", "max_completion_tokens"), ask._replace(limit="max_completion_tokens")))
    named = [less for words, less in ways if any(w in refusal for w in words)]
    return next(iter([*named, *(less for _, less in ways)]), None)


def _without_secrets(text: str) -> str:
    return text.split("@")[-1].split("?")[0][:100]


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"--key-env {variable}: there is no such environment variable, or it is empty; set it to the key"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"--key-env {variable}: its value has characters that are invalid in a key; set it to the key alone"
        )
    return key


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _kind(error: httpx.HTTPError) -> str:
    """Describe a connection error without the library's text, which may quote the request."""
    if isinstance(error, httpx.TimeoutException):
        return "timed out"
    return "the connection failed" if isinstance(error, httpx.ConnectError) else "the connection broke"


def retry_after_s(header: str | None) -> float:
    """Parse seconds or a date, as in RFC 9110; 0 for neither."""
    if header is None:
        return 0.0
    try:
        return max(0.0, min(float(header), MOST_WAIT_S))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, min((then - datetime.now(UTC)).total_seconds(), MOST_WAIT_S))


def _message(content: Any) -> str:
    """Extract a server's error message from the usual places."""
    match content:
        case (
            {"error": {"message": str(message)}}
            | {"error": str(message)}
            | {"message": str(message)}
            | {"detail": str(message)}
        ):
            return message
    return ""


def _storable(text: Any) -> str:
    """Make text encodable as UTF-8: JSON can contain lone surrogates. Values other than text become empty."""
    return text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else ""


def _clean(message: str, key: str) -> str:
    """Shorten to one line, without the key."""
    plain = message.replace(key, "…") if key else message
    return " ".join("".join(c if c.isprintable() else " " for c in plain).split())[:200]


def _logprobs(choice: dict[str, Any]) -> list[tuple[str, list[tuple[str, float]]]] | None:
    match choice:
        case {"logprobs": {"content": [_, *_] as places}}:
            pass
        case _:
            return None
    found = []
    for place in places:
        match place:
            case {"token": str(token), "logprob": int() | float() as own}:
                alternatives = [(token, float(own))]
            case _:
                return None
        for other in place.get("top_logprobs") or []:
            match other:
                case {"token": str(text), "logprob": int() | float() as value} if text != token:
                    alternatives.append((text, float(value)))
        found.append((token, alternatives))
    return found
