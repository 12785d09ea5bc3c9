"""What the scripts that measure serving share: both sides behind one interface, a clock, percentiles, prompts.

A side is opened with ``async with``; its ``stream`` yields a `Piece` whenever tokens arrive. Times are taken in one
event loop, by the same code for both. nanobraid runs in this process through `AsyncEngine`; the peer is llama.cpp's
`llama-server`, started here, asked through its streaming endpoint with token ids. Both decode greedily, neither stops
before `max_tokens`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

import nanobraid as nb
from machine import read_bandwidth
from nanobraid.bench_kv.machine import cpu_name
from nanobraid.models import resolve

Ids = list[int]


@dataclass(frozen=True)
class Piece:
    """Tokens that arrived together; in the last one of an answer, what the side says about the request.

    llama-server does not name tokens that end inside a character: `token_ids` may be fewer than `num_tokens`.
    """

    num_tokens: int
    token_ids: Ids
    queue_ms: float | None = None
    reuse_ratio: float | None = None


class Side(Protocol):
    """One of the two engines that are measured; `about` is what every figure must name."""

    name: str
    about: dict[str, str]

    def stream(self, prompt: Ids, max_tokens: int) -> AsyncIterator[Piece]: ...


class Nanobraid:
    """nanobraid in this process. Without `streams` the engine believes that nobody reads the tokens as they come, so it
    does not keep steps short for them."""

    def __init__(self, model: Path, *, streams: bool = True, **options: Any) -> None:
        self.name = "nanobraid"
        self.streams = streams
        self.engine = nb.AsyncEngine(model, **options)
        self.about = {key: str(self.engine.llm.config[key]) for key in ("backend", "dtype", "kv_dtype")}

    async def __aenter__(self) -> Nanobraid:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.engine.shutdown(drain=False)

    async def stream(self, prompt: Ids, max_tokens: int) -> AsyncIterator[Piece]:
        params = nb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        request = await self.engine.start(prompt, params, streams=self.streams)
        try:
            async for piece in request:
                ids, metrics = piece.token_ids, piece.metrics
                if metrics is None:
                    yield Piece(len(ids), ids)
                else:
                    yield Piece(len(ids), ids, metrics.queue_ms, metrics.kv_reuse_ratio)
        finally:
            request.abort()


class PeerError(RuntimeError):
    """llama-server did not start, refused a request, or broke off."""


class LlamaServer:
    """A `llama-server` of our own on a free port; `cache` is its `cache_prompt`.

    Args:
        binary: Path of llama-server.
        model: A GGUF file.
        threads: As for nanobraid.
        slots: Requests that run at a time.
        context: Tokens of one slot.
        cache: Whether a prompt may reuse what its slot has computed.
    """

    def __init__(
        self,
        binary: Path,
        model: Path,
        *,
        threads: int,
        slots: int,
        context: int,
        cache: bool,
    ) -> None:
        self.name = "llama.cpp"
        self.about = {"kv_dtype": "f16", "options": "its defaults"}
        self.cache = cache
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._command = [str(binary), "-m", str(model), "-t", str(threads), "-np", str(slots)]
        self._command += ["-c", str(slots * context), "--host", "127.0.0.1", "--port", str(self.port)]
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    async def __aenter__(self) -> LlamaServer:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by __aexit__
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment
        )
        try:
            await self._wait_until_ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._process is not None and self._log is not None
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    async def _wait_until_ready(self, seconds: float = 120.0) -> None:
        assert self._process is not None and self._log is not None
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds and self._process.poll() is None:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                status = await reader.readline()
                writer.close()
                if b" 200 " in status:
                    return
            except OSError:
                pass
            await asyncio.sleep(0.1)
        self._log.seek(0)
        tail = self._log.read()[-2000:].decode(errors="replace")
        raise PeerError(f"{self._command[0]} is not ready (exit code {self._process.poll()}):\n{tail}")

    async def stream(self, prompt: Ids, max_tokens: int) -> AsyncIterator[Piece]:
        begin = time.perf_counter()
        first = 0.0
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            body = json.dumps(
                {
                    "prompt": prompt,
                    "n_predict": max_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "cache_prompt": self.cache,
                    "stream": True,
                }
            ).encode()
            head = "POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            status = await reader.readline()
            while (await reader.readline()).strip():
                pass
            if b" 200 " not in status:
                raise PeerError(f"{status.decode(errors='replace').strip()}: {(await reader.read(500))!r}")
            received = 0
            async for event in _events(reader):
                if "error" in event:
                    raise PeerError(str(event["error"]))
                new = int(event["tokens_predicted"]) - received
                received += new
                first = first or time.perf_counter()
                if event["stop"]:
                    timings = event["timings"]
                    queue_ms = (first - begin) * 1e3 - float(timings["prompt_ms"])
                    yield Piece(new, event["tokens"], max(queue_ms, 0.0), timings["cache_n"] / len(prompt))
                    return
                yield Piece(new, event["tokens"])
            raise PeerError("the answer broke off")
        finally:
            writer.close()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events of a body in chunked transfer encoding."""
    buffer = b""
    while size := int(await reader.readline() or b"0", 16):
        buffer += await reader.readexactly(size)
        await reader.readexactly(2)
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            name, _, value = line.partition(b": ")
            if name in (b"data", b"error"):
                event = json.loads(value)
                yield event if name == b"data" else {"error": event}


@dataclass
class Outcome:
    """What became of one request. Times in seconds after the moment it was due.

    Attributes:
        due_s: That moment, after the start of the run.
        prompt_tokens: Length of the prompt.
        num_tokens: Tokens that came.
        token_ids: They, as far as the side names them.
        late_s: How late the client was to send it; part of every other time.
        arrivals_s: When pieces with tokens came.
        end_s: When it ended.
        queue_ms: Waiting time by the side's own account.
        reuse_ratio: Share of the prompt that was not computed, by the side's own account.
        error: What went wrong, or None.
    """

    due_s: float
    prompt_tokens: int
    num_tokens: int = 0
    token_ids: Ids = field(default_factory=list)
    late_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    queue_ms: float = 0.0
    reuse_ratio: float = 0.0
    error: str | None = None

    @property
    def ttft_ms(self) -> float:
        return self.arrivals_s[0] * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        """Between pieces. A piece is one token, or a few where a character needs several."""
        return [float(gap) * 1e3 for gap in np.diff(self.arrivals_s)]


async def ask(side: Side, prompt: Ids, max_tokens: int, *, start: float | None = None, due_s: float = 0.0) -> Outcome:
    """Runs one request that is due `due_s` seconds after `start` (perf_counter; now by default)."""
    due = (time.perf_counter() if start is None else start) + due_s
    outcome = Outcome(due_s, len(prompt))
    await asyncio.sleep(due - time.perf_counter())
    outcome.late_s = time.perf_counter() - due
    try:
        async for piece in side.stream(prompt, max_tokens):
            if piece.num_tokens > 0:
                outcome.arrivals_s.append(time.perf_counter() - due)
                outcome.num_tokens += piece.num_tokens
                outcome.token_ids += piece.token_ids
            if piece.queue_ms is not None and piece.reuse_ratio is not None:
                outcome.queue_ms, outcome.reuse_ratio = piece.queue_ms, piece.reuse_ratio
    except (nb.NanobraidError, PeerError, OSError, asyncio.IncompleteReadError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.end_s = time.perf_counter() - due
    if outcome.error is None and outcome.num_tokens != max_tokens:
        outcome.error = f"{outcome.num_tokens} tokens came, {max_tokens} were wanted"
    return outcome


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile, and maximum; empty without values."""
    if not values:
        return {}
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(max(values))}


class Prompts:
    """Prompts of any length out of Python's own language reference, each beginning elsewhere in it."""

    def __init__(self, model: Path, seed: int) -> None:
        from pydoc_data.topics import topics

        self._ids = nb.Tokenizer(model).encode("\n".join(topics.values()), add_special_tokens=False)
        self._random = random.Random(seed)

    def take(self, length: int) -> Ids:
        first = self._random.randrange(len(self._ids))
        turns = 1 + (first + length) // len(self._ids)
        return (self._ids * (1 + turns))[first : first + length] if turns > 1 else self._ids[first : first + length]


def parser_of(description: str | None, *, max_model_len: int, slots: int) -> argparse.ArgumentParser:
    """The options that all of these scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a known name or a GGUF file")
    parser.add_argument("--peer", type=Path, metavar="LLAMA_SERVER", help="also measure this llama-server")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=slots, help="requests that run at a time, on both sides")
    parser.add_argument("--max-model-len", type=int, default=max_model_len, help="tokens of one request")
    parser.add_argument("--seed", type=int, default=1, help="of prompts, lengths and arrivals")
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser


def ours(args: argparse.Namespace, *, cache: bool = True) -> Nanobraid:
    return Nanobraid(
        resolve(args.model),
        num_threads=args.threads,
        max_model_len=args.max_model_len,
        max_num_seqs=args.slots,
        enable_prefix_caching=cache,
    )


def theirs(args: argparse.Namespace, *, cache: bool = True) -> LlamaServer:
    return LlamaServer(
        args.peer,
        resolve(args.model),
        threads=args.threads,
        slots=args.slots,
        context=args.max_model_len,
        cache=cache,
    )


async def open_sides(stack: AsyncExitStack, args: argparse.Namespace) -> list[Side]:
    """The peer, if one is given, then nanobraid; closed with the stack."""
    sides: list[Side] = []
    if args.peer is not None:
        sides.append(await _entered(stack, theirs(args)))
    sides.append(await _entered(stack, ours(args)))
    return sides


async def _entered(stack: AsyncExitStack, side: AbstractAsyncContextManager[Any]) -> Side:
    opened: Side = await stack.enter_async_context(side)
    return opened


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What every report begins with."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "model": resolve(args.model).name,
        "threads": args.threads,
        "slots": args.slots,
        "max_model_len": args.max_model_len,
        "seed": args.seed,
        "read_gb_s_before": read_bandwidth(args.threads),
    }


def finish(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Measures the machine once more and writes the report."""
    report["read_gb_s_after"] = read_bandwidth(args.threads)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
