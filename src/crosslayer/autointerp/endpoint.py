"""An OpenAI-compatible endpoint: one request, one answer, whatever the server is like.

What may pass is waited for (connections that break, timeouts, 408, 409, 425, 429, 5xx), as long as the server says or
ever longer. What the server refuses (a schema, log-probabilities, a temperature) is left out, and from then on not
asked for. The key comes from an environment variable, goes into one header, and is in no error, file or representation.
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
"""Statuses, with all from 500 on, after which the same request may succeed."""
REFUSED = (400, 415, 422, 501)
"""Statuses of a request that the server does not take as it is."""
MOST_BYTES = 1 << 24
"""Of a response."""
MOST_WAIT_S = 300.0
ALTERNATIVES = 10
"""Tokens whose log-probabilities are asked for at each place."""


class Request(NamedTuple):
    """What a model is asked."""

    system: str
    user: str
    schema: dict[str, Any]
    most_tokens: int
    logprobs: bool = False
    attempt: int = 0
    """How often it was asked before, in vain; a later attempt may be answered otherwise."""

    def key(self, base: str, model: str) -> str:
        """A hash of all that the answer depends on."""
        said = json.dumps([base, model, *self], sort_keys=True)
        return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Answer(NamedTuple):
    """What came back."""

    text: str
    finish: str
    """stop, length, or what else the server says."""
    logprobs: list[tuple[str, list[tuple[str, float]]]] | None
    """Each token of the answer, and the alternatives to it with their log-probabilities."""
    prompt_tokens: int
    completion_tokens: int
    wall_s: float
    time: str
    """UTC, ISO 8601."""


class RequestFailed(Exception):
    """A request that got no answer; the message is one of a few reasons, to be counted."""


class Interrupted(Exception):
    """The run is ending."""


class Ask(NamedTuple):
    """What is asked for of a server, as far as it is known to take it."""

    format: Literal["json_schema", "json_object", "none"] = "json_schema"
    logprobs: bool = True
    temperature: bool = True
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long is waited.

    Attributes:
        timeout_s: for an answer.
        retries: of a request, for what may pass.
        base_s, most_s: the first wait and the longest, each drawn between half of it and the whole; in between they
            double.
    """

    timeout_s: float = 120.0
    retries: int = 6
    base_s: float = 1.0
    most_s: float = 60.0

    def wait_s(self, n: int) -> float:
        """Before retry `n`, from 0."""
        return random.uniform(0.5, 1.0) * min(self.most_s, self.base_s * 2**n)


@dataclass
class Endpoint:
    """Sends requests to one model, from any number of threads.

    Attributes:
        url: its base, which usually ends in /v1; `/chat/completions` is added.
        model: the name that it knows the model by.
        key_env: the environment variable that holds the key; no key is sent unless it is given.
        patience: how long is waited.
        n_sent: requests that went out, retries included.

    Raises:
        ConfigError: for a URL or a key that cannot be used.
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
        # The environment's proxies are for other machines. Redirects would take the key along.
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
        """Wait for nothing more: requests that would be sent again raise Interrupted."""
        self._ending.set()

    def send(self, request: Request) -> Answer:
        """The answer to a request.

        Raises:
            RequestFailed: for a request that was not answered, while others may be.
            EndpointError: where no other would be answered either.
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
        """The response, once there is one that does not pass by waiting."""
        why = ""
        for n in range(self.patience.retries + 1):
            self._pause()
            began = time.monotonic()
            try:
                response = self._post(self._body(request, ask), began)
            except httpx.HTTPError as error:
                self._stop_if_nobody_is_there(error)
                why, told_s = _kind(error), 0.0
            else:
                self._reached = True
                if response.whole or not (response.status == 200 or response.passing):
                    return response
                why, told_s = response.why, response.retry_after_s
            if n < self.patience.retries:
                self._hold(self.patience.wait_s(n), told_s)
        raise RequestFailed(why)

    def _pause(self) -> None:
        """Wait until the server is ready, as far as it said."""
        while (left_s := self._not_before - time.monotonic()) > 0:
            self._ending.wait(left_s)
            if self._ending.is_set():
                break
        if self._ending.is_set():
            raise Interrupted

    def _hold(self, wait_s: float, told_s: float) -> None:
        """Wait before the next try. What the server told counts for all threads."""
        if told_s:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + min(told_s, MOST_WAIT_S))
        self._ending.wait(wait_s)

    def _body(self, request: Request, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}],
            ask.limit: request.most_tokens * (1 + request.attempt),
            "stream": False,
        }
        if ask.temperature:
            # Asked again at 0 a model would say the same again.
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
            told = retry_after_s(response.headers.get("Retry-After"))
        try:
            said = json.loads(bytes(raw))
        except (ValueError, RecursionError):
            said = None
        return _Response(response.status_code, said, told, time.monotonic() - began, _clean(_message(said), self._key))

    def _stop_if_nobody_is_there(self, error: httpx.HTTPError) -> None:
        """A server that was never there will hardly come; one that was may."""
        if (
            isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol)
            and not self._reached
        ):
            raise EndpointError(
                f"nothing answers at {self.url} ({_kind(error)}); start the server, or give another --endpoint"
            ) from None

    def _stop_at(self, response: _Response) -> None:
        status, said = response.status, f"HTTP {response.status}{': ' if response.message else ''}{response.message}"
        if status in (401, 403):
            remedy = (
                f"see whether {self.key_env} holds the right key"
                if self.key_env
                else "name the variable that holds the key with --key-env"
            )
            raise EndpointError(f"{self.host} refuses access ({said}); {remedy}")
        if status == 402 or response.no_credit:
            raise EndpointError(
                f"{self.host} asks for payment ({said}); what was answered is kept, so run the same command again later"
            )
        if 300 <= status < 400:
            raise EndpointError(f"{self.url} leads elsewhere ({said}); give the endpoint that it leads to")
        if status != 200:
            raise EndpointError(
                f"{self.url}/chat/completions has no model {self.model!r}, or is no such place ({said}); see"
                " --endpoint, which usually ends in /v1, and --model"
            )


class _Response(NamedTuple):
    """What came back, whatever it is."""

    status: int
    said: Any
    retry_after_s: float
    wall_s: float
    message: str

    @property
    def no_credit(self) -> bool:
        return self.status == 429 and "insufficient_quota" in json.dumps(self.said)

    @property
    def passing(self) -> bool:
        return (self.status in PASSING or self.status >= 500) and self.status not in REFUSED and not self.no_credit

    @property
    def whole(self) -> bool:
        """Whether it holds an answer."""
        return self.status == 200 and self._choice() is not None

    @property
    def why(self) -> str:
        return "no answer in the response" if self.status == 200 else f"HTTP {self.status}"

    def _choice(self) -> dict[str, Any] | None:
        match self.said:
            case {"choices": [{"message": dict()} as choice, *_]}:
                return choice
        return None

    def answer(self) -> Answer:
        choice = self._choice()
        assert choice is not None
        content = choice["message"].get("content")
        used = self.said.get("usage")
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


def simpler(ask: Ask, message: str, *, logprobs: bool) -> Ask | None:
    """What to ask for after a refusal: without what the message names, else without the next thing in turn; None where
    nothing is left.

    Args:
        logprobs: whether log-probabilities were asked for.
    """
    said = message.lower()
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
    named = [less for words, less in ways if any(w in said for w in words)]
    return next(iter([*named, *(less for _, less in ways)]), None)


def base_url(text: str) -> str:
    """An endpoint's base, without what people paste along.

    Raises:
        ConfigError: for what is no plain http or https address.
    """
    said = text.strip().rstrip("/").removesuffix("/chat/completions").rstrip("/")
    try:
        parts = urlsplit(said)
        usable = bool(httpx.URL(said).host) and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        usable, parts = False, urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or not usable:
        raise ConfigError(f"the endpoint {_without_secrets(text)!r} is no address; write http://HOST:PORT/v1, say")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"the endpoint at {parts.hostname} has a name, a password or a query in its address, which could be a key;"
            " name the variable that holds the key with --key-env"
        )
    return said


def _without_secrets(text: str) -> str:
    return text.split("@")[-1].split("?")[0][:100]


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"--key-env {variable}: there is no such environment variable, or it is empty; set it to the key"
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"--key-env {variable}: its value holds characters that no key has; set it to the key alone")
    return key


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _kind(error: httpx.HTTPError) -> str:
    """An error of the connection in words of ours: those of the library may quote what was sent."""
    if isinstance(error, httpx.TimeoutException):
        return "timed out"
    return "the connection failed" if isinstance(error, httpx.ConnectError) else "the connection broke"


def retry_after_s(told: str | None) -> float:
    """Seconds, or a date, as RFC 9110 has it; 0 for neither."""
    if told is None:
        return 0.0
    try:
        return max(0.0, min(float(told), MOST_WAIT_S))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(told)
    except ValueError:
        return 0.0
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, min((then - datetime.now(UTC)).total_seconds(), MOST_WAIT_S))


def _message(said: Any) -> str:
    """What a server says of an error, in the places where they say it."""
    match said:
        case (
            {"error": {"message": str(message)}}
            | {"error": str(message)}
            | {"message": str(message)}
            | {"detail": str(message)}
        ):
            return message
    return ""


def _storable(text: Any) -> str:
    """Text as UTF-8 can hold it: JSON can spell halves of surrogate pairs. What is no text is none."""
    return text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else ""


def _clean(message: str, key: str) -> str:
    """One line, not long, without the key."""
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
