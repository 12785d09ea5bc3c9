"""The evaluation scripts of serving on the default model, small and without peers; llama-server's stream from a server
of our own that sends what it sends."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

EVAL = Path(__file__).parents[2] / "eval"


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EVAL / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def report(tmp_path: Path, script: str, *args: object) -> dict[str, Any]:
    path = tmp_path / "report.json"
    done = run(script, *args, "--json", path)
    assert done.returncode == 0, done.stderr[-2000:]
    parsed: dict[str, Any] = json.loads(path.read_text())
    assert parsed["date"] and parsed["cpu"] and parsed["read_gb_s_before"] > 0 and parsed["read_gb_s_after"] > 0
    return parsed


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EVAL))
    import serving

    return serving


@pytest.fixture
def serve_load(serving: Any) -> Any:
    import serve_load

    return serve_load


# --- the scripts -------------------------------------------------------------------------------------------------


def test_load_in_the_open(model_path: Path, tmp_path: Path) -> None:
    mix = ["--prompt-lens", "20:40", "--output-lens", "4,8", "--system-tokens", 32, "--system-share", 1]
    small = ["--requests", 6, "--rates", 20, 40, "--rounds", 2, "--slots", 3, "--max-model-len", 256]
    got = report(tmp_path, "serve_load.py", "--model", model_path, *mix, *small)
    assert got["mix"] == {
        "name": "chat", "prompt_lens": "20:40", "output_lens": "4,8", "system_tokens": 32, "system_share": 1.0,
    }  # fmt: skip
    assert set(got["about"]["nanobraid"]) == {"backend", "dtype", "kv_dtype"}
    assert [row["rate"] for row in got["rows"]] == [20, 40]
    for row in got["rows"]:
        side = row["nanobraid"]
        assert (side["requests"], side["errors"]) == (12, 0)
        assert side["output_tok_s"] * side["seconds"] == pytest.approx(row["output_tokens"])
        assert 12 * 52 <= row["prompt_tokens"] <= 12 * 72
        assert side["reused_share"] == pytest.approx(2 * 5 * 32 / row["prompt_tokens"], rel=0.01)  # all but the first
        for key in ("ttft_ms", "inter_token_ms", "total_ms"):
            assert 0 < side[key]["p50"] <= side[key]["p90"] <= side[key]["p99"] <= side[key]["max"]
        assert side["queue_ms"]["p50"] < side["ttft_ms"]["p50"] < side["total_ms"]["p50"]


def test_a_request_that_cannot_be_served_is_an_error_of_the_report(model_path: Path, tmp_path: Path) -> None:
    lengths = ["--prompt-lens", "40,400", "--output-lens", "2", "--system-tokens", 0, "--requests", 8, "--rates", 40]
    got = report(tmp_path, "serve_load.py", "--model", model_path, *lengths, "--max-model-len", 64)
    side = got["rows"][0]["nanobraid"]
    assert 0 < side["errors"] < 8
    assert "InvalidArgumentError" in side["first_errors"][0]
    assert side["output_tok_s"] * side["seconds"] == pytest.approx(2 * (8 - side["errors"]))


def test_batches_are_steps_of_decodes_only(model_path: Path, tmp_path: Path) -> None:
    small = ["--batches", 1, 3, "--prompt-tokens", 32, "--new-tokens", 8, "--rounds", 2]
    got = report(tmp_path, "batch_decode.py", "--files", model_path, *small)
    assert [result["batch"] for result in got["rows"][0]["batches"]] == [1, 3]
    for result in got["rows"][0]["batches"]:
        mine = result["nanobraid"]
        # Requests of one call begin within a few steps of each other.
        assert 8 <= mine["steps"] <= 8 * result["batch"]
        assert len(result["all"]["nanobraid"]) == 2
        assert all(
            run["tok_s"] * run["step_ms"] * run["steps"] / 1e3 == pytest.approx(8 * result["batch"])
            for run in result["all"]["nanobraid"]
        )
        parts = [run["plan_share"] + run["sample_share"] + run["other_share"] for run in result["all"]["nanobraid"]]
        assert parts == pytest.approx([run["outside_forward_share"] for run in result["all"]["nanobraid"]])
        assert 0 < mine["outside_forward_share"] < 1
    assert got["rows"][0]["batches"][0]["ratio_to_batch_1"] == 1


def test_prompts_interfere_with_running_requests(model_path: Path, tmp_path: Path) -> None:
    small = ["--prompt-tokens", 700, "--arrivals", 2, "--idle-tokens", 8, "--rounds", 1, "--max-model-len", 1024]
    got = report(tmp_path, "interference.py", "--model", model_path, *small, "--running", 2, "--slots", 3)
    side = got["sides"]["nanobraid"]
    assert side["p99_over_idle_step"] == pytest.approx(side["loaded_ms"]["p99"] / side["idle_step_ms"])
    assert side["gaps"] >= 2 * 2  # both requests went on while either prompt was computed
    assert side["prompt_ttft_ms"] > side["loaded_ms"]["p50"]


def test_prompts_that_arrive_at_once(model_path: Path, tmp_path: Path) -> None:
    small = ("--prompt-tokens", 20, 40, "--new-tokens", 6, "--rounds", 1, "--max-model-len", 256)
    got = report(tmp_path, "burst.py", "--model", model_path, *small, "--running", 0, 2, "--arriving", 3, "--slots", 5)
    alone, beside = got["rows"]
    assert (alone["running"], beside["running"]) == (0, 2)
    assert alone["tok_s"] == pytest.approx(3 * 6 / alone["seconds"])  # what ran before counts only where something did
    assert "gaps_ms" not in alone and beside["num_gaps"] >= 2
    for row in (alone, beside):
        assert 0 < row["ttft_p50_ms"] <= row["ttft_max_ms"] < 1e3 * row["seconds"]


def test_turns_of_a_conversation(model_path: Path, tmp_path: Path) -> None:
    lengths = [
        "--turns",
        3,
        "--question-tokens",
        40,
        "--answer-tokens",
        8,
        "--prefix-tokens",
        100,
        "--suffix-tokens",
        8,
    ]
    got = report(tmp_path, "multi_turn.py", "--model", model_path, *lengths, "--rounds", 2, "--max-model-len", 256)
    side = got["sides"]["nanobraid"]
    off, on = side["cache off"], side["cache on"]
    assert [turn["prompt_tokens"] for turn in on["turns"]] == [40, 88, 136]
    assert [turn["reuse_ratio"] for turn in off["turns"]] == [0, 0, 0]
    # Full blocks of what was there after the answer but for its last token, which nobody computed.
    assert [turn["reuse_ratio"] for turn in on["turns"]] == pytest.approx([0, 32 / 88, 80 / 136])
    assert (off["prefix"]["reuse_ratio"], on["prefix"]["reuse_ratio"]) == (0, pytest.approx(96 / 108))
    assert side["last_turn_over_turn_2"] == on["turns"][2]["ttft_ms"] / on["turns"][1]["ttft_ms"]
    assert all(len(turn["all_ttft_ms"]) == 2 for turn in on["turns"] + off["turns"])


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("serve_load.py", ["--prompt-lens", "many"], "'many' is no length"),
        ("serve_load.py", ["--output-lens", "0:0"], "'0:0' is no length"),
        ("serve_load.py", ["--rates", "0"], "must be positive"),
        ("batch_decode.py", ["--prompt-tokens", "100"], "multiple of 16"),
        ("interference.py", ["--running", "5"], "below --slots"),
        ("burst.py", ["--running", "30"], "at most --slots"),
        ("multi_turn.py", ["--turns", "100"], "--max-model-len must be at least"),
    ],
)
def test_wrong_options_are_said(script: str, arguments: list[str], says: str) -> None:
    done = run(script, *arguments)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]


def test_a_peer_that_does_not_start_is_said(model_path: Path) -> None:
    done = run("serve_load.py", "--model", model_path, "--peer", "/bin/false", "--requests", 1)
    assert done.returncode == 1
    assert "/bin/false is not ready (exit code 1)" in done.stderr


# --- the schedule ------------------------------------------------------------------------------------------------


def test_schedules_are_poisson_and_follow_from_the_seed(serving: Any, serve_load: Any, model_path: Path) -> None:
    mix = serve_load.Mix("~100", "16:64", system_tokens=20, system_share=0.25)

    def jobs(seed: int) -> Any:
        return serve_load.schedule(serving.Prompts(model_path, seed), mix, rate=4.0, requests=2000, seed=seed)

    made = jobs(3)
    assert made == jobs(3)
    assert made != jobs(4)
    intervals = [after.due_s - before.due_s for before, after in itertools.pairwise(made)]
    mean = sum(intervals) / len(intervals)
    assert mean == pytest.approx(0.25, rel=0.1)
    # The standard deviation of an exponential distribution is its mean; that of even arrivals would be 0.
    assert sum((x - mean) ** 2 for x in intervals) / len(intervals) == pytest.approx(mean**2, rel=0.25)
    heads = Counter(tuple(job.prompt[:20]) for job in made)
    assert heads.most_common(1)[0][1] == pytest.approx(500, abs=80)
    assert sum(job.max_tokens for job in made) / 2000 == pytest.approx(40, abs=2)


def test_lengths_follow_their_description(serve_load: Any) -> None:
    draw = random.Random(1)
    lengths = sorted(serve_load.draw_length("~100", draw) for _ in range(4001))
    assert lengths[2000] == pytest.approx(100, abs=5)
    assert 25 <= lengths[0] < 40 and 250 < lengths[-1] <= 400
    assert {serve_load.draw_length("3:5", draw) for _ in range(100)} == {3, 4, 5}
    assert {serve_load.draw_length("7,90", draw) for _ in range(100)} == {7, 90}


def test_a_late_start_counts(serving: Any) -> None:
    """A side that begins every request 50 ms late shows it in every time."""

    class Slow:
        name = "slow"
        lock = asyncio.Lock()

        async def stream(self, prompt: list[int], max_tokens: int) -> Any:
            async with self.lock:
                await asyncio.sleep(0.05)
                yield serving.Piece(max_tokens, prompt, 1.0, 0.5)

    async def three() -> Any:
        side = Slow()
        return await asyncio.gather(*(serving.ask(side, [1], 2, due_s=0.001 * i) for i in range(3)))

    outcomes = asyncio.run(three())
    assert [outcome.ttft_ms for outcome in outcomes] == pytest.approx([50, 99, 148], abs=45)
    assert outcomes[2].ttft_ms > 120
    assert [outcome.error for outcome in outcomes] == [None] * 3


def test_percentiles(serving: Any) -> None:
    assert serving.percentiles(list(range(101))) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert serving.percentiles([]) == {}


# --- the client of llama-server ----------------------------------------------------------------------------------


def answer_of(events: list[str], status: str = "200 OK", cut: int | None = None) -> bytes:
    """An answer in chunks that end anywhere: every 7 bytes, as a proxy may do."""
    body = "".join(events).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + (chunks[:cut] if cut is not None else chunks + b"0\r\n\r\n")


def token(token_id: int, count: int, **more: Any) -> str:
    event = {"index": 0, "content": "é", "tokens": [token_id], "stop": False, "tokens_predicted": count, **more}
    return f"data: {json.dumps(event)}\n\n"


LAST = token(0, 3, tokens=[], stop=True, timings={"prompt_ms": 5.0, "cache_n": 1})


def asked(serving: Any, answer: bytes) -> tuple[Any, dict[str, Any]]:
    """What the client makes of an answer, and what it had asked."""
    seen: dict[str, Any] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen["line"] = (await reader.readline()).decode().strip()
        length = 0
        while line := (await reader.readline()).strip():
            name, _, value = line.partition(b": ")
            length = int(value) if name == b"Content-Length" else length
        seen["body"] = json.loads(await reader.readexactly(length))
        writer.write(answer)
        writer.close()

    async def run_one() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        side = serving.LlamaServer(Path("none"), Path("none"), threads=1, slots=1, context=1, cache=True)
        side.port = server.sockets[0].getsockname()[1]
        async with server:
            return await serving.ask(side, [7, 8], 3)

    return asyncio.run(run_one()), seen


def test_the_peers_stream_is_read(serving: Any) -> None:
    # The second piece has two tokens: a character was not complete.
    outcome, seen = asked(serving, answer_of([token(11, 1), token(13, 3), LAST]))
    assert outcome.error is None
    assert (outcome.num_tokens, outcome.token_ids, len(outcome.arrivals_s)) == (3, [11, 13], 2)
    assert outcome.reuse_ratio == 0.5
    assert outcome.queue_ms == pytest.approx(max(outcome.ttft_ms - 5.0, 0.0), abs=5)
    assert seen["line"] == "POST /completion HTTP/1.1"
    wanted = {"prompt": [7, 8], "n_predict": 3, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
    assert seen["body"] == {**wanted, "stream": True}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (answer_of(["no"], "503 Busy"), "503 Busy"),
        (answer_of([token(1, 1), 'error: {"message": "full"}\n\n']), "full"),
        (answer_of([token(1, 1), token(2, 2)]), "broke off"),
        (answer_of([token(1, 1), LAST], cut=55), "IncompleteReadError"),
        (answer_of([token(1, 1), LAST.replace('"tokens_predicted": 3', '"tokens_predicted": 2')]), "2 tokens came, 3"),
        (b"", "PeerError"),
    ],
)
def test_a_broken_answer_of_the_peer_is_an_error(serving: Any, answer: bytes, says: str) -> None:
    outcome, _ = asked(serving, answer)
    assert outcome.error is not None and says in outcome.error
