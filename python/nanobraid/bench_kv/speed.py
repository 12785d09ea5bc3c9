"""Speed and memory of one method, in a process of its own: what `worker` runs for a job of the kind "speed".

Order: load, warm up on a prompt that is never timed, reserve what the method reserves, set the peak of memory back, the
timed rounds, read the peak. Bytes of the cache are read in rounds that are not timed, because whoever reads them runs
beside the engine: in one what a batch holds at most, in another what each prompt keeps while it is answered. Every
method has the same prompts and the same stop rule.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanobraid._driver import Call
from nanobraid.bench_kv.memory import MIB, Highest, Meter, gpu_used
from nanobraid.bench_kv.methods import ENGINE_BLOCK, Case
from nanobraid.errors import InternalError, OutOfMemoryError
from nanobraid.llm import LLM
from nanobraid.outputs import RequestOutput
from nanobraid.sampling_params import SamplingParams

_BITS = {"f32": 32, "f16": 16, "bf16": 16}  # of the formats that a device has


@dataclass(frozen=True)
class SpeedJob:
    """What to run.

    Attributes:
        model: Path of the model.
        options: Of `LLM`: device, dtype, num_threads, max_batch_tokens.
        kv_dtype: Type of keys and values of methods that name none.
        case: The method.
        prompts: Token ids.
        max_new_tokens: For each prompt; without `stop_at_eos` exactly so many.
        batch_size: Prompts that run at once; the next ones begin when these have ended.
        max_model_len: The context: what full_cache reserves for each sequence.
        rounds: Timed rounds over all prompts.
        stop_at_eos: Stop at the end-of-sequence token, in every method.
        seed: Of the tokens that memory is touched with.
    """

    model: str
    options: dict[str, Any]
    kv_dtype: str
    case: Case
    prompts: list[list[int]]
    max_new_tokens: int
    batch_size: int
    max_model_len: int
    rounds: int
    stop_at_eos: bool
    seed: int


@dataclass(frozen=True)
class Answer:
    """One answer: tokens, milliseconds to the first of them and to the last."""

    token_ids: list[int]
    ttft_ms: float
    total_ms: float


def params(case: Case, max_tokens: int, stop_at_eos: bool) -> SamplingParams:
    """Greedy, under the policy of a method, with the one stop rule of all methods."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=not stop_at_eos, kv_policy=case.policy)


def run_batch(llm: LLM, job: SpeedJob, prompts: Sequence[list[int]], max_tokens: int, salt: str) -> list[Answer]:
    """The answers to prompts that begin together; what other salts have computed is not reused."""
    if job.case.kind == "recomputed":
        return recompute(llm, prompts, max_tokens, job.stop_at_eos, lambda: None)
    greedy = params(job.case, max_tokens, job.stop_at_eos)
    if job.case.kind == "reserved":
        outs = _generate_apart(llm, prompts, greedy, salt)
    else:
        outs = llm.generate(list(prompts), greedy, cache_salt=salt, progress=False)
    if reused := sum(out.num_cached_tokens for out in outs):
        raise InternalError(f"{job.case.label}: {reused} tokens of timed prompts came from the prefix cache")
    return [Answer(list(out.token_ids), out.metrics.ttft_ms, out.metrics.total_ms) for out in outs]


def _generate_apart(llm: LLM, prompts: Sequence[list[int]], greedy: SamplingParams, salt: str) -> list[RequestOutput]:
    """As `LLM.generate`, each prompt under a salt of its own: two that begin alike share nothing."""
    requests = [llm._prepare(ids, greedy, f"{salt} {i}", None, streams=False) for i, ids in enumerate(prompts)]
    call = Call(streams=False)
    try:
        with llm._driver.together():
            for i, request in enumerate(requests):
                llm._driver.submit(call, i, request.ids, **request.options)
        while outputs := llm._driver.wait(call):
            for i, output in outputs:
                requests[i].draft.add(output)
    except BaseException:
        llm._driver.cancel(call)
        raise
    return [request.draft.result(request.text, request.ids) for request in requests]


def recompute(
    llm: LLM, prompts: Sequence[list[int]], max_tokens: int, stop_at_eos: bool, after_step: Callable[[], None]
) -> list[Answer]:
    """Every token by requests that compute the whole text again; `after_step` is called between them."""
    texts = [list(prompt) for prompt in prompts]
    first, last = [0.0] * len(prompts), [0.0] * len(prompts)
    running = list(range(len(prompts)))
    one = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=not stop_at_eos)
    begun = time.perf_counter()
    for step in range(max_tokens):
        before = 1e3 * (time.perf_counter() - begun)
        outs = llm.generate([texts[i] for i in running], one, progress=False)
        still = []
        for i, out in zip(running, outs, strict=True):
            if out.num_cached_tokens:
                raise InternalError(f"no_cache: {out.num_cached_tokens} tokens came from the prefix cache")
            if step == 0:
                first[i] = out.metrics.ttft_ms
            last[i] = before + out.metrics.total_ms
            texts[i] += out.token_ids
            if out.token_ids:  # none: the token was one that ends the text
                still.append(i)
        after_step()
        running = still
        if not running:
            break
    return [Answer(texts[i][len(prompt) :], first[i], last[i]) for i, prompt in enumerate(prompts)]


def open_llm(job: SpeedJob) -> LLM:
    """The engine of a method; of a full cache with room for `batch_size` whole contexts."""
    kv_dtype = job.case.kv_dtype or job.kv_dtype
    limits: dict[str, Any] = {
        "max_model_len": job.max_model_len,
        "max_num_seqs": job.batch_size,
        # A full cache is filled with sequences that stay: the prefix cache keeps them, each under a salt of its own.
        "enable_prefix_caching": job.case.kind == "reserved",
    }
    llm = LLM(job.model, kv_dtype=kv_dtype, **limits, **job.options)
    if not llm.config["backend"].startswith("cuda") or job.case.kind == "reserved":
        return llm
    # A device's memory is taken at once, so the pool gets what these prompts need and no more.
    config = llm.config
    llm.close()
    heads = config["num_layers"] * config["num_kv_heads"] * config["head_dim"]
    block = ENGINE_BLOCK * 2 * heads * _BITS[config["kv_dtype"]] // 8
    lengths = sorted((len(prompt) + job.max_new_tokens for prompt in job.prompts), reverse=True)[: job.batch_size]
    blocks = sum(-(-length // ENGINE_BLOCK) + 1 for length in lengths)
    return LLM(job.model, kv_dtype=kv_dtype, kv_cache_bytes=blocks * block, **limits, **job.options)


def touch_all(llm: LLM, job: SpeedJob) -> None:
    """Writes keys and values into every block of the pool, as an engine would that reserves whole contexts.

    Raises:
        OutOfMemoryError: The pool has no room for `batch_size` contexts.
        InternalError: Blocks are left that nothing was written to.
    """
    per_sequence = -(-job.max_model_len // ENGINE_BLOCK)
    total = llm.stats()["blocks_total"]
    if total < per_sequence * job.batch_size:
        raise OutOfMemoryError(
            f"full_cache reserves {job.batch_size} contexts of {job.max_model_len} tokens, {per_sequence} blocks each; "
            f"memory has room for {total} blocks: lower batch_size or max_model_len"
        )
    draw = random.Random(job.seed)
    once = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    whole = per_sequence - 1  # blocks that a finished sequence leaves in the cache; the last one is not full
    # What is never given back is taken from untouched blocks first, so these many sequences reach all of them.
    for number in range(-(-total // max(whole, 1)) + 1):
        ids = [draw.randrange(llm.tokenizer.vocab_size) for _ in range(job.max_model_len - 1)]
        llm.generate([ids], once, cache_salt=f"touch {number}", progress=False)
    free = llm.stats()["blocks_free"]
    if free > per_sequence:
        raise InternalError(f"full_cache: {free} of {total} blocks were not touched")


def measure(job: SpeedJob) -> dict[str, Any]:
    """Runs a job; the keys are those of `KVCacheBenchmarker.benchmark_method`.

    Raises:
        NanobraidError: The engine refuses the format or the policy, or the job does not fit into memory.
    """
    gpu_before = gpu_used()
    with open_llm(job) as llm:
        on_gpu = llm.config["backend"].startswith("cuda")
        stats = llm.stats()
        block_bytes = stats["kv_bytes"] // stats["blocks_total"]
        draw = random.Random(job.seed + 1)
        warm = [[draw.randrange(llm.tokenizer.vocab_size) for _ in range(ENGINE_BLOCK)]]
        run_batch(llm, job, warm, 2, "warm-up")
        before = Meter().before
        if job.case.kind == "reserved":
            touch_all(llm, job)
        groups = [job.prompts[i : i + job.batch_size] for i in range(0, len(job.prompts), job.batch_size)]
        meter = Meter()
        seconds, answers = [], []
        for number in range(job.rounds):
            begun = time.perf_counter()
            round_answers = [run_batch(llm, job, group, job.max_new_tokens, f"round {number}") for group in groups]
            seconds.append(time.perf_counter() - begun)
            answers += [answer for group in round_answers for answer in group]
        peak = meter.peak()
        gpu_peak = gpu_used() if on_gpu else None
        reserved = job.case.kind == "reserved"
        most = llm.stats()["kv_bytes"] if reserved else _most_blocks(llm, job, groups) * block_bytes
        kept = [most / job.batch_size] if reserved else [_kept_bytes(llm, job, ids, block_bytes) for ids in job.prompts]
        stats = llm.stats()
        facts = {key: llm.config[key] for key in ("backend", "dtype", "kv_dtype", "num_threads", "max_model_len")}
    new_tokens = sum(len(answer.token_ids) for answer in answers) // job.rounds
    elapsed = statistics.median(seconds)
    gaps = [(a.total_ms - a.ttft_ms) / (len(a.token_ids) - 1) for a in answers if len(a.token_ids) > 1]
    return {
        "elapsed_sec": elapsed,
        "total_new_tokens": new_tokens,
        "tokens_per_sec": new_tokens / elapsed,
        "cpu_mem_used_mb": (peak - before) / MIB,
        "gpu_peak_mb": None if gpu_peak is None else (gpu_peak - (gpu_before or 0)) / MIB,
        "est_kv_cache_mb_avg": statistics.fmean(kept) / MIB,
        "ttft_ms": statistics.median(answer.ttft_ms for answer in answers),
        "latency_ms": statistics.median(answer.total_ms for answer in answers),
        "ms_per_token": statistics.median(gaps) if gaps else None,
        "peak_rss_mb": peak / MIB,
        "memory_source": meter.source,
        "kv_cache_bytes": most,
        "kv_pool_bytes": stats["kv_bytes"],
        "elapsed_sec_rounds": seconds,
        "token_ids": [answer.token_ids for answer in answers[: len(job.prompts)]],
        **facts,
    }


def _kept_bytes(llm: LLM, job: SpeedJob, ids: list[int], block_bytes: int) -> int:
    room = job.max_model_len - len(ids)
    return kept_blocks(llm, job.case, ids, min(job.max_new_tokens, room - 1)) * block_bytes


def _most_blocks(llm: LLM, job: SpeedJob, groups: Sequence[list[list[int]]]) -> int:
    """The most blocks that running answers own at one time; without a cache, what is left between two tokens."""

    def owned() -> int:
        return int(llm.stats()["blocks_owned"])

    if job.case.kind == "recomputed":
        kept = [0]
        for group in groups:
            recompute(llm, group, min(job.max_new_tokens, 2), job.stop_at_eos, lambda: kept.append(owned()))
        return max(kept)
    with Highest(owned) as highest:
        for group in groups:
            run_batch(llm, job, group, job.max_new_tokens, "cache")
    return highest.value


def read_kept(llm: LLM, ids: list[int], greedy: SamplingParams) -> tuple[list[int], int]:
    """An answer, and the most blocks it owned once its prompt was computed; 0 if it ended before they could be read."""
    tokens, kept = [], 0
    for piece in llm.stream(ids, greedy):
        kept = max(kept, llm.stats()["blocks_owned"])
        tokens += piece.token_ids
    return tokens, kept


def kept_blocks(llm: LLM, case: Case, ids: list[int], max_tokens: int) -> int:
    """Blocks that an answer of so many tokens owns while it is generated, when nothing else runs.

    Raises:
        InternalError: They could not be read in time, again and again.
    """
    if case.kind == "recomputed":
        return 0
    greedy = params(case, max_tokens + 1, False)  # one more: whoever reads comes behind the engine
    for _ in range(10):
        kept = read_kept(llm, ids, greedy)[1]
        if kept:
            return kept
    raise InternalError(f"{case.label}: its blocks could not be read while it ran")
