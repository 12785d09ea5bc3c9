"""Who may use the server, from where, and what it tells nobody."""

from __future__ import annotations

import inspect
import json
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from http_checks import connect, read_answer, refused

from nanobraid._draft import Draft
from nanobraid.errors import InternalError, NanobraidError
from nanobraid.server import edge
from nanobraid.server.settings import Settings

CHAT = "/v1/chat/completions"
FIRST, SECOND = "sk-first", "sk-second"
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
DOCUMENT = "The east gate opens with a brass key that hangs behind the third shelf in the kitchen. " * 6


@pytest.fixture(scope="module")
def guarded_server(serve: Any) -> Iterator[Any]:
    with serve(Settings(api_keys=(FIRST, SECOND))) as server:
        yield server


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer sk-firs")],
        [("authorization", "Bearer sk-first1")],
        [("authorization", "Bearer SK-FIRST")],
        [("authorization", "sk-first")],
        [("authorization", "Basic c2stZmlyc3Q=")],
        [("authorization", "Basic sk-first")],
        [("authorization", "Bearer sk-first"), ("authorization", "Bearer sk-second")],
        [("authorization", "Bearer sk-first"), ("authorization", "Bearer sk-first")],
        [("authorization", "Bearer sk-wrong"), ("x-api-key", "sk-first")],
        [("authorization", "Bearer sk-first sk-second")],
        [("authorization", "Bearer sk-first,sk-second")],
        [("x-api-key", "wrong")],
        [("cookie", "key=sk-first")],
    ],
)
def test_no_or_wrong_keys(guarded_server: Any, headers: list[tuple[str, str]]) -> None:
    client = guarded_server.client
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/nowhere"), ("GET", "/openapi.json")):
        answer = client.request(method, path, headers=headers, json=BODY if method == "POST" else None)
        refused(answer, 401, None, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "sk-" not in answer.text
    for path in ("/metrics", "/state", "/ready", "/v1/chunks", "/tokenizer_info"):
        assert client.get(path, headers=headers).status_code == 401
    assert client.get("/health", headers=headers).status_code == 200


def test_a_key_in_the_address_is_no_key(guarded_server: Any) -> None:
    for query in ("key=sk-first", "api_key=sk-first", "authorization=Bearer%20sk-first"):
        refused(guarded_server.client.post(f"{CHAT}?{query}", json=BODY), 401)


def test_keys(guarded_server: Any) -> None:
    for headers in (_bearer(FIRST), _bearer(SECOND), {"x-api-key": FIRST}, {"authorization": f"bearer  {FIRST}"}):
        assert guarded_server.client.post(CHAT, json=BODY, headers=headers).status_code == 200


def test_keys_are_compared_in_constant_time() -> None:
    source = inspect.getsource(edge.Edge._checked_key)
    assert "compare_digest" in source
    # Every key is looked at whichever matches, and nothing else compares the value.
    loop = source[source.index("for known") :]
    assert "break" not in loop and loop.count("return") == 1
    assert not re.search(r"(==|!=|\bin\b)\s*(value|digest|self\._keys\b(?!:))", source.replace("in self._keys:", ""))


def test_keys_share_neither_prefixes_nor_chunks(guarded_server: Any) -> None:
    def cached(key: str, **fields: Any) -> int:
        body = {**BODY, "messages": [{"role": "user", "content": DOCUMENT}], **fields}
        answer = guarded_server.client.post(CHAT, json=body, headers=_bearer(key)).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(FIRST) <= 32  # the template's own words
    assert cached(FIRST) > 50
    assert cached(SECOND) <= 32
    assert cached(SECOND) > 50
    # The namespace of a key cannot be chosen by another.
    for salt in (edge_namespace(guarded_server, FIRST), f"{edge_namespace(guarded_server, FIRST)}:"):
        assert cached(SECOND, cache_salt=salt) == 0
    client = guarded_server.client
    chunk = client.post("/v1/chunks", json={"text": DOCUMENT, "pin": True}, headers=_bearer(FIRST)).json()
    try:
        body = {**BODY, "chunks": [chunk["id"]], "reuse": "isolated"}
        assert client.post(CHAT, json=body, headers=_bearer(FIRST)).status_code == 200
        refused(client.post(CHAT, json=body, headers=_bearer(SECOND)), 404, "chunks[0]", "chunk_not_found")
        assert client.get("/v1/chunks", headers=_bearer(SECOND)).json()["data"] == []
        for method, more in (("GET", ""), ("DELETE", "")):
            refused(client.request(method, f"/v1/chunks/{chunk['id']}{more}", headers=_bearer(SECOND)), 404)
        answer = client.post(f"/v1/chunks/{chunk['id']}/pin", json={"pinned": False}, headers=_bearer(SECOND))
        refused(answer, 404)
        other = client.post("/v1/chunks", json={"text": DOCUMENT}, headers=_bearer(SECOND)).json()
        assert other["id"] != chunk["id"]  # nor does the id tell that another has the text
        assert client.delete(f"/v1/chunks/{other['id']}", headers=_bearer(SECOND)).status_code == 200
        assert client.get(f"/v1/chunks/{chunk['id']}", headers=_bearer(FIRST)).json()["pinned"] is True
    finally:
        client.delete(f"/v1/chunks/{chunk['id']}", headers=_bearer(FIRST))
    guarded_server.wait_idle()


def edge_namespace(server: Any, key: str) -> str:
    return str(server.app.service.namespace_of(key))


# ---- browsers ----

ASK = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}


def test_other_web_pages_are_not_allowed_by_default(server: Any) -> None:
    origin = {"origin": "https://example.com"}
    answers = [
        server.client.options(CHAT, headers={**origin, **ASK}),
        server.client.post(CHAT, json=BODY, headers=origin),
        server.client.get("/nowhere", headers=origin),
    ]
    assert [answer.status_code for answer in answers] == [405, 200, 404]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("allowed, given, answer", [
    ("https://example.com", "https://example.com", "https://example.com"),
    ("https://example.com", "https://example.com.evil.org", None),
    ("https://example.com", "http://example.com", None),
    ("https://example.com", "null", None),
    ("*", "https://any.org", "*"),
])  # fmt: skip
def test_origins(serve: Any, allowed: str, given: str, answer: str | None) -> None:
    with serve(Settings(allowed_origins=(allowed,), api_keys=(FIRST,))) as server:
        headers = {"origin": given}
        preflight = server.client.options(CHAT, headers={**headers, **ASK})  # browsers send no key with it
        if answer is None:
            refused(preflight, 401)
        else:
            assert preflight.status_code == 204
            assert b"POST" in preflight.headers["access-control-allow-methods"].encode()
            assert "authorization" in preflight.headers["access-control-allow-headers"]
        for made in (
            preflight,
            server.client.post(CHAT, json=BODY, headers={**headers, **_bearer(FIRST)}),
            server.client.post(CHAT, json=BODY, headers=headers),  # pages can read refusals too
        ):
            assert made.headers.get("access-control-allow-origin") == answer
            assert "access-control-allow-credentials" not in made.headers


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("", 403),
        ("[::1", 403),
        ("evil.example:127.0.0.1", 403),
    ],
)
def test_names_of_this_machine(serve: Any, host: str, status: int) -> None:
    """A web page cannot reach a server on loopback by letting a name of its own point here."""
    with serve(allowed_hosts=frozenset(("127.0.0.1", "[::1]", "localhost"))) as server:
        for path in ("/v1/models", "/"):
            with connect(server) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
                assert read_answer(connection)[0] == status
        with connect(server) as connection:  # HTTP/1.0 needs no host
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert read_answer(connection)[0] == 403


# ---- what nobody is told ----

SECRET = "/srv/models/secret.gguf"


@pytest.mark.parametrize(
    "error",
    [
        InternalError(f"cannot map {SECRET} at 0x7f0012345678"),
        NanobraidError(f"cannot read {SECRET}"),
        RuntimeError(f"{SECRET}: 0x7f0012345678"),
        OSError(5, "input/output error", SECRET),
        KeyError(SECRET),
        RecursionError(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("when", ["at once", "at once, stream", "later", "later, stream"])
def test_errors_of_the_engine_stay_in_the_log(
    server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, when: str
) -> None:
    late, stream = "later" in when, "stream" in when
    start = server.engine.start

    async def broken(*args: Any, **more: Any) -> Any:
        if not late:
            raise error
        request = await start(*args, **more)

        def fail(*_: Any) -> Any:
            raise error

        for name in ("pieces", "add_tokens"):
            monkeypatch.setattr(Draft, name, fail)
        return request

    monkeypatch.setattr(server.engine, "start", broken)
    for path, body in (
        (CHAT, BODY),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/messages", BODY),
        ("/v1/responses", {"input": "a"}),
    ):
        answer = server.post(path, {**body, "stream": stream})
        assert "secret" not in answer.text and "0x7f" not in answer.text and "/srv" not in answer.text
        assert "Traceback" not in answer.text and type(error).__name__ not in answer.text
        if not (late and stream):
            assert answer.status_code == 500
            assert answer.headers["content-type"] == "application/json"
        else:
            assert answer.status_code == 200
            assert "internal error" in answer.text
            assert "[DONE]" not in answer.text
        if path == CHAT and not (late and stream):
            refused(answer, 500, None, None)
    told = caplog.text
    assert SECRET in told  # whoever runs the server must be able to see it
    assert not any(record.name.startswith("uvicorn") for record in caplog.records if record.levelno >= logging.ERROR)
    monkeypatch.undo()
    assert server.chat(max_tokens=1).status_code == 200


def test_nothing_names_folders(server: Any) -> None:
    for path in ("/v1/models", "/tokenizer_info", "/openapi.json", "/metrics", "/state"):
        text = server.client.get(path).text
        assert not re.search(r"/(home|root|work|tmp|usr|opt)/", text), path
        assert not re.search(r"0x[0-9a-f]{8}", text), path


def test_what_clients_send_cannot_forge_lines_of_the_log(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    from nanobraid.server.running import _AccessLines, _JsonLines

    forged = 'x\n12:00:00 127.0.0.1:1 GET "/admin" 200\x1b[2J'
    with caplog.at_level(logging.INFO, logger="nanobraid.access"):
        server.chat(max_tokens=1, user=forged)
        server.client.get("/%0aadmin")
        end = time.monotonic() + 2  # lines come behind the answers
        while len(records := [r for r in caplog.records if r.name == "nanobraid.access"]) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    for record in records:
        for formatter in (_AccessLines(), _JsonLines()):
            line = formatter.format(record)
            assert "\n" not in line and "\x1b" not in line
        assert json.loads(_JsonLines().format(record))["status"] in (200, 404)
