"""What `ChunkedLLM` keeps until told otherwise, under other traffic: retained answers, pinned system prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_threads import THREADS

import nanobraid as nb

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
PARAMS = nb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SYSTEM = "You answer briefly and you never say more than you know. " * 2
BOB = "Bob is 42 years old and lives in Paris. He likes tea, long walks and his cat Alice."
ALICE = "Alice is a cat of seven years. She sleeps all day, and at night she watches the moon from the window."


@pytest.fixture(scope="module")
def small(model_path: Path) -> Iterator[nb.LLM]:
    """A model whose cache has room for some 500 tokens."""
    with nb.LLM(model_path, num_threads=THREADS, max_model_len=256, max_num_seqs=2, kv_cache_bytes=12 << 20) as small:
        yield small


@pytest.fixture
def chunked(small: nb.LLM) -> Iterator[nb.ChunkedLLM]:
    """Closing it gives everything back."""
    with nb.ChunkedLLM(small, chunk_memory_ratio=0.7) as chunked:
        yield chunked
    assert held(small) == 0
    assert small.chunks.list() == []


def held(llm: nb.LLM) -> int:
    """Blocks that chunks hold; nobody else does."""
    llm.generate("a", nb.SamplingParams(max_tokens=1))  # a step gives back what is free
    stats = llm.stats()
    assert stats["blocks_owned"] == stats["chunk_blocks"]
    return int(stats["chunk_blocks"])


def fill(llm: nb.LLM) -> None:
    """Other traffic, more than the cache has room for; what nobody keeps is gone then."""
    lost = [3, *([5, 8] * 10)]
    llm.generate([lost], nb.SamplingParams(max_tokens=1))
    assert llm.chunks.cached_prefix(lost) > 0
    prompts = [[100 + i, *([7, 9, 11] * 75)] for i in range(3)]
    llm.generate(prompts, nb.SamplingParams(max_tokens=1))
    assert llm.chunks.cached_prefix(lost) == 0


def known(out: nb.ChunkedOutput) -> int:
    """Tokens of prompt and answer that were computed, in whole blocks."""
    return (len(out.prompt_token_ids) + len(out.token_ids) - 1) // 16 * 16


def test_a_retained_answer_outlasts_other_traffic(chunked: nb.ChunkedLLM, small: nb.LLM) -> None:
    first = chunked.generate_and_retain_output(SYSTEM, "How old is Bob?", [ALICE, BOB], GREEDY)
    handle = first.retained_seq_id or 0
    assert held(small) == known(first) // 16
    fill(small)
    info = chunked.get_retained_outputs()[handle].cache_info
    assert info == {"cached_tokens": known(first), "kept_tokens": known(first)}
    second = chunked.continue_output(handle, "Where does he live?", GREEDY, retain_output=False)
    assert second.reuse is not None
    assert (second.reuse.is_exact, second.reuse.exact_prefix) == (True, known(first))
    (cold,) = small.generate([second.prompt_token_ids], PARAMS, cache_salt="cold")
    assert second.token_ids == cold.token_ids
    stats = chunked.get_chunk_stats()
    assert (stats["retained_outputs"], stats["kept_bytes"]) == (1, small.chunks.bytes_for(known(first)))

    assert chunked.release_retained_output(handle)
    assert held(small) == 0
    assert chunked.get_chunk_stats()["kept_bytes"] == 0
    assert small.chunks.cached_prefix(first.prompt_token_ids) > 0  # as any other from now on
    fill(small)
    assert small.chunks.cached_prefix(first.prompt_token_ids) == 0


def test_turns_of_a_conversation_share_memory(chunked: nb.ChunkedLLM, small: nb.LLM) -> None:
    turns = [chunked.generate_and_retain_output(SYSTEM, "How old is Bob?", BOB, GREEDY)]
    for query in ("And where does he live?", "What does he like, and since when?"):
        turns.append(chunked.continue_output(turns[-1].retained_seq_id or 0, query, GREEDY))
    sizes = [known(turn) // 16 for turn in turns]
    assert sizes == sorted(set(sizes))
    assert held(small) == sizes[2]
    assert chunked.get_chunk_stats()["kept_bytes"] == small.chunks.bytes_for(16 * sizes[2])
    assert chunked.release_retained_output(1)
    assert held(small) == sizes[2]
    assert chunked.release_retained_output(3)
    assert held(small) == sizes[1]
    assert chunked.release_all() == 1


def test_equal_answers_are_kept_until_the_last_one_is_released(chunked: nb.ChunkedLLM, small: nb.LLM) -> None:
    outs = [chunked.generate_and_retain_output(SYSTEM, "Who is Bob?", None, GREEDY) for _ in range(2)]
    assert chunked.release_retained_output(outs[0].retained_seq_id or 0)
    assert held(small) == known(outs[1]) // 16
    assert chunked.release_retained_output(outs[1].retained_seq_id or 0)
    assert held(small) == 0


def test_what_cannot_be_kept_is_refused_with_the_numbers(chunked: nb.ChunkedLLM, small: nb.LLM) -> None:
    with nb.ChunkedLLM(small, chunk_memory_ratio=0.01, cache_salt="tiny") as tiny:
        steps = small.stats()["steps"]
        with pytest.raises(nb.OutOfMemoryError, match=r"may take \d+ bytes \(chunk_memory_ratio of .* need \d+"):
            tiny.generate_and_retain_output(SYSTEM, "How old is Bob?", BOB, GREEDY)
        assert small.stats()["steps"] == steps  # nothing was computed for it
        assert tiny.get_retained_outputs() == {}
    outs = []
    with pytest.raises(nb.OutOfMemoryError, match="chunk_memory_ratio"):
        for i in range(100):
            outs.append(chunked.generate_and_retain_output(f"{i} is {i}. {SYSTEM}", "Why?", [BOB, ALICE], GREEDY))
    assert 1 < len(outs) == len(chunked.get_retained_outputs())
    for out in outs[:: len(outs) - 1]:
        more = chunked.continue_output(out.retained_seq_id or 0, "Why?", GREEDY, retain_output=False)
        assert more.reuse is not None
        assert more.reuse.exact_prefix == known(out)
    chunked.release_retained_output(1)
    assert chunked.generate_and_retain_output(f"More. {SYSTEM}", "Why?", [BOB, ALICE], GREEDY).retained_seq_id


def test_of_an_approximate_prompt_the_exact_beginning_is_kept(chunked: nb.ChunkedLLM, small: nb.LLM) -> None:
    out = chunked.generate_and_retain_output(SYSTEM, "How old is Bob?", BOB, GREEDY, mode="isolated")
    (context,) = chunked.list_chunks("context")
    at = next(i for i in range(500) if out.prompt_token_ids[i:][: len(context.kv_token_ids)] == context.kv_token_ids)
    assert 16 <= at < len(out.prompt_token_ids)
    info = chunked.get_retained_outputs()[out.retained_seq_id or 0].cache_info
    assert info["kept_tokens"] == at // 16 * 16 <= info["cached_tokens"]
    fill(small)
    more = chunked.continue_output(out.retained_seq_id or 0, "Why?", GREEDY, mode="isolated", retain_output=False)
    assert more.reuse is not None
    assert more.reuse.exact_prefix == at // 16 * 16


@pytest.mark.parametrize("at_once", [True, False])
def test_a_pinned_system_prompt_outlasts_other_traffic(chunked: nb.ChunkedLLM, small: nb.LLM, *, at_once: bool) -> None:
    system = chunked.register_chunk(SYSTEM, "system_prompt", pin=at_once)
    query = chunked.register_chunk("How old is Bob?", "query")
    if not at_once:
        assert held(small) == 0
        chunked.pin(system)
        chunked.pin(system)  # nothing more happens
    chunk = chunked.get_chunk(system)
    kept = held(small) * 16
    assert kept >= chunk.token_count // 16 * 16
    assert (chunk.pinned, chunk.kv_ready, chunk.kv_bytes) == (True, True, small.chunks.bytes_for(kept))
    assert chunked.get_chunk_stats()["memory_by_type"]["system_prompt"] == chunk.kv_bytes
    fill(small)
    out = chunked.generate_from_chunks(system, query, None, GREEDY)
    assert out.reuse is not None
    assert out.reuse.exact_prefix == kept
    chunked.unpin(system)
    assert not chunked.get_chunk(system).kv_ready
    assert held(small) == 0
    fill(small)
    lost = chunked.generate_from_chunks(system, query, None, GREEDY)
    assert lost.reuse is not None
    assert lost.reuse.exact_prefix == 0
    chunked.pin(system)
    assert held(small) * 16 == kept
    assert chunked.delete_chunk(system)
    assert held(small) == 0


def test_a_pinned_system_prompt_comes_back_from_a_file(chunked: nb.ChunkedLLM, small: nb.LLM, tmp_path: Path) -> None:
    chunked.register_chunk(SYSTEM, "system_prompt", pin=True)
    kept = held(small)
    chunked.save(tmp_path / "chunks.json")
    chunked.clear_chunks()
    assert held(small) == 0
    chunked.load(tmp_path / "chunks.json")
    assert held(small) == kept > 0


def test_without_prefix_caching_tokens_alone_are_kept(model_path: Path) -> None:
    options = {"max_model_len": 256, "max_num_seqs": 1, "kv_cache_bytes": 12 << 20, "enable_prefix_caching": False}
    with nb.ChunkedLLM(model_path, **options) as chunked:
        system = chunked.register_chunk(SYSTEM, "system_prompt", pin=True)
        assert chunked.get_chunk(system).pinned
        out = chunked.generate_and_retain_output(SYSTEM, "How old is Bob?", BOB, GREEDY)
        info = chunked.get_retained_outputs()[out.retained_seq_id or 0].cache_info
        assert info == {"cached_tokens": 0, "kept_tokens": 0}
        assert chunked.llm.chunks.list() == []
        assert chunked.continue_output(out.retained_seq_id or 0, "Why?", GREEDY).token_ids
