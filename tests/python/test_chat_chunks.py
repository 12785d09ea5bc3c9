"""The commands of ``nanobraid chat`` that put prompts together from chunks, each driven by a script."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_threads import THREADS
from test_cli import Terminal, run

import nanobraid as nb
from nanobraid.commands import _chunk_view

CHAT = ("chat", "--temperature", "0", "--max-tokens", "8", "--threads", str(THREADS), "--max-model-len", "1024")
PARAMS = nb.SamplingParams(temperature=0, max_tokens=8)
SYSTEM = "You answer briefly."
BOB = "Bob is 42 years old and lives in Paris. He likes tea, long walks and his cat Alice."
ALICE = "Alice is a cat of seven years."
QUERY = "How old is Bob?"
PARTS = [f"/system {SYSTEM}", f"/context {BOB}", f"/query {QUERY}"]


def chat(*lines: str, fails: bool = False, arguments: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """What a script gets: lines of answers, lines of notes."""
    done = run(*CHAT, *arguments, stdin="\n".join(lines) + "\n")
    assert done.returncode == (2 if fails else 0), done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def answer(llm: nb.LLM, mode: str, contexts: list[str], query: str = QUERY) -> nb.ChunkedOutput:
    with nb.ChunkedLLM(llm, mode=mode, cache_salt="chat") as chunked:  # type: ignore[arg-type]
        return chunked.generate(SYSTEM, query, contexts, PARAMS)


def test_a_prompt_is_put_together_and_answered(llm: nb.LLM) -> None:
    exact = answer(llm, "exact", [BOB])
    isolated = answer(llm, "isolated", [BOB, ALICE])
    out, notes = chat(*PARTS, "/infer", f"/context {ALICE}", "/mode isolated", "/infer", "/infer", "/outputs")
    assert out == [exact.text, isolated.text, isolated.text]
    assert notes[0].startswith("System message: 4 tokens, ")
    assert notes[1].startswith("Context 1: 23 tokens, ")
    assert notes[2].startswith("Question: 5 tokens, ")
    assert re.match(
        r"\[output 1: \d+ tokens; exact: 0 prompt tokens from the prefix cache, 0 from chunks, 48 ", notes[3]
    )
    assert notes[4].startswith("Context 2: 8 tokens, ")
    assert notes[5] == "Contexts are reused in the mode isolated."
    assert re.match(r"\[output 3: .* isolated: \d+ prompt tokens .*, 31 from chunks, \d+ computed; first", notes[7])
    assert notes[8] == f"1: {len(exact.token_ids)} tokens, exact: {exact.text}"
    assert notes[10] == f"3: {len(isolated.token_ids)} tokens, approximate: {isolated.text}"


def test_answers_become_contexts_and_are_forgotten(llm: nb.LLM) -> None:
    first = answer(llm, "exact", [BOB])
    flat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{BOB}\n\n{first.text}\n\nIs it so?"}]
    out, notes = chat(
        *PARTS, "/infer", "/use-output 1", "/query Is it so?", "/infer", "/delete-output 1", "/infer", "/output"
    )
    assert out[:2] == [first.text, llm.chat(flat, PARAMS).text]
    assert out[2] == answer(llm, "exact", [BOB], "Is it so?").text
    assert notes[4].startswith("Context 2: ")
    assert notes[7] == "Output 1 is forgotten."
    assert [note.partition(":")[0] for note in notes[9:]] == ["2", "3"]


def test_the_system_message_is_one_for_both_and_plain_text_is_conversation(llm: nb.LLM) -> None:
    talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who are you?"}]
    out, notes = chat(f"/system {SYSTEM}", "Who are you?", "/system", "/query Who are you?", "/infer")
    assert out == [llm.chat(talk, PARAMS).text] * 2
    assert notes[1] == f"System message: {SYSTEM}"
    given, _ = chat("/query Who are you?", "/infer", arguments=("--system", SYSTEM))
    assert given == out[:1]


def test_chunks_and_stats_show_true_figures(llm: nb.LLM) -> None:
    script = ["/chunks", *PARTS, f"/context {BOB}", "/mode isolated", "/infer", "/infer", "/chunks", "/stats", "/list"]
    _, notes = chat(*script)
    assert notes[0].startswith("There are no chunks.")
    at = next(i for i, note in enumerate(notes) if note.startswith("4 chunks"))  # the output is one
    size = llm.chunks.bytes_for(23)
    assert re.match(rf"4 chunks, KV {size / 1e6:.1f} of [\d.]+ MB \[\.{{30}}\]", notes[at])
    rows = {line.split()[0]: re.split(r"  +", line.strip()) for line in notes[at + 2 : at + 6]}
    assert rows["context"][1:2] + rows["context"][3:] == [
        "context 1, context 2", "23", "4", "3", f"{size / 1e6:.1f} MB", BOB[:50],
    ]  # fmt: skip
    assert rows["query"][6] == "-"
    split = (re.split(r"  +", line.strip(), maxsplit=1) for line in notes if line.startswith("  "))
    figures = {row[0]: row[1] for row in split if len(row) > 1}
    assert figures["cache_hits"] == "3"  # the second one of the first prompt, and both of the second
    assert figures["cache_misses"] == "1"
    assert figures["kv_bytes"] == str(size)
    assert figures["isolated"] == "46"
    assert figures["to_encode"] == "0"
    assert figures["num_runs"] == "3"
    assert notes.count(notes[at]) == 2  # /list is /chunks


def test_modes(llm: nb.LLM) -> None:
    modes = ["/mode", "/mode blend", "/mode blend 0.5", "/mode isolated", "/mode exact"]
    _, notes = chat(*modes)
    assert [note.removeprefix("Contexts are reused in the mode ") for note in notes] == [
        "exact.", "blend 0.15.", "blend 0.5.", "isolated.", "exact.",
    ]  # fmt: skip
    wrong_ones = ("fast", "blend 2", "blend x", "exact 0.5", "isolated now", "blend nan")
    _, notes = chat(*(f"/mode {wrong}" for wrong in wrong_ones), fails=True)
    for wrong, note in zip(wrong_ones, notes, strict=True):
        assert note.startswith(f"nanobraid: error: /mode {wrong}: there are exact, isolated")


def test_files_are_contexts(tmp_path: Path, llm: nb.LLM) -> None:
    file = tmp_path / "a file.txt"
    file.write_text(f"{BOB}\n\n{ALICE}\n")
    out, _ = chat(PARTS[0], f"/context @{file}", PARTS[2], "/mode isolated", "/infer")
    assert out == [answer(llm, "isolated", [file.read_text()]).text]
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, says in (
        ("none", "cannot be read"),
        ("empty", "is empty"),
        ("binary", "not UTF-8"),
        ("", "cannot be read"),
    ):
        _, (note,) = chat(f"/context @{tmp_path / name}", fails=True)
        assert says in note


def test_save_and_load(tmp_path: Path, llm: nb.LLM) -> None:
    file = tmp_path / "saved.json"
    out, notes = chat(*PARTS, "/mode isolated", "/infer", "/use-output 1", f"/save {file}", "/infer")
    assert notes[-2] == f"4 chunks and 1 outputs are in {file}."
    assert {chunk["content"] for chunk in json.loads(file.read_text())["chunks"]} == {SYSTEM, BOB, QUERY, out[0]}
    again, notes = chat(f"/load {file}", "/mode isolated", "/infer", "/outputs", "/clear outputs", "/infer", "/outputs")
    assert notes[0] == "4 chunks and 1 outputs were read."
    assert again[0] == out[1]
    assert notes[3].startswith("1: ")
    assert again[1] == out[0]  # without the output as a context
    assert notes[5] == "2 outputs are forgotten."
    file.write_text("{}")
    wrong = {
        f"/load {file}": "not written by save", "/load /nowhere/x": "cannot be read", "/load": "missing",
        "/save": "missing", "/save /nowhere/x": "cannot be written", f"/save {tmp_path}": "cannot be written",
    }  # fmt: skip
    _, notes = chat(*wrong, fails=True)
    for (line, says), note in zip(wrong.items(), notes, strict=True):
        assert note.startswith("nanobraid: error: ")
        assert says in note, line


def test_clear_forgets_what_it_says(llm: nb.LLM) -> None:
    alone = answer(llm, "exact", []).text
    out, notes = chat(*PARTS, "/clear context", "/infer", "/clear", PARTS[2], "/infer")
    assert out == [alone, alone]
    assert notes[3] == "The contexts are forgotten."
    assert notes[5] == "The conversation is forgotten."
    _, notes = chat(
        *PARTS, "/clear query", "/infer", "/clear", "/infer", PARTS[2], "/clear system", "/infer", fails=True
    )
    assert ["no question yet" in note for note in notes[4:7]] == [True, False, True]
    assert "no system message yet" in notes[-1]
    _, (note,) = chat("/clear everything", fails=True)
    assert "system, context, query and outputs" in note


WRONG = {
    "/infer": "no question yet",
    "/infer now": "/infer takes nothing, got 'now'",
    "/query": "question is missing",
    "/context": "text is missing",
    "/context @": "text is missing",
    "/use-output": "N is the number of an output, got ''; there are: none",
    "/use-output 1": "there are: none",
    "/use-output -1": "got '-1'",
    "/use-output ²": "got '²'",
    "/delete-output 99999999999999999999": "there are: none",
    "/delete-output x": "got 'x'",
    "/chunks all": "takes nothing",
    "/stats all": "takes nothing",
    "/outputs all": "takes nothing",
    "/context " + "word " * 1100: "content is too long",
}


def test_wrong_commands_are_one_line_and_change_nothing(model_path: Path) -> None:
    out, notes = chat(*WRONG, "/chunks", fails=True)
    assert out == []
    for (line, says), note in zip(WRONG.items(), notes[:-1], strict=True):
        assert note.startswith("nanobraid: error: "), line
        assert says in note, line
    assert notes[-1].startswith("There are no chunks.")


def test_unknown_commands_and_paths(llm: nb.LLM) -> None:
    out, notes = chat("/fly to the moon", "/Query", "/exit now", fails=True)
    assert out == [llm.chat([{"role": "user", "content": "/Query"}], PARAMS).text]
    assert notes == [f"Unknown command {name}. /help lists the commands." for name in ("/fly", "/exit")]
    out, notes = chat("/usr/bin is a folder.", "/quit", "not reached")
    assert (len(out) > 0, notes) == (True, [])
    _, notes = chat("/help")
    text = "\n".join(notes)
    for name in [
        "system",
        "context",
        "query",
        "infer",
        "outputs",
        "use-output",
        "delete-output",
        "chunks",
        "stats",
        "mode",
        "save",
        "load",
        "clear",
        "help",
        "exit",
    ]:
        assert f"/{name}" in text


@pytest.fixture
def terminal(model_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(*CHAT)
    terminal.read_until("> ")
    yield terminal
    terminal.close()


def test_on_a_terminal_chunks_are_drawn_and_an_answer_can_be_stopped(terminal: Terminal) -> None:
    for line in (f"/system {SYSTEM}", f"/context {BOB}", "/query Tell me a very long story."):
        terminal.write(line + "\n")
        terminal.read_until("\n> ")
    terminal.write("/chunks\n")
    drawn = terminal.read_until("\n> ")
    assert "3 chunks, KV 0.0 of" in drawn
    assert "╺━" in drawn or "──" in drawn  # a line of rich's
    assert "context 1" in drawn
    terminal.write("/infer\n")
    assert "[output 1:" in terminal.read_until("\n> ")
    terminal.write("/exit\n")
    assert terminal.wait() == 0


def test_texts_cannot_draw_on_the_terminal(llm: nb.LLM, capsys: pytest.CaptureFixture[str]) -> None:
    with nb.ChunkedLLM(llm, cache_salt="view") as chunked:
        chunked.register_chunk("\x1b[31mred [bold]x[/bold]", "context")
        _chunk_view.show_chunks(chunked.list_chunks(), [[]], chunked.get_chunk_stats())
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "[bold]x[/bold]" in shown
