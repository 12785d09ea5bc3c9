"""Log-probabilities in the two shapes of OpenAI's interfaces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nanobraid.outputs import Logprob, TokenLogprobs

_LOWEST = -9999.0  # what OpenAI sends for "impossible"; JSON has no infinity


def _value(logprob: float) -> float:
    return max(logprob, _LOWEST)


class ChatLogprobs:
    """``choices[].logprobs`` of chat completions.

    Args:
        token_bytes: The bytes of every token, None for control tokens.
        num_top: So many of the most likely tokens of each place.
    """

    def __init__(self, token_bytes: Sequence[bytes | None], num_top: int) -> None:
        self._bytes = token_bytes
        self._num_top = num_top

    def of(self, rows: Iterable[TokenLogprobs]) -> dict[str, Any]:
        """The log-probabilities of some tokens."""
        return {"content": [self._token(row) for row in rows], "refusal": None}

    def _token(self, row: TokenLogprobs) -> dict[str, Any]:
        entries = list(row.items())
        top = sorted(entries, key=lambda entry: entry[1].rank)[: self._num_top]
        return {**self._entry(*entries[0]), "top_logprobs": [self._entry(*entry) for entry in top]}

    def _entry(self, token_id: int, logprob: Logprob) -> dict[str, Any]:
        data = self._bytes[token_id]
        return {
            "token": logprob.decoded_token,
            "logprob": _value(logprob.logprob),
            "bytes": list(logprob.decoded_token.encode() if data is None else data),
        }


def completion_logprobs(
    rows: Iterable[TokenLogprobs | None], tokens: Iterable[int], texts: Iterable[str], offset: int, num_top: int
) -> dict[str, Any]:
    """``choices[].logprobs`` of completions.

    Args:
        rows: For each token its log-probabilities; None for one that nothing stands before.
        tokens: The token ids.
        texts: What each of them adds to the text.
        offset: Characters of the text before the first.
        num_top: So many of the most likely tokens of each place.
    """
    result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for row, token_id, text in zip(rows, tokens, texts, strict=True):
        result["text_offset"].append(offset)
        offset += len(text)
        if row is None:
            result["tokens"].append(text)
            result["token_logprobs"].append(None)
            result["top_logprobs"].append(None)
            continue
        result["tokens"].append(row[token_id].decoded_token)
        result["token_logprobs"].append(_value(row[token_id].logprob))
        top = sorted(row.values(), key=lambda entry: entry.rank)[: max(num_top, 1)]
        result["top_logprobs"].append({entry.decoded_token: _value(entry.logprob) for entry in top})
    return result
