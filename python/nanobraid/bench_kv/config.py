"""Configurations of benchmarks of keys and values. What has no effect on this engine is refused, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanobraid.bench_kv.methods import DEFAULTS, MODES, make_case, sweep
from nanobraid.errors import InvalidArgumentError, UnsupportedError
from nanobraid.models import DEFAULT_MODEL
from nanobraid.sampling_params import require_int

_EPS = 1e-8
_DTYPES = ("auto", "int8", "bf16", "f32")


def _count(name: str, value: object, low: int = 1) -> int:
    return require_int(name, value, low, 2**31 - 1, f"an integer >= {low}")


@dataclass
class Config:
    """What is run, and on what.

    Attributes:
        model_name: As `LLM` takes it.
        device: As `LLM` takes it.
        dtype: Type of activations, as `LLM` takes it.
        seed: Of the prompts and documents that are made up. Answers are greedy, so no token is drawn.
        max_new_tokens: Tokens generated for each prompt.
        batch_size: Prompts that run at once.

    Raises:
        InvalidArgumentError: A value is outside its range.
    """

    model_name: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 42
    max_new_tokens: int = 64
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise InvalidArgumentError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        _count("seed", self.seed, 0)
        _count("max_new_tokens", self.max_new_tokens)
        _count("batch_size", self.batch_size)


@dataclass
class QuantizationConfig:
    """A format of keys and values.

    Attributes:
        mode: ``int8``, ``int4`` or ``mixed``.
        eps: Must stay at its default: a scale of zero is exact here, nothing is divided by it.

    Raises:
        InvalidArgumentError: There is no such mode.
        UnsupportedError: `eps` is another one.
    """

    mode: str = "int8"
    eps: float = _EPS

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidArgumentError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.eps != _EPS:
            raise UnsupportedError(f"eps={self.eps!r} has no effect on this engine; leave it out")

    @property
    def method(self) -> str:
        """The method with this format."""
        return f"quant_{self.mode}"


@dataclass
class CacheConfig:
    """Parameters of the methods that forget.

    Attributes:
        window_size: Tokens of the window.
        block_size: Tokens of a group of which block_cache keeps a part; a multiple of 16. The engine's own blocks have
            16 tokens.
        chunk_size: Tokens of a group that chunked_cache replaces by their mean; a multiple of 16.
        keep_last: Tokens that chunked_cache leaves as they are.

    Raises:
        InvalidArgumentError: A value is outside its range.
    """

    window_size: int = DEFAULTS["window_size"]
    block_size: int = DEFAULTS["block_size"]
    chunk_size: int = DEFAULTS["chunk_size"]
    keep_last: int = DEFAULTS["keep_last"]

    def __post_init__(self) -> None:
        for name in ("sliding_window", "block_cache", "chunked_cache"):
            self.params(name)

    def params(self, method: str) -> dict[str, Any]:
        """Those of these parameters that a method reads, for ``benchmark_method(prompts, method, **params)``.

        Raises:
            InvalidArgumentError: There is no such method, or a value is outside its range.
        """
        names = ("window_size", "block_size", "chunk_size", "keep_last")
        reads = make_case(method).params
        found = {name: getattr(self, name) for name in names if name in reads}
        make_case(method, **found)
        return found


@dataclass
class BenchmarkConfig:
    """Which methods a whole benchmark compares, and with which sizes.

    Attributes:
        methods: Names of methods.
        window_sizes: Windows of sliding_window.
        block_sizes: Groups of block_cache.
        chunk_sizes: Groups of chunked_cache.

    Raises:
        InvalidArgumentError: There is no such method, or a size of one that is named is outside its range.
    """

    methods: Sequence[str] = field(default_factory=lambda: ["no_cache", "full_cache", "sliding_window"])
    window_sizes: Sequence[int] = field(default_factory=lambda: [64, 128, 256, 512])
    block_sizes: Sequence[int] = field(default_factory=lambda: [32, 64, 128])
    chunk_sizes: Sequence[int] = field(default_factory=lambda: [32, 64, 128])

    def __post_init__(self) -> None:
        sweep(self.methods, self.window_sizes, self.block_sizes, self.chunk_sizes)


@dataclass
class QualityConfig:
    """How the quality of a method is measured.

    Attributes:
        dtype: Type of activations while it is; int8 ones alone are off by more than most formats.
        text_tokens: Tokens of each text that are scored.
        agreement_tokens: Greedy tokens that are compared, behind the first three quarters of each text; 0: none.
        needle_lengths: Tokens of the documents in which a code is hidden; empty: none.
        needle_depths: Where it stands: 0 behind the first sentence, 1 behind the last.
        needle_draws: Documents for each length and depth.

    Raises:
        InvalidArgumentError: A value is outside its range.
    """

    dtype: str = "bf16"
    text_tokens: int = 1024
    agreement_tokens: int = 32
    needle_lengths: Sequence[int] = (512, 1024)
    needle_depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    needle_draws: int = 2

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise InvalidArgumentError(f"quality dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        _count("text_tokens", self.text_tokens, 8)
        _count("agreement_tokens", self.agreement_tokens, 0)
        _count("needle_draws", self.needle_draws)
        for length in self.needle_lengths:
            _count("needle_lengths", length, 64)
        for depth in self.needle_depths:
            if not isinstance(depth, int | float) or not 0 <= depth <= 1:
                raise InvalidArgumentError(f"needle_depths must be numbers in [0, 1], got {depth!r}")
        if bool(self.needle_lengths) != bool(self.needle_depths):
            raise InvalidArgumentError("needle_lengths and needle_depths must both be given, or both be empty")
