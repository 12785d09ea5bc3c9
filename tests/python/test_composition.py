"""Composed prompts on the real default model: modes, reports, errors, kept chunks. Numbers are for the oracle tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_threads import THREADS

import nanobraid as nb
from nanobraid import Segment

GREEDY = nb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
DOCUMENTS = [
    f"Note {i}: the code of the {name} room is {7919 * (i + 3)}.\n" * 3 for i, name in enumerate(("red", "blue", "old"))
]


@pytest.fixture(scope="module", params=["auto", "f16", "int8", "mixed", "int4"])
def llm(request: pytest.FixtureRequest, model_path: Path) -> Iterator[nb.LLM]:
    """An engine for each format of keys and values."""
    with nb.LLM(model_path, kv_dtype=request.param, num_threads=THREADS, max_model_len=1024) as llm:
        yield llm


@pytest.fixture(autouse=True)
def no_chunks_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """The shared engine is left without chunks."""
    yield
    if "llm" not in request.fixturenames:
        return
    llm: nb.LLM = request.getfixturevalue("llm")
    for salt in ("", "other"):
        for chunk in llm.chunks.list(cache_salt=salt):
            llm.chunks.remove(chunk.id)
    llm.generate("a", nb.SamplingParams(max_tokens=1))  # a step gives their blocks back


def segments(order: tuple[int, ...] = (0, 1, 2)) -> list[Segment | str]:
    return ["Read these notes.\n", *(Segment(DOCUMENTS[i], chunk=True) for i in order), "The code of the red room is"]


def ids_of(llm: nb.LLM, order: tuple[int, ...] = (0, 1, 2)) -> list[int]:
    texts = ["Read these notes.\n", *(DOCUMENTS[i] for i in order), "The code of the red room is"]
    return llm.tokenizer.encode("") + [
        t for text in texts for t in llm.tokenizer.encode(text, add_special_tokens=False)
    ]


def test_exact_is_the_prompt_of_its_tokens(llm: nb.LLM) -> None:
    out = llm.compose(segments(), GREEDY)
    (plain,) = llm.generate([ids_of(llm)], GREEDY)
    assert out.prompt_token_ids == plain.prompt_token_ids == ids_of(llm)
    assert out.token_ids == plain.token_ids
    assert out.reuse is not None
    assert out.reuse.is_exact
    assert (out.reuse.mode_requested, out.reuse.isolated) == ("exact", 0)
    assert llm.chunks.list() == []


@pytest.mark.parametrize(
    "reuse", [nb.Isolated(), nb.Isolated("keep"), nb.Blend(), nb.Blend(0.5, "first"), "isolated", "blend"]
)
def test_the_report_accounts_for_every_token(llm: nb.LLM, reuse: Any) -> None:
    out = llm.compose(segments(), GREEDY, reuse=reuse)
    report = out.reuse
    assert report is not None
    assert not report.is_exact
    count = sum(len(llm.tokenizer.encode(text, add_special_tokens=False)) for text in DOCUMENTS)
    assert report.isolated + report.recomputed == count
    assert report.exact_prefix + report.computed + count == len(out.prompt_token_ids)
    assert out.metrics.kv_reuse_ratio == (report.exact_prefix + report.isolated) / len(out.prompt_token_ids)
    if "isolated" in (reuse, report.mode_requested):
        assert report.recomputed == 0
    else:
        assert report.recomputed >= (0.15 if reuse == "blend" else reuse.ratio) * count
    again = llm.compose(segments((2, 0, 1)), GREEDY, reuse=reuse)
    assert again.reuse is not None
    assert llm.chunks.list()[0].hits >= 1


def test_all_tokens_computed_again_is_exact(llm: nb.LLM) -> None:
    out = llm.compose(segments(), GREEDY, reuse=nb.Blend(1.0))
    assert out.token_ids == llm.compose(segments(), GREEDY).token_ids
    assert out.reuse is not None
    assert (out.reuse.mode_requested, out.reuse.mode_served) == ("blend", "exact")


def test_exact_requests_never_see_approximate_keys(llm: nb.LLM) -> None:
    """The same tokens, asked exactly right after an approximate request computed its own keys for them."""
    cold = llm.logits(ids_of(llm, (1, 2, 0)))[-1]
    llm.compose(segments((1, 2, 0)), GREEDY, reuse=nb.Isolated())
    llm.compose(segments((1, 2, 0)), GREEDY, reuse=nb.Blend(0.3))
    out = llm.compose(segments((1, 2, 0)), GREEDY)
    assert out.reuse is not None
    assert out.token_ids[0] == int(cold.argmax())
    assert np.array_equal(llm.logits(ids_of(llm, (1, 2, 0)))[-1], cold)


def test_streams_end_with_the_report(llm: nb.LLM) -> None:
    pieces = list(llm.compose(segments(), GREEDY, reuse=nb.Isolated(), stream=True))
    assert "".join(piece.text for piece in pieces) == llm.compose(segments(), GREEDY, reuse=nb.Isolated()).text
    assert pieces[-1].reuse is not None
    assert pieces[-1].reuse.mode_served == "isolated"
    assert all(piece.reuse is None for piece in pieces[:-1])


def test_logits_are_those_behind_the_last_chunk(llm: nb.LLM) -> None:
    tail = llm.tokenizer.encode("The code of the red room is", add_special_tokens=False)
    exact = llm.composed_logits(segments())
    assert exact.shape == (len(tail), llm.config["vocab_size"])
    assert np.array_equal(exact, llm.logits(ids_of(llm))[-len(tail) :])
    isolated = llm.composed_logits(segments(), reuse=nb.Isolated())
    assert isolated.shape == exact.shape
    assert not np.array_equal(isolated, exact)
    with pytest.raises(nb.InvalidArgumentError, match="last segment must not be a chunk"):
        llm.composed_logits(segments()[:-1])


def test_several_answers_and_threads_get_the_same_tokens(llm: nb.LLM) -> None:
    alone = llm.compose(segments(), GREEDY, reuse=nb.Blend(0.2))
    many = llm.compose(
        segments(), nb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, n=3), reuse=nb.Blend(0.2)
    )
    assert [answer.token_ids for answer in many.outputs] == [alone.token_ids] * 3
    results: list[list[int]] = []

    def ask() -> None:
        results.append(llm.compose(segments(), GREEDY, reuse=nb.Blend(0.2)).token_ids)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone.token_ids] * 6


# --- chunks that are kept ----------------------------------------------------------------------------------------


def test_chunks_are_computed_listed_pinned_and_removed(llm: nb.LLM) -> None:
    ids = llm.chunks.compute([*DOCUMENTS, DOCUMENTS[0]], pin=True)
    assert ids[0] == ids[3]
    infos = llm.chunks.list()
    assert [info.id for info in infos] == ids[:3]
    assert all(info.ready and info.pinned and info.users == 0 and info.kv_bytes > 0 for info in infos)
    assert llm.tokenizer.decode(infos[1].token_ids) == DOCUMENTS[1]
    assert llm.chunks.find(DOCUMENTS[1]) == ids[1]
    assert llm.chunks.find(DOCUMENTS[1], cache_salt="other") is None
    assert llm.chunks.find(DOCUMENTS[1], anchor=[5]) is None
    before = llm.stats()["chunk_misses"]
    llm.compose(segments(), GREEDY, reuse=nb.Isolated())
    assert llm.stats()["chunk_misses"] == before
    assert llm.chunks.pin(ids[0], False)
    assert llm.chunks.remove(ids[0])
    assert not llm.chunks.remove(ids[0])
    assert not llm.chunks.pin(ids[0])
    assert llm.chunks.find(DOCUMENTS[0]) is None


def test_an_anchor_is_part_of_the_identity(llm: nb.LLM) -> None:
    anchor = llm.tokenizer.encode("Read these notes.\n", add_special_tokens=False)
    (plain,) = llm.chunks.compute([DOCUMENTS[0]])
    (anchored,) = llm.chunks.compute([DOCUMENTS[0]], anchor=anchor)
    assert plain != anchored
    chunk = llm.chunks.list()[1]
    assert (chunk.anchor_token_ids, chunk.token_ids) == (anchor, llm.chunks.list()[0].token_ids)
    # Behind its own anchor nothing is approximate: the same logits up to rounding.
    parts = [Segment(anchor), Segment(DOCUMENTS[0], chunk=True, anchor=anchor), Segment("It is")]
    exact, reused = llm.composed_logits(parts), llm.composed_logits(parts, reuse=nb.Isolated("keep"))
    assert np.abs(exact - reused).max() < 0.05 * np.abs(exact).max()


def test_chunks_that_are_not_pinned_make_room(model_path: Any) -> None:
    with nb.LLM(model_path, max_model_len=256, max_num_seqs=1, kv_cache_bytes=24 << 20) as small:
        texts = [f"{i} is a number that is not {i + 1}. " * 12 for i in range(12)]
        for text in texts:
            small.chunks.compute([text])
        assert small.stats()["chunk_evictions"] > 0
        assert 0 < len(small.chunks.list()) < 12
        with pytest.raises(nb.OutOfMemoryError, match="no room for"):
            for text in texts:
                small.chunks.compute([text], pin=True)
        for chunk in small.chunks.list():
            small.chunks.pin(chunk.id, False)
        out = small.compose(["First: ", Segment(texts[11], chunk=True), "and"], GREEDY, reuse="isolated")
        assert out.finish_reason == "length"


def test_a_request_that_cannot_be_served_is_an_error_or_exact_if_asked(llm: nb.LLM) -> None:
    params = nb.SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
    with pytest.raises(nb.UnsupportedError, match="prompt_logprobs"):
        llm.compose(segments(), params, reuse=nb.Isolated())
    out = llm.compose(segments(), params, reuse=nb.Isolated(), on_unsupported="exact")
    assert out.reuse is not None
    assert (out.reuse.mode_requested, out.reuse.mode_served) == ("isolated", "exact")
    assert "prompt_logprobs" in str(out.reuse.downgrade_reason)
    assert out.prompt_logprobs is not None


# --- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one"),
        ("text", "must be a list"),
        ([3], r"segments\[0\] must be a Segment"),
        ([""], r"segments\[0\] is empty"),
        (["a", Segment([], chunk=True)], r"segments\[1\] is empty"),
        (["a", Segment([-1])], "token_ids"),
        (["a", Segment("b", anchor=[1])], "has an anchor but is no chunk"),
        (["a", Segment("b", chunk=True, anchor=[10**9])], "anchor"),
    ],
)
def test_segments_that_make_no_sense_are_refused(llm: nb.LLM, given: Any, message: str) -> None:
    with pytest.raises(nb.InvalidArgumentError, match=message):
        llm.compose(given, GREEDY)


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        ("fast", "reuse must be"),
        (nb.Blend(0.0), "ratio must be"),
        (nb.Blend(1.5), "ratio must be"),
        (nb.Blend(0.1, "random"), "select must be"),  # type: ignore[arg-type]
        (nb.Isolated("drop"), "sink must be"),  # type: ignore[arg-type]
    ],
)
def test_modes_that_do_not_exist_are_refused(llm: nb.LLM, reuse: Any, message: str) -> None:
    with pytest.raises(nb.InvalidArgumentError, match=message):
        llm.compose(segments(), GREEDY, reuse=reuse)


def test_a_composed_prompt_longer_than_the_context_is_refused(llm: nb.LLM) -> None:
    with pytest.raises(nb.InvalidArgumentError, match="1024"):
        llm.compose([Segment([5] * 1000, chunk=True), Segment([6] * 30)], GREEDY, reuse=nb.Isolated())


def test_closing_ends_calls_about_chunks(model_path: Any) -> None:
    llm = nb.LLM(model_path, max_model_len=256)
    llm.chunks.compute(["A piece of text."])
    llm.close()
    with pytest.raises(nb.InvalidArgumentError, match="closed"):
        llm.chunks.list()
    with pytest.raises(nb.InvalidArgumentError, match="closed"):
        llm.chunks.compute(["Another one."])
