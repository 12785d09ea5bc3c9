"""Talk with a model.

The conversation is remembered. Commands put prompts together from contexts that are
computed once and used again. /help lists them. Ctrl-C stops an answer;
at an empty prompt it leaves, as Ctrl-D does.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
from typing import Any

from nanobraid.commands import _chat_chunks, _options
from nanobraid.commands._terminal import TextOut, guesses, note
from nanobraid.errors import NanobraidError
from nanobraid.llm import LLM
from nanobraid.sampling_params import SamplingParams
from nanobraid.streaming import stream_line

_PROMPT = "> "
_HELP = f"""\
{_chat_chunks.HELP}
/help             this list
/exit             leave (also /quit)
Ctrl-C            stop an answer; at an empty prompt: leave
Ctrl-D            leave"""
_COMMAND = re.compile(r"/[a-z-]+\Z")  # /usr/bin is no command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--system", metavar="TEXT", help="instructions that precede the conversation")
    _options.add_model_options(parser)
    _options.add_sampling_options(parser, temperature=0.7, top_k=40, top_p=0.9, max_tokens=None)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    params = _options.make_sampling_params(options)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history for input())
    with _options.make_llm(options) as llm:
        chat = _Chat(llm, params, options.system)
        if interactive:
            config = llm.config
            kv = f"{config['kv_dtype']} KV of {llm.stats()['kv_bytes_per_token'] / 1e3:.1f} kB a token"
            note(f"{options.model} on {config['backend']}, {config['num_threads']} threads, {kv}. /help for help.")
            if layers := llm.stats()["streamed_layers"]:
                note(f"{layers} of {config['num_layers']} layers are read from disk for each token.")
        while (line := _read_line(interactive)) is not None:
            if line and not chat.turn(line):
                break
        if interactive:
            note(stream_line(llm.stats()))
    return 0 if interactive or not chat.failed else 2


def _read_line(interactive: bool) -> str | None:
    """One line of the user's; empty after Ctrl-C on a begun line, None when it is time to leave."""
    begun = ""

    def on_interrupt(number: int, frame: object) -> None:
        # Asked here, because the line is gone when input() raises.
        nonlocal begun
        readline: Any = sys.modules.get("readline")
        begun = readline.get_line_buffer() if readline is not None else ""
        raise KeyboardInterrupt

    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        return input(_PROMPT).strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not begun:
            return None
        note("")
        return ""
    finally:
        signal.signal(signal.SIGINT, previous)


class _Chat:
    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._chunks = _chat_chunks.ChunkCommands(llm, params, system)
        self._turns: list[dict[str, str]] = []
        self._out = TextOut()
        self.failed = False

    def turn(self, line: str) -> bool:
        """Handles a line; returns whether to go on."""
        command, _, argument = line.partition(" ")
        if command in ("/exit", "/quit") and not argument:
            return False
        num_before = len(self._turns)
        try:
            if _COMMAND.match(command):
                self._command(command, argument.strip())
            else:
                self._turns.append({"role": "user", "content": line})
                self._answer()
        except NanobraidError as error:
            del self._turns[num_before:]
            self.failed = True
            note(f"nanobraid: error: {' '.join(str(error).split())}")
        return True

    def _command(self, command: str, argument: str) -> None:
        if command == "/help":
            note(_HELP)
        elif command == "/clear":
            note(self._chunks.clear(argument))
            if not argument:
                self._turns.clear()
        elif self._chunks.knows(command):
            self._chunks.run(command, argument)
        else:
            self.failed = True
            note(f"Unknown command {command}. /help lists the commands.")

    @property
    def _opening(self) -> list[dict[str, str]]:
        system = self._chunks.system_text
        return [{"role": "system", "content": system}] if system else []

    def _answer(self) -> None:
        prompt = self._fitting_prompt()
        answer = ""
        stopped = False
        guessed = ""
        with contextlib.closing(self._llm.stream(prompt, self._params)) as pieces:
            try:
                for piece in pieces:
                    answer += piece.text
                    self._out.write(piece.text)
                    guessed = guesses(piece.metrics)
            except KeyboardInterrupt:
                stopped = True
        self._out.write("\n")
        if stopped:
            note("[stopped]")
        elif guessed and sys.stderr.isatty():
            note(f"[{guessed}]")
        # A stopped answer stays in the history as far as the user has seen it.
        self._turns.append({"role": "assistant", "content": answer})

    def _fitting_prompt(self) -> list[int]:
        """The conversation as tokens; the oldest turns are forgotten when it leaves too little room for an answer."""
        context = int(self._llm.config["max_model_len"])
        room = min(256, context // 4, self._params.max_tokens or context)
        forgotten = 0
        while True:
            prompt = self._llm.encode_chat(self._opening + self._turns)
            if len(prompt) + room <= context or len(self._turns) <= 2:
                break
            del self._turns[:2]
            forgotten += 2
        if forgotten:
            note(f"[the oldest {forgotten} messages no longer fit into the context and were forgotten]")
        return prompt
