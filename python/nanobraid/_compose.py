"""Composed prompts: from segments to tokens and chunks, and the methods of an `LLM` that take segments."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from nanobraid import _core
from nanobraid._draft import Prepared
from nanobraid._driver import Call, Driver
from nanobraid._options import require_one_of
from nanobraid._requests import is_list_like, params_for
from nanobraid.composition import Content, Reuse, Segment, reuse_options
from nanobraid.errors import InvalidArgumentError, OutOfMemoryError, UnsupportedError, error_of
from nanobraid.outputs import RequestOutput, StreamPiece
from nanobraid.sampling_params import SamplingParams
from nanobraid.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: (begin, count, anchor token ids) of a chunk in its prompt.
Chunk = tuple[int, int, list[int]]


def encode_content(tokenizer: Tokenizer, content: Content, where: str, *, at_start: bool = False) -> list[int]:
    """Returns the tokens of a text that stands inside a prompt, or checks token ids.

    Raises:
        InvalidArgumentError: Neither a text nor token ids of the vocabulary, or empty.
    """
    if isinstance(content, str):
        ids = tokenizer.encode(content, add_special_tokens=False, at_start=at_start)
    elif is_list_like(content) and not isinstance(content, bytes):
        ids = tokenizer.check_token_ids(content, f"{where}: token_ids")
    else:
        raise InvalidArgumentError(f"{where} must be a string or a list of token ids, got {type(content).__name__}")
    if not ids:
        raise InvalidArgumentError(f"{where} is empty")
    return ids


def composed_prompt(tokenizer: Tokenizer, segments: Sequence[Segment | str]) -> tuple[list[int], list[Chunk]]:
    """Returns the prompt's tokens and its chunks.

    Raises:
        InvalidArgumentError: There are no segments, or one is empty or no segment.
    """
    if isinstance(segments, str) or not isinstance(segments, Sequence) or not segments:
        raise InvalidArgumentError(f"segments must be a list of Segment, with at least one, got {segments!r:.80}")
    ids: list[int] = []
    chunks: list[Chunk] = []
    for i, given in enumerate(segments):
        segment: Any = Segment(given) if isinstance(given, str) else given
        if not isinstance(segment, Segment):
            raise InvalidArgumentError(f"segments[{i}] must be a Segment or a string, got {type(given).__name__}")
        if i == 0 and isinstance(segment.content, str):
            ids += tokenizer.encode("")  # what a text begins with
        own = encode_content(tokenizer, segment.content, f"segments[{i}]", at_start=i == 0)
        if segment.chunk:
            anchor = tokenizer.check_token_ids(segment.anchor, f"segments[{i}]: anchor")
            chunks.append((len(ids), len(own), anchor))
        elif len(segment.anchor) > 0:
            raise InvalidArgumentError(f"segments[{i}] has an anchor but is no chunk")
        ids += own
    return ids, chunks


class Attempts:
    """What is submitted for a composed prompt: a request in its mode; where that cannot be served, one in ``exact``.

    Args:
        prepare: Makes a request in a mode, with the reason why that is not the one wanted.
        reuse: The mode that is wanted.
        to_exact: Whether the mode ``exact`` may take its place.

    Attributes:
        request: The one that counts.
    """

    def __init__(self, prepare: Callable[[Reuse, str | None], Prepared], reuse: Reuse, *, to_exact: bool) -> None:
        self._prepare = prepare
        self._may_retry = to_exact and reuse != "exact"
        self.request = prepare(reuse, None)

    def retry(self, error: UnsupportedError | OutOfMemoryError) -> None:
        """Makes the request of the second attempt after the first one failed with this error.

        Raises:
            UnsupportedError, OutOfMemoryError: This error, if there is no second attempt.
        """
        if not self._may_retry:
            raise error
        self._may_retry = False
        self.request = self._prepare("exact", str(error))

    def stream(
        self, stream: Callable[[Prepared], Generator[StreamPiece, None, None]]
    ) -> Generator[StreamPiece, None, None]:
        """The pieces of the attempt that is served; `stream` gives those of one request."""
        try:
            yield from stream(self.request)
            return
        except (UnsupportedError, OutOfMemoryError) as error:
            self.retry(error)
        yield from stream(self.request)


class Composing:
    """The part of an `LLM` that takes segments."""

    _tokenizer: Tokenizer
    _driver: Driver

    if TYPE_CHECKING:  # what an `LLM` has

        def _prepare(
            self,
            prompt: str | Sequence[int],
            sampling_params: SamplingParams | None,
            cache_salt: str,
            timeout_s: float | None,
            *,
            streams: bool = True,
        ) -> Prepared: ...
        def _stream(self, request: Prepared) -> Generator[StreamPiece, None, None]: ...
        def _evaluate(self, text_or_ids: str | Sequence[int], **what: Any) -> tuple[list[int], _core.StepOutput]: ...

    @overload
    def compose(
        self,
        segments: Sequence[Segment | str],
        sampling_params: SamplingParams | None = None,
        *,
        reuse: Reuse = "exact",
        on_unsupported: Literal["error", "exact"] = "error",
        cache_salt: str = "",
        timeout_s: float | None = None,
        stream: Literal[False] = False,
    ) -> RequestOutput: ...
    @overload
    def compose(
        self,
        segments: Sequence[Segment | str],
        sampling_params: SamplingParams | None = None,
        *,
        reuse: Reuse = "exact",
        on_unsupported: Literal["error", "exact"] = "error",
        cache_salt: str = "",
        timeout_s: float | None = None,
        stream: Literal[True],
    ) -> Generator[StreamPiece, None, None]: ...
    def compose(
        self,
        segments: Sequence[Segment | str],
        sampling_params: SamplingParams | None = None,
        *,
        reuse: Reuse = "exact",
        on_unsupported: Literal["error", "exact"] = "error",
        cache_salt: str = "",
        timeout_s: float | None = None,
        stream: bool = False,
    ) -> RequestOutput | Generator[StreamPiece, None, None]:
        """Continues a prompt that is put together from segments, some of which are chunks.

        Args:
            segments: Their tokens, one after the other, are the prompt; see `Segment`. A string is a plain segment. If
                the first one is a text, the prompt begins as any text does (with the beginning-of-text token where the
                model wants one).
            sampling_params: None is ``SamplingParams()``.
            reuse: ``"exact"`` computes the prompt as any other, from its longest cached beginning on. `Isolated` and
                `Blend` use the keys and values of chunks, which are computed first if they are not there: approximately
                what ``"exact"`` gives, with less to compute.
            on_unsupported: What happens if the request cannot be served in this mode (no room for its chunks,
                ``prompt_logprobs``): an error, or the mode ``exact``, with the reason in the report.
            cache_salt: As for `generate`; chunks belong to it too.
            timeout_s: As for `generate`.
            stream: Return an iterator of pieces instead, as `stream` does.

        Returns:
            The answer; ``reuse`` says where the tokens of its prompt came from.

        Raises:
            InvalidArgumentError: A segment is empty or no segment, or as `generate`.
            UnsupportedError: This request cannot be served in this mode.
            OutOfMemoryError: There is no room for its chunks.
        """
        attempts = self._attempts(
            segments,
            sampling_params,
            reuse=reuse,
            on_unsupported=on_unsupported,
            cache_salt=cache_salt,
            timeout_s=timeout_s,
            streams=stream,
        )
        pieces = attempts.stream(self._stream)
        if stream:
            return pieces
        for _ in pieces:
            pass
        return attempts.request.draft.result(None, attempts.request.ids)

    def _attempts(
        self,
        segments: Sequence[Segment | str],
        sampling_params: SamplingParams | None,
        *,
        reuse: Reuse,
        on_unsupported: str,
        cache_salt: str,
        timeout_s: float | None,
        streams: bool,
    ) -> Attempts:
        """Checks what `compose` was given; nothing is submitted.

        Raises:
            InvalidArgumentError: As `compose`.
        """
        require_one_of("on_unsupported", on_unsupported, ("error", "exact"))
        wanted = reuse_options(reuse)["reuse"]
        ids, chunks = composed_prompt(self._tokenizer, segments)

        def prepare(mode: Reuse, reason: str | None) -> Prepared:
            request = self._prepare(ids, sampling_params, cache_salt, timeout_s, streams=streams)
            request.options.update(reuse_options(mode), chunks=chunks)
            request.draft.reuse_requested = wanted
            request.draft.downgrade_reason = reason
            return request

        return Attempts(prepare, reuse, to_exact=on_unsupported == "exact")

    def compose_batch(
        self,
        prompts: Sequence[Sequence[Segment | str]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        reuse: Reuse | list[Reuse] = "exact",
        on_unsupported: Literal["error", "exact"] = "error",
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> list[RequestOutput]:
        """Continues several prompts that are put together from segments, all of them as one continuous batch.

        Args:
            prompts: Each as for `compose`.
            sampling_params: For all prompts, or one for each. None is ``SamplingParams()``.
            reuse: For all prompts, or one for each.
            on_unsupported: As for `compose`; it holds for each prompt alone.
            cache_salt: As for `compose`.
            timeout_s: As for `compose`.

        Returns:
            One output per prompt, in order. An answer that ended because its options left no token to choose has the
            finish reason ``error``, as with `generate`.

        Raises:
            InvalidArgumentError: There are no prompts, or as `compose`. Nothing has been computed then.
            UnsupportedError, OutOfMemoryError: As `compose`; the other answers are given up.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
            raise InvalidArgumentError("prompts must be a list of lists of Segment, with at least one")
        params = params_for(sampling_params, len(prompts))
        modes: list[Reuse] = reuse if isinstance(reuse, list) else [reuse] * len(prompts)
        if len(modes) != len(prompts):
            raise InvalidArgumentError(f"reuse has {len(modes)} entries for {len(prompts)} prompts")
        attempts = [
            self._attempts(
                segments,
                param,
                reuse=mode,
                on_unsupported=on_unsupported,
                cache_salt=cache_salt,
                timeout_s=timeout_s,
                streams=False,
            )
            for segments, param, mode in zip(prompts, params, modes, strict=True)
        ]
        call = Call(streams=False)

        def submit(i: int) -> None:
            request = attempts[i].request
            try:
                self._driver.submit(call, i, request.ids, **request.options)
            except (UnsupportedError, OutOfMemoryError) as error:
                retry(i, error)

        def retry(i: int, error: UnsupportedError | OutOfMemoryError) -> None:
            attempts[i].retry(error)
            submit(i)

        try:
            with self._driver.together():
                for i in range(len(attempts)):
                    submit(i)
            while outputs := self._driver.wait(call):
                for i, output in outputs:
                    error = error_of(*output.error) if output.finish_reason == "error" and output.error else None
                    if isinstance(error, UnsupportedError | OutOfMemoryError):
                        retry(i, error)
                    else:
                        attempts[i].request.draft.add(output)
        except BaseException:
            self._driver.cancel(call)
            raise
        return [made.request.draft.result(None, made.request.ids) for made in attempts]

    def composed_logits(self, segments: Sequence[Segment | str], *, reuse: Reuse = "exact") -> NDArray[np.float32]:
        """Returns the logits after every token behind the last chunk of a composed prompt, for evaluation.

        Args:
            segments: As for `compose`; the last one is no chunk.
            reuse: As for `compose`.

        Returns:
            float32[T, V]; row i are the logits for the token after token i of those behind the last chunk.

        Raises:
            InvalidArgumentError: The last segment is a chunk, or as `compose`.
            OutOfMemoryError: As `compose`.
        """
        ids, chunks = composed_prompt(self._tokenizer, segments)
        begin = chunks[-1][0] + chunks[-1][1] if chunks else 0
        if begin == len(ids):
            raise InvalidArgumentError("the last segment must not be a chunk")
        _, output = self._evaluate(ids, prompt_logits=True, chunks=chunks, **reuse_options(reuse))
        logits = output.prompt_logits
        if logits is None:
            assert output.error is not None
            raise error_of(*output.error)
        return logits[len(logits) - (len(ids) - begin) :]
