"""Keys and values that survive a restart: the same tokens, sooner, whatever happened to the process that wrote them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_threads import THREADS

import nanobraid as nb

GREEDY = nb.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
TEXT = (Path(__file__).parents[2] / "eval/text/mixed.txt").read_text(encoding="utf-8")
PROMPT_TOKENS = 700

SERVER = """
import sys
import nanobraid as nb
model, store, start = sys.argv[1], sys.argv[2], int(sys.argv[3])
llm = nb.LLM(model, num_threads=1, max_model_len=1024, kv_store_path=store)
ids = llm.tokenizer.encode(open(sys.argv[4], encoding="utf-8").read())
params = nb.SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
print("ready", flush=True)
for i in range(start, start + 10_000):
    begin = 173 * i % (len(ids) - 300)
    llm.generate([ids[begin : begin + 300]], params)
    print(llm.stats()["disk_writes"], flush=True)
"""


def open_llm(model: Path, store: Path | None, **options: object) -> nb.LLM:
    settings: dict[str, object] = {"num_threads": THREADS, "max_model_len": 1024, "kv_store_path": store, **options}
    return nb.LLM(model, **settings)  # type: ignore[arg-type]


def prompt_of(llm: nb.LLM, begin: int = 0, count: int = PROMPT_TOKENS) -> list[int]:
    return llm.tokenizer.encode(TEXT)[begin : begin + count]


def test_a_restart_gives_the_same_tokens_sooner(model_path: Path, tmp_path: Path) -> None:
    with open_llm(model_path, None) as llm:
        prompt = prompt_of(llm)
        (expected,) = llm.generate([prompt], GREEDY)
        assert llm.stats()["disk_writes"] == 0
        (from_memory,) = llm.generate([prompt], GREEDY)
    store = tmp_path / "store"
    with open_llm(model_path, store) as llm:
        (first,) = llm.generate([prompt], GREEDY)
        assert first.num_cached_tokens == 0
    assert len(list(store.iterdir())) == 3, "records of 256, 256 and the other full blocks"
    with open_llm(model_path, store) as llm:
        (restored,) = llm.generate([prompt], GREEDY)
        stats = llm.stats()
    assert first.token_ids == restored.token_ids == expected.token_ids == from_memory.token_ids
    assert restored.num_cached_tokens == (PROMPT_TOKENS - 1) // 16 * 16 == stats["disk_hit_tokens"]
    assert stats["prompt_tokens"] == PROMPT_TOKENS - stats["disk_hit_tokens"], "what is restored is not computed"
    assert stats["disk_misses"] == 0 and stats["disk_hits"] == 3
    assert expected.metrics and from_memory.metrics and restored.metrics
    print(
        f"\nTTFT of {PROMPT_TOKENS} tokens: computed {expected.metrics.ttft_ms:.1f} ms, memory "
        f"{from_memory.metrics.ttft_ms:.1f} ms, disk {restored.metrics.ttft_ms:.1f} ms"
    )
    assert restored.metrics.ttft_ms < expected.metrics.ttft_ms / 2


def test_chunks_come_back(model_path: Path, tmp_path: Path) -> None:
    segments = [
        nb.Segment("You answer questions.\n"),
        nb.Segment(TEXT[:900], chunk=True),
        nb.Segment(TEXT[2000:2700], chunk=True),
        nb.Segment("What is it about?"),
    ]
    outputs = []
    for restarted in (False, True):
        with open_llm(model_path, tmp_path / "store") as llm:
            outputs.append(llm.compose(segments, GREEDY, reuse=nb.Isolated()))
            assert llm.stats()["disk_hit_chunks"] == (2 if restarted else 0)
    assert outputs[0].token_ids == outputs[1].token_ids
    with open_llm(model_path, tmp_path / "store") as llm:
        llm.compose(segments, GREEDY, reuse=nb.Isolated(), cache_salt="somebody else")
        assert llm.stats()["disk_hit_chunks"] == 0


def test_namespaces_and_other_options_find_nothing(model_path: Path, tmp_path: Path) -> None:
    with open_llm(model_path, tmp_path, kv_dtype="bf16") as llm:
        prompt = prompt_of(llm, count=100)
        (expected,) = llm.generate([prompt], GREEDY, cache_salt="alice")
    for salt, options, hits in (
        ("alice", {"kv_dtype": "f32"}, 0),
        ("alice", {"dtype": "bf16"}, 0),
        ("bob", {}, 0),
        ("", {}, 0),
        ("alice", {}, 96),
    ):
        with open_llm(model_path, tmp_path, **options) as llm:
            (output,) = llm.generate([prompt], GREEDY, cache_salt=salt)
            assert llm.stats()["disk_hit_tokens"] == hits
            assert options or output.token_ids == expected.token_ids


def test_an_edited_model_finds_nothing(model_path: Path, tmp_path: Path) -> None:
    edited = tmp_path / "model.gguf"
    data = bytearray(model_path.read_bytes())
    edited.write_bytes(data)
    with open_llm(edited, tmp_path / "store") as llm:
        prompt = prompt_of(llm, count=100)
        llm.generate([prompt], GREEDY)
    data[-1000] ^= 1
    edited.write_bytes(data)
    with open_llm(edited, tmp_path / "store") as llm, open_llm(edited, None) as plain:
        assert llm.generate([prompt], GREEDY)[0].token_ids == plain.generate([prompt], GREEDY)[0].token_ids
        assert llm.stats()["disk_hit_tokens"] == 0
        assert llm.stats()["disk_foreign_records"] > 0


def test_options_are_checked(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(nb.ModelIOError, match="file"):
        open_llm(model_path, tmp_path / "file")
    with pytest.raises(nb.InvalidArgumentError, match="kv_store_path"):
        nb.LLM(model_path, kv_store_bytes=1 << 30)
    with pytest.raises(nb.InvalidArgumentError, match="kv_store_bytes"):
        nb.LLM(model_path, kv_store_path=tmp_path, kv_store_bytes=0)
    with pytest.raises(nb.InvalidArgumentError, match="kv_store_path"):
        nb.LLM(model_path, kv_store_path="")


def test_killed_while_writing(model_path: Path, tmp_path: Path) -> None:
    """A process that dies at any time leaves records that are right or none, and no files that stay for ever."""
    store = tmp_path / "store"
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    num_writes = 0
    num_rounds = 20 if os.environ.get("NANOBRAID_TEST_FULL") == "1" else 10
    for round_ in range(num_rounds):
        arguments = [sys.executable, "-c", SERVER, str(model_path), str(store), str(round_ * 7), str(text)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
            assert server.stdout is not None
            for _ in range(2 + round_ % 3):  # ready, and some answers
                num_writes += int(server.stdout.readline().strip() not in ("ready", "0"))
            time.sleep(0.011 * round_ % 0.1)
            server.send_signal(signal.SIGKILL)
    assert num_writes > num_rounds // 4, "the store was never written to"
    with open_llm(model_path, store) as llm, open_llm(model_path, None) as plain:
        span = len(plain.tokenizer.encode(TEXT)) - 300
        prompts = [prompt_of(plain, 173 * i % span, 300) for i in range(0, 7 * num_rounds, 7)]
        restored = llm.generate(prompts, GREEDY)
        assert [out.token_ids for out in restored] == [out.token_ids for out in plain.generate(prompts, GREEDY)]
        stats = llm.stats()
    assert stats["disk_hit_tokens"] > num_rounds // 2 * 256
    assert stats["disk_misses_torn"] == stats["disk_misses_checksum"] == 0, "files appear whole"
    names = [path.name for path in store.iterdir()]
    assert names and all(".kv" in name for name in names), "no temporary file is left"
