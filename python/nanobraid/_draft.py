"""Puts the tokens of a request together: into text while it runs, into a `RequestOutput` when it has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nanobraid import _core
from nanobraid.composition import ReuseReport, report_of
from nanobraid.errors import error_of
from nanobraid.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamPiece, TokenLogprobs
from nanobraid.sampling_params import SamplingParams
from nanobraid.tokenizer import Tokenizer


class _Text:
    """The text of an answer as it grows: whole characters, up to a stop string, with the control tokens to be kept.

    Stop strings are found as the engine finds them, in the text without control tokens. Which of its characters a kept
    one stands before, a second decoder says that holds nothing back for stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, Any], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        at_start = options["guided"] is None  # a grammar counts the space that a text would begin without
        self._decoder = tokenizer.stream(
            at_start=at_start,
            stop=options["stop"],
            include_stop=params.include_stop_str_in_output,
            min_tokens=options["min_tokens"],
        )
        specials = set(tokenizer.special_tokens.values()) if params.keep_special_token_ids else set()
        self._kept = specials.intersection(params.keep_special_token_ids)  # what else was named is text anyway
        self._places = tokenizer.stream(at_start=at_start) if self._kept else None
        self._num_decoded = self._num_given = 0  # characters, without control tokens
        self._marks: deque[tuple[int, str]] = deque()  # kept tokens not given out, and the characters before them

        # Called once a token: where nothing is kept, the decoder is asked without a function between.
        self.push: Callable[[int], str] = self._push if self._kept else self._decoder.push

    @property
    def stop_reason(self) -> str | None:
        return self._decoder.stop_reason

    def _push(self, token_id: int) -> str:
        text = self._decoder.push(token_id)
        assert self._places is not None
        if token_id in self._kept:
            if self._decoder.stop_reason is None:
                self._marks.append((self._num_decoded, self._tokenizer.token_text(token_id)))
        else:
            self._num_decoded += len(self._places.push(token_id))
        return self._with_marks(text)

    def finish(self) -> str:
        return self._with_marks(self._decoder.finish())

    def _with_marks(self, text: str) -> str:
        end = self._num_given + len(text)
        parts = []
        while self._marks and self._marks[0][0] <= end:
            place, mark = self._marks.popleft()
            parts += [text[: place - self._num_given], mark]
            text = text[place - self._num_given :]
            self._num_given = place
        self._num_given = end
        return "".join([*parts, text])


class _Answer:
    """One of the answers to a prompt as it grows."""

    # Between two tokens of an answer the caches are filled with weights: what lies together is found sooner.
    __slots__ = ("decoder", "error", "finish_reason", "logprobs", "push", "reported", "texts", "token_ids")

    def __init__(self, text: _Text, has_logprobs: bool) -> None:
        self.decoder = text
        self.push = text.push
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = [] if has_logprobs else None
        self.texts: list[str] = []
        self.reported = 0  # tokens that have been given out with some text
        self.finish_reason: str | None = None
        self.error: str | None = None

    def result(self, index: int) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text="".join(self.texts),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason or "abort",
            stop_reason=self.decoder.stop_reason,
            logprobs=self.logprobs,
            error=self.error,
        )


def _metrics(output: _core.StepOutput) -> RequestMetrics:
    """Times of an answer that ended with `output`."""
    times = output.metrics
    return RequestMetrics(
        queue_ms=times.get("queue_ms", 0.0),
        ttft_ms=times.get("ttft_ms", 0.0),
        total_ms=times.get("total_ms", 0.0),
        tokens_per_s=times.get("tokens_per_s", 0.0),
        kv_reuse_ratio=(output.reuse["exact_prefix"] + output.reuse["isolated"]) / max(output.num_prompt_tokens, 1),
        num_draft_tokens=int(times.get("num_draft_tokens", 0)),
        num_accepted_tokens=int(times.get("num_accepted_tokens", 0)),
    )


class Draft:
    """The texts and tokens of one request as they grow. Used by one thread at a time.

    Args:
        tokenizer: The model's.
        options: What the request was submitted with.
        params: What they were made from.

    Attributes:
        reuse_requested: The mode of reuse that the user wanted.
        downgrade_reason: Why the request is served in the mode ``exact`` instead, if it is.
    """

    __slots__ = (
        *("_answers", "_prompt_output", "_scores_prompt", "_tokenizer"),
        *("downgrade_reason", "reuse_requested"),
    )

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, Any], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self.reuse_requested = "exact"
        self.downgrade_reason: str | None = None
        self._scores_prompt = options["prompt_logprobs"] is not None
        self._prompt_output: _core.StepOutput | None = None
        self._answers = [
            _Answer(_Text(tokenizer, options, params), options["logprobs"] is not None) for _ in range(options["n"])
        ]

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return all(answer.finish_reason is not None for answer in self._answers)

    def add(self, output: _core.StepOutput) -> StreamPiece:
        """Takes an output in; returns the new whole characters and, with them, the tokens not given out yet."""
        answer = self._answers[output.choice]
        new_ids = output.token_ids
        text = "".join(answer.decoder.push(token_id) for token_id in new_ids)
        answer.token_ids += new_ids
        if answer.logprobs is not None:
            answer.logprobs += [self._named(row) for row in output.logprobs or ()]
        finished = output.finish_reason is not None
        if finished:
            text += answer.decoder.finish()
            answer.finish_reason = output.finish_reason
            answer.error = None if output.error is None else output.error[1]
            if output.choice == 0:
                self._prompt_output = output
        answer.texts.append(text)
        if not text and not finished:
            return StreamPiece("", [], None, index=output.choice)
        begin, answer.reported = answer.reported, len(answer.token_ids)
        logprobs = None if answer.logprobs is None else answer.logprobs[begin:]
        metrics = _metrics(output) if finished else None
        reuse = self._report(output) if finished else None
        return StreamPiece(
            text,
            answer.token_ids[begin:],
            output.finish_reason,
            logprobs,
            output.choice,
            metrics,
            reuse,
            answer.decoder.stop_reason if finished else None,
        )

    def add_tokens(self, token_ids: list[int]) -> tuple[str, list[int]]:
        """As `add`, for an output that is nothing but tokens of the first answer; the text and tokens of its piece."""
        answer = self._answers[0]
        all_ids = answer.token_ids
        all_ids += token_ids
        push = answer.push
        text = push(token_ids[0]) if len(token_ids) == 1 else "".join([push(token) for token in token_ids])
        if not text:
            return "", []
        answer.texts.append(text)
        begin, answer.reported = answer.reported, len(all_ids)
        return text, all_ids[begin:]

    def pieces(self, output: _core.StepOutput | list[int]) -> Iterator[StreamPiece]:
        """As `add`, without pieces that say nothing. A list is what `add_tokens` takes.

        Raises:
            InvalidArgumentError: The options of the request left no token to choose; after the tokens before that.
        """
        if isinstance(output, list):
            text, token_ids = self.add_tokens(output)
            if text:
                yield StreamPiece(text, token_ids, None)
            return
        piece = self.add(output)
        failed = output.finish_reason == "error"
        if piece.text or (piece.finish_reason is not None and not failed):
            yield piece
        if failed and output.error is not None:
            raise error_of(*output.error)

    def _named(self, row: list[tuple[int, float, int]]) -> TokenLogprobs:
        return {
            token_id: Logprob(logprob, rank, self._tokenizer.decode([token_id], skip_special_tokens=False))
            for token_id, logprob, rank in row
        }

    def result(self, prompt: str | None, prompt_ids: list[int]) -> RequestOutput:
        """The whole request, once every answer has ended."""
        output = self._prompt_output
        assert output is not None
        outputs = [answer.result(index) for index, answer in enumerate(self._answers)]
        first = outputs[0]
        return RequestOutput(
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            prompt=prompt,
            prompt_token_ids=prompt_ids,
            num_cached_tokens=output.num_cached_tokens,
            metrics=_metrics(output),
            logprobs=first.logprobs,
            prompt_logprobs=self._prompt_logprobs(output),
            error=first.error,
            stop_reason=first.stop_reason,
            outputs=outputs,
            reuse=self._report(output),
        )

    def _report(self, output: _core.StepOutput) -> ReuseReport:
        return report_of(self.reuse_requested, output, self.downgrade_reason)

    def _prompt_logprobs(self, output: _core.StepOutput) -> list[TokenLogprobs | None] | None:
        if not self._scores_prompt or (output.finish_reason in ("abort", "timeout") and not output.prompt_logprobs):
            return None
        return [None, *(self._named(row) for row in output.prompt_logprobs or ())]


@dataclass(frozen=True)
class Prepared:
    """A checked request, ready to be submitted.

    Attributes:
        text: The prompt as text; None if token ids were given.
        ids: The prompt as the model sees it.
        options: What `Driver.submit` wants besides.
        draft: Puts its tokens together.
    """

    text: str | None
    ids: list[int]
    options: dict[str, Any]
    draft: Draft
