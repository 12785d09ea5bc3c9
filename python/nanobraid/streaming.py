"""Weights that stay on disk: a model runs within a budget of memory, and the layers that do not fit are read each step.

The layers are packed into a file of the cache once. From then on a thread reads them, in the order in which a step uses
them, into slots that take turns, while the processor computes with the layer before. Embeddings, head and norms stay in
memory, and as many layers as the budget has room for. The text is that of a model in memory, token for token.

    llm = nb.LLM("llama-3.1-8b", streaming_config=nb.StreamingConfig(budget_bytes=2 << 30))

On a GPU the budget is of its memory: the layers that do not fit lie packed in pinned memory of the host, and a thread
copies them beside the kernels, in the same way. No file is made.

A step takes at least as long as the disk, or the bus, needs for what is not kept, whether one sequence takes part in it
or many: so many requests at once, long prompts and speculation are what it is good for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from nanobraid._options import path_name
from nanobraid.errors import InvalidArgumentError
from nanobraid.models import stream_dir
from nanobraid.sampling_params import require_int

_MOST_LAYERS = 2**20
_MOST_PREFETCH = 64


@dataclass(frozen=True)
class StreamingConfig:
    """How much of an `LLM`'s weights stays in memory.

    Attributes:
        keep_first_k: Layers that stay in memory, from the first on.
        keep_last_k: Layers that stay in memory, up to the last.
        budget_bytes: Most memory, of a GPU if that computes, that all weights take together: those that stay and the
            slots, not keys and values nor what a step computes with. What is left of it keeps further layers; with
            room for all, nothing is streamed. A budget too small for what must be there is refused with the numbers
            when the model is loaded. None: as little as there must be.
        prefetch_layers: Layers that are read ahead of the one in use, in [1, 64]; there is a slot for each of them and
            one for that in use.
        cache_dir: A directory, made if it is not there, for the file of packed layers, which is about as large as the
            model's. None: ``streamed`` in nanobraid's cache. On a GPU nothing is written there.
        cache_bytes: Most bytes that all files of packed layers in `cache_dir` take together, this model's included.
            When a file is made or opened, others go that were opened longest ago; those that are in use never go, and
            where they leave too little for this model's, it is refused with the numbers. None: no limit. Refused on a
            GPU, which has no such files.

    Raises:
        InvalidArgumentError: On construction, naming the field, the value and what is allowed.
    """

    keep_first_k: int = 0
    keep_last_k: int = 0
    budget_bytes: int | None = None
    prefetch_layers: int = 2
    cache_dir: str | os.PathLike[str] | None = None
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        def check(field: str, low: int, high: int, allowed: str) -> None:
            object.__setattr__(self, field, require_int(field, getattr(self, field), low, high, allowed))

        check("keep_first_k", 0, _MOST_LAYERS, "an integer >= 0")
        check("keep_last_k", 0, _MOST_LAYERS, "an integer >= 0")
        check("prefetch_layers", 1, _MOST_PREFETCH, f"an integer in [1, {_MOST_PREFETCH}]")
        for field in ("budget_bytes", "cache_bytes"):
            if getattr(self, field) is not None:
                check(field, 1, 2**62, "an integer >= 1, or None")
        if self.cache_dir is not None:
            path_name("cache_dir", "a directory", self.cache_dir)


def core_options(config: StreamingConfig | None) -> tuple[int, int, int, int, str, int] | None:
    """Returns what the core's model takes.

    Raises:
        InvalidArgumentError: It is no `StreamingConfig`.
        ModelIOError: There is no place for the cache.
    """
    if config is None:
        return None
    if not isinstance(config, StreamingConfig):
        raise InvalidArgumentError(f"streaming_config must be a StreamingConfig or None, got {config!r}")
    folder = os.fspath(stream_dir() if config.cache_dir is None else config.cache_dir)
    return (
        *(config.budget_bytes or 0, config.keep_first_k, config.keep_last_k),
        *(config.prefetch_layers, folder, config.cache_bytes or 0),
    )


def stream_line(stats: dict[str, object]) -> str:
    """What `LLM.stats` says of streaming, in one line for people; empty where nothing is streamed."""
    if not stats["streamed_layers"]:
        return ""
    return "{} layers streamed: {:.1f} MB read at {:.2f} GB/s, {:.1f} s waited; weights in {:.1f} of {:.1f} MB".format(
        stats["streamed_layers"],
        _number(stats, "streamed_bytes") / 1e6,
        _number(stats, "streamed_gb_per_s"),
        _number(stats, "streamed_wait_seconds"),
        _number(stats, "weight_resident_bytes") / 1e6,
        _number(stats, "weight_budget_bytes") / 1e6,
    )


def _number(stats: dict[str, object], key: str) -> float:
    value = stats[key]
    assert isinstance(value, int | float)
    return value
