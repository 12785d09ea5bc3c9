"""Looks at the pieces of a request on their way, for the metrics and the page."""

from __future__ import annotations

import time

from nanobraid.outputs import StreamPiece
from nanobraid.server.metrics import Metrics, RequestRecord
from nanobraid.server.page import LiveRequests


class Watch:
    """One request.

    Args:
        metrics: What is counted.
        live: Where it stands while it runs.
        request_id: Its id.
        arrived: When it came, by `time.perf_counter`.
        num_prompt: Tokens of its prompt.
        num_answers: Answers it asks for.
    """

    __slots__ = (
        *("_accepted", "_arrived", "_before_s", "_counts", "_entry", "_first", "_last", "_live", "_metrics"),
        *("_num_prompt", "_observe_gap", "_open"),
    )

    def __init__(
        self,
        metrics: Metrics,
        live: LiveRequests,
        *,
        request_id: str,
        arrived: float,
        num_prompt: int,
        num_answers: int,
    ) -> None:
        self._metrics = metrics
        self._observe_gap = metrics.observe_token_gap
        self._live = live
        self._entry = live.add(request_id, num_prompt)
        self._num_prompt = num_prompt
        self._arrived = arrived
        self._before_s = time.perf_counter() - arrived
        self._counts = [0] * num_answers
        self._first = [0.0] * num_answers
        self._last = [0.0] * num_answers
        self._open = set(range(num_answers))
        self._accepted = False

    def accepted(self) -> None:
        """The engine has taken it."""
        self._accepted = True

    def piece(self, piece: StreamPiece) -> None:
        """A piece has come."""
        i = piece.index
        if piece.token_ids:
            self.tokens(i, len(piece.token_ids))
        if piece.finish_reason is not None and piece.metrics is not None and piece.reuse is not None:
            self._open.discard(i)
            self._metrics.observe(
                RequestRecord.of(
                    piece.metrics,
                    piece.reuse,
                    finish_reason=piece.finish_reason,
                    prompt_tokens=self._num_prompt,
                    generated_tokens=self._counts[i],
                    before_s=self._before_s,
                )
            )

    def tokens(self, i: int, num_tokens: int) -> None:
        """Tokens of an answer have come."""
        now = time.perf_counter()
        entry, counts, last = self._entry, self._counts, self._last
        if counts[i]:
            self._observe_gap((now - last[i]) / num_tokens)
        else:
            self._first[i] = now
            entry.running = True
        last[i] = now
        counts[i] += num_tokens
        entry.tokens += num_tokens

    def close(self) -> None:
        """It has ended; what has not come to its own end was cut off."""
        self._live.remove(self._entry)
        if not self._accepted:
            return  # counted as rejected
        now = time.perf_counter()
        for i in self._open:
            self._metrics.observe(
                RequestRecord.cut_off(
                    "abort",
                    prompt_tokens=self._num_prompt,
                    generated_tokens=self._counts[i],
                    ttft_s=self._first[i] - self._arrived if self._counts[i] else None,
                    e2e_s=now - self._arrived,
                )
            )
