"""The demos in Python, run as a user runs them; each asserts what it claims."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nanobraid as nb

DEMO = Path(__file__).resolve().parents[2] / "demo"


def run(name: str, *arguments: str | Path, stdin: str = "", fails: bool = False) -> tuple[str, str]:
    command = [sys.executable, DEMO / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode != 0) == fails, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_four_agents_share_one_document(model_path: Path, llm: nb.LLM) -> None:
    tokens = 600
    text, _ = run("multi_agent", "--context-tokens", tokens, "--max-tokens", 8)
    first, _, *rows, last = text.splitlines()
    size = re.match(rf"document: {tokens} tokens, ([\d.]+) MB of keys and values, computed once in \d+ ms", first)
    assert size is not None
    assert float(size[1]) == pytest.approx(llm.chunks.bytes_for(tokens) / 1e6, abs=0.1)
    assert len(rows) == 4
    for row in rows:
        times = re.match(r"(\w+) +(\d+) ms +(\d+) ms +([\d.]+) MB  \S", row)
        assert times is not None, row
        assert int(times[3]) < 0.7 * int(times[2])
    ratio = re.search(r"([\d.]+) times that$", last)
    assert ratio is not None
    assert float(ratio[1]) < 1.3


def test_passages_that_come_up_again_are_not_computed_again(model_path: Path) -> None:
    question = "How do I read a file from a zip archive?"
    text, _ = run("rag_demo", "--mode", "isolated", "--words", 60, "--max-tokens", 8, question, question)
    known = [int(n) for n in re.findall(r"isolated: first token after \d+ ms; (\d) of 4 passages known", text)]
    assert known == [0, 4]
    counts = re.findall(r"tokens: (\d+) exact prefix, (\d+) from chunks, (\d+) computed again, (\d+) computed", text)
    assert all(int(row[1]) > 200 > int(row[3]) for row in counts)
    blend, _ = run("rag_demo", "--words", 60, "--max-tokens", 8, question)
    assert "mode blend" in blend
    assert re.search(r", [1-9]\d* computed again", blend)


def test_passages_of_a_folder_are_ranked(model_path: Path, tmp_path: Path) -> None:
    for i, text in enumerate(("Cats sleep all day.", "The harbour of Bergen freezes never.", "Dogs bark at night.")):
        (tmp_path / f"{i}.txt").write_text(text)
    arguments = ("--folder", tmp_path, "--passages", 1, "--mode", "exact", "--max-tokens", 16)
    text, _ = run("rag_demo", *arguments, "Does the harbour of Bergen freeze?")
    assert text.startswith("3 passages, mode exact")
    answer = text.splitlines()[3]
    assert re.search("harbou?r|Bergen|freez", answer), text
    _, error = run("rag_demo", "--folder", tmp_path / "nowhere", fails=True)
    assert re.fullmatch(r"rag_demo: error: .*nowhere.*\n", error)


def test_a_conversation_about_a_document(model_path: Path, tmp_path: Path) -> None:
    document = tmp_path / "notes.txt"
    document.write_text("Bob is 42 years old and lives in Paris. " * 6)
    script = "Where does Bob live?\nAre you sure?\n/clear\nWhere does Bob live?\n/system You are a poet.\nWho is Bob?\n"
    arguments = ("--document", document, "--temperature", "0", "--max-tokens", "12")
    text, notes = run("chat_chunked", *arguments, stdin=script + "/cache\n/stats\n/fly\n/exit\nnot reached\n")
    first, *_ = answers = text.splitlines()
    assert "Paris" in first
    assert answers.count(first) >= 2
    lines = notes.splitlines()
    reuse = [
        re.match(r"\[isolated: (\d+) cached, (\d+) from chunks, (\d+) computed; first", line) for line in lines[:4]
    ]
    chunks = {int(found[2]) for found in reuse if found}
    assert len(chunks) == 1  # in every turn the whole document
    assert chunks.pop() > 60
    assert any("context" in line and "MB  'Bob is 42" in line for line in lines)
    assert any(line.startswith("cache_hits") for line in lines)
    assert lines[-1].startswith("There are /system")
    _, error = run("chat_chunked", "--document", tmp_path / "nowhere", fails=True)
    assert "nowhere" in error


def test_methods_of_a_cache_give_the_same_answers(model_path: Path) -> None:
    text, _ = run("basic_benchmark", "--max-tokens", 3)
    _, *rows = text.splitlines()
    found = [re.match(r"(\w+) +(\d+) +([\d.]+) +(\d+) ms +([\d.]+) MB  (yes|no)$", row) for row in rows]
    assert [row[1] for row in found if row] == ["no_cache", "full_cache", "paged_attention", "quant_int8"]
    assert {row[2] for row in found if row} == {"9"}  # three prompts, three tokens each
    assert [row[6] for row in found[:3] if row] == ["yes"] * 3
    cache = [float(row[5]) for row in found if row]
    assert cache[0] == 0 and cache[1] > cache[2] > cache[3] > 0
    _, error = run("basic_benchmark", "--max-tokens", 0, fails=True)
    assert re.fullmatch(r"basic_benchmark: error: max_new_tokens must be .*\n", error)


def test_fewer_bits_take_less_memory(model_path: Path) -> None:
    text, _ = run("quantized_cache", "--modes", "int8", "mixed", "--max-tokens", 6)
    rows = [re.match(r"(\w+) +([\d.]+) MB 6 tokens(?:, +(\d+) % alike)?: \S", line) for line in text.splitlines()]
    assert [row[1] for row in rows if row] == ["auto", "int8", "mixed"]
    full, int8, mixed = (float(row[2]) for row in rows if row)
    assert int8 == pytest.approx(full * 8.25 / 16, rel=0.05)
    assert mixed == pytest.approx(full * 6.6 / 16, rel=0.05)


def test_a_comprehensive_benchmark_writes_its_report(model_path: Path, tmp_path: Path) -> None:
    methods = ("--methods", "full_cache", "paged_attention", "sliding_window")
    small = ("--max-tokens", 2, "--long", 2, "--text-tokens", 64, "--agreement-tokens", 2, "--needle-lengths", 64)
    text, _ = run("comprehensive_benchmark", *methods, *small, "--output", tmp_path)
    lines = (tmp_path / "kv.csv").read_text().splitlines()
    assert [line.split(",")[0].strip('"').split("(")[0] for line in lines[1:]] == [
        "full_cache", "paged_attention", "sliding_window", "sliding_window",
    ]  # fmt: skip
    assert "Peak memory of paged_attention against contiguous reservation" in text
    for name in ("kv.md", "kv.json", "kv-memory.svg", "kv-windows.svg", "kv-needles.svg"):
        assert (tmp_path / name).stat().st_size > 300, name
