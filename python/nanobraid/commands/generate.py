"""Continue a prompt.

The prompt is an argument, or standard input if there is none (or it is '-'). The
continuation, without the prompt, goes to stdout as it is generated.

  nanobraid generate "The capital of France is"
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from nanobraid.commands import _options
from nanobraid.commands._terminal import TextOut, guesses, note
from nanobraid.errors import InvalidArgumentError
from nanobraid.guided import Guided
from nanobraid.streaming import stream_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue")
    _options.add_model_options(parser)
    _options.add_sampling_options(parser, temperature=0.0, top_k=-1, top_p=1.0, max_tokens=64)
    what = parser.add_argument_group("guided decoding (needs 'nanobraid[guided]')").add_mutually_exclusive_group()
    what.add_argument("--json-schema", metavar="FILE|JSON", help="the answer is JSON that fits this schema")
    what.add_argument("--regex", metavar="PATTERN", help="the answer matches from beginning to end")
    what.add_argument("--choice", action="append", metavar="TEXT", help="the answer is one of these; repeat the option")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    prompt = _read_prompt(options.prompt)
    params = replace(_options.make_sampling_params(options), guided=_guided(options))
    with _options.make_llm(options) as llm:
        out = TextOut()
        start = time.perf_counter()
        first = start
        num_tokens = 0
        guessed = ""
        with closing(llm.stream(prompt, params)) as pieces:
            for piece in pieces:
                out.write(piece.text)
                if num_tokens == 0:
                    first = time.perf_counter()
                num_tokens += len(piece.token_ids)
                guessed = guesses(piece.metrics)
        end = time.perf_counter()
        out.write("\n")
        if sys.stderr.isatty():
            config = llm.config
            speed = f", {(num_tokens - 1) / (end - first):.1f} tokens/s" if num_tokens > 1 else ""
            note(
                f"[{num_tokens} tokens, first after {1e3 * (first - start):.0f} ms{speed}; {config['backend']}, "
                f"{config['dtype']} activations, {config['kv_dtype']} KV, {config['num_threads']} threads"
                f"{'; ' if guessed else ''}{guessed}]"
            )
            if line := stream_line(llm.stats()):
                note(f"[{line}]")
    return 0


def _guided(options: argparse.Namespace) -> Guided | None:
    if options.json_schema is not None:
        given: str = options.json_schema
        if given.lstrip().startswith("{"):
            return Guided.json_schema(given)
        try:
            return Guided.json_schema(Path(given).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgumentError(f"--json-schema: cannot read {given}: {error}") from None
    if options.regex is not None:
        return Guided.regex(options.regex)
    return None if options.choice is None else Guided.choice(options.choice)


def _read_prompt(argument: str | None) -> str:
    if argument is None and sys.stdin.isatty():
        raise InvalidArgumentError("no prompt: give one as an argument or on standard input")
    if argument not in (None, "-"):
        prompt = str(argument)
    else:
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(f"standard input is not UTF-8 text: {error}") from None
        prompt = prompt.removesuffix("\n")  # the line end that echo and editors add
    if not prompt:
        raise InvalidArgumentError("the prompt is empty: at least one token is needed to begin with")
    return prompt
