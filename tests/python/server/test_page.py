"""The page at `/` in a real browser, before a server that plays a script; and what the page is told."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_chromium

import nanobraid as nb
from nanobraid.server.page import MAX_REQUESTS, LiveRequests, page, state

SCRIPT_TEXT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
ANSWER = [
    "Here is **bold**, *slanted* and `a < b`:\n\n",
    "- one\n- two\n  - inner\n\n",
    "```python\nprint('<b>')\n",
    "**not bold**\n```\n",
    f"\n{SCRIPT_TEXT}\n\n",
    "## The end\n> said",
]
CHUNKS = [
    {
        "id": "chunk-7",
        "text": "The manual of a kettle. " + SCRIPT_TEXT,
        "tokens": 912,
        "pinned": True,
        "users": 2,
        "hits": 31,
    },
    {"id": "chunk-9", "text": "The manual of a newer kettle.", "tokens": 540, "pinned": False, "users": 0, "hits": 1},
]
BYTES = {"chunk-7": (21012480, 0), "chunk-9": (12441600, 4976640)}


class Stub:
    """A server in a thread. `asked` are the bodies it got, as (method, path, body)."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.keys: list[str | None] = []
        self.steps = threading.Semaphore(0)  # an answer goes on by one piece for each release()
        self.stopped = threading.Event()
        self.fails: dict[str, Any] | None = None
        self.needs_key = False
        self.chunks = [
            {
                **chunk,
                "object": "chunk",
                "ready": True,
                "kv_bytes": BYTES[chunk["id"]][0],
                "shared_bytes": BYTES[chunk["id"]][1],
            }
            for chunk in CHUNKS
        ]
        self.requests = [
            {"id": "chatcmpl-81f0c2", "state": "running", "prompt_tokens": 1204, "generated_tokens": 87, "age_s": 3.2},
            {"id": "chatcmpl-81f0c3", "state": "waiting", "prompt_tokens": 88, "generated_tokens": 0, "age_s": 71.0},
        ]
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def bodies(self, method: str, path: str) -> list[Any]:
        return [body for asked, where, body in self.asked if (asked, where) == (method, path)]

    def close(self) -> None:
        self._server.should_exit = True
        for _ in range(100):
            self.steps.release()
        self._thread.join(10)

    def _serve(self) -> None:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [
            Route("/", self._page),
            Route("/state", self._state),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/chunks", self._list, methods=["GET"]),
            Route("/v1/chunks", self._register, methods=["POST"]),
            Route("/v1/chunks/{id}/pin", self._pin, methods=["POST"]),
            Route("/v1/chunks/{id}", self._delete, methods=["DELETE"]),
        ]

        async def serve() -> None:
            config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", lifespan="off")
            self._server = uvicorn.Server(config)
            task = asyncio.create_task(self._server.serve())
            while not self._server.started:
                await asyncio.sleep(0.01)
            self.port = self._server.servers[0].sockets[0].getsockname()[1]
            self._ready.set()
            await task

        asyncio.run(serve())

    async def _note(self, request: Any) -> Any:
        raw = await request.body()
        body = json.loads(raw) if raw else None
        self.asked.append((request.method, request.url.path, body))
        self.keys.append(request.headers.get("authorization"))
        return body

    async def _page(self, request: Any) -> Any:
        from starlette.responses import Response

        body, headers = page()
        return Response(body, headers=headers)

    async def _state(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        await self._note(request)
        if self.needs_key and request.headers.get("authorization") != "Bearer sesame":
            return JSONResponse({"error": {"message": "no key"}}, status_code=401)
        stats = {"running": 1, "waiting": 1, "blocks_total": 2048, "blocks_free": 1024, "blocks_owned": 608}
        stats |= {"blocks_cached": 416, "chunk_blocks": 96, "kv_bytes": 754974720, "preemptions": 3}
        stats |= {"kv_bytes_per_token": 23040.0, "peak_rss_bytes": 734003200}
        stats |= {"kv_requests": [{"kv_dtype": "bf16", "running": 1, "bytes": 7372800}]}
        stats |= {"generated_tokens": int(42 * time.monotonic()), "recent_read_gb_per_s": 17.25}
        body = {
            "model": "smollm2-135m",
            "uptime_s": 4021.5,
            "num_requests": 2,
            "requests": self.requests,
            "stats": stats,
        }
        return JSONResponse(body)

    async def _chat(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        await self._note(request)
        if self.fails is not None:
            return JSONResponse({"error": self.fails}, status_code=400)
        return StreamingResponse(self._pieces(), media_type="text/event-stream")

    async def _pieces(self) -> AsyncIterator[str]:
        try:
            yield event({"role": "assistant", "content": ""})
            yield event({"reasoning_content": "Let me think about <i>that</i>."})
            for piece in ANSWER:
                while not self.steps.acquire(blocking=False):
                    await asyncio.sleep(0.005)
                yield event({"content": piece})
            yield event({}, finish_reason="stop")
            report = {"kv_reuse_ratio": 0.75, "ttft_ms": 12.3, "mode": "approximate", "mode_served": "blend"}
            report |= {"exact_prefix": 16, "isolated": 1300, "recomputed": 152, "computed": 287}
            usage = {"prompt_tokens": 1755, "completion_tokens": 64, "total_tokens": 1819}
            yield f"data: {json.dumps({'choices': [], 'usage': usage, 'nanobraid': report})}\r\n\r\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.stopped.set()
            raise

    async def _list(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": self.chunks})

    async def _register(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        body = await self._note(request)
        if body["text"] == "too much":
            return JSONResponse({"error": {"message": "there is no room for 9 blocks"}}, status_code=503)
        chunk = {
            "id": "chunk-12a2f4e0c67b9d31a5e4c7f0",
            "name": None,
            "object": "chunk",
            "text": body["text"],
            "tokens": 3,
            "pinned": body["pin"],
            "users": 0,
        }
        self.chunks.append({**chunk, "ready": False, "hits": 0, "kv_bytes": 368640, "shared_bytes": 0})
        return JSONResponse(self.chunks[-1])

    async def _pin(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        body = await self._note(request)
        (chunk,) = [chunk for chunk in self.chunks if chunk["id"] == request.path_params["id"]]
        chunk["pinned"] = body["pinned"]
        return JSONResponse(chunk)

    async def _delete(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        await self._note(request)
        self.chunks = [chunk for chunk in self.chunks if chunk["id"] != request.path_params["id"]]
        return JSONResponse({"deleted": True})


def event(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    for module in ("starlette", "uvicorn"):
        pytest.importorskip(module, reason="needs the extra server")
    with Browser(chromium, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def tab(browser: Browser, stub: Stub) -> Iterator[Browser]:
    """The page, its first figures shown. It must say nothing in the console and ask nobody but its server."""
    browser.look(1280, 860)
    browser.open("about:blank")
    browser.console.clear()
    browser.requests.clear()
    browser.open(f"http://127.0.0.1:{stub.port}/")
    browser.until("document.getElementById('health')?.textContent === 'ready'")
    browser.until("document.querySelectorAll('.chunk').length === 2")
    yield browser
    browser.run("sessionStorage.clear()")
    assert browser.console == []
    assert browser.requests
    foreign = [url for url in browser.requests if not url.startswith((f"http://127.0.0.1:{stub.port}/", "data:image/"))]
    assert foreign == []


def say(tab: Browser, text: str) -> None:
    tab.run(f"document.getElementById('input').value = {json.dumps(text)}")
    press = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    tab.run("document.getElementById('input').focus()")
    tab.send("Input.dispatchKeyEvent", type="rawKeyDown", **press)
    tab.send("Input.dispatchKeyEvent", type="keyUp", **press)


def click(tab: Browser, script: str) -> None:
    tab.run(f"({script}).click()")


def answer_text(tab: Browser) -> str:
    return str(tab.run("[...document.querySelectorAll('.answer')].at(-1).textContent"))


def finish(tab: Browser, stub: Stub) -> None:
    for _ in ANSWER:
        stub.steps.release()
    tab.until("!document.getElementById('send').hidden")


def test_text_comes_piece_by_piece(tab: Browser, stub: Stub) -> None:
    say(tab, "Hello?")
    tab.until("document.querySelector('.answer.waiting')")
    assert answer_text(tab) == ""
    stub.steps.release()
    tab.until("document.querySelector('.answer strong')?.textContent === 'bold'")
    assert tab.run("document.querySelectorAll('.answer li').length") == 0
    stub.steps.release()
    tab.until("document.querySelectorAll('.answer li').length === 3")
    stub.steps.release()
    tab.until("document.querySelector('.answer pre')")  # of a block that has not ended
    finish(tab, stub)
    assert stub.bodies("POST", "/v1/chat/completions") == [
        {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": "Hello?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    facts = tab.run("document.querySelector('.message.assistant .facts').textContent")
    assert "64 tokens" in facts
    assert "first token after 12 ms" in facts
    assert "blend: 75 % of the prompt reused" in facts
    assert "16 exact prefix, 1,300 isolated, 152 recomputed, 287 computed" in facts


def test_markdown_becomes_nodes_and_markup_stays_text(tab: Browser, stub: Stub) -> None:
    say(tab, SCRIPT_TEXT)
    finish(tab, stub)
    assert tab.run("document.querySelector('.answer em').textContent") == "slanted"
    assert tab.run("document.querySelector('.answer p code').textContent") == "a < b"
    assert tab.run("document.querySelector('.answer li ul li').textContent") == "inner"
    assert tab.run("document.querySelector('.answer pre code').textContent") == "print('<b>')\n**not bold**"
    assert tab.run("document.querySelector('.answer h3').textContent") == "The end"
    assert tab.run("document.querySelector('.answer blockquote').textContent") == "said"
    assert tab.run("document.querySelectorAll('.answer > *')[3].textContent") == SCRIPT_TEXT
    assert tab.run("document.querySelector('.message.user').textContent") == SCRIPT_TEXT
    assert SCRIPT_TEXT in tab.run("document.querySelector('.chunk p').textContent")
    assert (
        tab.run("document.querySelectorAll('#messages img, #messages script, .chunk img, .chunk script').length") == 0
    )
    assert tab.run("window.hacked") is None


def test_markdown(tab: Browser) -> None:
    for text, markup in (
        ("a\n\nb\nc", "<p>a</p><p>b\nc</p>"),
        (
            "1. one\n   ```sh\n   ls\n     -l\n   ```\n2. two",
            '<ol start="1"><li>one</li></ol><pre><code>ls\n  -l</code></pre><ol start="2"><li>two</li></ol>',
        ),
        ("* a\n    1) b\n* c\n  d", '<ul><li>a<ol start="1"><li>b</li></ol></li><li>c\nd</li></ul>'),
        ("```\n<b>&", "<pre><code>&lt;b&gt;&amp;</code></pre>"),
        ("2 * 3 * 4 and **x", "<p>2 * 3 * 4 and **x</p>"),
        ("``a ` b`` **c *d***", "<p><code>a ` b</code> **c <em>d</em>**</p>"),
        ("**a `b`** ![x](http://x/y.png)", "<p><strong>a <code>b</code></strong> ![x](http://x/y.png)</p>"),
        ("# T\n---\n- - -", "<h2>T</h2><hr><hr>"),
        ("> a\n>b\nc", "<blockquote>a\nb</blockquote><p>c</p>"),
        ("", ""),
    ):
        begin = f"(() => {{ const node = make('div', ''), text = {json.dumps(text)};"
        assert tab.run(f"{begin} showMarkdown(node, text); return node.innerHTML; }})()") == markup
        # Coming letter by letter it is the same in the end.
        grow = "for (let i = 0; i <= text.length; i++) showMarkdown(node, text.slice(0, i));"
        assert tab.run(f"{begin} {grow} return node.innerHTML; }})()") == markup


def test_reasoning_is_folded(tab: Browser, stub: Stub) -> None:
    say(tab, "Why?")
    finish(tab, stub)
    assert tab.run("document.querySelector('.reasoning').open") is False
    assert tab.run("document.querySelector('.reasoning > div').textContent") == "Let me think about <i>that</i>."
    assert "think" not in answer_text(tab)


def test_stop_ends_the_request(tab: Browser, stub: Stub) -> None:
    say(tab, "Go on and on")
    stub.steps.release()
    tab.until("document.querySelector('.answer strong')")
    click(tab, "document.getElementById('stop')")
    assert stub.stopped.wait(5)
    tab.until("!document.getElementById('send').hidden")
    assert "stopped" in tab.run("document.querySelector('.message.assistant .facts').textContent")
    assert answer_text(tab) == "Here is bold, slanted and a < b:"
    assert tab.run("document.querySelector('.message .error').hidden")


def test_regenerate_and_new_chat(tab: Browser, stub: Stub) -> None:
    say(tab, "One")
    finish(tab, stub)
    click(tab, "document.querySelector('.again')")
    finish(tab, stub)
    assert tab.run("document.querySelectorAll('.message').length") == 2
    say(tab, "Two")
    finish(tab, stub)
    first, second, third = stub.bodies("POST", "/v1/chat/completions")
    assert first == second
    assert [message["role"] for message in third["messages"]] == ["user", "assistant", "user"]
    assert third["messages"][1]["content"] == "".join(ANSWER)
    click(tab, "document.getElementById('fresh')")
    assert tab.run("document.querySelectorAll('.message').length") == 0
    say(tab, "Three")
    finish(tab, stub)
    assert stub.bodies("POST", "/v1/chat/completions")[-1]["messages"] == [{"role": "user", "content": "Three"}]


def test_settings_are_sent(tab: Browser, stub: Stub) -> None:
    for name, value in (("system", "Be brief."), ("temperature", "0.3"), ("max-tokens", "77")):
        tab.run(f"document.getElementById('{name}').value = '{value}'")
    tab.run("document.getElementById('key').value = 'sesame'")
    tab.run("document.getElementById('key').dispatchEvent(new Event('input'))")
    say(tab, "Hi")
    finish(tab, stub)
    (body,) = stub.bodies("POST", "/v1/chat/completions")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"]) == (0.3, 77)
    where = [path for _, path, _ in stub.asked].index("/v1/chat/completions")
    assert stub.keys[where] == "Bearer sesame"
    assert tab.run("sessionStorage.length") == 1
    assert tab.run("localStorage.length") == 0


def test_a_missing_key_is_asked_for(tab: Browser, stub: Stub) -> None:
    stub.needs_key = True
    tab.until("document.getElementById('health').textContent === 'needs an API key'")
    assert tab.run("document.getElementById('settings').open")
    tab.run("document.getElementById('key').value = 'sesame'")
    tab.run("document.getElementById('key').dispatchEvent(new Event('input'))")
    tab.until("document.getElementById('health').textContent === 'ready'")
    assert all("401" in line for line in tab.console)
    tab.console.clear()


def test_an_error_is_shown_under_the_question(tab: Browser, stub: Stub) -> None:
    stub.fails = {"message": "messages: 9000 tokens, the model takes <b>1024</b>", "type": "invalid_request_error"}
    say(tab, "Too long")
    shown = "document.querySelector('.message .error:not([hidden])')?.textContent"
    assert tab.until(shown) == "messages: 9000 tokens, the model takes <b>1024</b>"
    stub.fails = None
    click(tab, "document.querySelector('.again')")
    finish(tab, stub)
    assert tab.run("document.querySelector('.message .error').hidden")
    assert all("400" in line for line in tab.console)
    tab.console.clear()


def test_ticked_chunks_go_with_the_message(tab: Browser, stub: Stub) -> None:
    say(tab, "Before")
    finish(tab, stub)
    click(tab, "document.querySelectorAll('.chunk input')[0]")
    click(tab, "document.querySelectorAll('.chunk input')[1]")
    click(tab, "document.querySelector('#reuse [value=blend]')")
    assert tab.run("document.getElementById('with').textContent") == "with chunk-7, chunk-9, blend"
    say(tab, "With both")
    finish(tab, stub)
    click(tab, "document.querySelectorAll('.chunk input')[0]")
    click(tab, "document.querySelector('#reuse [value=isolated]')")
    say(tab, "With one")
    finish(tab, stub)
    before, both, one = stub.bodies("POST", "/v1/chat/completions")
    assert "chunks" not in before
    assert "reuse" not in before
    assert (both["chunks"], both["reuse"]) == (["chunk-7", "chunk-9"], "blend")
    assert (one["chunks"], one["reuse"]) == (["chunk-9"], "isolated")


def test_chunks_are_listed_with_what_they_share(tab: Browser, stub: Stub) -> None:
    rows = tab.run("[...document.querySelectorAll('.chunk')].map((row) => row.textContent)")
    assert "chunk-7" in rows[0]
    assert "pinned, in use by 2" in rows[0]
    assert "912 tokens31 hits21 MB" in rows[0]
    assert "shares" not in rows[0]
    assert "540 tokens1 hit12 MBshares 5.0 MB" in rows[1]
    width = "document.querySelectorAll('.chunk')[1].querySelector('.shared').getBoundingClientRect().width"
    whole = "document.querySelectorAll('.chunk')[1].querySelector('.meter').getBoundingClientRect().width"
    tab.until(f"Math.abs({width} / {whole} - 4976640 / 21012480) < 0.01")
    assert tab.run("document.getElementById('shared').textContent") == "5.0 MB shared"


def test_chunks_are_registered_pinned_and_deleted(tab: Browser, stub: Stub) -> None:
    tab.run("document.getElementById('chunk-text').value = 'A new one'")
    click(tab, "document.getElementById('chunk-pin')")
    click(tab, "document.getElementById('chunk-add')")
    tab.until("document.querySelectorAll('.chunk').length === 3")
    assert stub.bodies("POST", "/v1/chunks") == [{"text": "A new one", "pin": True}]
    tab.until("document.getElementById('chunk-text').value === ''")
    assert "pinned, computing" in tab.run("document.querySelectorAll('.chunk')[2].textContent")
    click(tab, "document.querySelectorAll('.chunk input')[2]")
    assert tab.run("document.getElementById('with').textContent") == "with chunk-12a2f4e0\u2026, exact"
    click(tab, "document.querySelectorAll('.chunk')[2].querySelector('.link')")
    tab.until("document.querySelectorAll('.chunk')[2].querySelector('.link').textContent === 'pin'")
    assert stub.bodies("POST", "/v1/chunks/chunk-12a2f4e0c67b9d31a5e4c7f0/pin") == [{"pinned": False}]
    click(tab, "document.querySelectorAll('.chunk')[2].querySelectorAll('.link')[1]")
    tab.until("document.querySelectorAll('.chunk').length === 2")
    assert tab.run("document.getElementById('with').textContent") == ""  # what is gone is not ticked either
    tab.run("document.getElementById('chunk-text').value = 'too much'")
    click(tab, "document.getElementById('chunk-add')")
    shown = tab.until("document.querySelector('#chunk-error:not([hidden])')?.textContent")
    assert shown == "there is no room for 9 blocks"
    assert tab.run("document.getElementById('chunk-text').value") == "too much"
    assert all("503" in line for line in tab.console)
    tab.console.clear()


def test_the_live_view_shows_the_state(tab: Browser, stub: Stub) -> None:
    texts = {
        "running": "1",
        "waiting": "1",
        "preempted": "3",
        "reading": "17 GB/s",
        "kv-used": "512",
        "kv-chunked": "96",
    }
    texts |= {"kv-cached": "416", "kv-free": "1,024", "model": "smollm2-135m", "uptime": "up 1 h 7 min"}
    texts |= {"blocks": "2,048 blocks, 755 MB"}
    texts |= {"kv-token": "23 kB (bf16)", "kv-request": "7.4 MB", "peak": "734 MB"}
    for name, text in texts.items():
        assert tab.run(f"document.getElementById('{name}').textContent") == text
    rows = tab.run("[...document.querySelectorAll('#requests td')].map((cell) => cell.textContent)")
    assert rows[:5] == ["chatcmpl-81f0c2", "running", "1,204", "87", "3.2 s"]
    assert rows[5:] == ["chatcmpl-81f0c3", "waiting", "88", "0", "1:11"]
    share = "document.querySelector('#kv .used').getBoundingClientRect().width"
    tab.until(f"Math.abs({share} / document.getElementById('kv').getBoundingClientRect().width - 0.25) < 0.01")
    rate = float(tab.until("Number(document.getElementById('rate-value').textContent)"))
    assert 25 < rate < 60  # 42, but for how long questions and answers were under way
    stub.requests.clear()
    tab.until("document.getElementById('requests').hidden")


def test_a_hidden_page_asks_nothing(tab: Browser, stub: Stub) -> None:
    hide = "Object.defineProperty(document, 'hidden', {{configurable: true, value: {}}})"
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    tab.run(f"{hide.format('true')}; {tell}")
    tab.run("new Promise((done) => setTimeout(done, 400))")  # one that was under way
    asked = len(stub.asked)
    tab.run("new Promise((done) => setTimeout(done, 1600))")  # it asks every second
    assert len(stub.asked) == asked
    tab.run(f"{hide.format('false')}; {tell}")
    end = time.monotonic() + 10
    while len(stub.asked) == asked:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_that_is_gone_is_noticed(tab: Browser, stub: Stub) -> None:
    stub.close()
    tab.until("document.getElementById('health').textContent === 'cannot be reached'")
    assert all("ERR_" in line for line in tab.console)
    tab.console.clear()


def test_a_narrow_window_shows_one_side_at_a_time(tab: Browser, stub: Stub) -> None:
    visible = "getComputedStyle(document.getElementById('side')).display !== 'none'"
    assert tab.run(visible)
    tab.look(420, 800)
    assert not tab.run(visible)
    click(tab, "document.getElementById('toggle')")
    assert tab.run(visible)
    assert tab.run("document.documentElement.scrollWidth") == 420


def test_screenshots(tab: Browser, stub: Stub, tmp_path: Path) -> None:
    """Colors follow the user's; and the pictures are there to be looked at."""
    say(tab, "How does a kettle know that the water boils?")
    finish(tab, stub)
    shades = []
    for dark in (False, True):
        tab.look(1280, 860, dark=dark)
        name = "dark" if dark else "light"
        (tmp_path / f"{name}.png").write_bytes(tab.screenshot())
        channels = re.findall(r"\d+", tab.run("getComputedStyle(document.body).backgroundColor"))
        shades.append(sum(map(int, channels[:3])) / 3)
    assert shades[0] > 200
    assert shades[1] < 60


def test_headers_allow_the_page_and_nothing_else() -> None:
    body, headers = page()
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    (script,) = re.findall(rb"<script>(.*?)</script>", body, re.DOTALL)
    assert policy["script-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe-inline" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert len(body) < 40_000
    assert b"innerHTML" not in body
    assert b"http:" not in body.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https:" not in body


def test_state_of_a_real_engine(llm: nb.LLM) -> None:
    live = LiveRequests()
    engine = nb.AsyncEngine(llm)
    first, second = live.add("same", 12), live.add("same", 30)
    first.running = True
    first.tokens += 5
    shown = state(engine, live, "smol")
    assert [request["state"] for request in shown["requests"]] == ["running", "waiting"]
    assert {**shown["requests"][0], "age_s": 0} == {
        "id": "same",
        "state": "running",
        "prompt_tokens": 12,
        "generated_tokens": 5,
        "age_s": 0,
    }
    assert 0 <= shown["requests"][0]["age_s"] < 60
    assert shown["model"] == "smol"
    memory = {"rss_bytes": 0, "peak_rss_bytes": 0}  # of the process, which changes by itself
    assert {**shown["stats"], **memory} == {**llm.stats(), **memory}
    json.dumps(shown)
    live.remove(first)
    live.remove(first)
    assert list(live) == [second]
    for _ in range(MAX_REQUESTS + 10):
        live.add("other", 1)
    shown = state(engine, live, "smol")
    assert (len(shown["requests"]), shown["num_requests"]) == (MAX_REQUESTS, MAX_REQUESTS + 11)


def test_the_page_reads_what_stats_has(llm: nb.LLM) -> None:
    names = set(re.findall(rb"stats\.(\w+)", page()[0]))
    assert names
    assert {name.decode() for name in names} <= llm.stats().keys()
