"""Puts the tokens of a request together: into text while it runs, into a `RequestOutput` when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanobraid import _core
from nanobraid.outputs import Logprob, RequestMetrics, RequestOutput, StreamPiece, TokenLogprobs
from nanobraid.tokenizer import Tokenizer


class Draft:
    """The text and tokens of one request as they grow. Used by one thread at a time.

    Args:
        tokenizer: The model's.
        options: What the request was submitted with.
    """

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if options["logprobs"] is None else []
        self._scores_prompt = options["prompt_logprobs"] is not None
        self._texts: list[str] = []
        self._reported = 0  # tokens that have been given out with some text

    def add(self, output: _core.StepOutput) -> StreamPiece:
        """Takes an output in; returns the new whole characters and, with them, the tokens not given out yet."""
        new_ids = output.token_ids
        text = "".join(self._decoder.push(token_id) for token_id in new_ids)
        self._token_ids += new_ids
        if self._logprobs is not None:
            self._logprobs += [self._named(row) for row in output.logprobs or ()]
        finished = output.finish_reason is not None
        if finished:
            text += self._decoder.finish()
        self._texts.append(text)
        if not text and not finished:
            return StreamPiece("", [], None)
        begin, self._reported = self._reported, len(self._token_ids)
        logprobs = None if self._logprobs is None else self._logprobs[begin:]
        return StreamPiece(text, self._token_ids[begin:], output.finish_reason, logprobs)

    def _named(self, row: list[tuple[int, float, int]]) -> TokenLogprobs:
        return {
            token_id: Logprob(logprob, rank, self._tokenizer.decode([token_id], skip_special_tokens=False))
            for token_id, logprob, rank in row
        }

    def result(self, prompt: str | None, prompt_ids: list[int], output: _core.StepOutput) -> RequestOutput:
        times = output.metrics
        ttft_ms, total_ms = times.get("ttft_ms", 0.0), times.get("total_ms", 0.0)
        later = len(self._token_ids) - 1
        metrics = RequestMetrics(
            queue_ms=times.get("queue_ms", 0.0),
            ttft_ms=ttft_ms,
            total_ms=total_ms,
            tokens_per_s=1e3 * later / (total_ms - ttft_ms) if later > 0 and total_ms > ttft_ms else 0.0,
            kv_reuse_ratio=output.num_cached_tokens / len(prompt_ids),
        )
        return RequestOutput(
            text="".join(self._texts),
            token_ids=self._token_ids,
            finish_reason=output.finish_reason or "abort",
            prompt=prompt,
            prompt_token_ids=prompt_ids,
            num_cached_tokens=output.num_cached_tokens,
            metrics=metrics,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs(output),
            error=output.error,
        )

    def _prompt_logprobs(self, output: _core.StepOutput) -> list[TokenLogprobs | None] | None:
        if not self._scores_prompt or output.finish_reason == "abort":
            return None
        return [None, *(self._named(row) for row in output.prompt_logprobs or ())]
