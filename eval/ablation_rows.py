"""The rows of ablation.py: each measures one optimisation off and on."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import bench_gpu
import format_speed
import interference
import multi_turn
import nanobraid as nb
import restart_bench
import reuse_bench
from ablation_setup import Case, NotMeasured, Setup, seed_of
from serving import Nanobraid, Prompts
from speculation import COPYING, PROSE

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}

# ---- operators ----


def fused_operator(name: str) -> Callable[[Setup], list[Case]]:
    """One fused operator against its composition, by ablation_bench."""

    def measure(setup: Setup) -> list[Case]:
        backend = ["--backend", setup.backend] if setup.backend else []
        lines = setup.run(
            "ablation_bench", *backend, "--threads", setup.threads, "--rounds", setup.rounds, "--rows", name
        )
        cases = [line for line in lines if "skipped" not in line]
        if not cases:
            raise NotMeasured(lines[0]["skipped"])
        return [
            Case(f"{line['case']}, us", line["off"], line["on"], False, "composed of small operators", "one kernel")
            for line in cases
        ]

    return measure


def attention(setup: Setup) -> list[Case]:
    backend = ["--backend", setup.backend] if setup.backend else []
    command = [*backend, "--threads", setup.threads, "--rows", "attention", "--rounds"]
    if not setup.is_gpu:
        (line,) = setup.run("ablation_bench", *command, setup.rounds)
        note = "products of eager by the engine's own matrix kernels, bf16; softmax f32, all threads"
        return [_attention_case(line["case"], line["off"], line["on"], note)]
    try:
        import torch  # noqa: F401
    except ImportError:
        raise NotMeasured("eager attention on a GPU is torch's, which is not installed") from None

    def eager(number: int) -> float:
        return torch_eager_seconds("cuda") * 1e6

    def tiled(number: int) -> float:
        (line,) = setup.run("ablation_bench", *command, 5)
        return float(statistics.median(line["on"]))

    off, on = setup.alternate(eager, tiled)
    return [_attention_case("2048 rows, 2048 keys", off, on, "eager by torch, bf16; the target is a gain of 3")]


def _attention_case(what: str, off: list[float], on: list[float], note: str) -> Case:
    return Case(f"{what}, us", off, on, False, "eager: the whole matrix of scores", "tiles, online softmax", note)


def torch_eager_seconds(device: str, heads: int = 9, tokens: int = 2048, head_dim: int = 64) -> float:
    """Three steps over a prompt: scores and mask, softmax in f32, values. SmolLM2-135M's heads."""
    import torch

    q, k, v = (torch.randn(heads, tokens, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3))
    mask = torch.full((tokens, tokens), float("-inf"), dtype=torch.bfloat16, device=device).triu(1)

    def step() -> Any:
        scores = q @ k.transpose(1, 2) * head_dim**-0.5 + mask
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(torch.bfloat16) @ v

    return bench_gpu.median_seconds(device, step)


def cascade(setup: Setup) -> list[Case]:
    sequences, shared = setup.size(8, 4), setup.size(2000, 256)
    steps = setup.size(93, 9)
    (line,) = setup.run(
        "cascade_bench", "--decode", sequences, shared, setup.model, setup.backend, setup.threads, steps
    )
    if line["saved_tokens"] <= 0:
        raise NotMeasured("the cascade plan joined nothing")
    what = f"a step of {line['case']}, us"
    return [Case(what, line["off"], line["on"], False, "each reads all of its keys", "common keys read once")]


# ---- speeds of two engines ----


Named = tuple[str, dict[str, Any]]  # what format_speed.py takes as a name, and options of the LLM


def speeds(setup: Setup, off: Named, on: Named, words: tuple[str, str], depth: int = 0) -> list[Case]:
    """Prefill and decode of two engines, behind so many tokens of context."""
    args = setup.namespace(pp=setup.size(512, 64), tg=setup.size(64, 8), depth=depth)
    with ExitStack() as stack:
        sides = [format_speed.Side(name, args, device=setup.device, **options) for name, options in (off, on)]
        for side in sides:
            stack.enter_context(side.llm)
        without, with_it = setup.alternate(lambda _: sides[0].run(args), lambda _: sides[1].run(args))
        _check_sides([side.llm.config | side.llm.stats() for side in sides], off, on)
    behind = f" behind {depth} tokens" if depth else ""
    return [
        Case(
            f"{metric} of {count} tokens{behind}, tok/s",
            [each[metric] for each in without],
            [each[metric] for each in with_it],
            True,
            *words,
        )
        for metric, count in (("prefill", args.pp), ("decode", args.tg))
    ]


def _check_sides(facts: list[dict[str, Any]], off: Named, on: Named) -> None:
    """The sides must differ in what they are said to differ in."""
    if off[1].get("fusion") == "off" and (facts[0]["fused_ops"] > 0 or facts[1]["fused_ops"] == 0):
        raise NotMeasured("this backend fuses no operator of this model")
    if off[0].split("@")[0] != on[0].split("@")[0] and facts[0]["weight_bytes"] == facts[1]["weight_bytes"]:
        raise NotMeasured("this backend keeps weights of both formats as one")


def fusion(setup: Setup) -> list[Case]:
    file = str(setup.model)
    words = ("no operator fused", "those that the engine takes by itself")
    return speeds(setup, (file, {"fusion": "off"}), (file, {"fusion": "auto"}), words)


def int8_weights(setup: Setup) -> list[Case]:
    words = ("weights bf16", "weights int8 (w8)")
    files = setup.exported("bf16"), setup.exported("w8")
    return speeds(setup, (str(files[0]), {}), (str(files[1]), {}), words)


def int8_kv(setup: Setup) -> list[Case]:
    words = ("keys and values bf16", "keys and values int8")
    depth = setup.size(4096, 256)
    return speeds(setup, (f"{setup.model}@auto@bf16", {}), (f"{setup.model}@auto@int8", {}), words, depth)


def graphs(setup: Setup) -> list[Case]:
    if not setup.is_gpu:
        raise NotMeasured("graphs are of a GPU")
    file = str(setup.model)
    return speeds(
        setup, (file, {"enforce_eager": True}), (file, {"enforce_eager": False}), ("kernel by kernel", "graphs")
    )


def speculation(setup: Setup) -> list[Case]:
    options: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 1, "deterministic": setup.is_gpu, **setup.options}
    params = nb.SamplingParams(max_tokens=setup.size(160, 16), **GREEDY)
    config = nb.SpeculativeConfig("ngram", 8)

    def measure(plain: nb.LLM, guessing: nb.LLM, what: str, prompts: dict[str, str]) -> Case:
        texts: dict[bool, list[list[int]]] = {}

        def speed(llm: nb.LLM) -> float:
            outputs = [llm.generate(prompt, params)[0] for prompt in prompts.values()]
            texts[llm is guessing] = [output.token_ids for output in outputs]
            return statistics.harmonic_mean([output.metrics.tokens_per_s for output in outputs])

        off, on = setup.alternate(lambda _: speed(plain), lambda _: speed(guessing))
        if texts[False] != texts[True]:
            raise RuntimeError("speculation: other tokens than without")
        words = ("a token a step", "guesses by ngram")
        return Case(f"decode of {len(prompts)} answers, {what}, tok/s", off, on, True, *words)

    with nb.LLM(setup.model, **options) as plain, nb.LLM(setup.model, speculative_config=config, **options) as guessing:
        return [measure(plain, guessing, what, texts) for what, texts in (("copying", COPYING), ("prose", PROSE))]


# ---- reuse ----


def prefix_reuse(setup: Setup) -> list[Case]:
    args = setup.namespace(prefix_tokens=setup.size(1000, 100), suffix_tokens=16)
    options: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 1, **setup.options}

    async def measure() -> tuple[list[float], list[float]]:
        async with AsyncExitStack() as stack:
            sides = [
                await stack.enter_async_context(Nanobraid(setup.model, enable_prefix_caching=cache, **options))
                for cache in (False, True)
            ]
            times: tuple[list[float], list[float]] = [], []
            for number, which in setup.turns():
                prompts = Prompts(setup.model, seed_of(setup, number))
                outcome = await multi_turn.behind_a_prefix(sides[which], prompts, args)
                reused = outcome.reuse_ratio > 0.5
                if reused != (which == 1):
                    raise RuntimeError(f"prefix: {outcome.reuse_ratio:.0%} were reused on side {which}")
                if number >= 0:
                    times[which].append(outcome.ttft_ms)
        return times

    off, on = asyncio.run(measure())
    what = f"first token, {args.prefix_tokens} tokens asked before and {args.suffix_tokens}, ms"
    return [Case(what, off, on, False, "prefix cache off", "prefix cache on")]


def chunk_reuse(setup: Setup) -> list[Case]:
    documents, length = setup.size(16, 3), setup.size(256, 64)
    args = setup.namespace(max_model_len=documents * length + 256, slots=4)
    bench = reuse_bench.Bench(args, device=setup.device)
    texts: dict[int, list[list[int]]] = {}

    def segments(number: int) -> list[nb.Segment | str]:
        if number not in texts:
            texts[number] = [bench.take(length) for _ in range(documents)]
            bench.llm.chunks.compute(texts[number])
        order = texts[number][:]
        bench.random.shuffle(order)
        return [nb.Segment(bench.take(16)), *reuse_bench.chunks_of(order), nb.Segment(bench.take(64))]

    def ttft(number: int, reuse: Any) -> float:
        asked = segments(number)
        report = bench.ttft(asked, reuse)
        if (report.isolated > 0) != (reuse != "exact"):
            raise RuntimeError(f"chunks: {report.isolated} tokens came from chunks")
        return report.ttft_ms

    with bench.llm:
        off, on = setup.alternate(lambda n: ttft(n, "exact"), lambda n: ttft(n, nb.Isolated()))
    what = f"first token, {documents} documents of {length} tokens in a new order, ms"
    note = "approximate: kv_quality.py measures what it costs"
    return [Case(what, off, on, False, "all computed", "documents computed once, before", note)]


def disk_reuse(setup: Setup) -> list[Case]:
    tokens = setup.size(1000, 100)
    with tempfile.TemporaryDirectory(dir=setup.folder) as store:
        measurement = restart_bench.Measurement(setup.namespace(), Path(store), tokens, device=setup.device)
        measurement.fill()
        for _ in range(setup.rounds):
            measurement.round()
    times = measurement.ttft_ms
    what = f"first token after a restart, {tokens} tokens, ms"
    note = "the store's files are in the page cache"
    return [Case(what, times["computed"], times["disk warm"], False, "no store", "a store of a former process", note)]


# ---- requests together ----


def chunked_prefill(setup: Setup) -> list[Case]:
    prompt = setup.size(4000, 400)
    context = prompt + setup.size(200, 600)
    args = setup.namespace(running=1, prompt_tokens=prompt, arrivals=1, idle_tokens=16, max_model_len=context)
    options: dict[str, Any] = {
        "max_model_len": context, "max_num_seqs": 2, "enable_prefix_caching": False, **setup.options,
    }  # fmt: skip

    async def measure() -> list[list[dict[str, Any]]]:
        async with AsyncExitStack() as stack:
            # Off: a prompt is one slice, and the engine does not keep steps short for who reads an answer.
            off = Nanobraid(setup.model, streams=False, max_batch_tokens=context, **options)
            on = Nanobraid(setup.model, **options)
            sides = [await stack.enter_async_context(side) for side in (off, on)]
            rounds: list[list[dict[str, Any]]] = [[], []]
            for number, which in setup.turns():
                prompts = Prompts(setup.model, seed_of(setup, number))
                one = await interference.one_round(sides[which], prompts, args)
                if number >= 0:
                    rounds[which].append(one)
        return rounds

    rounds = asyncio.run(measure())
    longest = [[max(gap for gaps in one["loaded_ms"] for gap in gaps) for one in side] for side in rounds]
    first = [[statistics.median(one["prompt_ttft_ms"]) for one in side] for side in rounds]
    words = ("the prompt in one slice", "slices that keep steps short")
    what = f"longest gap of a running answer while a prompt of {prompt} tokens comes, ms"
    return [
        Case(what, longest[0], longest[1], False, *words),
        Case(f"first token of the prompt of {prompt} tokens, ms", first[0], first[1], False, *words, "its price"),
    ]


def batching(setup: Setup) -> list[Case]:
    count, new = 8, setup.size(64, 8)
    length = setup.size(128, 16)
    params = nb.SamplingParams(max_tokens=new, **GREEDY)
    limits: dict[str, Any] = {"max_model_len": length + new + 16, "max_num_seqs": count, "enable_prefix_caching": False}
    with nb.LLM(setup.model, **limits, **setup.options) as llm:

        def speed(number: int, together: bool) -> float:
            drawn = Prompts(setup.model, seed_of(setup, number))
            prompts = [drawn.take(length) for _ in range(count)]
            begin = time.perf_counter()
            for calls in [prompts] if together else [[prompt] for prompt in prompts]:
                llm.generate(calls, params, progress=False)
            return count * new / (time.perf_counter() - begin)

        off, on = setup.alternate(lambda n: speed(n, False), lambda n: speed(n, True))
    what = f"{count} requests of {length} + {new} tokens, tok/s"
    return [Case(what, off, on, True, "one after the other", "together")]


def paged_kv(setup: Setup) -> list[Case]:
    """Bytes of keys and values of requests of mixed lengths, and how many run at once in a given memory."""
    count, slots, longest = setup.size(24, 8), setup.size(4, 2), setup.size(1024, 256)
    draw = random.Random(setup.seed)
    lengths = [draw.randint(16, longest // 2) for _ in range(count)]
    params = nb.SamplingParams(max_tokens=setup.size(32, 16), **GREEDY)
    limits: dict[str, Any] = {
        "max_model_len": longest, "max_num_seqs": count, "enable_prefix_caching": False, "max_batch_tokens": 4096,
        **setup.options,
    }  # fmt: skip
    with nb.LLM(setup.model, **limits) as llm:
        token_bytes = llm.stats()["kv_bytes_per_token"]
    reserved = int(longest * token_bytes)

    def peaks(llm: nb.LLM, number: int) -> dict[str, float]:
        drawn = Prompts(setup.model, seed_of(setup, number))
        prompts = [drawn.take(length) for length in lengths]
        call = threading.Thread(target=llm.generate, args=(prompts, params), kwargs={"progress": False})
        call.start()
        most = {"running": 0, "blocks_owned": 0}
        while call.is_alive():
            stats = llm.stats()
            most = {key: max(most[key], int(stats[key])) for key in most}
            time.sleep(0.002)
        return {"running": most["running"], "bytes": most["blocks_owned"] * llm.stats()["kv_block_bytes"]}

    def rounds(kv_cache_bytes: int) -> list[dict[str, float]]:
        with nb.LLM(setup.model, kv_cache_bytes=kv_cache_bytes, **limits) as llm:
            return [peaks(llm, number) for number in range(setup.rounds)]

    roomy, tight = rounds(count * reserved), rounds(slots * reserved)
    if max(each["running"] for each in roomy) < count:
        raise RuntimeError("paged: the requests did not all run at the same time")
    words = (f"{longest} tokens reserved for each (computed)", "blocks as they are needed (the engine's counters)")
    return [
        Case(
            f"most keys and values of {count} requests of 16 to {longest // 2} tokens, bytes",
            [float(count * reserved)] * setup.rounds, [each["bytes"] for each in roomy], False, *words,
        ),
        Case(
            f"requests at once in the memory of {slots} contexts",
            [float(slots)] * setup.rounds, [each["running"] for each in tight], True, *words,
        ),
    ]  # fmt: skip


# ---- everything ----


def everything(setup: Setup) -> list[Case]:
    """Requests over a few documents: the plainest engine, one by one, against the engine with all that it has."""
    requests, length, new = 8, setup.size(256, 48), setup.size(48, 8)
    limits: dict[str, Any] = {
        "max_model_len": 3 * length + new + 128, "deterministic": setup.is_gpu, **setup.options,
    }  # fmt: skip
    params = nb.SamplingParams(max_tokens=new, **GREEDY)
    plain: dict[str, Any] = {
        "kv_dtype": "bf16", "fusion": "off", "enable_prefix_caching": False, "max_num_seqs": 1,
        "max_batch_tokens": limits["max_model_len"],
    }  # fmt: skip
    full: dict[str, Any] = {
        "kv_dtype": "int8", "max_num_seqs": requests, "speculative_config": nb.SpeculativeConfig("ngram", 8),
    }  # fmt: skip
    if setup.is_gpu:
        plain["enforce_eager"] = True

    def prompts(number: int) -> list[list[nb.Segment | str]]:
        drawn = Prompts(setup.model, seed_of(setup, number))
        system = drawn.take(64)
        texts = [drawn.take(length) for _ in range(4)]
        asked: list[list[nb.Segment | str]] = []
        for i in range(requests):
            chosen = [texts[(i + k) % len(texts)] for k in (0, 1 + i // len(texts))]
            query = nb.Segment(drawn.take(24))
            asked.append([nb.Segment(system), *reuse_bench.chunks_of(chosen), query])
        return asked

    def alone(llm: nb.LLM, number: int) -> float:
        asked = prompts(number)
        begin = time.perf_counter()
        for segments in asked:
            llm.compose(segments, params)
        return time.perf_counter() - begin

    def together(llm: nb.LLM, number: int) -> float:
        asked = prompts(number)
        answers: list[Any] = []

        def answer(segments: list[nb.Segment | str]) -> None:
            answers.append(llm.compose(segments, params, reuse=nb.Isolated()))

        threads = [threading.Thread(target=answer, args=(segments,)) for segments in asked]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
        if len(answers) != requests:
            raise RuntimeError("all: a request failed")
        return seconds

    with (
        nb.LLM(setup.exported("bf16"), **limits, **plain) as off_llm,
        nb.LLM(setup.exported("w8"), **limits, **full) as on_llm,
    ):
        off, on = setup.alternate(lambda n: alone(off_llm, n), lambda n: together(on_llm, n))
    what = f"{requests} requests, each over 2 of 4 documents of {length} tokens, {new} new tokens, s"
    note = (
        "attention is tiled and keys lie in blocks on both sides: the engine has no other; documents are new each round"
    )
    return [Case(what, off, on, False, "all of the above off", "all of the above on", note)]


#: Name: what it is about, and what measures it.
ROWS: dict[str, tuple[str, Callable[[Setup], list[Case]]]] = {
    "norm_qkv": ("fused norm, queries, keys and values", fused_operator("norm_qkv")),
    "gate_up": ("fused norm, gate and up", fused_operator("norm_gate_up")),
    "residual": ("fused product and residual", fused_operator("linear_residual")),
    "head": ("fused norm, head and argmax", fused_operator("head")),
    "fusion": ("all fused operators, in the engine", fusion),
    "attention": ("tiled attention", attention),
    "cascade": ("reading common prefixes once", cascade),
    "graphs": ("graphs of a GPU", graphs),
    "paged_kv": ("keys and values in blocks", paged_kv),
    "int8_weights": ("weights int8", int8_weights),
    "int8_kv": ("keys and values int8", int8_kv),
    "speculation": ("guesses of coming tokens", speculation),
    "prefix": ("prefix reuse", prefix_reuse),
    "chunks": ("chunk composition", chunk_reuse),
    "disk": ("reuse from disk", disk_reuse),
    "chunked_prefill": ("prompts in slices", chunked_prefill),
    "batching": ("continuous batching", batching),
    "all": ("everything", everything),
}
