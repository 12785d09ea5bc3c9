"""What requests return."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanobraid.composition import ReuseReport


@dataclass(frozen=True)
class RequestMetrics:
    """Times of one request.

    Attributes:
        queue_ms: Milliseconds from submission until its first step began.
        ttft_ms: Milliseconds from submission until its first token, or its end if there was none.
        total_ms: Milliseconds from submission until it ended.
        tokens_per_s: Tokens after the first one, per second between the first and the last; 0 with fewer than two. Of
            the first answer, as all of these.
        kv_reuse_ratio: Share of the prompt's tokens whose keys and values were reused instead of computed.
        num_draft_tokens: Guesses of coming tokens that were verified, of the first answer.
        num_accepted_tokens: Those of them that were right.
    """

    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    tokens_per_s: float = 0.0
    kv_reuse_ratio: float = 0.0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True)
class Logprob:
    """How likely a token was, before any sampling option: log softmax of the model's logits.

    Attributes:
        logprob: Natural logarithm of the probability.
        rank: 1 for the most likely token of the vocabulary, 2 for the next; ties by ascending id.
        decoded_token: The token alone as text; bytes of an unfinished character show as U+FFFD.
    """

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""For one place in a text: token id to `Logprob`, first the token that stands there, then the most likely ones."""


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt.

    Attributes:
        index: Which of the n answers, from 0.
        text: The generated text, special tokens left out, up to a stop string.
        token_ids: The generated tokens; a token that ended the answer is not among them, those of a stop string are.
        finish_reason: As in `RequestOutput`.
        stop_reason: The stop string that ended it, or None.
        logprobs: As in `RequestOutput`.
        error: As in `RequestOutput`.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request. What it says of the answer is about the first one; `outputs` has all.

    Attributes:
        text: The generated text, special tokens left out, up to a stop string.
        token_ids: The generated tokens; a token that ended the text is not among them, those of a stop string are.
        finish_reason: ``stop`` (end-of-sequence token, stop token or stop string), ``length`` (max_tokens or the
            context), ``timeout``, ``abort``, or ``error``: the options left no token to choose, `error` says
            which.
        prompt: The prompt as text, or None if token ids were given.
        prompt_token_ids: The prompt as the model saw it.
        num_cached_tokens: Prompt tokens whose keys and values were reused instead of computed.
        metrics: Times of this request.
        logprobs: With ``SamplingParams(logprobs=...)``: one entry for each of `token_ids`.
        prompt_logprobs: With ``SamplingParams(prompt_logprobs=...)``: one entry for each of `prompt_token_ids`; the
            first is None, because nothing stands before it.
        error: With finish_reason ``error``, what was wrong; the tokens before it are in the output.
        stop_reason: The stop string that ended the answer, or None.
        outputs: All ``SamplingParams.n`` answers, by index.
        reuse: Where the tokens of the prompt came from.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt: str | None
    prompt_token_ids: list[int]
    num_cached_tokens: int
    metrics: RequestMetrics
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None
    stop_reason: str | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    reuse: ReuseReport | None = None


@dataclass(frozen=True)
class StreamPiece:
    """The next piece of a streamed answer.

    Attributes:
        text: New text, always whole characters; empty in a last piece that only reports the end.
        token_ids: The tokens since the piece before. A token that ends inside a character comes with the piece that
            completes it.
        finish_reason: None until the last piece; then as in `RequestOutput`.
        logprobs: With ``SamplingParams(logprobs=...)``: one entry for each of `token_ids`.
        index: Which of the n answers it belongs to.
        metrics: With the last piece of an answer, its times; None before.
        reuse: Likewise, where the tokens of the prompt came from.
        stop_reason: Likewise, the stop string that ended the answer, if one did.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None = None
    index: int = 0
    metrics: RequestMetrics | None = None
    reuse: ReuseReport | None = None
    stop_reason: str | None = None


@dataclass(frozen=True)
class ScoreOutput:
    """How likely a text is to the model.

    Attributes:
        token_ids: The T tokens of the text.
        logprobs: T entries: natural logarithm of the probability of each token given those before it; the first is
            None, because nothing stands before it.
    """

    token_ids: list[int]
    logprobs: list[float | None]
