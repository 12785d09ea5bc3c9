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

__all__ = ["BenchmarkConfig", "CacheConfig", "Config", "KVCacheBenchmarker", "QualityConfig", "QuantizationConfig"]


def __getattr__(name: str) -> Any:
    # Evaluation scripts import single modules of this package, and the worker is one: neither needs the rest.
    if name == "KVCacheBenchmarker":
        from nanobraid.bench_kv.benchmarker import KVCacheBenchmarker

        return KVCacheBenchmarker
    if name in __all__:
        from nanobraid.bench_kv import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
