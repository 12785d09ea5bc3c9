"""nanobraid: runs open-weight language models on one machine.

Example:
    >>> import nanobraid as nb
    >>> llm = nb.LLM("smollm2-135m")
    >>> llm.generate("The capital of France is", nb.SamplingParams(temperature=0))[0].text  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from nanobraid import _logging, kv_policy
from nanobraid._core import __version__
from nanobraid.chat_template import ChatTemplate
from nanobraid.chunk_cache import ChunkCache, ChunkInfo
from nanobraid.composition import Blend, Isolated, ReuseReport, Segment
from nanobraid.errors import (
    ChatTemplateError,
    ChunkNotFoundError,
    DeviceError,
    DownloadError,
    FormatError,
    InternalError,
    InvalidArgumentError,
    InvalidCompositionError,
    ModelIOError,
    ModelNotFoundError,
    NanobraidError,
    OutOfMemoryError,
    OverloadedError,
    UnsupportedError,
)
from nanobraid.guided import Guided
from nanobraid.kv_policy import KvPolicy
from nanobraid.llm import LLM
from nanobraid.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, ScoreOutput, StreamPiece
from nanobraid.sampling_params import SamplingParams
from nanobraid.speculative import SpeculativeConfig
from nanobraid.streaming import StreamingConfig
from nanobraid.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanobraid._async_request import AsyncRequest
    from nanobraid.async_chunks import AsyncChunkCache
    from nanobraid.async_engine import AsyncEngine
    from nanobraid.bench_kv import KVCacheBenchmarker
    from nanobraid.chunked import Chunk, ChunkedLLM, ChunkedOutput, ChunkedPiece, ChunkType, RetainedOutput, WarmReport

__all__ = [
    "LLM",
    "AsyncChunkCache",
    "AsyncEngine",
    "AsyncRequest",
    "Blend",
    "ChatTemplate",
    "ChatTemplateError",
    "Chunk",
    "ChunkCache",
    "ChunkInfo",
    "ChunkNotFoundError",
    "ChunkType",
    "ChunkedLLM",
    "ChunkedOutput",
    "ChunkedPiece",
    "CompletionOutput",
    "DeviceError",
    "DownloadError",
    "FormatError",
    "Guided",
    "InternalError",
    "InvalidArgumentError",
    "InvalidCompositionError",
    "Isolated",
    "KVCacheBenchmarker",
    "KvPolicy",
    "Logprob",
    "ModelIOError",
    "ModelNotFoundError",
    "NanobraidError",
    "OutOfMemoryError",
    "OverloadedError",
    "RequestMetrics",
    "RequestOutput",
    "RetainedOutput",
    "ReuseReport",
    "SamplingParams",
    "ScoreOutput",
    "Segment",
    "SpeculativeConfig",
    "StreamPiece",
    "StreamingConfig",
    "Tokenizer",
    "UnsupportedError",
    "WarmReport",
    "__version__",
    "kv_policy",
]


_CHUNKED = ("Chunk", "ChunkType", "ChunkedLLM", "ChunkedOutput", "ChunkedPiece", "RetainedOutput", "WarmReport")


def __getattr__(name: str) -> Any:
    if name == "AsyncChunkCache":
        from nanobraid import async_chunks  # importing asyncio takes time

        return async_chunks.AsyncChunkCache
    if name in ("AsyncEngine", "AsyncRequest"):
        from nanobraid import async_engine

        return getattr(async_engine, name)
    if name == "KVCacheBenchmarker":
        from nanobraid import bench_kv

        return bench_kv.KVCacheBenchmarker
    if name in _CHUNKED:
        from nanobraid import chunked

        return getattr(chunked, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_logging.connect()
