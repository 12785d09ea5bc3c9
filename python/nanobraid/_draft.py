"""Puts the tokens of a request together: into text while it runs, into a `RequestOutput` when it has ended."""

from __future__ import annotations

from nanobraid import _core
from nanobraid.outputs import RequestMetrics, RequestOutput
from nanobraid.tokenizer import Tokenizer


class Draft:
    """The text and tokens of one request as they grow. Used by one thread at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.stream()
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._reported = 0  # tokens that have been given out with some text

    def add(self, output: _core.StepOutput) -> tuple[str, list[int]]:
        """Takes an output in; returns the new whole characters and, with them, the tokens not given out yet."""
        new_ids = output.token_ids
        text = "".join(self._decoder.push(token_id) for token_id in new_ids)
        self._token_ids += new_ids
        finished = output.finish_reason is not None
        if finished:
            text += self._decoder.finish()
        self._texts.append(text)
        if not text and not finished:
            return "", []
        ids = self._token_ids[self._reported :]
        self._reported = len(self._token_ids)
        return text, ids

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
        )
