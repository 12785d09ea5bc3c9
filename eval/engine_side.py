"""`AsyncEngine` without HTTP as a process that is measured; and the HTTP layer over an engine that computes nothing.

    python eval/engine_side.py engine MODEL OPTIONS     jobs as JSON lines on stdin, answers on stdout
    python eval/engine_side.py stub MODEL               serves, prints `Ready at ...` as the command does

Both are started by server_overhead.py.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import nanobraid as nb


async def stream(engine: nb.AsyncEngine, prompt: list[int], max_tokens: int) -> tuple[float, int]:
    """Reads an answer; returns seconds to its first piece, and its tokens."""
    params = nb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    begin, first, count = time.perf_counter(), 0.0, 0
    async for piece in engine.stream(prompt, params):
        first = first or time.perf_counter() - begin
        count += len(piece.token_ids)
    return first, count


async def run_jobs(engine: nb.AsyncEngine) -> None:
    """Runs the prompts of each line at the same time."""
    about = {key: str(engine.llm.config[key]) for key in ("backend", "dtype", "kv_dtype")}
    print(json.dumps(about), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        job = json.loads(line)
        begin = time.perf_counter()
        answers = await asyncio.gather(*(stream(engine, prompt, job["max_tokens"]) for prompt in job["prompts"]))
        seconds = time.perf_counter() - begin
        result = {"seconds": seconds, "ttft_s": [a[0] for a in answers], "tokens": sum(a[1] for a in answers)}
        print(json.dumps(result), flush=True)
    await engine.shutdown(drain=False)


def serve_stub(model: str) -> None:
    """Serves; every request is answered at once with `max_tokens` pieces that nobody has computed."""
    from nanobraid.outputs import StreamPiece
    from nanobraid.server import running
    from nanobraid.server.app import create_app
    from nanobraid.server.settings import Settings

    class Request:
        """Pieces from the event loop, one after the other, so that others have their turn as between two steps."""

        def __init__(self, count: int) -> None:
            self._left = count
            self._take: Callable[[StreamPiece], None] | None = None
            self._take_text: Callable[[str, list[int]], None] | None = None

        def listen(
            self, take: Callable[[StreamPiece], None], take_text: Callable[[str, list[int]], None] | None = None
        ) -> None:
            self._take, self._take_text = take, take_text
            self._step()

        def _step(self) -> None:
            if self._take is None or self._left == 0:
                return
            self._left -= 1
            if self._left and self._take_text is not None:
                self._take_text(" word", [100])
            else:
                self._take(StreamPiece(" word", [100], None if self._left else "length"))
            asyncio.get_running_loop().call_soon(self._step)

        def abort(self) -> None:
            self._left = 0

    async def start(self: nb.AsyncEngine, prompt: Any, params: Any, **_: Any) -> Request:
        return Request(params.max_tokens)

    nb.AsyncEngine.start = start  # type: ignore[method-assign,assignment]
    with nb.LLM(model, max_model_len=8192, num_threads=1) as llm:
        app = create_app(nb.AsyncEngine(llm), Settings(log_requests=False), model="stub")

        def started(port: int) -> None:
            print(f"Ready at http://127.0.0.1:{port}", file=sys.stderr, flush=True)

        running.serve(app, running.bound_socket("127.0.0.1", 0), started=started)


def main() -> int:
    kind, model = sys.argv[1:3]
    if kind == "stub":
        serve_stub(model)
    else:
        asyncio.run(run_jobs(nb.AsyncEngine(model, **json.loads(sys.argv[3]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
