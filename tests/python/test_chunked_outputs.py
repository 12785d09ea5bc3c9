"""Retained answers, files of chunks, automatic reuse, and what `ChunkedLLM` refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import nanobraid as nb
from nanobraid._chunk_outputs import params_of, think_spans, think_tags, without

GREEDY = {"temperature": 0, "max_tokens": 8}
PARAMS = nb.SamplingParams(temperature=0, max_tokens=8)
SYSTEM = "You answer briefly."
BOB = "Bob is 42 years old and lives in Paris. He likes tea, long walks and his cat Alice."
ALICE = "Alice is a cat of seven years. She sleeps all day, and at night she watches the moon from the window."
QUERY = "How old is Bob?"
_salts = count()


@pytest.fixture
def chunked(llm: nb.LLM) -> Iterator[nb.ChunkedLLM]:
    """Of a namespace of its own; closing it gives everything back."""
    with nb.ChunkedLLM(llm, mode="isolated", cache_salt=f"outputs {next(_salts)}") as chunked:
        yield chunked


# --- retained answers --------------------------------------------------------------------------------------------


def test_going_on_in_the_same_context_is_exact_and_computes_only_what_is_new(
    chunked: nb.ChunkedLLM, llm: nb.LLM
) -> None:
    first = chunked.generate_and_retain_output(SYSTEM, QUERY, [ALICE, BOB], GREEDY, mode="exact")
    assert first.retained_seq_id is not None
    kept = chunked.get_retained_outputs()[first.retained_seq_id]
    known = len(first.prompt_token_ids) + len(first.token_ids)
    # The last token of an answer was never computed; blocks are whole.
    assert kept.cache_info["cached_tokens"] >= (known - 1) // 16 * 16
    second = chunked.continue_output(first.retained_seq_id, "And where does he live?", GREEDY, mode="exact")
    turns = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "\n\n".join([ALICE, BOB, QUERY])},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And where does he live?"},
    ]
    cold = llm.chat(turns, PARAMS)
    assert second.prompt_token_ids == cold.prompt_token_ids
    assert second.token_ids == cold.token_ids
    assert second.reuse is not None
    assert second.reuse.is_exact
    assert second.reuse.exact_prefix == (known - 1) // 16 * 16
    third = chunked.continue_output(second.retained_seq_id or 0, "Why?", GREEDY, mode="exact")
    assert third.prompt_token_ids[: len(second.prompt_token_ids)] == second.prompt_token_ids
    assert not chunked.get_retained_outputs()[third.retained_seq_id or 0].tainted_origin


def test_elsewhere_an_answer_is_a_chunk_anchored_on_its_prompt(chunked: nb.ChunkedLLM, llm: nb.LLM) -> None:
    first = chunked.generate_and_retain_output(SYSTEM, "Who is Alice?", ALICE, GREEDY, mode="exact")
    assert first.output_chunk_id is not None
    chunk = chunked.get_chunk(first.output_chunk_id)
    assert (chunk.chunk_type, chunk.content) == (nb.ChunkType.OUTPUT, first.text)
    assert chunk.kv_token_ids == chunk.token_ids == first.token_ids
    assert chunk.anchor_token_ids == first.prompt_token_ids
    assert chunk.metadata == {
        "source": "retained_output",
        "seq_id": first.retained_seq_id,
        "prompt_length": len(first.prompt_token_ids),
        "completion_length": len(first.token_ids),
        "has_think_tags": False,
        "tainted_origin": False,
    }
    system = chunked.register_chunk(SYSTEM, "system_prompt")
    query = chunked.register_chunk("What does she do?", "query")
    for mode in ("isolated", "blend"):
        out = chunked.generate_from_chunks(system, query, [first.output_chunk_id], GREEDY, mode=mode)  # type: ignore[arg-type]
        at = next(
            i
            for i in range(len(out.prompt_token_ids))
            if out.prompt_token_ids[i:][: len(first.token_ids)] == first.token_ids
        )
        segments = [
            nb.Segment(out.prompt_token_ids[:at]),
            nb.Segment(first.token_ids, chunk=True, anchor=first.prompt_token_ids),
            nb.Segment(out.prompt_token_ids[at + len(first.token_ids) :]),
        ]
        wanted = llm.compose(segments, PARAMS, reuse=mode, cache_salt=chunked._cache_salt)  # type: ignore[arg-type]
        assert out.token_ids == wanted.token_ids
        assert out.reuse is not None
        assert out.reuse.isolated + out.reuse.recomputed == len(first.token_ids)


def test_an_answer_from_an_approximate_prompt_says_so(chunked: nb.ChunkedLLM) -> None:
    system = chunked.register_chunk(SYSTEM, "system_prompt")
    query = chunked.register_chunk(QUERY, "query")
    bob = chunked.register_chunk(BOB, "context")
    out = chunked.generate_and_retain_output(
        sampling_params=GREEDY, system_chunk_id=system, query_chunk_id=query, context_chunk_ids=[bob]
    )
    kept = chunked.get_retained_outputs()[out.retained_seq_id or 0]
    assert kept.tainted_origin
    assert chunked.get_chunk(out.output_chunk_id or "").metadata["tainted_origin"] is True
    assert kept.cache_info["cached_tokens"] <= len(out.prompt_token_ids) - len(chunked.get_chunk(bob).kv_token_ids)
    # Continued exactly, nothing approximate is found; continued as before, the chunk is.
    exact = chunked.continue_output(kept.seq_id, "Why?", GREEDY, mode="exact", retain_output=False)
    assert exact.reuse is not None
    assert exact.retained_seq_id is None
    assert exact.reuse.is_exact
    approximate = chunked.continue_output(kept.seq_id, "Why?", GREEDY)
    assert approximate.reuse is not None
    assert approximate.reuse.isolated == len(chunked.get_chunk(bob).kv_token_ids)


def test_handles_are_released(chunked: nb.ChunkedLLM) -> None:
    handles = [chunked.generate_and_retain_output(SYSTEM, q, None, GREEDY).retained_seq_id for q in ("A?", "B?", "C?")]
    assert list(chunked.get_retained_outputs()) == handles == [1, 2, 3]
    assert chunked.get_retained_sequences().keys() == chunked.get_retained_outputs().keys()
    assert chunked.release_retained_output(2)
    assert not chunked.release_retained_sequence(2)
    with pytest.raises(nb.ChunkNotFoundError, match="no retained output 2"):
        chunked.continue_output(2, "Why?")
    with pytest.raises(nb.ChunkNotFoundError):
        chunked.register_output_chunk_from_retained(2)
    assert chunked.release_all() == 2
    assert chunked.release_all_retained_sequences() == 0
    assert len(chunked.list_chunks("output")) == 3  # chunks stay


@pytest.mark.parametrize(
    ("ids", "spans"),
    [
        ([5, 6], []),
        ([1, 5, 2, 6], [(0, 3)]),
        ([5, 1, 5, 2, 6, 1, 2], [(1, 4), (5, 7)]),
        ([1, 5, 1, 6, 2, 7, 2, 8], [(0, 7)]),
        ([5, 1, 6, 7], [(1, 4)]),
        ([1, 1, 2, 6], [(0, 4)]),
        ([5, 2, 6, 1, 2, 2], [(3, 5)]),
        ([], []),
    ],
)
def test_think_tags_closed_unclosed_and_nested(ids: list[int], spans: list[tuple[int, int]]) -> None:
    assert think_spans(ids, (1, 2)) == spans
    assert think_spans(ids, None) == []
    assert without(ids, spans) == [t for i, t in enumerate(ids) if not any(a <= i < b for a, b in spans)]


def test_what_a_model_thought_can_be_left_out(llm: nb.LLM) -> None:
    assert think_tags(llm.tokenizer) is None  # the default model has none
    with nb.ChunkedLLM(llm, cache_salt=f"outputs {next(_salts)}", mode="isolated") as chunked:
        out = chunked.generate_and_retain_output(SYSTEM, QUERY, BOB, GREEDY)
        # As if the second token opened and the fourth closed what it thought.
        chunked._think = (out.token_ids[1], out.token_ids[3])
        out = chunked.generate_and_retain_output(SYSTEM, QUERY, BOB, GREEDY)
        handle = out.retained_seq_id or 0
        assert chunked.get_retained_outputs()[handle].think_positions == [(1, 4)]
        whole = chunked.register_output_chunk_from_retained(handle)
        rest = chunked.register_output_chunk_from_retained(handle, {"mine": 1}, strip_think=True)
        assert chunked.get_chunk(whole).kv_token_ids == out.token_ids
        chunk = chunked.get_chunk(rest)
        assert chunk.kv_token_ids == out.token_ids[:1] + out.token_ids[4:]
        assert chunk.content == llm.tokenizer.decode(chunk.token_ids)
        assert (chunk.metadata["has_think_tags"], chunk.metadata["mine"]) == (True, 1)
        system = chunked.register_chunk(SYSTEM, "system_prompt")
        query = chunked.register_chunk("Is it so?", "query")
        used = chunked.generate_from_chunks(system, query, [rest], GREEDY)
        assert used.reuse is not None
        assert used.reuse.isolated == len(chunk.kv_token_ids)
        chunked._think = (out.token_ids[0], -1)  # opened and never closed: nothing is left
        handle = chunked.generate_and_retain_output(SYSTEM, QUERY, BOB, GREEDY).retained_seq_id or 0
        with pytest.raises(nb.InvalidArgumentError, match="nothing is left"):
            chunked.register_output_chunk_from_retained(handle, strip_think=True)


def test_the_tags_of_a_model_that_thinks_are_found_by_name(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the `tokenizers` package, which makes vocabularies, is not installed")
    from test_tokenizer_hf import FAMILIES, byte_level, save

    oracle = byte_level(FAMILIES["qwen2"])
    oracle.add_tokens(["<think>", "</think>"])
    tokenizer = nb.Tokenizer(save(tmp_path / "thinks", oracle))
    assert think_tags(tokenizer) == (oracle.token_to_id("<think>"), oracle.token_to_id("</think>"))


# --- files -------------------------------------------------------------------------------------------------------


def fill(chunked: nb.ChunkedLLM) -> nb.ChunkedOutput:
    system = chunked.register_chunk(SYSTEM, "system_prompt", {"who": "me"})
    bob = chunked.register_chunk(BOB + "\n", "context", anchor=system)
    chunked.register_chunk(ALICE, "context", pin=True)
    query = chunked.register_chunk(QUERY, "query")
    return chunked.generate_from_chunks(system, query, [bob], GREEDY, retain_output=True)


def test_a_file_brings_chunks_and_answers_back(chunked: nb.ChunkedLLM, llm: nb.LLM, tmp_path: Path) -> None:
    out = fill(chunked)
    path = tmp_path / "chunks.json"
    chunked.save(path, extra={"note": "é"})
    assert [file.name for file in tmp_path.iterdir()] == ["chunks.json"]
    with nb.ChunkedLLM(llm, mode="isolated", cache_salt=f"outputs {next(_salts)}") as fresh:
        report = fresh.load(path)
        assert report.extra == {"note": "é"}
        assert all(old == new for old, new in report.chunk_ids.items())
        assert report.outputs == {1: 1}

        def facts(c: nb.ChunkedLLM) -> list[tuple[Any, ...]]:
            return [
                (k.chunk_id, k.content, k.token_ids, k.kv_token_ids, k.anchor_token_ids, k.metadata, k.pinned)
                for k in sorted(c.list_chunks(), key=lambda k: k.chunk_id)
            ]  # fmt: skip

        assert facts(fresh) == facts(chunked)
        assert [c.content for c in fresh.list_chunks() if c.kv_ready] == [ALICE]  # pinned
        ids = out.chunk_ids
        assert ids is not None
        again = fresh.generate_from_chunks(ids["system"], ids["query"], ids["context"], GREEDY)
        assert again.token_ids == out.token_ids
        on = [c.continue_output(1, "Why?", GREEDY, retain_output=False).token_ids for c in (chunked, fresh)]
        assert on[0] == on[1]
        used = [
            c.generate_from_chunks(ids["system"], ids["query"], [out.output_chunk_id or ""], GREEDY)
            for c in (chunked, fresh)
        ]
        assert used[0].token_ids == used[1].token_ids
        assert fresh.load(path).outputs == {1: 1}  # what is there already is not there twice
        assert len(fresh.list_chunks()) == len(chunked.list_chunks())
    with nb.ChunkedLLM(llm, enable_deduplication=False, cache_salt=f"outputs {next(_salts)}") as separate:
        report = separate.load(path)
        assert all(old != new for old, new in report.chunk_ids.items())
        kept = separate.get_retained_outputs()[1]
        assert kept.output_chunk_id == report.chunk_ids[out.output_chunk_id or ""]


def edit(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(data: dict[str, Any]) -> None:
        *folders, last = name.split(".")
        at: Any = data
        for folder in folders:
            at = at[int(folder) if folder.isdigit() else folder]
        at[int(last) if last.isdigit() else last] = value

    return change


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "not written by": edit("format", "other"),
    "version 2": edit("version", 2),
    "a model with 7 tokens": edit("vocab_size", 7),
    "chunks is": edit("chunks", {}),
    "content is": edit("chunks.0.content", 5),
    "token_ids.0. must be": edit("chunks.0.token_ids.0", 10**9),
    "token_ids is": edit("chunks.0.token_ids", "x"),
    "other tokens here": edit("chunks.0.content", "Another text"),
    "other tokens": edit("chunks.1.kv_token_ids", [5]),
    "chunk_type is": edit("chunks.0.chunk_type", "poem"),
    "has 0 tokens": edit("chunks.0.token_ids", []),
    "anchor of 2000": edit("chunks.0.anchor_token_ids", [1] * 2000),
    "metadata is": edit("chunks.0.metadata", 3),
    "pinned is": edit("chunks.0.pinned", "yes"),
    "outputs is": edit("outputs", None),
    "seq_id is": edit("outputs.0.seq_id", True),
    "segments are not": edit("outputs.0.prompt_token_ids", [1]),
    "segments has": edit("outputs.0.segments.0", [1, 2]),
    "content is ": edit("outputs.0.messages.0.content", None),
    "chunk ids that are none": edit("outputs.0.output_chunk_id", 5),
}


def test_damaged_files_register_nothing(chunked: nb.ChunkedLLM, llm: nb.LLM, tmp_path: Path) -> None:
    fill(chunked)
    path = tmp_path / "chunks.json"
    chunked.save(path)
    good = path.read_text()
    with nb.ChunkedLLM(llm, cache_salt=f"outputs {next(_salts)}") as fresh:
        for says, change in DAMAGE.items():
            data = json.loads(good)
            change(data)
            path.write_text(json.dumps(data))
            with pytest.raises(nb.FormatError, match=says):
                fresh.load(path)
        for text in (good[:-20], "", "[1]", "[" * 100_000):
            path.write_text(text)
            with pytest.raises(nb.FormatError, match=r"chunks\.json"):
                fresh.load(path)
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(nb.FormatError):
            fresh.load(path)
        with pytest.raises(nb.ModelIOError, match="nowhere"):
            fresh.load(tmp_path / "nowhere")
        assert fresh.list_chunks() == []
        assert fresh.get_retained_outputs() == {}
    with pytest.raises(nb.ModelIOError, match="cannot be written"):
        chunked.save(tmp_path / "no" / "folder.json")
    chunked.register_chunk("x", "context", {"bad": object()})
    with pytest.raises(nb.InvalidArgumentError, match="metadata cannot be saved"):
        chunked.save(path)


# --- automatic reuse ---------------------------------------------------------------------------------------------

PAGES = [f"Page {i}. " + text for i, text in enumerate((ALICE, BOB, ALICE + " " + BOB))]


def test_warm_messages_are_found_in_conversations(chunked: nb.ChunkedLLM, llm: nb.LLM) -> None:
    report = chunked.warm(PAGES)
    assert (report.pieces, report.new_pieces) == (3, 3)
    assert report.kv_bytes == sum(info.kv_bytes for info in llm.chunks.list(cache_salt=chunked._cache_salt))
    assert report.tokens == sum(len(i.token_ids) for i in llm.chunks.list(cache_salt=chunked._cache_salt))
    assert chunked.warm(PAGES[1]).new_pieces == 0
    talk = [
        {"role": "user", "content": PAGES[2]},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": PAGES[0]},
        {"role": "assistant", "content": "Go on."},
        {"role": "user", "content": QUERY},
    ]
    out = chunked.complete(talk, GREEDY)
    assert out.prompt_token_ids == llm.encode_chat(talk)
    assert out.reuse is not None
    assert out.pieces == {"candidates": 2, "reused": 2}
    sizes = {tuple(i.token_ids): len(i.token_ids) for i in llm.chunks.list(cache_salt=chunked._cache_salt)}
    assert out.reuse.isolated == sum(sizes.values()) - sorted(sizes.values())[0]
    exact = chunked.complete(talk, GREEDY, mode="exact")
    assert exact.token_ids == llm.chat(talk, PARAMS).token_ids
    assert exact.pieces == {"candidates": 2, "reused": 0}
    fresh = [
        {"role": "user", "content": "Something else that has never been seen in all of the world before us today."}
    ]
    unseen = chunked.complete(fresh, GREEDY)
    assert unseen.reuse is not None
    assert unseen.reuse.is_exact
    assert unseen.pieces == {"candidates": 1, "reused": 0}
    assert len(llm.chunks.list(cache_salt=chunked._cache_salt)) == 3  # nothing was stored on the way


def test_paragraphs_and_slices(chunked: nb.ChunkedLLM, llm: nb.LLM) -> None:
    chunked.warm("\n\n".join([*PAGES, "The end."]), chunk_boundaries="paragraphs")
    ask = [{"role": "user", "content": f"{PAGES[1]}\n \nSome words.\n\n\n{PAGES[0]}\n\n{QUERY}"}]
    out = chunked.complete(ask, GREEDY, chunk_boundaries="paragraphs")
    assert out.prompt_token_ids == llm.encode_chat(ask)
    assert out.pieces == {"candidates": 2, "reused": 2}
    assert chunked.complete(ask, GREEDY).pieces == {"candidates": 1, "reused": 0}  # other borders, other pieces

    long = " ".join(PAGES * 3)
    for boundaries, size in (("messages", 128), ("paragraphs", 128), (32, 32)):
        text = long + f" And then, by {boundaries}, it ends."
        own = len(llm.tokenizer.encode(text))
        unknown = chunked.complete(text, GREEDY, chunk_boundaries=boundaries)
        chunked.warm(text, chunk_boundaries=size)
        found = chunked.complete(text, GREEDY, chunk_boundaries=boundaries)
        assert unknown.prompt_token_ids == found.prompt_token_ids == llm.tokenizer.encode(text)
        assert unknown.pieces is not None
        assert found.pieces is not None
        assert unknown.pieces["reused"] < found.pieces["reused"]
        assert found.pieces["candidates"] == -(-(own - 1) // size) == found.pieces["reused"] + ((own - 1) % size < 16)
        assert found.reuse is not None
        assert found.reuse.isolated > 0


def test_pinned_pieces_stay_until_they_are_cleared(chunked: nb.ChunkedLLM, llm: nb.LLM) -> None:
    chunked.warm(PAGES[:1], pin=True)
    assert [info.pinned for info in llm.chunks.list(cache_salt=chunked._cache_salt)] == [True]
    assert chunked.clear_chunks() == 0
    assert llm.chunks.list(cache_salt=chunked._cache_salt) == []
    assert chunked.warm("Too short.").pieces == 0


# --- wrong input, streams, threads -------------------------------------------------------------------------------


def test_what_is_refused(chunked: nb.ChunkedLLM, llm: nb.LLM) -> None:
    system = chunked.register_chunk(SYSTEM, "system_prompt")
    query = chunked.register_chunk(QUERY, "query")
    bob = chunked.register_chunk(BOB, "context")
    bad, missing = nb.InvalidCompositionError, nb.ChunkNotFoundError
    wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (bad, "system_chunk_id must be a chunk of type system_prompt, got one of type context",
         lambda: chunked.generate_from_chunks(bob, query)),
        (bad, "query_chunk_id", lambda: chunked.generate_from_chunks(system, bob)),
        (bad, r"context_chunk_ids\[1\] must be a chunk of type context or output",
         lambda: chunked.generate_from_chunks(system, query, [bob, system])),
        (bad, "list of chunk ids", lambda: chunked.generate_from_chunks(system, query, bob)),
        (missing, "there is no chunk 'x'", lambda: chunked.generate_from_chunks("x", query)),
        (KeyError, "there is no chunk 5", lambda: chunked.get_chunk(5)),  # type: ignore[arg-type]
        (missing, "x", lambda: chunked.preview_composition(system, "x")),
        (missing, "x", lambda: chunked.pin("x")),
        (missing, "x", lambda: chunked.unpin("x")),
        (missing, "x", lambda: chunked.register_chunk("y", "context", anchor="x")),
        (ValueError, "not empty", lambda: chunked.register_chunk("", "context")),
        (ValueError, "content", lambda: chunked.register_chunk(b"x", "context")),  # type: ignore[arg-type]
        (ValueError, "surrogate", lambda: chunked.register_chunk("\ud800", "context")),
        (ValueError, "chunk_type must be one of system_prompt", lambda: chunked.register_chunk("x", "poem")),
        (ValueError, "metadata", lambda: chunked.register_chunk("x", "context", 5)),  # type: ignore[arg-type]
        (ValueError, "anchor has no meaning", lambda: chunked.register_chunk("x", "query", anchor="bos")),
        (ValueError, "pin must be", lambda: chunked.register_chunk("x", "query", pin=1)),  # type: ignore[arg-type]
        (ValueError, "too long", lambda: chunked.register_chunk("word " * 2000, "context")),
        (ValueError, "temperature", lambda: chunked.generate(SYSTEM, QUERY, None, {"temperature": -1})),
        (ValueError, "unknown key 'temp'", lambda: chunked.generate(SYSTEM, QUERY, None, {"temp": 1})),
        (ValueError, "must be SamplingParams or a dict", lambda: params_of(5)),  # type: ignore[arg-type]
        (ValueError, "retain_output_cache", lambda: params_of({"retain_output_cache": 1})),
        (ValueError, "n must be 1", lambda: chunked.generate(SYSTEM, QUERY, None, {"n": 2})),
        (ValueError, "reuse must be", lambda: chunked.generate(SYSTEM, QUERY, mode="fast")),  # type: ignore[arg-type]
        (ValueError, "not empty", lambda: chunked.generate("", QUERY)),
        (ValueError, "give either", lambda: chunked.generate_and_retain_output(SYSTEM)),
        (ValueError, "give either", lambda: chunked.generate_and_retain_output(SYSTEM, QUERY, query_chunk_id=query)),
        (ValueError, "requests must be", lambda: chunked.batch_generate_from_chunks([])),
        (ValueError, r"requests\[0\] must be", lambda: chunked.batch_generate_from_chunks([5])),  # type: ignore[list-item]
        (ValueError, "no query_chunk_id", lambda: chunked.batch_generate_from_chunks([{"system_chunk_id": system}])),
        (ValueError, "unknown key 'a'", lambda: chunked.batch_generate_from_chunks([{"a": 1}])),
        (ValueError, "2 entries for 1", lambda: chunked.batch_generate_from_chunks(
            [{"system_chunk_id": system, "query_chunk_id": query}], [GREEDY, GREEDY])),
        (ValueError, "max_age_seconds", lambda: chunked.evict_unused_chunks(-1)),
        (ValueError, "chunk_type", lambda: chunked.list_chunks("poem")),
        (ValueError, "chunk_type", lambda: chunked.clear_chunks("poem")),
        (ValueError, "metadata_filter", lambda: chunked.list_chunks(metadata_filter=5)),  # type: ignore[arg-type]
        (ValueError, "chunk_boundaries", lambda: chunked.complete("x", chunk_boundaries="words")),
        (ValueError, "chunk_boundaries", lambda: chunked.warm("x", chunk_boundaries=3)),
        (ValueError, "text_or_texts", lambda: chunked.warm([])),
        (ValueError, "text_or_texts", lambda: chunked.warm(["x", ""])),
        (ValueError, "messages", lambda: chunked.complete([])),
        (ValueError, "query must be", lambda: chunked.continue_output(
            chunked.generate_and_retain_output(SYSTEM, QUERY, None, GREEDY).retained_seq_id or 0, "")),
        (ValueError, "max_chunks", lambda: nb.ChunkedLLM(llm, max_chunks=0)),
        (ValueError, "chunk_memory_ratio", lambda: nb.ChunkedLLM(llm, chunk_memory_ratio=0)),
        (ValueError, "chunk_memory_ratio", lambda: nb.ChunkedLLM(llm, chunk_memory_ratio=1.5)),
        (ValueError, "enable_deduplication", lambda: nb.ChunkedLLM(llm, enable_deduplication=1)),  # type: ignore[arg-type]
        (ValueError, "on_unsupported", lambda: nb.ChunkedLLM(llm, on_unsupported="hope")),  # type: ignore[arg-type]
        (ValueError, "cache_salt", lambda: nb.ChunkedLLM(llm, cache_salt=5)),  # type: ignore[arg-type]
        (ValueError, "num_threads: the LLM", lambda: nb.ChunkedLLM(llm, num_threads=1)),
        (TypeError, "bogus", lambda: nb.ChunkedLLM(bogus=1)),
    ]  # fmt: skip
    for error, says, call in wrong:
        with pytest.raises(error, match=says):
            call()
    with pytest.raises(KeyError) as caught:
        chunked.get_chunk("x")
    assert str(caught.value).startswith("there is no chunk")  # a message, no quotes around it
    assert chunked.generate_from_chunks(system, query, [bob], GREEDY).text


def test_what_cannot_be_served_is_an_error_or_exact_with_the_reason(llm: nb.LLM) -> None:
    scored = {**GREEDY, "prompt_logprobs": 1}
    with nb.ChunkedLLM(llm, mode="isolated", cache_salt=f"outputs {next(_salts)}") as strict:
        with pytest.raises(nb.UnsupportedError, match="prompt_logprobs"):
            strict.generate(SYSTEM, QUERY, BOB, scored)
        assert strict.list_chunks("context")[0].kv_ready is False
    with nb.ChunkedLLM(llm, mode="isolated", on_unsupported="exact", cache_salt=f"outputs {next(_salts)}") as lenient:
        system = lenient.register_chunk(SYSTEM, "system_prompt")
        query = lenient.register_chunk(QUERY, "query")
        request = {
            "system_chunk_id": system,
            "query_chunk_id": query,
            "context_chunk_ids": [lenient.register_chunk(BOB, "context")],
        }
        downgraded, served = lenient.batch_generate_from_chunks(
            [{**request, "sampling_params": scored}, request], GREEDY
        )
        assert downgraded.reuse is not None
        assert served.reuse is not None
        assert (downgraded.reuse.mode_requested, downgraded.reuse.mode_served) == ("isolated", "exact")
        assert "prompt_logprobs" in str(downgraded.reuse.downgrade_reason)
        assert (served.reuse.mode_served, served.reuse.downgrade_reason) == ("isolated", None)


def test_a_stream_that_is_left_early_gives_everything_back(chunked: nb.ChunkedLLM, llm: nb.LLM) -> None:
    system = chunked.register_chunk(SYSTEM, "system_prompt")
    query = chunked.register_chunk("Tell me a very long story.", "query")
    bob = chunked.register_chunk(BOB, "context")
    stream = chunked.generate_from_chunks(system, query, [bob], {"max_tokens": 500}, stream=True, retain_output=True)
    next(stream)
    assert llm.stats()["running"] == 1
    stream.close()
    assert llm.stats()["running"] == 0
    assert chunked.get_retained_outputs() == {}


def test_several_threads_at_once(chunked: nb.ChunkedLLM) -> None:
    wanted = chunked.generate(SYSTEM, QUERY, [ALICE, BOB], GREEDY).token_ids
    got: list[list[int]] = []

    def ask() -> None:
        got.append(chunked.generate_and_retain_output(SYSTEM, QUERY, [ALICE, BOB], GREEDY).token_ids)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [wanted] * 4
    assert sorted(chunked.get_retained_outputs()) == [1, 2, 3, 4]
    assert chunked.get_chunk_stats()["deduplicated"] >= 4 * 4
