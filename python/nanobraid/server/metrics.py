"""What `/metrics` says, in Prometheus' text format: under vLLM's names with vLLM's meanings, and under ours.

Ours begin with ``nanobraid:``; those of the engine are then called as in `LLM.stats`. Counters end in ``_total``.
Everything here belongs to the thread of the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nanobraid import _core
from nanobraid.chunk_cache import BLOCK_TOKENS
from nanobraid.outputs import RequestMetrics
from nanobraid.server.exposition import CONTENT_TYPE, Histogram, Kind, TextWriter

if TYPE_CHECKING:
    from nanobraid.async_engine import AsyncEngine
    from nanobraid.composition import ReuseReport

__all__ = ["CONTENT_TYPE", "FINISH_REASONS", "REJECTION_REASONS", "Metrics", "RequestRecord"]

#: Of `RequestOutput.finish_reason`.
FINISH_REASONS: Final = ("stop", "length", "abort", "error", "timeout")
#: Why a request was not taken in.
REJECTION_REASONS: Final = ("queue_full", "draining")
_REUSE_MODES: Final = ("exact", "isolated", "blend")
_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_MAX_PATHS = 64  # of routes; a caller that gave what clients send would fill the memory

# vLLM's bounds (vllm/v1/metrics/loggers.py), so that its dashboards and alerts hold, and below them finer ones: small
# models on processors take milliseconds for what they were made for.
_TTFT_BOUNDS: Final[tuple[float, ...]] = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_TOKEN_BOUNDS: Final[tuple[float, ...]] = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.0075),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_REQUEST_BOUNDS: Final[tuple[float, ...]] = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2),
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
)

# Keys of LLM.stats() and what they are. What vLLM has a name for is in _vllm_state().
_ENGINE_METRICS: Final[tuple[tuple[str, Kind, str], ...]] = (
    ("blocks_total", "gauge", "Blocks of keys and values."),
    ("blocks_owned", "gauge", "Blocks that sequences and chunks hold."),
    ("blocks_cached", "gauge", "Blocks kept for the prefix cache, given away when others need them."),
    ("blocks_free", "gauge", "Blocks with nothing in them."),
    ("kv_bytes", "gauge", "Memory reserved for keys and values."),
    ("kv_block_bytes", "gauge", "Memory of one block, over all layers."),
    ("kv_bytes_per_token", "gauge", "Memory of the keys and values of one token."),
    ("rss_bytes", "gauge", "Resident memory of the process."),
    ("peak_rss_bytes", "gauge", "Most resident memory that the process had so far."),
    ("workspace_bytes", "gauge", "Most memory that a step has taken for intermediate results."),
    ("steps", "counter", "Forward passes."),
    ("plan_seconds", "counter", "Seconds spent planning and committing steps."),
    ("forward_seconds", "counter", "Seconds spent in forward passes."),
    ("sample_seconds", "counter", "Seconds spent drawing tokens and scoring prompts."),
    ("drawn_on_device", "counter", "Tokens that a device drew where their logits were."),
    ("graphs_recorded", "counter", "Shapes of steps whose work a device keeps, as a graph."),
    ("graph_steps", "counter", "Steps that a device started at once, as a graph."),
    ("prompt_tokens", "counter", "Prompt tokens computed, those computed again after a preemption too."),
    ("forked_tokens", "counter", "Prompt tokens shared with another answer to the same prompt."),
    ("prefix_hit_tokens", "counter", "Tokens taken from the prefix cache instead of being computed."),
    ("cascade_saved_tokens", "counter", "Tokens of keys and values that steps did not read again for each sequence."),
    ("num_drafts", "counter", "Times that guesses for an answer were verified, one or more at once."),
    ("draft_tokens", "counter", "Guesses of coming tokens that were verified."),
    ("accepted_draft_tokens", "counter", "Guesses of coming tokens that were right."),
    ("draft_acceptance", "gauge", "Share of the guesses that were right."),
    ("tokens_per_decode", "gauge", "Tokens that an answer gets in a step on average; 0 without speculation."),
    ("draft_saved_seconds", "gauge", "Estimate of the seconds that guesses saved, from what steps took."),
    ("draft_model_seconds", "counter", "Seconds in which the draft model ran."),
    ("draft_model_tokens", "counter", "Tokens that the draft model read, prompts and guesses."),
    ("draft_kv_bytes", "gauge", "Bytes reserved for keys and values of the draft model."),
    ("read_bytes", "counter", "Weights, keys and values that steps had to read."),
    ("tokens_per_s", "gauge", "Generated tokens per second in which there was work."),
    ("recent_tokens_per_s", "gauge", "Generated tokens per second of work, over the last steps."),
    ("read_gb_per_s", "gauge", "Gigabytes read per second of forward pass."),
    ("recent_read_gb_per_s", "gauge", "Gigabytes read per second of forward pass, over the last steps."),
    ("chunks", "gauge", "Chunks that are there or being computed."),
    ("chunk_blocks", "gauge", "Blocks that chunks take."),
    ("chunk_hits", "counter", "Chunks that a request wanted and found."),
    ("chunk_misses", "counter", "Chunks that a request wanted and were not in memory."),
    ("chunk_evictions", "counter", "Chunks that went because others needed the room."),
    ("measured_tokens", "counter", "Tokens of chunks whose deviation was measured for blending."),
    ("disk_hits", "counter", "Records found in the store on disk."),
    ("disk_hit_tokens", "counter", "Tokens whose keys and values came from the store on disk."),
    ("disk_hit_chunks", "counter", "Chunks whose keys and values came from the store on disk."),
    ("disk_read_bytes", "counter", "Bytes read from the store on disk."),
    ("disk_load_seconds", "counter", "Seconds in which steps waited for the store on disk."),
    ("disk_writes", "counter", "Records written to the store on disk."),
    ("disk_written_bytes", "counter", "Bytes written to the store on disk."),
    ("disk_saves_dropped", "counter", "Sequences and chunks not kept on disk, since others needed their blocks."),
    ("disk_evictions", "counter", "Records removed from the store on disk for its quota."),
    ("disk_damaged_removed", "counter", "Damaged files removed from the store on disk."),
    ("disk_records", "gauge", "Records of this model in the store on disk."),
    ("disk_foreign_records", "gauge", "Records of other models in the store on disk."),
    ("disk_bytes", "gauge", "Bytes of all records in the store on disk."),
    ("disk_waiting_bytes", "gauge", "Bytes that wait to be written to the store on disk."),
    ("weight_budget_bytes", "gauge", "Memory that weights may take; 0 without a limit."),
    ("weight_resident_bytes", "gauge", "Memory that weights take, with a limit."),
    ("streamed_layers", "gauge", "Layers that are read in each step, from disk or, by a GPU, from host memory."),
    ("streamed_direct", "gauge", "Whether they are read past the page cache, or from pinned memory."),
    ("streamed_reads", "counter", "Layers read from disk."),
    ("streamed_bytes", "counter", "Bytes of layers read from disk."),
    ("streamed_seconds", "counter", "Seconds that reading layers from disk took."),
    ("streamed_wait_seconds", "counter", "Seconds that steps waited for layers."),
    ("streamed_gb_per_s", "gauge", "Gigabytes of layers per second of reading."),
    ("streamed_errors", "counter", "Layers that could not be read."),
)
_RENAMED: Final = {"blocks_total": "blocks"}  # a gauge; names in _total are for counters
# Counters with a label: the keys are the name, `_` and the value of the label; the name alone is the sum.
_LABELLED_METRICS: Final = (
    ("disk_misses", "reason", "Records wanted and not got from the store on disk."),
    ("disk_write_failures", "reason", "Records not written to the store on disk."),
    ("fused_ops", "operator", "Calls of operators that ran as one kernel."),
    ("composed_ops", "operator", "Calls of operators that ran as several kernels."),
)
# Of each row of stats()["kv_requests"].
_KV_REQUEST_LABELS: Final = ("kv_dtype", "kv_policy")
_KV_REQUEST_METRICS: Final = (
    ("running", "kv_requests", "Running requests, by the kind of their keys and values."),
    ("blocks", "kv_request_blocks", "Blocks that running requests own; one that several share counts for each."),
    ("bytes", "kv_request_bytes", "Memory of these blocks."),
    ("largest_bytes", "kv_request_largest_bytes", "Most memory that the blocks of one running request take."),
)


@dataclass(frozen=True)
class RequestRecord:
    """An answer that has ended. As vLLM does, each of the n answers to a prompt counts as a request.

    Attributes:
        finish_reason: One of `FINISH_REASONS`.
        prompt_tokens: Of the prompt.
        generated_tokens: Of the answer.
        prefix_tokens: Prompt tokens taken from the prefix cache; None if nobody said.
        isolated_tokens: Prompt tokens taken from chunks as they are.
        recomputed_tokens: Tokens of chunks that were computed again.
        mode: How chunks were used: ``exact``, ``isolated`` or ``blend``; None if nobody said.
        queue_s: Seconds in the engine before the first step; None if nobody said.
        prefill_s: From the first step to the first token; None if none came, or nobody said.
        ttft_s: From the arrival to the first token; None if none came.
        decode_s: From the first token to the last one; None if nobody said.
        e2e_s: From the arrival to the end.
    """

    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    prefix_tokens: int | None
    isolated_tokens: int
    recomputed_tokens: int
    mode: str | None
    queue_s: float | None
    prefill_s: float | None
    ttft_s: float | None
    decode_s: float | None
    e2e_s: float

    @classmethod
    def of(
        cls,
        metrics: RequestMetrics,
        reuse: ReuseReport,
        *,
        finish_reason: str,
        prompt_tokens: int,
        generated_tokens: int,
        before_s: float = 0.0,
    ) -> RequestRecord:
        """From what the last `StreamPiece` of an answer, or a `RequestOutput`, says.

        Args:
            metrics: The times it has.
            reuse: Where the prompt came from.
            finish_reason: Why the engine ended it.
            prompt_tokens: Of its prompt.
            generated_tokens: Of this answer.
            before_s: Seconds from the arrival of the request to its submission to the engine.
        """
        began = generated_tokens > 0 or finish_reason in ("stop", "length")
        return cls(
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            generated_tokens=generated_tokens,
            prefix_tokens=reuse.exact_prefix,
            isolated_tokens=reuse.isolated,
            recomputed_tokens=reuse.recomputed,
            mode=reuse.mode_served,
            queue_s=metrics.queue_ms / 1e3,
            prefill_s=max(0.0, metrics.ttft_ms - metrics.queue_ms) / 1e3 if began else None,
            ttft_s=before_s + metrics.ttft_ms / 1e3 if began else None,
            decode_s=max(0.0, metrics.total_ms - metrics.ttft_ms) / 1e3 if began else None,
            e2e_s=before_s + metrics.total_ms / 1e3,
        )

    @classmethod
    def cut_off(
        cls, finish_reason: str, *, prompt_tokens: int, generated_tokens: int, ttft_s: float | None, e2e_s: float
    ) -> RequestRecord:
        """Of an answer whose last piece was not waited for, because the client has gone, or never came.

        Args:
            finish_reason: Why it ended.
            prompt_tokens: Of its prompt.
            generated_tokens: Seen so far.
            ttft_s: As the attribute.
            e2e_s: As the attribute.
        """
        return cls(
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            generated_tokens=generated_tokens,
            prefix_tokens=None,
            isolated_tokens=0,
            recomputed_tokens=0,
            mode=None,
            queue_s=None,
            prefill_s=None,
            ttft_s=ttft_s,
            decode_s=None,
            e2e_s=e2e_s,
        )


class Metrics:
    """Counts what the server does, and says it together with what the engine has counted.

    Args:
        model_name: The label of that name: what clients call the model.
        engine: Asked at each `render`, which waits for no step.
    """

    def __init__(self, model_name: str, engine: AsyncEngine) -> None:
        self._engine = engine
        self._labels = (("model_name", model_name), ("engine", "0"))
        self._config = engine.llm.config
        self._start = time.time()
        self._tokens = dict.fromkeys(
            ("prompt", "prompt_cached", "prefix_queries", "prefix_hits", "isolated", "recomputed"), 0
        )
        self._finished = dict.fromkeys(FINISH_REASONS, 0)
        self._rejected = dict.fromkeys(REJECTION_REASONS, 0)
        self._modes = dict.fromkeys(_REUSE_MODES, 0)
        self._http: dict[tuple[str, str, str], int] = {}
        self._paths: set[str] = set()
        self._ttft = Histogram(_TTFT_BOUNDS)
        self._gaps = Histogram(_TOKEN_BOUNDS)
        self._per_token = Histogram(_TOKEN_BOUNDS)
        self._e2e, self._queue, self._prefill, self._decode = (Histogram(_REQUEST_BOUNDS) for _ in range(4))
        counts = _one_two_five(int(self._config["max_model_len"]))
        self._prompt_lengths, self._answer_lengths = Histogram(counts), Histogram(counts)
        #: Takes the seconds between two tokens of an answer; costs a fraction of a microsecond.
        self.observe_token_gap = self._gaps.observe

    def observe(self, record: RequestRecord) -> None:
        """Counts an answer that has ended, once.

        Raises:
            ValueError: Its finish reason or its mode is none that there is.
        """
        if record.finish_reason not in self._finished:
            raise ValueError(f"finish_reason must be one of {', '.join(FINISH_REASONS)}, got {record.finish_reason!r}")
        if record.mode is not None and record.mode not in self._modes:
            raise ValueError(f"mode must be one of {', '.join(_REUSE_MODES)}, got {record.mode!r}")
        self._finished[record.finish_reason] += 1
        if record.mode is not None:
            self._modes[record.mode] += 1
        if record.prefix_tokens is not None:
            self._tokens["prefix_queries"] += record.prompt_tokens
            self._tokens["prefix_hits"] += record.prefix_tokens
            self._tokens["prompt_cached"] += record.prefix_tokens + record.isolated_tokens
        if record.prefix_tokens is not None or record.ttft_s is not None:
            self._tokens["prompt"] += record.prompt_tokens
        self._tokens["isolated"] += record.isolated_tokens
        self._tokens["recomputed"] += record.recomputed_tokens
        self._prompt_lengths.observe(record.prompt_tokens)
        self._answer_lengths.observe(record.generated_tokens)
        self._e2e.observe(record.e2e_s)
        for histogram, seconds in (
            (self._queue, record.queue_s),
            (self._ttft, record.ttft_s),
            (self._prefill, record.prefill_s),
            (self._decode, record.decode_s),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        if record.decode_s is not None and record.generated_tokens > 1:
            self._per_token.observe(record.decode_s / (record.generated_tokens - 1))

    def mean_request_seconds(self) -> float:
        """Of the requests that have ended, from arrival to end; 0 if none has."""
        return self._e2e.sum / max(self._e2e.count, 1)

    def rejected(self, reason: str) -> None:
        """Counts a request that was not taken in.

        Raises:
            ValueError: The reason is none of `REJECTION_REASONS`.
        """
        if reason not in self._rejected:
            raise ValueError(f"reason must be one of {', '.join(REJECTION_REASONS)}, got {reason!r}")
        self._rejected[reason] += 1

    def http_request(self, route: str | None, method: str, status: int) -> None:
        """Counts an HTTP answer.

        Args:
            route: The pattern of the path, as ``/v1/chunks/{id}``; None if there was no route for it.
            method: What the client sent; one that HTTP does not know counts as ``other``.
            status: Of the answer.
        """
        path = "other" if route is None else route
        if path not in self._paths:
            if len(self._paths) < _MAX_PATHS:
                self._paths.add(path)
            else:
                path = "other"
        key = (path, method if method in _METHODS else "other", str(status))
        self._http[key] = self._http.get(key, 0) + 1

    def render(self) -> bytes:
        """All metrics as text; its type is `CONTENT_TYPE`.

        Raises:
            InvalidArgumentError: The engine was closed.
        """
        stats = self._engine.stats()
        out = TextWriter(self._labels)
        self._vllm_state(out, stats)
        self._vllm_requests(out)
        self._server(out)
        for key, kind, text in _ENGINE_METRICS:
            number = +stats[key]  # of a truth value too
            out.metric(f"nanobraid:{_RENAMED.get(key, key)}", kind, text, [((), number)])
        for key, label, text in _LABELLED_METRICS:
            prefix = key + "_"
            rows = [(((label, name[len(prefix) :]),), stats[name]) for name in stats if name.startswith(prefix)]
            out.metric(f"nanobraid:{key}", "counter", text, rows)
        for key, name, text in _KV_REQUEST_METRICS:
            kinds = [(tuple((of, row[of]) for of in _KV_REQUEST_LABELS), row[key]) for row in stats["kv_requests"]]
            out.metric(f"nanobraid:{name}", "gauge", text, kinds)
        return out.encode()

    def _vllm_state(self, out: TextWriter, stats: Mapping[str, Any]) -> None:
        out.metric("vllm:num_requests_running", "gauge", "Requests that steps work on.", [((), stats["running"])])
        out.metric("vllm:num_requests_waiting", "gauge", "Requests that wait for a step.", [((), stats["waiting"])])
        usage = stats["blocks_owned"] / stats["blocks_total"]
        out.metric("vllm:kv_cache_usage_perc", "gauge", "KV cache in use, of 1.", [((), usage)])
        cache = (
            ("block_size", str(BLOCK_TOKENS)),
            ("num_gpu_blocks", str(stats["blocks_total"])),
            ("cache_dtype", str(self._config["kv_dtype"])),
            ("enable_prefix_caching", str(self._config["enable_prefix_caching"])),
        )
        out.metric("vllm:cache_config_info", "gauge", "How the KV cache is laid out.", [(cache, 1)])
        tokens = stats["generated_tokens"]
        out.metric("vllm:generation_tokens", "counter", "Tokens generated.", [((), tokens)])
        text = "Times a sequence gave its blocks back and was computed again."
        out.metric("vllm:num_preemptions", "counter", text, [((), stats["preemptions"])])
        if self._config["speculative_config"] is not None:  # vLLM has them only then, too
            text = "Times that guesses for an answer were verified, one or more at once."
            out.metric("vllm:spec_decode_num_drafts", "counter", text, [((), stats["num_drafts"])])
            text = "Guesses of coming tokens that were verified."
            out.metric("vllm:spec_decode_num_draft_tokens", "counter", text, [((), stats["draft_tokens"])])
            text = "Guesses of coming tokens that were right."
            out.metric("vllm:spec_decode_num_accepted_tokens", "counter", text, [((), stats["accepted_draft_tokens"])])

    def _vllm_requests(self, out: TextWriter) -> None:
        tokens = self._tokens
        text = "Prompt tokens looked for in the prefix cache, of requests that have ended."
        out.metric("vllm:prefix_cache_queries", "counter", text, [((), tokens["prefix_queries"])])
        text = "Prompt tokens found in the prefix cache, of requests that have ended."
        out.metric("vllm:prefix_cache_hits", "counter", text, [((), tokens["prefix_hits"])])
        text = "Prompt tokens, cached or computed, of requests that have ended."
        out.metric("vllm:prompt_tokens", "counter", text, [((), tokens["prompt"])])
        text = "Prompt tokens whose keys and values were reused, of requests that have ended."
        out.metric("vllm:prompt_tokens_cached", "counter", text, [((), tokens["prompt_cached"])])
        ends = [((("finished_reason", reason),), count) for reason, count in self._finished.items()]
        out.metric("vllm:request_success", "counter", "Requests that have ended, by reason.", ends)
        rejections = [((("reason", reason),), count) for reason, count in self._rejected.items()]
        out.metric("vllm:admission_rejections", "counter", "Requests not taken in, by reason.", rejections)
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From the arrival of a request to its first token.", self._ttft),
            ("inter_token_latency_seconds", "Between two tokens of an answer.", self._gaps),
            ("request_time_per_output_token_seconds", "Mean time per token after the first.", self._per_token),
            ("e2e_request_latency_seconds", "From the arrival of a request to its end.", self._e2e),
            ("request_queue_time_seconds", "Until a request took part in a step.", self._queue),
            ("request_prefill_time_seconds", "From the first step of a request to its first token.", self._prefill),
            ("request_decode_time_seconds", "From the first token of a request to its last.", self._decode),
            ("request_prompt_tokens", "Tokens of a prompt.", self._prompt_lengths),
            ("request_generation_tokens", "Tokens of an answer.", self._answer_lengths),
        ):
            out.histogram(f"vllm:{name}", text, histogram)

    def _server(self, out: TextWriter) -> None:
        names = ("architecture", "backend", "dtype", "kv_dtype", "num_threads", "max_model_len")
        info = [("version", _core.__version__), *((name, str(self._config[name])) for name in names)]
        out.metric("nanobraid:info", "gauge", "What runs here.", [(info, 1)])
        out.metric("nanobraid:start_time_seconds", "gauge", "When it started, since 1970.", [((), self._start)])
        answers = [
            ((("path", path), ("method", method), ("status", status)), count)
            for (path, method, status), count in sorted(self._http.items())
        ]
        out.metric("nanobraid:http_requests", "counter", "Answers by route, method and status.", answers)
        modes = [((("mode", mode),), count) for mode, count in self._modes.items()]
        out.metric("nanobraid:reuse_requests", "counter", "Requests that have ended, by their use of chunks.", modes)
        uses = [((("use", use),), self._tokens[use]) for use in ("isolated", "recomputed")]
        text = "Tokens of chunks in prompts: taken as they are, or computed again."
        out.metric("nanobraid:chunk_tokens", "counter", text, uses)


def _one_two_five(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to `limit`."""
    bounds = [digit * 10**power for power in range(len(str(limit))) for digit in (1, 2, 5)]
    return [bound for bound in bounds if bound <= limit]
