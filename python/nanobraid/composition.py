"""Prompts put together from segments, some of which are chunks: context that is computed once and used again.

A prompt is the list of its segments' tokens, one after the other; nothing is tokenized again where two meet. In the
mode ``exact`` that is all there is to it. In the modes `Isolated` and `Blend` the keys and values of chunks are
computed apart from what stands before them, kept, and used wherever the chunk stands: an approximation, which the
output's `ReuseReport` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanobraid import _core
from nanobraid.errors import InvalidArgumentError

#: What a segment's content may be: a text, in which the spelling of control tokens is text, or token ids.
Content = str | Sequence[int]


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt.

    Attributes:
        content: Text or token ids. A text is tokenized alone, without a beginning-of-sequence token.
        chunk: Its keys and values may be computed without what stands before it, and used in other prompts.
        anchor: Token ids that stand before a chunk while it is computed, and are not part of it: a beginning that gives
            it something to attend to. Part of the chunk's identity.
    """

    content: Content
    chunk: bool = False
    anchor: Sequence[int] = ()


@dataclass(frozen=True)
class Isolated:
    """Chunks are used as they are.

    Attributes:
        sink: ``mask``: nobody attends to the first token of a chunk that does not stand first in the prompt. Such a
            token has become an attention sink while the chunk was computed; a prompt has one. Of a chunk of one token
            nothing would be left: its token is computed as if it were in no chunk. ``keep``: they do.
    """

    sink: Literal["mask", "keep"] = "mask"


@dataclass(frozen=True)
class Blend:
    """Some tokens of chunks are computed again, seeing all that stands before them.

    Attributes:
        ratio: How many, of all tokens of chunks, rounded up; in (0, 1], where 1 is ``exact``.
        select: ``deviation``: those whose keys differ most from the chunk's in the second layer. ``first``: the first
            ones of every chunk.
        sink: As for `Isolated`, for first tokens that are not computed again.
    """

    ratio: float = 0.15
    select: Literal["deviation", "first"] = "deviation"
    sink: Literal["mask", "keep"] = "mask"


#: How chunks are used: ``"exact"``, or an approximation with its options, or its name for the defaults.
Reuse = Isolated | Blend | Literal["exact", "isolated", "blend"]


@dataclass(frozen=True)
class ReuseReport:
    """Where the tokens of a prompt came from.

    Attributes:
        mode_requested: ``exact``, ``isolated`` or ``blend``.
        mode_served: The same; or ``exact`` where there was nothing to approximate, or where `downgrade_reason` says
            why.
        exact_prefix: Tokens taken from the prefix cache, which are what computing them would give.
        isolated: Tokens taken from chunks as they are.
        recomputed: Tokens of chunks that were computed again.
        computed: All others.
        ttft_ms: From the submission to the first token; of an answer without tokens, to its end.
        policy_applied: Whether `SamplingParams.kv_policy` kept a token from seeing all before it.
        downgrade_reason: Why the request was served in the mode ``exact``, if it could not be as it was meant.
    """

    mode_requested: str
    mode_served: str
    exact_prefix: int
    isolated: int
    recomputed: int
    computed: int
    ttft_ms: float
    downgrade_reason: str | None = None
    policy_applied: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the answer is what a request without chunks and policy would give."""
        return self.mode_served == "exact" and not self.policy_applied


def reuse_options(reuse: Reuse) -> dict[str, Any]:
    """Options for the engine.

    Raises:
        InvalidArgumentError: A mode that does not exist, or an option outside its range.
    """
    if reuse == "exact":
        return {"reuse": "exact"}
    if reuse == "isolated":
        reuse = Isolated()
    if reuse == "blend":
        reuse = Blend()
    if not isinstance(reuse, Isolated | Blend):
        raise InvalidArgumentError(f"reuse must be 'exact', Isolated(...) or Blend(...), got {reuse!r}")
    if reuse.sink not in ("mask", "keep"):
        raise InvalidArgumentError(f"sink must be 'mask' or 'keep', got {reuse.sink!r}")
    options = {"reuse": "isolated", "mask_sink": reuse.sink == "mask"}
    if isinstance(reuse, Isolated):
        return options
    ratio: Any = reuse.ratio
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise InvalidArgumentError(f"ratio must be a number in (0, 1], got {ratio!r}")
    if reuse.select not in ("deviation", "first"):
        raise InvalidArgumentError(f"select must be 'deviation' or 'first', got {reuse.select!r}")
    return options | {"reuse": "blend", "ratio": float(ratio), "select": reuse.select}


def used_chunks(segments: Sequence[Segment], reuse: Reuse) -> list[Segment]:
    """The chunks whose keys and values a prompt of token ids uses in this mode."""
    options = reuse_options(reuse)
    if options["reuse"] == "exact" or options.get("ratio") == 1.0:
        return []
    used, begin = [], 0
    for segment in segments:
        is_hidden = options["mask_sink"] and begin > 0 and len(segment.content) == 1
        if segment.chunk and not is_hidden:
            used.append(segment)
        begin += len(segment.content)
    return used


def report_of(requested: str, output: _core.StepOutput, reason: str | None) -> ReuseReport:
    """What the last output of a request says of its prompt."""
    reuse = output.reuse
    return ReuseReport(
        mode_requested=requested,
        mode_served=reuse["mode"],
        exact_prefix=reuse["exact_prefix"],
        isolated=reuse["isolated"],
        recomputed=reuse["recomputed"],
        computed=reuse["computed"],
        ttft_ms=output.metrics["ttft_ms"],
        downgrade_reason=reason,
        policy_applied=reuse["policy_applied"],
    )
