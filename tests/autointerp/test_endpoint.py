"""Any server behaviour is retried, worked around or reported in one sentence, and the key never leaks."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from autointerp.stand_in import Answering, Reply, StandIn, json_reply, serving, slowly
from crosslayer.autointerp.ask import FAILED_IN_A_ROW, Asker, Failure, OverBudget, Usable, estimated_tokens
from crosslayer.autointerp.cache import AnswerCache
from crosslayer.autointerp.endpoint import (
    Ask,
    Endpoint,
    Patience,
    Request,
    RequestFailed,
    base_url,
    retry_after_s,
    simpler,
)
from crosslayer.autointerp.explain import SCHEMA
from crosslayer.autointerp.reply import explanation_in
from crosslayer.core.errors import ConfigError, EndpointError, FormatError

REQUEST = Request("Be brief.", "Hello", SCHEMA, 50, logprobs=True)
QUICK = Patience(timeout_s=5.0, retries=3, base_s=0.001)
GOOD = json_reply({"label": "a", "explanation": "b"})
KEY = "sk-very-secret-0123456789"


def first(*replies: Reply) -> Answering:
    """Give these replies, then a good answer."""
    return lambda body, n: replies[n] if n < len(replies) else GOOD


def sent(answering: Answering, patience: Patience = QUICK, **more: str) -> tuple[str, StandIn]:
    with serving(answering) as s, Endpoint(s.url, "m", patience=patience, **more) as e:
        return e.send(REQUEST).text, s


def test_request_follows_the_api():
    _, s = sent(first())
    body = s.bodies[0]
    assert body["model"] == "m"
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert (body["temperature"], body["max_tokens"], body["logprobs"], body["stream"]) == (0, 50, True, False)
    assert "authorization" not in {k.lower() for k in s.headers[0]}


@pytest.mark.parametrize(
    "reply",
    [
        Reply(429),
        Reply(500),
        Reply(503, "busy"),
        Reply(408),
        Reply(raw=b'{"choices": [{"mess'),
        Reply(raw=b"<html>"),
        Reply(raw=b'{"choices": []}'),
    ],
)
def test_temporary_failures_are_retried(reply: Reply):
    text, s = sent(first(reply, reply))
    assert text == GOOD.content
    assert len(s.bodies) == 3
    with serving(first(*[reply] * 9)) as s, Endpoint(s.url, "m", patience=QUICK) as e:
        with pytest.raises(RequestFailed, match=r"HTTP|no answer in"):
            e.send(REQUEST)
        assert len(s.bodies) == e.n_sent == 4


def test_retry_after_is_respected():
    began = time.monotonic()
    sent(first(Reply(429, headers={"Retry-After": "0.3"})))
    assert time.monotonic() - began > 0.25
    assert 28 < retry_after_s(format_datetime(datetime.now(UTC) + timedelta(seconds=30))) <= 30
    assert [retry_after_s(t) for t in (None, "soon", "-3", "7", "1e9", "Wed, 21 Oct 2015 07:28:00 GMT")] == [
        0,
        0,
        0,
        7,
        300,
        0,
    ]
    began = time.monotonic()
    sent(first(Reply(429, headers={"Retry-After": "soon"})))
    assert time.monotonic() - began < 0.25


def test_waits_double_up_to_a_bound_with_jitter():
    patience = Patience(base_s=1.0, most_s=10.0)
    for n, most in ((0, 1), (1, 2), (2, 4), (9, 10)):
        waits = {patience.wait_s(n) for _ in range(20)}
        assert len(waits) > 10
        assert all(most / 2 <= w <= most for w in waits)


def test_slow_server_times_out_and_is_retried():
    with serving(lambda body, n: slowly(first(), 0.4 if n == 0 else 0.0)(body, n)) as s:
        with Endpoint(s.url, "m", patience=Patience(timeout_s=0.1, retries=2, base_s=0.001)) as e:
            assert e.send(REQUEST).text == GOOD.content
        assert len(s.bodies) == 2


def refusing(*, schema: bool, logprobs: bool, temperature: bool, named: bool) -> Answering:
    def answer(body: dict, n: int) -> Reply:
        kind = body.get("response_format", {}).get("type")
        for refused, what in (
            (schema and kind == "json_schema", "response_format"),
            (logprobs and "logprobs" in body, "logprobs"),
            (temperature and "temperature" in body, "temperature"),
        ):
            if refused:
                return Reply(400, f"{what} is not supported" if named else "bad request")
        return GOOD

    return answer


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("which", [(True, False, False), (False, True, False), (True, True, True)])
def test_refused_options_are_left_out_from_then_on(which: tuple[bool, bool, bool], named: bool):
    schema, logprobs, temperature = which
    with serving(refusing(schema=schema, logprobs=logprobs, temperature=temperature, named=named)) as s:
        with Endpoint(s.url, "m", patience=QUICK) as e:
            assert e.send(REQUEST).text == GOOD.content
            n = len(s.bodies)
            assert e.send(REQUEST).text == GOOD.content
            assert len(s.bodies) == n + 1
        if named:
            assert n == 1 + sum(which)
            assert ("response_format" in s.bodies[-1], "temperature" in s.bodies[-1]) == (True, not temperature)


def test_request_refused_without_options_fails_alone():
    def answering(body: dict, n: int) -> Reply:
        return Reply(400, "the prompt is too long") if body["messages"][1]["content"] == "long" else GOOD

    with serving(answering) as s, Endpoint(s.url, "m", patience=QUICK) as e:
        with pytest.raises(RequestFailed, match="HTTP 400: the prompt is too long"):
            e.send(REQUEST._replace(user="long"))
        e.send(REQUEST)
        assert "response_format" in s.bodies[-1]


def test_options_are_dropped_until_none_is_left():
    ask, seen = Ask(), []
    while (less := simpler(ask, "max_tokens is unknown; use max_completion_tokens", logprobs=True)) is not None:
        seen.append(ask := less)
    assert seen[0] == Ask(limit="max_completion_tokens")
    assert seen[-1] == Ask("none", logprobs=False, temperature=False, limit="max_completion_tokens")


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(401, "who are you"), "refuses access (HTTP 401: who are you); name the variable"),
        (Reply(403), "refuses access"),
        (Reply(404, "model not found"), "has no model 'm', or is no such place (HTTP 404: model not found)"),
        (Reply(402), "asks for payment"),
        (Reply(429, "insufficient_quota: pay"), "asks for payment"),
        (Reply(307, headers={"Location": "http://127.0.0.1:1/"}), "redirects"),
    ],
)
def test_permanent_failures_are_reported_at_once(reply: Reply, words: str):
    with serving(first(*[reply] * 9)) as s, Endpoint(s.url, "m", patience=QUICK) as e:
        with pytest.raises(EndpointError) as caught:
            e.send(REQUEST)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(s.bodies) == 1


def test_missing_server_is_reported_at_once_and_a_lost_one_is_retried():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with Endpoint(url, "m") as e, pytest.raises(EndpointError, match="nothing answers at http://127"):
            e.send(REQUEST)
    with serving(first(GOOD._replace(headers={"Connection": "close"}))) as s:
        url = s.url
        with Endpoint(url, "m", patience=QUICK) as e:
            e.send(REQUEST)
            s.server.shutdown()
            s.server.socket.close()
            with pytest.raises(RequestFailed, match="the connection failed"):
                e.send(REQUEST)
            assert e.n_sent == 5


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "is no address"),
        ("localhost:80", "is no address"),
        ("ftp://x/v1", "is no address"),
        ("http://", "is no address"),
        ("http://x:99999/v1", "is no address"),
        ("http://me:word@x/v1", "name the variable"),
        ("https://x/v1?key=word", "name the variable"),
        ("word://me:word@[", "is no address"),
    ],
)
def test_addresses(url: str, words: str):
    with pytest.raises(ConfigError, match=words) as caught:
        base_url(url)
    assert "word@" not in str(caught.value)
    assert "key=" not in str(caught.value)


def test_pasted_addresses():
    assert (
        base_url(" http://127.0.0.1:8080/v1/ ")
        == base_url("http://127.0.0.1:8080/v1/chat/completions")
        == "http://127.0.0.1:8080/v1"
    )


def test_key_is_sent_and_appears_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    replies = [Reply(500, KEY), Reply(400, f"response_format: {KEY}"), GOOD, Reply(401, f"bad key {KEY}\x1b[31m")]
    with serving(first(*replies)) as s, Endpoint(s.url, "m", "SOME_KEY", QUICK) as e:
        asker = Asker(e, AnswerCache(tmp_path / "c.sqlite"))
        assert isinstance(asker.ask(REQUEST, explanation_in), Usable)
        with pytest.raises(EndpointError) as caught:
            asker.ask(REQUEST._replace(user="again"), explanation_in)
        assert {h["Authorization"] for h in s.headers} == {f"Bearer {KEY}"}
        assert KEY not in json.dumps(s.bodies)
        shown = [
            str(caught.value),
            str(caught.getrepr()),
            repr(e),
            repr(asker.spent),
            repr(e._client.headers),
            caplog.text,
        ]
    assert "check that SOME_KEY holds the right key" in str(caught.value)
    assert not any(KEY in text for text in shown)
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.iterdir())


def test_invalid_keys(monkeypatch: pytest.MonkeyPatch):
    for value, words in (
        (None, "no such environment variable"),
        ("  ", "or it is empty"),
        (f"{KEY}\nx", "characters that are invalid in a key"),
    ):
        monkeypatch.delenv("SOME_KEY", raising=False) if value is None else monkeypatch.setenv("SOME_KEY", value)
        with pytest.raises(ConfigError, match=words) as caught:
            Endpoint("https://example.org/v1", "m", "SOME_KEY")
        assert KEY not in str(caught.value)
    monkeypatch.setenv("SOME_KEY", KEY)
    with pytest.raises(ConfigError, match="would go unencrypted"):
        Endpoint("http://example.org/v1", "m", "SOME_KEY")


def test_answer_is_requested_once(tmp_path: Path):
    with serving(first()) as s, Endpoint(s.url, "m", patience=QUICK) as e:
        for _ in range(2):
            asker = Asker(e, AnswerCache(tmp_path / "c.sqlite"))
            assert asker.ask(REQUEST, explanation_in).value == ("a", "b")  # type: ignore[union-attr]
        assert (asker.spent.calls, asker.spent.cached, len(s.bodies)) == (0, 1, 1)
        keys = {
            r.key(u, m)
            for r in (REQUEST, REQUEST._replace(attempt=1), REQUEST._replace(user="x"))
            for u in ("a", "b")
            for m in ("m", "n")
        }
        assert len(keys) == 12
    (tmp_path / "bad.sqlite").write_text("no database at all " * 100)
    with pytest.raises(FormatError, match="move it away"):
        AnswerCache(tmp_path / "bad.sqlite")


def test_unusable_answer_is_requested_again_at_another_temperature(tmp_path: Path):
    with (
        serving(first(Reply(content='{"label": "a", "expl', finish="length"))) as s,
        Endpoint(s.url, "m", patience=QUICK) as e,
    ):
        asker = Asker(e, AnswerCache(tmp_path / "c.sqlite"))
        assert isinstance(asker.ask(REQUEST, explanation_in), Usable)
        assert [(b["temperature"], b["max_tokens"]) for b in s.bodies] == [(0, 50), (0.5, 100)]
        assert asker.spent.reasons == {"cut short": 1}
    with serving(lambda body, n: Reply(content="I cannot.")) as s, Endpoint(s.url, "m", patience=QUICK) as e:
        asker = Asker(e, AnswerCache(tmp_path / "d.sqlite"))
        assert asker.ask(REQUEST, explanation_in) == Failure("no JSON")
        assert asker.ask(REQUEST, explanation_in) == Failure("no JSON")
        assert len(s.bodies) == 2, "an unusable answer was paid for twice"


def test_consecutive_failures_stop_the_run(tmp_path: Path):
    once = Patience(retries=0)
    with serving(lambda body, n: Reply(500)) as s, Endpoint(s.url, "m", patience=once) as e:
        asker = Asker(e, AnswerCache(tmp_path / "c.sqlite"))
        for n in range(FAILED_IN_A_ROW - 1):
            assert asker.ask(REQUEST._replace(user=str(n)), explanation_in) == Failure("HTTP 500")
        with pytest.raises(EndpointError, match="in a row had no answer"):
            asker.ask(REQUEST, explanation_in)


def test_budget_is_not_exceeded(tmp_path: Path):
    one = 110
    budget = 4 * one + estimated_tokens(REQUEST) + REQUEST.most_tokens
    with serving(first()) as s, Endpoint(s.url, "m", patience=QUICK) as e:
        asker = Asker(e, AnswerCache(tmp_path / "c.sqlite"), budget)
        for n in range(5):
            asker.ask(REQUEST._replace(user=f"{n}    "), explanation_in)
        with pytest.raises(OverBudget):
            asker.ask(REQUEST._replace(user="more"), explanation_in)
        assert (len(s.bodies), asker.spent.tokens) == (5, 5 * one)
        asker.ask(REQUEST._replace(user="0    "), explanation_in)


def test_waiting_ends_with_the_run():
    with serving(lambda body, n: Reply(429, headers={"Retry-After": "100"})) as s, Endpoint(s.url, "m") as e:
        raised: list[str] = []

        def work() -> None:
            try:
                e.send(REQUEST)
            except Exception as error:  # noqa: BLE001
                raised.append(type(error).__name__)

        thread = threading.Thread(target=work)
        thread.start()
        while not s.answered:
            time.sleep(0.01)
        e.end()
        thread.join(timeout=3)
        assert raised == ["Interrupted"]
