"""What `ChunkedLLM` returns, and what it takes as sampling parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanobraid.composition import ReuseReport, Segment
from nanobraid.errors import InvalidArgumentError
from nanobraid.outputs import RequestMetrics, RequestOutput
from nanobraid.sampling_params import SamplingParams
from nanobraid.tokenizer import Tokenizer

#: What the engine finds keys and values by: tokens, and the anchor that stood before them while they were computed.
KvKey = tuple[tuple[int, ...], tuple[int, ...]]

#: What sampling parameters may be: an object, its fields as a dict, or None for `DEFAULT_PARAMS`.
Params = SamplingParams | Mapping[str, Any]

DEFAULT_PARAMS: Mapping[str, Any] = {"temperature": 1.0, "max_tokens": 64}


class Keyed:
    """A dataclass whose fields can be read as keys too: ``out["text"]`` is ``out.text``. None is an absent key."""

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> list[str]:
        """Names of the fields that are not None."""
        names = [item.name for item in dataclasses.fields(self) if item.repr]  # type: ignore[arg-type]
        return [name for name in names if getattr(self, name) is not None]

    def get(self, key: str, default: Any = None) -> Any:
        """The field of this name, or `default`."""
        return getattr(self, key) if key in self.keys() else default


@dataclass(frozen=True)
class ChunkedOutput(Keyed):
    """An answer to a prompt made of chunks. ``out.text`` and ``out["text"]`` are the same, and so for all fields.

    Attributes:
        text: The generated text.
        token_ids: The generated tokens.
        finish_reason: As in `RequestOutput`.
        chunk_ids: ``system``, ``context`` (a list) and ``query``; None where the prompt was not made of registered
            chunks.
        reuse: Where the tokens of the prompt came from.
        metrics: Times of the request.
        usage: ``prompt_tokens``, ``completion_tokens``, ``total_tokens``, and ``cached_tokens``: those of the prompt
            that were not computed.
        prompt_token_ids: The prompt as the model saw it.
        output_chunk_id: The answer as a chunk, if it was retained and is not empty.
        retained_seq_id: The handle of the retained answer.
        pieces: Of `ChunkedLLM.complete`: ``candidates``, pieces of the prompt that could have been stored, and
            ``reused``, those that were used.
        error: With finish_reason ``error``, what was wrong.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    chunk_ids: dict[str, Any] | None
    reuse: ReuseReport | None
    metrics: RequestMetrics
    usage: dict[str, int]
    prompt_token_ids: list[int] = field(default_factory=list)
    output_chunk_id: str | None = None
    retained_seq_id: int | None = None
    pieces: dict[str, int] | None = None
    error: str | None = None


@dataclass(frozen=True)
class ChunkedPiece(Keyed):
    """A piece of a streamed answer.

    Attributes:
        text: New text.
        token_ids: Its tokens.
        cumulative_text: All text so far.
        finished: Whether this is the last piece.
        final_output: With the last piece, the whole answer.
    """

    text: str
    token_ids: list[int]
    cumulative_text: str
    finished: bool
    final_output: ChunkedOutput | None = None


@dataclass(frozen=True)
class RetainedOutput(Keyed):
    """An answer that is kept, to go on with or to stand in other prompts.

    Attributes:
        seq_id: Its handle.
        text: Its text.
        token_ids: Its tokens.
        prompt_token_ids: The prompt that it answers.
        prompt_length: Tokens of the prompt.
        completion_length: Tokens of the answer.
        think_positions: (begin, end) of what the model thought, in tokens of the answer, tags included; what was not
            closed runs to the end.
        tainted_origin: The answer was generated from approximate keys and values. Those are not kept: where its
            tokens are used again, they are computed behind the prompt's, exactly.
        cache_info: Of prompt and answer together, ``cached_tokens``: how many the prefix cache could give now;
            ``kept_tokens``: how many it cannot lose until the answer is released. Of an answer that `ChunkedLLM.load`
            brought, none: its keys and values are not in the file.
        chunk_ids: As in `ChunkedOutput`.
        output_chunk_id: The chunk it was registered as at once.
    """

    seq_id: int
    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    prompt_length: int
    completion_length: int
    think_positions: list[tuple[int, int]]
    tainted_origin: bool
    cache_info: dict[str, int]
    chunk_ids: dict[str, Any] | None
    output_chunk_id: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list, repr=False)
    segments: list[Segment] = field(default_factory=list, repr=False)
    kv_key: KvKey | None = field(default=None, repr=False)


def output_of(out: RequestOutput, chunk_ids: dict[str, Any] | None) -> ChunkedOutput:
    """A finished request in the words of chunks."""
    reuse = out.reuse
    num_prompt, num_new = len(out.prompt_token_ids), len(out.token_ids)
    cached = 0 if reuse is None else num_prompt - reuse.computed - reuse.recomputed
    return ChunkedOutput(
        text=out.text,
        token_ids=out.token_ids,
        finish_reason=out.finish_reason,
        chunk_ids=chunk_ids,
        reuse=reuse,
        metrics=out.metrics,
        usage={
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "cached_tokens": cached,
        },
        prompt_token_ids=out.prompt_token_ids,
        error=out.error,
    )


def params_of(given: Params | None) -> tuple[SamplingParams, bool]:
    """Returns sampling parameters, and whether they ask to retain the answer (the key ``retain_output_cache``).

    Args:
        given: An object; or a dict of its fields, where those that are missing have the values of `DEFAULT_PARAMS`, or
            else their defaults. In a dict, None is a missing key, but for ``max_tokens``.

    Raises:
        InvalidArgumentError: Neither; a key that is no field; or a value outside its range.
    """
    if isinstance(given, SamplingParams):
        params, retain = given, False
    elif given is None or isinstance(given, Mapping):
        fields = {**DEFAULT_PARAMS, **(given or {})}
        retain = fields.pop("retain_output_cache", False)
        if not isinstance(retain, bool):
            raise InvalidArgumentError(f"retain_output_cache must be True or False, got {retain!r}")
        known = [item.name for item in dataclasses.fields(SamplingParams)]
        for key in fields:
            if key not in known:
                raise InvalidArgumentError(
                    f"sampling_params has the unknown key {key!r}; there are {', '.join(known)} and retain_output_cache"
                )
        wanted = {key: value for key, value in fields.items() if value is not None or key == "max_tokens"}
        params = SamplingParams(**wanted)
    else:
        raise InvalidArgumentError(f"sampling_params must be SamplingParams or a dict, got {type(given).__name__}")
    if params.n != 1:
        raise InvalidArgumentError(f"n must be 1 for prompts made of chunks, got {params.n}; send a batch instead")
    return params, retain


def think_tags(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The tokens that a model thinks between, if it has them."""
    begin, end = tokenizer.find_token("<think>"), tokenizer.find_token("</think>")
    return None if begin is None or end is None else (begin, end)


def think_spans(token_ids: Sequence[int], tags: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Returns (begin, end) of what stands between tags, these included; of nested ones, the outermost.

    One that is not closed runs to the end. A closing tag alone is not the end of anything.
    """
    if tags is None:
        return []
    spans: list[tuple[int, int]] = []
    depth, begin = 0, 0
    for i, token in enumerate(token_ids):
        if token == tags[0]:
            if depth == 0:
                begin = i
            depth += 1
        elif token == tags[1] and depth > 0:
            depth -= 1
            if depth == 0:
                spans.append((begin, i + 1))
    if depth > 0:
        spans.append((begin, len(token_ids)))
    return spans


def without(token_ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """The tokens outside the spans."""
    return [token for i, token in enumerate(token_ids) if not any(begin <= i < end for begin, end in spans)]
