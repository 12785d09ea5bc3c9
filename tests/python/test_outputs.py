"""What a request returns."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

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


def test_one_token_has_no_speed(llm: nb.LLM) -> None:
    (out,) = llm.generate("Hello", nb.SamplingParams(temperature=0, max_tokens=1))
    assert out.metrics.tokens_per_s == 0.0
    assert out.metrics.ttft_ms > 0


def test_outputs_cannot_be_changed() -> None:
    piece = nb.StreamPiece("a", [1], None)
    with pytest.raises(FrozenInstanceError):
        piece.text = "b"  # type: ignore[misc]
