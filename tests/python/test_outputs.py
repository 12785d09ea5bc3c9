"""What a request returns."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

import nanobraid as nb


def test_every_field_of_a_request_output_is_filled(llm: nb.LLM) -> None:
    prompt = "The capital of France is"
    (out,) = llm.generate(prompt, nb.SamplingParams(temperature=0, max_tokens=8))
    assert out.prompt == prompt
    assert out.prompt_token_ids == llm.tokenizer.encode(prompt)
    assert len(out.token_ids) == 8
    assert out.text == llm.tokenizer.decode(out.token_ids)
    assert out.finish_reason == "length"
    assert out.num_cached_tokens == 0
    times = out.metrics
    assert 0 <= times.queue_ms <= times.ttft_ms <= times.total_ms
    assert times.tokens_per_s > 0
    assert times.tokens_per_s == pytest.approx(7e3 / (times.total_ms - times.ttft_ms))


def test_logprobs_are_those_of_the_logits(llm: nb.LLM) -> None:
    params = nb.SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2)
    plain, out = llm.generate(
        ["The capital of France is"] * 2, [nb.SamplingParams(temperature=0, max_tokens=5), params]
    )
    assert (plain.token_ids, plain.logprobs, plain.prompt_logprobs) == (out.token_ids, None, None)
    ids = out.prompt_token_ids + out.token_ids
    logits = llm.logits(ids[:-1]).astype(np.float64)
    expected = logits - logits.max(1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(1, keepdims=True))
    assert out.logprobs is not None and out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    entries = out.prompt_logprobs[1:] + out.logprobs
    assert len(entries) == len(ids) - 1
    for i, entry in enumerate(entries):
        assert entry is not None
        count = 3 if i >= len(out.prompt_token_ids) - 1 else 2
        best = np.argsort(-expected[i], kind="stable")
        assert next(iter(entry)) == ids[i + 1]
        assert set(entry) == {ids[i + 1], *(int(token_id) for token_id in best[:count])}
        for token_id, value in entry.items():
            assert value.logprob == pytest.approx(expected[i, token_id], abs=1e-5)
            assert best[value.rank - 1] == token_id
            assert value.decoded_token == llm.tokenizer.decode([token_id], skip_special_tokens=False)


def test_logprobs_are_those_before_the_stages(llm: nb.LLM) -> None:
    first = llm.generate("One, two,", nb.SamplingParams(temperature=0, max_tokens=1, logprobs=1))[0].logprobs
    token_id = 100
    params = nb.SamplingParams(max_tokens=1, logprobs=0, allowed_token_ids=[token_id])
    second = llm.generate("One, two,", params)[0].logprobs
    assert first is not None and second is not None
    (entry,) = second
    assert list(entry) == [token_id]
    assert entry[token_id].logprob < -1
    assert entry[token_id].rank > 1
    assert max(value.logprob for value in first[0].values()) > entry[token_id].logprob


def test_pieces_carry_the_logprobs_of_their_tokens(llm: nb.LLM) -> None:
    params = nb.SamplingParams(temperature=0, max_tokens=12, logprobs=1)
    (out,) = llm.generate("Emoji: 😀", params)
    pieces = list(llm.stream("Emoji: 😀", params))
    assert all(piece.logprobs is not None and len(piece.logprobs) == len(piece.token_ids) for piece in pieces)
    assert [entry for piece in pieces for entry in piece.logprobs or ()] == out.logprobs


def test_logprobs_of_the_shortest_requests(llm: nb.LLM) -> None:
    bias = dict.fromkeys(llm.tokenizer.eos_token_ids, 100.0)
    params = nb.SamplingParams(temperature=0, logit_bias=bias, logprobs=1, prompt_logprobs=1)
    (out,) = llm.generate([[100]], params)
    assert (out.token_ids, out.logprobs, out.prompt_logprobs) == ([], [], [None])


def test_one_token_has_no_speed(llm: nb.LLM) -> None:
    (out,) = llm.generate("Hello", nb.SamplingParams(temperature=0, max_tokens=1))
    assert out.metrics.tokens_per_s == 0.0
    assert out.metrics.ttft_ms > 0


def test_outputs_cannot_be_changed() -> None:
    piece = nb.StreamPiece("a", [1], None)
    with pytest.raises(FrozenInstanceError):
        piece.text = "b"  # type: ignore[misc]
