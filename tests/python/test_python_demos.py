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
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)
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
