"""`/metrics`: names, format and numbers, read by the parser of Prometheus' own Python library."""

from __future__ import annotations

import asyncio
import math
import timeit
from typing import Any

import pytest

import nanobraid as nb
from nanobraid.outputs import RequestMetrics
from nanobraid.server.exposition import Histogram, TextWriter
from nanobraid.server.metrics import CONTENT_TYPE, FINISH_REASONS, Metrics, RequestRecord

parser = pytest.importorskip("prometheus_client.parser", reason="needs prometheus-client, to read what is exported")

GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"}
COUNTERS = {
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "num_preemptions",
    "request_success",
    "admission_rejections",
}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
}
# Keys of LLM.stats() that vLLM has names for, and sums of others.
SAID_OTHERWISE = {"running", "waiting", "generated_tokens", "preemptions"}
SUMS = {"disk_misses", "disk_write_failures", "fused_ops", "composed_ops"}


class Scrape:
    """What Prometheus would read."""

    def __init__(self, metrics: Metrics) -> None:
        self.text = metrics.render().decode("ascii")
        self.families = {family.name: family for family in parser.text_string_to_metric_families(self.text)}

    def value(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) == 1, f"{name} {labels}: {found}"
        return float(found[0])


@pytest.fixture
def engine(llm: nb.LLM) -> nb.AsyncEngine:
    return nb.AsyncEngine(llm)


@pytest.fixture
def metrics(engine: nb.AsyncEngine) -> Metrics:
    return Metrics("smol", engine)


def record(**changes: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "finish_reason": "stop",
        "prompt_tokens": 100,
        "generated_tokens": 11,
        "prefix_tokens": 32,
        "isolated_tokens": 16,
        "recomputed_tokens": 3,
        "mode": "blend",
        "queue_s": 0.002,
        "prefill_s": 0.04,
        "ttft_s": 0.05,
        "decode_s": 1.0,
        "e2e_s": 1.05,
    }
    return RequestRecord(**{**values, **changes})


def test_has_the_names_of_vllm(metrics: Metrics) -> None:
    scrape = Scrape(metrics)
    kinds = {name.removeprefix("vllm:"): family.type for name, family in scrape.families.items() if "vllm:" in name}
    assert kinds == {
        **dict.fromkeys(GAUGES, "gauge"),
        **dict.fromkeys(COUNTERS, "counter"),
        **dict.fromkeys(HISTOGRAMS, "histogram"),
    }
    assert "gpu_cache_usage_perc" not in scrape.text
    assert "spec_decode" not in scrape.text  # as with vLLM, only where the engine speculates
    assert all(f"vllm:{name}_total{{" in scrape.text for name in COUNTERS)


def test_every_sample_says_model_and_engine(metrics: Metrics) -> None:
    samples = [sample for family in Scrape(metrics).families.values() for sample in family.samples]
    assert samples
    assert all(sample.labels["model_name"] == "smol" and sample.labels["engine"] == "0" for sample in samples)


def test_every_metric_has_one_type_and_one_sentence_of_help(metrics: Metrics) -> None:
    lines = Scrape(metrics).text.splitlines()
    typed = [line.split()[2] for line in lines if line.startswith("# TYPE ")]
    helped = [line.split()[2] for line in lines if line.startswith("# HELP ") and len(line.split()) > 4]
    assert typed == helped
    assert len(set(typed)) == len(typed)
    for name, kind in (line.split()[2:] for line in lines if line.startswith("# TYPE ")):
        assert name.endswith("_total") == (kind == "counter")


def test_every_figure_of_the_engine_has_a_name(metrics: Metrics, engine: nb.AsyncEngine) -> None:
    scrape = Scrape(metrics)
    stats = engine.stats()
    kinds = stats.pop("kv_requests")
    assert {kind["kv_policy"] for kind in kinds} >= {"full", "window", "none"}
    for kind in kinds:
        labels = {name: kind[name] for name in ("kv_dtype", "kv_policy")}
        for key, name in (("running", "kv_requests"), ("bytes", "kv_request_bytes"), ("blocks", "kv_request_blocks")):
            assert scrape.value(f"nanobraid:{name}", **labels) == kind[key]
        assert scrape.value("nanobraid:kv_request_largest_bytes", **labels) == kind["largest_bytes"]
    for key, value in stats.items():
        if key in ("rss_bytes", "peak_rss_bytes"):  # may have grown since
            assert 0 < scrape.value(f"nanobraid:{key}") < 2 * value
            continue
        base = next((name for name in SUMS if key.startswith(name + "_")), None)
        if key in SAID_OTHERWISE or key in SUMS:
            continue
        if base is not None:
            label = "reason" if base.startswith("disk") else "operator"
            assert scrape.value(f"nanobraid:{base}_total", **{label: key[len(base) + 1 :]}) == value
            continue
        family = scrape.families["nanobraid:blocks" if key == "blocks_total" else f"nanobraid:{key}"]
        assert [sample.value for sample in family.samples] == [value], key


def test_histograms_add_up(metrics: Metrics) -> None:
    for seconds in (0.0, 0.0005, 0.0123, 3.0, 1000.0):
        metrics.observe_token_gap(seconds)
    metrics.observe(record())
    metrics.observe(record(e2e_s=4.0))
    scrape = Scrape(metrics)
    for name in HISTOGRAMS:
        samples = scrape.families[f"vllm:{name}"].samples
        buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name.endswith("_bucket")]
        assert [bound for bound, _ in buckets] == sorted({bound for bound, _ in buckets})
        assert [count for _, count in buckets] == sorted(count for _, count in buckets)
        assert buckets[-1] == (math.inf, scrape.value(f"vllm:{name}_count"))
        assert buckets[-1][1] == (5 if name == "inter_token_latency_seconds" else 2)
    gaps = "vllm:inter_token_latency_seconds"
    assert scrape.value(f"{gaps}_sum") == pytest.approx(1003.0128)
    assert scrape.value(f"{gaps}_bucket", le="0.0005") == 2  # bounds are inclusive
    assert scrape.value(f"{gaps}_bucket", le="0.01") == 2
    assert scrape.value(f"{gaps}_bucket", le="0.025") == 3
    assert scrape.value(f"{gaps}_bucket", le="80.0") == 4


def test_a_record_is_counted_where_it_belongs(metrics: Metrics) -> None:
    metrics.observe(record())
    metrics.observe(record(finish_reason="timeout", generated_tokens=0, ttft_s=None, prefill_s=None, mode="exact"))
    metrics.rejected("queue_full")
    scrape = Scrape(metrics)
    assert scrape.value("vllm:prompt_tokens_total") == 200
    assert scrape.value("vllm:prompt_tokens_cached_total") == 96
    assert scrape.value("vllm:prefix_cache_queries_total") == 200
    assert scrape.value("vllm:prefix_cache_hits_total") == 64
    ends = {reason: scrape.value("vllm:request_success_total", finished_reason=reason) for reason in FINISH_REASONS}
    assert ends == {**dict.fromkeys(FINISH_REASONS, 0), "stop": 1, "timeout": 1}
    assert scrape.value("vllm:time_to_first_token_seconds_count") == 1
    assert scrape.value("vllm:request_queue_time_seconds_count") == 2
    assert scrape.value("vllm:request_time_per_output_token_seconds_sum") == pytest.approx(0.1)
    assert scrape.value("vllm:admission_rejections_total", reason="queue_full") == 1
    assert scrape.value("vllm:admission_rejections_total", reason="draining") == 0
    assert scrape.value("nanobraid:reuse_requests_total", mode="blend") == 1
    assert scrape.value("nanobraid:chunk_tokens_total", use="isolated") == 32
    assert scrape.value("nanobraid:chunk_tokens_total", use="recomputed") == 6


def test_a_client_that_has_gone(metrics: Metrics) -> None:
    """Of such a request less is known; what is not known counts nowhere."""
    metrics.observe(RequestRecord.cut_off("abort", prompt_tokens=50, generated_tokens=7, ttft_s=0.2, e2e_s=0.9))
    metrics.observe(RequestRecord.cut_off("abort", prompt_tokens=9, generated_tokens=0, ttft_s=None, e2e_s=0.1))
    scrape = Scrape(metrics)
    assert scrape.value("vllm:request_success_total", finished_reason="abort") == 2
    assert scrape.value("vllm:prompt_tokens_total") == 50  # the other was not seen to begin
    assert scrape.value("vllm:prefix_cache_queries_total") == 0
    assert scrape.value("vllm:time_to_first_token_seconds_sum") == 0.2
    assert scrape.value("vllm:e2e_request_latency_seconds_sum") == pytest.approx(1.0)
    assert scrape.value("vllm:request_generation_tokens_count") == 2
    for name in ("request_queue_time_seconds", "request_decode_time_seconds", "request_time_per_output_token_seconds"):
        assert scrape.value(f"vllm:{name}_count") == 0
    assert scrape.value("nanobraid:reuse_requests_total", mode="exact") == 0


def test_refuses_what_it_does_not_know(metrics: Metrics) -> None:
    with pytest.raises(ValueError, match=r"finish_reason must be one of stop, .*got 'tool_calls'"):
        metrics.observe(record(finish_reason="tool_calls"))
    with pytest.raises(ValueError, match=r"mode must be one of exact, .*got 'guess'"):
        metrics.observe(record(mode="guess"))
    with pytest.raises(ValueError, match="reason must be one of queue_full, draining, got 'mood'"):
        metrics.rejected("mood")
    with pytest.raises(ValueError, match="must ascend"):
        Histogram([1, 1])
    assert Scrape(metrics).value("vllm:request_success_total", finished_reason="stop") == 0


def test_clients_cannot_make_labels(metrics: Metrics) -> None:
    metrics.http_request("/v1/models", "GET", 200)
    metrics.http_request("/v1/models", "GET", 200)
    metrics.http_request(None, "BREW", 404)
    for number in range(1000):
        metrics.http_request(f"/{number}", "GET", 200)
    scrape = Scrape(metrics)
    name = "nanobraid:http_requests_total"
    assert scrape.value(name, path="/v1/models", method="GET", status="200") == 2
    assert scrape.value(name, path="other", method="other", status="404") == 1
    samples = scrape.families["nanobraid:http_requests"].samples
    assert len(samples) < 70
    assert sum(sample.value for sample in samples) == 1003


def test_labels_and_help_are_escaped() -> None:
    out = TextWriter([("model_name", 'a "b"\\c\nd')])
    out.metric("x", "gauge", "one\ntwo \\", [((("y", "ü"),), math.inf)])
    (family,) = parser.text_string_to_metric_families(out.encode().decode())
    assert family.documentation == "one\ntwo \\"
    assert family.samples[0].labels == {"model_name": 'a "b"\\c\nd', "y": "ü"}
    assert family.samples[0].value == math.inf
    out = TextWriter([("model_name", "\udcff")])  # a byte of a command line that is no text
    out.metric("x", "gauge", "one", [((), 1)])
    assert b'x{model_name="?"} 1\n' in out.encode()


def test_a_token_gap_costs_little(metrics: Metrics) -> None:
    observe = metrics.observe_token_gap
    best = min(timeit.repeat(lambda: observe(0.0123), number=20_000, repeat=5)) / 20_000
    assert best < 2e-6, f"{best * 1e6:.2f} microseconds"  # 0.2 where nothing else runs


def test_the_bounds_of_vllm_are_there(metrics: Metrics) -> None:
    text = Scrape(metrics).text
    for name, bounds in (
        ("time_to_first_token_seconds", (0.001, 0.06, 7.5, 2560.0)),
        ("inter_token_latency_seconds", (0.01, 0.075, 0.15, 80.0)),
        ("e2e_request_latency_seconds", (0.3, 0.8, 15.0, 7680.0)),
        ("request_prompt_tokens", (1.0, 20.0, 500.0, 1000.0)),
    ):
        for bound in bounds:
            assert f'vllm:{name}_bucket{{model_name="smol",engine="0",le="{bound}"}} ' in text


def test_figures_of_a_run(metrics: Metrics, engine: nb.AsyncEngine) -> None:
    """A long prompt twice: the second time its beginning comes from the prefix cache."""
    before = Scrape(metrics)
    prompt = engine.llm.tokenizer.encode("One two three four five six seven eight nine ten. " * 12)
    params = nb.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)

    async def run() -> None:
        for _ in range(2):
            pieces = [piece async for piece in engine.stream(prompt, params)]
            last = pieces[-1]
            assert last.metrics is not None
            assert last.reuse is not None
            assert last.finish_reason is not None
            metrics.observe(
                RequestRecord.of(
                    last.metrics,
                    last.reuse,
                    finish_reason=last.finish_reason,
                    prompt_tokens=len(prompt),
                    generated_tokens=sum(len(piece.token_ids) for piece in pieces),
                    before_s=0.5,
                )
            )

    asyncio.run(run())
    after = Scrape(metrics)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert grown("vllm:generation_tokens_total") == 16
    assert grown("vllm:request_success_total", finished_reason="length") == 2
    assert grown("vllm:prompt_tokens_total") == 2 * len(prompt)
    hits = (len(prompt) - 1) // 16 * 16
    assert grown("vllm:prefix_cache_hits_total") == hits == grown("nanobraid:prefix_hit_tokens_total")
    assert grown("vllm:prompt_tokens_cached_total") == hits
    assert grown("nanobraid:prompt_tokens_total") == 2 * len(prompt) - hits
    assert grown("nanobraid:steps_total") >= 16
    assert grown("nanobraid:reuse_requests_total", mode="exact") == 2
    ttft = grown("vllm:time_to_first_token_seconds_sum")
    parts = grown("vllm:request_queue_time_seconds_sum") + grown("vllm:request_prefill_time_seconds_sum")
    assert ttft == pytest.approx(parts + 1.0)  # half a second before each
    decode = grown("vllm:request_decode_time_seconds_sum")
    assert grown("vllm:e2e_request_latency_seconds_sum") == pytest.approx(ttft + decode)
    assert grown("vllm:request_time_per_output_token_seconds_sum") == pytest.approx(decode / 7)
    assert after.value("nanobraid:recent_tokens_per_s") > 0
    assert after.value("vllm:cache_config_info", block_size="16") == 1
    assert after.value("vllm:kv_cache_usage_perc") == 0


def test_what_is_running_is_seen(metrics: Metrics, engine: nb.AsyncEngine) -> None:
    async def run() -> Scrape:
        params = nb.SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        async for _ in engine.stream("Once upon a time", params):
            return Scrape(metrics)
        raise AssertionError("no piece")

    scrape = asyncio.run(run())
    assert scrape.value("vllm:num_requests_running") == 1
    assert scrape.value("vllm:num_requests_waiting") == 0
    total, owned = scrape.value("nanobraid:blocks"), scrape.value("nanobraid:blocks_owned")
    assert owned >= 1
    assert scrape.value("vllm:kv_cache_usage_perc") == owned / total
    for _ in range(100):  # the request ends within a step of being left
        if engine.stats()["running"] == 0:
            break
        asyncio.run(asyncio.sleep(0.05))


def test_an_answer_that_never_began_has_no_first_token() -> None:
    times = RequestMetrics(queue_ms=40.0, ttft_ms=40.0, total_ms=40.0)
    reuse = nb.ReuseReport("blend", "exact", 0, 0, 0, 0, 40.0)
    ended = RequestRecord.of(times, reuse, finish_reason="timeout", prompt_tokens=7, generated_tokens=0, before_s=0.01)
    assert (ended.ttft_s, ended.prefill_s, ended.decode_s) == (None, None, None)
    assert ended.queue_s == pytest.approx(0.04)
    assert ended.e2e_s == pytest.approx(0.05)
    assert ended.mode == "exact"


def test_content_type() -> None:
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
