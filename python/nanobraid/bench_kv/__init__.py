"""Benchmarks of keys and values: speed, memory and quality of one model under every way to keep them.

Example:
    >>> from nanobraid.bench_kv import KVCacheBenchmarker
    >>> bench = KVCacheBenchmarker("smollm2-135m")  # doctest: +SKIP
    >>> bench.benchmark_method(["Once upon a time"], "quant_int8")["tokens_per_sec"]  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanobraid.bench_kv.benchmarker import KVCacheBenchmarker
    from nanobraid.bench_kv.config import BenchmarkConfig, CacheConfig, Config, QualityConfig, QuantizationConfig
    from nanobraid.bench_kv.divergence import text_similarity, token_agreement_rate
    from nanobraid.bench_kv.quality import compute_perplexity, compute_sliding_window_nll

__all__ = [
    "BenchmarkConfig",
    "CacheConfig",
    "Config",
    "KVCacheBenchmarker",
    "QualityConfig",
    "QuantizationConfig",
    "compute_perplexity",
    "compute_sliding_window_nll",
    "text_similarity",
    "token_agreement_rate",
]


def __getattr__(name: str) -> Any:
    # Evaluation scripts import single modules of this package, and the worker is one: neither needs the rest.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanobraid.bench_kv import benchmarker, config, divergence, quality

    home = next(module for module in (benchmarker, config, divergence, quality) if name in vars(module))
    return getattr(home, name)
