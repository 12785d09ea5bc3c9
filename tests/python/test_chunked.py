"""`ChunkedLLM` against `LLM` itself: the same tokens, true figures, options with an effect, nothing left behind."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from engine_threads import THREADS

import nanobraid as nb
from nanobraid._chunk_outputs import params_of
from nanobraid._chunk_prompt import segments_of
from nanobraid._chunk_registry import chunk_identity

GREEDY = {"temperature": 0, "max_tokens": 6}
PARAMS = nb.SamplingParams(temperature=0, max_tokens=6)
SYSTEM = "You answer briefly."
CHEESE = "The moon is made of green cheese. Nobody lives there, but many mice would like to move in. " * 2
BOB = "Bob is 42 years old and lives in Paris. He likes tea, long walks and his cat Alice."
QUERY = "How old is Bob?"
_salts = count()


@pytest.fixture
def chunked(llm: nb.LLM) -> Iterator[nb.ChunkedLLM]:
    """Of a namespace of its own; closing it gives everything back."""
    with nb.ChunkedLLM(llm, mode="isolated", cache_salt=f"test {next(_salts)}") as chunked:
        yield chunked


def other(llm: nb.LLM, **options: Any) -> nb.ChunkedLLM:
    return nb.ChunkedLLM(llm, **{"mode": "isolated", "cache_salt": f"test {next(_salts)}", **options})


def three(chunked: nb.ChunkedLLM) -> tuple[str, str, list[str]]:
    return (
        chunked.register_chunk(SYSTEM, nb.ChunkType.SYSTEM_PROMPT),
        chunked.register_chunk(QUERY, nb.ChunkType.QUERY),
        [chunked.register_chunk(text, nb.ChunkType.CONTEXT) for text in (CHEESE, BOB)],
    )


def messages_of(contexts: list[str], query: str = QUERY, system: str = SYSTEM) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n\n".join([*contexts, query])}]


# --- names -------------------------------------------------------------------------------------------------------


def test_names_and_defaults_that_users_know() -> None:
    assert {member.name: member.value for member in nb.ChunkType} == {
        "SYSTEM_PROMPT": "system_prompt", "CONTEXT": "context", "QUERY": "query", "OUTPUT": "output",
    }  # fmt: skip
    made = inspect.signature(nb.ChunkedLLM).parameters
    defaults = {name: made[name].default for name in ("max_chunks", "chunk_memory_ratio", "enable_deduplication")}
    assert defaults == {"max_chunks": 1000, "chunk_memory_ratio": 0.5, "enable_deduplication": True}
    for method, names in {
        "register_chunk": ["content", "chunk_type", "metadata", "anchor", "pin", "compute"],
        "generate_from_chunks": ["system_chunk_id", "query_chunk_id", "context_chunk_ids", "sampling_params", "mode"],
        "generate": ["system_prompt", "query", "context", "sampling_params", "persist_chunks"],
        "evict_unused_chunks": ["max_age_seconds"],
    }.items():
        assert list(inspect.signature(getattr(nb.ChunkedLLM, method)).parameters)[1:][: len(names)] == names
    assert issubclass(nb.ChunkNotFoundError, KeyError | nb.InvalidArgumentError)
    assert issubclass(nb.InvalidCompositionError, ValueError)
    assert params_of(None)[0] == nb.SamplingParams(temperature=1.0, max_tokens=64)


def test_ids_are_hashes_of_fields_with_tags_and_lengths(chunked: nb.ChunkedLLM) -> None:
    ids = chunked.llm.tokenizer.encode(BOB, add_special_tokens=False)
    digest = hashlib.sha256()
    tokens = b"".join(token.to_bytes(4, "little") for token in ids)
    fields = ((b"format", b"nanobraid chunk 1"), (b"type", b"context"), (b"anchor", b""), (b"tokens", tokens))
    for tag, payload in fields:
        digest.update(len(tag).to_bytes(8, "little") + tag + len(payload).to_bytes(8, "little") + payload)
    plain = chunked.register_chunk(BOB, "context")
    assert plain == digest.hexdigest()
    system = chunked.register_chunk(SYSTEM, "system_prompt")
    variants = [
        plain,
        chunked.register_chunk(BOB, "query"),
        chunked.register_chunk(BOB, "output"),
        chunked.register_chunk(BOB, "context", anchor="bos"),
        chunked.register_chunk(BOB, "context", anchor=system),
        chunked.register_chunk(BOB + " ", "context"),
        chunk_identity(nb.ChunkType.CONTEXT, ids[:1], ids[1:]),
        chunk_identity(nb.ChunkType.CONTEXT, ids[:2], ids[2:]),
    ]
    assert len(set(variants)) == len(variants)


def test_results_answer_as_objects_and_as_mappings(chunked: nb.ChunkedLLM) -> None:
    out = chunked.generate(SYSTEM, QUERY, BOB, GREEDY)
    assert out["text"] is out.text
    assert set(out) == {
        "text", "token_ids", "finish_reason", "chunk_ids", "reuse", "metrics", "usage", "prompt_token_ids",
    }  # fmt: skip
    assert "output_chunk_id" not in out
    assert out.get("output_chunk_id", 3) == 3
    with pytest.raises(KeyError):
        out["output_chunk_id"]
    with pytest.raises(KeyError):
        out["nothing"]
    assert dict(out)["usage"] == {
        "prompt_tokens": len(out.prompt_token_ids),
        "completion_tokens": len(out.token_ids),
        "total_tokens": len(out.prompt_token_ids) + len(out.token_ids),
        "cached_tokens": out.reuse.isolated + out.reuse.exact_prefix,  # type: ignore[union-attr]
    }
    assert set(out.chunk_ids) == {"system", "context", "query"}  # type: ignore[arg-type]
    kept = chunked.generate_and_retain_output(SYSTEM, QUERY, BOB, GREEDY)
    assert {"output_chunk_id", "retained_seq_id"} <= set(kept)


# --- the same as LLM ---------------------------------------------------------------------------------------------


def test_exact_is_what_the_template_gives(chunked: nb.ChunkedLLM, llm: nb.LLM) -> None:
    system, query, contexts = three(chunked)
    out = chunked.generate_from_chunks(system, query, contexts, GREEDY, mode="exact")
    plain = llm.chat(messages_of([CHEESE, BOB]), PARAMS)
    assert (out.prompt_token_ids, out.token_ids, out.text) == (plain.prompt_token_ids, plain.token_ids, plain.text)
    assert out.reuse is not None
    assert out.reuse.is_exact
    again = chunked.generate_from_chunks(system, query, contexts, GREEDY, mode="exact")
    assert again.token_ids == out.token_ids
    assert again.reuse is not None
    assert again.reuse.exact_prefix == (len(out.prompt_token_ids) - 1) // 16 * 16
    stats = chunked.get_chunk_stats()
    assert (stats["cache_hits"], stats["cache_misses"]) == (0, 0)  # reuse of prefixes is counted apart
    assert stats["exact_prefix_tokens"] == again.reuse.exact_prefix


@pytest.mark.parametrize("mode", ["isolated", "blend", nb.Isolated("keep"), nb.Blend(0.4, select="first")])
def test_approximate_modes_are_those_of_compose(chunked: nb.ChunkedLLM, llm: nb.LLM, mode: Any) -> None:
    system, query, contexts = three(chunked)
    out = chunked.generate_from_chunks(system, query, contexts, GREEDY, mode=mode)
    flat = llm.encode_chat(messages_of([CHEESE, BOB]))
    assert out.prompt_token_ids == flat
    segments: list[nb.Segment | str] = []
    at = 0
    for chunk_id in contexts:
        own = chunked.get_chunk(chunk_id).kv_token_ids
        begin = next(i for i in range(at, len(flat)) if flat[i : i + len(own)] == own)
        segments += [nb.Segment(flat[at:begin]), nb.Segment(own, chunk=True)]
        at = begin + len(own)
    wanted = llm.compose([*segments, nb.Segment(flat[at:])], PARAMS, reuse=mode, cache_salt=chunked._cache_salt)
    assert out.token_ids == wanted.token_ids
    assert out.reuse is not None
    assert wanted.reuse is not None
    assert dataclasses.replace(out.reuse, ttft_ms=0) == dataclasses.replace(wanted.reuse, ttft_ms=0)
    sizes = [len(chunked.get_chunk(chunk_id).kv_token_ids) for chunk_id in contexts]
    assert out.reuse.isolated + out.reuse.recomputed == sum(sizes) > 0.8 * len(flat) - 40


def test_ids_texts_batches_and_streams_agree(chunked: nb.ChunkedLLM) -> None:
    system, query, contexts = three(chunked)
    out = chunked.generate_from_chunks(system, query, contexts, GREEDY)
    assert chunked.generate(SYSTEM, QUERY, [CHEESE, BOB], PARAMS).token_ids == out.token_ids
    pieces = list(chunked.generate_from_chunks(system, query, contexts, GREEDY, stream=True))
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [token for piece in pieces for token in piece.token_ids] == out.token_ids
    assert "".join(piece["text"] for piece in pieces) == pieces[-1].cumulative_text == out.text
    final = pieces[-1].final_output
    assert final is not None
    times = {"metrics": None, "reuse": None}
    assert dataclasses.replace(final, **times) == dataclasses.replace(out, **times)
    assert all("final_output" not in piece for piece in pieces[:-1])


def test_a_batch_is_one_batch_of_requests_with_parameters_and_modes_of_their_own(
    chunked: nb.ChunkedLLM, llm: nb.LLM
) -> None:
    system, query, (cheese, bob) = three(chunked)
    requests: list[dict[str, Any]] = [
        {"system_chunk_id": system, "query_chunk_id": query, "context_chunk_ids": [cheese, bob]},
        {"system_chunk_id": system, "query_chunk_id": query, "context_chunk_ids": [bob, cheese], "mode": "exact"},
        {"system_chunk_id": system, "query_chunk_id": query, "sampling_params": {**GREEDY, "max_tokens": 3}},
        {"system_chunk_id": system, "query_chunk_id": query, "context_chunk_ids": [bob, bob], "mode": "blend"},
    ]
    before = llm.stats()["steps"]
    together = chunked.batch_generate_from_chunks(requests, GREEDY)
    steps = llm.stats()["steps"] - before
    alone = []
    for request in requests:
        sampling = request.get("sampling_params", GREEDY)
        ids = (request["system_chunk_id"], request["query_chunk_id"], request.get("context_chunk_ids"))
        alone.append(chunked.generate_from_chunks(*ids, sampling, mode=request.get("mode")))
    assert steps < llm.stats()["steps"] - before - steps
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    assert [out.reuse.mode_served for out in together if out.reuse] == ["isolated", "exact", "exact", "blend"]
    assert len(together[2].token_ids) <= 3
    several = chunked.batch_generate_from_chunks(requests[:2], [GREEDY, {**GREEDY, "max_tokens": 2}], mode="exact")
    assert len(several[1].token_ids) == 2
    assert several[0].reuse is not None
    assert several[0].reuse.is_exact


def test_sampling_params_as_a_dict(chunked: nb.ChunkedLLM) -> None:
    seeded = {"temperature": 1.5, "seed": 4, "max_tokens": 6, "stop": None, "stop_token_ids": None}
    first = chunked.generate(SYSTEM, QUERY, BOB, seeded)
    assert chunked.generate(SYSTEM, QUERY, BOB, nb.SamplingParams(temperature=1.5, seed=4, max_tokens=6)) != first
    assert chunked.generate(SYSTEM, QUERY, BOB, seeded).token_ids == first.token_ids
    assert chunked.generate(SYSTEM, QUERY, BOB, {**seeded, "seed": 5}).token_ids != first.token_ids
    assert chunked.generate(SYSTEM, QUERY, BOB, {**GREEDY, "retain_output_cache": True}).retained_seq_id == 1
    assert chunked.generate(SYSTEM, QUERY, BOB, {**GREEDY, "retain_output_cache": False}).retained_seq_id is None


# --- options -----------------------------------------------------------------------------------------------------


def test_max_chunks_evicts_what_was_not_used_for_longest_and_keeps_pinned_ones(llm: nb.LLM) -> None:
    with other(llm, max_chunks=3) as chunked:
        first, second, third = (chunked.register_chunk(text, "context") for text in ("one", "two", "three"))
        chunked.pin(first)
        system_first = chunked.get_chunk(second)  # looking is not using
        assert system_first.content == "two"
        fourth = chunked.register_chunk("four", "context")
        assert [chunk.chunk_id for chunk in chunked.list_chunks()] == [first, third, fourth]
        with pytest.raises(nb.ChunkNotFoundError, match=second[:8]):
            chunked.get_chunk(second)
        assert chunked.get_chunk_stats()["evictions"] == 1
        chunked.pin(third)
        chunked.pin(fourth)
        with pytest.raises(nb.OutOfMemoryError, match=r"3 chunks \(max_chunks\) are pinned"):
            chunked.register_chunk("five", "context")
        chunked.unpin(third)
        fifth = chunked.register_chunk("five", "context")
        assert {chunk.chunk_id for chunk in chunked.list_chunks()} == {first, fourth, fifth}
    with other(llm, max_chunks=4) as chunked:
        system, query, (cheese, bob) = three(chunked)
        chunked.generate_from_chunks(system, query, [cheese], GREEDY)
        chunked.register_chunk("new", "context")
        assert {cheese, system, query} <= {chunk.chunk_id for chunk in chunked.list_chunks()}
        assert bob not in [chunk.chunk_id for chunk in chunked.list_chunks()]
    with other(llm, max_chunks=1) as tiny:  # a request holds what it was given
        assert tiny.generate(SYSTEM, QUERY, [CHEESE, BOB], GREEDY).token_ids


def test_chunk_memory_ratio_bounds_the_memory_of_chunks(llm: nb.LLM) -> None:
    texts = [f"{i} {BOB}" for i in range(4)]
    size = llm.chunks.bytes_for(len(llm.tokenizer.encode(texts[0])))
    ratio = 2.5 * size / llm.stats()["kv_bytes"]
    with other(llm, chunk_memory_ratio=ratio) as chunked:
        assert chunked.get_chunk_stats()["budget_bytes"] == int(ratio * llm.stats()["kv_bytes"])
        for text in texts:
            chunked.generate(SYSTEM, QUERY, text, GREEDY)
            assert chunked.get_chunk_stats()["kv_bytes"] <= 2.5 * size
        ready = [chunk.content for chunk in chunked.list_chunks("context") if chunk.kv_ready]
        assert ready == texts[2:]  # those used last
        assert chunked.get_chunk_stats()["kv_evictions"] == 2
        with pytest.raises(nb.OutOfMemoryError, match="chunk_memory_ratio"):
            chunked.generate(SYSTEM, QUERY, texts[:3], GREEDY)
        for text in texts[:2]:
            chunked.register_chunk(text, "context", pin=True)
        with pytest.raises(nb.OutOfMemoryError, match="pinned"):
            chunked.generate(SYSTEM, QUERY, texts[3], GREEDY)
    with other(llm, chunk_memory_ratio=ratio, on_unsupported="exact") as chunked:
        out = chunked.generate(SYSTEM, QUERY, texts[:3], GREEDY)
        assert out.reuse is not None
        assert (out.reuse.mode_requested, out.reuse.mode_served) == ("isolated", "exact")
        assert "chunk_memory_ratio" in str(out.reuse.downgrade_reason)
        pieces = list(
            chunked.generate_from_chunks(
                out.chunk_ids["system"],
                out.chunk_ids["query"],
                out.chunk_ids["context"],
                GREEDY,
                stream=True,  # type: ignore[index]
            )
        )
        final = pieces[-1].final_output
        assert final is not None
        assert final.token_ids == out.token_ids
        assert final.reuse is not None
        assert final.reuse.downgrade_reason == out.reuse.downgrade_reason


def test_deduplication(llm: nb.LLM) -> None:
    with other(llm) as chunked:
        first = chunked.register_chunk(BOB, "context", {"a": 1})
        assert chunked.register_chunk(BOB, "context", {"b": 2}) == first
        assert chunked.get_chunk(first).metadata == {"a": 1, "b": 2}
        stats = chunked.get_chunk_stats()
        assert (stats["total_chunks"], stats["total_registered"], stats["deduplicated"]) == (1, 2, 1)
    with other(llm, enable_deduplication=False) as chunked:
        one, two = (chunked.register_chunk(BOB, "context", {"n": n}, compute=True) for n in (1, 2))
        assert one != two
        assert [chunked.get_chunk(chunk_id).metadata for chunk_id in (one, two)] == [{"n": 1}, {"n": 2}]
        bytes_each = chunked.get_chunk(one).kv_bytes
        assert chunked.get_chunk_stats()["kv_bytes"] == bytes_each > 0  # stored once all the same
        chunked.delete_chunk(one)
        assert chunked.get_chunk(two).kv_ready
        chunked.delete_chunk(two)
        assert chunked.get_chunk_stats()["kv_bytes"] == 0


def test_mode_and_namespace(llm: nb.LLM) -> None:
    with other(llm, mode="exact", cache_salt="a") as exact, other(llm, mode=nb.Blend(0.3), cache_salt="b") as blend:
        outs = [chunked.generate(SYSTEM, QUERY, [CHEESE, BOB], GREEDY) for chunked in (exact, blend)]
        assert [out.reuse.mode_served for out in outs if out.reuse] == ["exact", "blend"]
        assert exact.get_chunk_stats()["kv_bytes"] == 0
        assert blend.get_chunk_stats()["kv_bytes"] > 0
        assert [chunk.kv_ready for chunk in exact.list_chunks("context")] == [False, False]
        exact.mode = "isolated"
        changed = exact.generate(SYSTEM, QUERY, [CHEESE, BOB], GREEDY)
        assert changed.reuse is not None
        assert (changed.reuse.mode_served, changed.reuse.isolated > 0) == ("isolated", True)
        with pytest.raises(nb.InvalidArgumentError, match="reuse"):
            exact.mode = "fast"  # type: ignore[assignment]
        assert exact.mode == "isolated"


def test_an_llm_of_its_own(model_path: Path) -> None:
    with nb.ChunkedLLM(model_path, max_model_len=256, num_threads=1, max_num_seqs=2) as chunked:
        assert chunked.llm.config["max_model_len"] == 256
        assert chunked.llm.config["num_threads"] == 1
        assert chunked.mode == "exact"
        assert "ChunkedLLM(LLM(" in repr(chunked)
        assert chunked.generate(SYSTEM, QUERY, BOB, GREEDY).text
        with pytest.raises(nb.InvalidArgumentError, match="too long"):
            chunked.register_chunk("word " * 300, "context")
    with pytest.raises(nb.InvalidArgumentError, match="closed"):
        chunked.generate(SYSTEM, QUERY, BOB, GREEDY)


def test_anchors(chunked: nb.ChunkedLLM, llm: nb.LLM) -> None:
    system, query, _ = three(chunked)
    head = chunked.register_chunk(BOB, "context", anchor=system)
    flat = llm.encode_chat(messages_of([BOB]))
    anchor = chunked.get_chunk(head).anchor_token_ids
    assert anchor == flat[: len(anchor)]
    assert llm.tokenizer.decode(anchor, skip_special_tokens=False).endswith("user\n")
    bos = chunked.register_chunk(BOB, "context", anchor="bos")
    assert chunked.get_chunk(bos).anchor_token_ids == [llm.tokenizer.bos_token_id]
    behind = chunked.register_chunk(BOB, "context", anchor=head)
    assert chunked.get_chunk(behind).anchor_token_ids == anchor + chunked.get_chunk(head).kv_token_ids
    with pytest.raises(nb.InvalidArgumentError, match="not a query"):
        chunked.register_chunk(BOB, "context", anchor=query)


def test_a_chunk_behind_its_anchor_is_what_the_prompt_would_compute(model_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "f32", "kv_dtype": "f32", "max_model_len": 256, "num_threads": THREADS}
    with nb.ChunkedLLM(model_path, **options) as chunked:
        system, query, _ = three(chunked)
        worst = {}
        for anchor in (system, None):
            chunk_id = chunked.register_chunk(BOB, "context", anchor=anchor)
            pieces = chunked._pieces(*chunked._named(system, [chunk_id], query))
            exact, isolated = (
                chunked.llm.composed_logits(segments_of(pieces), reuse=mode) for mode in ("exact", nb.Isolated("keep"))
            )
            worst[anchor] = float(abs(exact - isolated).max())
    assert worst[system] < 1e-3
    assert worst[None] > 1


def test_compute_and_pin_store_keys_and_values_at_once(chunked: nb.ChunkedLLM, llm: nb.LLM) -> None:
    lazy = chunked.register_chunk(CHEESE, "context")
    assert not chunked.get_chunk(lazy).kv_ready
    eager = chunked.register_chunk(BOB, "context", compute=True)
    info = chunked.get_chunk(eager)
    assert info.kv_ready
    assert info.kv_bytes == llm.chunks.bytes_for(len(info.kv_token_ids))
    pinned = chunked.register_chunk(BOB + " And dogs.", "context", pin=True)
    assert [i.pinned for i in llm.chunks.list(cache_salt=chunked._cache_salt)] == [False, True]
    chunked.unpin(pinned)
    chunked.pin(eager)
    assert [i.pinned for i in llm.chunks.list(cache_salt=chunked._cache_salt)] == [True, False]
    system = chunked.register_chunk(
        "You are a pirate with a parrot, and you never tell a lie.", "system_prompt", compute=True
    )
    query = chunked.register_chunk(QUERY, "query")
    out = chunked.generate_from_chunks(system, query, [], GREEDY)
    assert out.reuse is not None
    assert out.reuse.exact_prefix >= 16
    with pytest.raises(nb.InvalidArgumentError, match="compute"):
        chunked.register_chunk(QUERY, "query", compute=True)


# --- management --------------------------------------------------------------------------------------------------


def test_counters_are_those_of_a_hand_count(chunked: nb.ChunkedLLM) -> None:
    system, query, (cheese, bob) = three(chunked)
    trace: list[tuple[list[str], Any, int, int]] = [
        ([cheese], "isolated", 0, 1),
        ([cheese], "isolated", 1, 1),
        ([bob, cheese], "blend", 2, 2),
        ([bob, bob], "isolated", 4, 2),
        ([bob], "exact", 4, 2),
        ([], "isolated", 4, 2),
        ([bob], nb.Blend(1.0), 4, 2),  # served as exact
    ]
    for contexts, mode, hits, misses in trace:
        chunked.generate_from_chunks(system, query, contexts, GREEDY, mode=mode)
        stats = chunked.get_chunk_stats()
        assert (stats["cache_hits"], stats["cache_misses"]) == (hits, misses)
    assert stats["hit_rate"] == 4 / 6
    assert chunked.get_chunk(bob).access_count == 5
    assert chunked.get_chunk(query).access_count == len(trace)
    tokens = chunked.llm.tokenizer.encode
    total = sum(len(tokens(text, add_special_tokens=False)) for text in (SYSTEM, QUERY, CHEESE, BOB))
    assert stats["total_tokens"] == total
    by_type = stats["memory_by_type"]
    assert by_type["context"] == stats["kv_bytes"] == sum(chunk.kv_bytes for chunk in chunked.list_chunks())
    assert stats["memory_used_mb"] == stats["kv_bytes"] / 1e6 > 0


def test_lists_and_filters(chunked: nb.ChunkedLLM) -> None:
    system, query, (cheese, bob) = three(chunked)
    chunked.register_chunk(BOB, "context", {"source": "file", "page": 2})
    assert [chunk.chunk_id for chunk in chunked.list_chunks(metadata_filter={"source": "file"})] == [bob]
    assert chunked.list_chunks(metadata_filter={"source": "file", "page": 3}) == []
    assert {chunk.chunk_id for chunk in chunked.list_chunks(nb.ChunkType.CONTEXT)} == {cheese, bob}
    assert {chunk.chunk_id for chunk in chunked.list_chunks("query")} == {query}
    assert len(chunked.list_chunks()) == 4
    info = chunked.get_chunk(cheese)
    assert info.content_preview == CHEESE[:50]
    assert info["token_count"] if "token_count" in info else info.token_count == len(info.token_ids)
    info.metadata["changed"] = True  # a copy
    assert chunked.get_chunk(cheese).metadata == {}
    assert chunked.get_chunk(system).kv_token_ids == []


def test_what_goes_gives_its_memory_back(chunked: nb.ChunkedLLM, llm: nb.LLM) -> None:
    free = llm.stats()["blocks_free"]

    def fill() -> tuple[str, str, list[str]]:
        ids = three(chunked)
        chunked.generate_from_chunks(ids[0], ids[1], ids[2], GREEDY)
        assert llm.stats()["blocks_owned"] > 0
        return ids

    def owned() -> int:
        return int(llm.stats()["blocks_owned"])

    _, _, contexts = fill()
    assert [chunked.delete_chunk(contexts[0]), chunked.delete_chunk(contexts[0])] == [True, False]
    assert [chunk.content for chunk in chunked.list_chunks("context")] == [BOB]
    assert chunked.delete_chunk(contexts[1])
    assert owned() == 0
    fill()
    assert chunked.clear_chunks("context") == 2
    assert (owned(), len(chunked.list_chunks())) == (0, 2)
    _, query, (cheese, _) = fill()
    chunked.pin(cheese)
    assert chunked.evict_unused_chunks(3600) == 0
    assert chunked.evict_unused_chunks(0) == 3
    assert [chunk.chunk_id for chunk in chunked.list_chunks()] == [cheese]
    assert chunked.clear_chunks() == 1
    assert owned() == 0
    assert query not in [chunk.chunk_id for chunk in chunked.list_chunks()]
    chunked.generate(SYSTEM, QUERY, [CHEESE, BOB], GREEDY, persist_chunks=False)
    assert (owned(), chunked.list_chunks()) == (0, [])
    kept = chunked.register_chunk(BOB, "context", compute=True)
    chunked.generate(SYSTEM, QUERY, [CHEESE, BOB], GREEDY, persist_chunks=False)
    assert [chunk.chunk_id for chunk in chunked.list_chunks() if chunk.kv_ready] == [kept]
    chunked.warm(CHEESE)
    chunked.close()
    assert owned() == 0
    assert llm.stats()["blocks_free"] + llm.stats()["blocks_cached"] >= free


@pytest.mark.parametrize("mode", ["exact", "isolated", "blend", nb.Blend(0.35, select="first"), nb.Blend(1.0)])
def test_a_preview_says_what_then_happens(chunked: nb.ChunkedLLM, llm: nb.LLM, mode: Any) -> None:
    system, query, contexts = three(chunked)
    contexts = [*contexts, chunked.register_chunk("Nobody knows more.", "context", anchor="bos"), contexts[0]]
    for _ in range(2):
        said = chunked.preview_composition(system, query, contexts, mode)
        before = llm.stats()
        out = chunked.generate_from_chunks(system, query, contexts, GREEDY, mode=mode)
        report = out.reuse
        assert report is not None
        assert {key: said[key] for key in ("mode", "exact_prefix", "isolated", "recomputed", "computed")} == {
            "mode": report.mode_served,
            "exact_prefix": report.exact_prefix,
            "isolated": report.isolated,
            "recomputed": report.recomputed,
            "computed": report.computed,
        }
        assert said["total_tokens"] == len(out.prompt_token_ids)
        parts = said["chunks"]
        assert said["total_tokens"] == parts["system"] + sum(parts["contexts"]) + parts["query"] + parts["template"]
        encoded = llm.stats()["prompt_tokens"] - before["prompt_tokens"] - said["computed"] - said["recomputed"]
        approximate = report.mode_served != "exact"
        assert said["to_encode"] == encoded
        assert said["num_runs"] == (5 if approximate else 1)
        assert said["chunk_bytes"] == chunked.get_chunk_stats()["kv_bytes"]
        assert said["memory_bytes"] == said["chunk_bytes"] + said["own_bytes"]
    assert said["to_encode"] == 0
    assert said["num_levels"] == (3 if approximate else 2)


def test_a_preview_of_whole_blocks_that_are_all_cached(chunked: nb.ChunkedLLM) -> None:
    system, query = chunked.register_chunk(SYSTEM, "system_prompt"), ""
    for words in range(1, 17):
        query = chunked.register_chunk("Why" + " so" * words + "?", "query")
        if chunked.preview_composition(system, query)["total_tokens"] % 16 == 0:
            break
    chunked.generate_from_chunks(system, query, None, GREEDY)
    said = chunked.preview_composition(system, query)
    out = chunked.generate_from_chunks(system, query, None, GREEDY)
    assert out.reuse is not None
    assert len(out.prompt_token_ids) % 16 == 0
    assert (said["exact_prefix"], said["computed"]) == (out.reuse.exact_prefix, out.reuse.computed)
    assert said["computed"] == 16  # the last token is computed, and with it its block
