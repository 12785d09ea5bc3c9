"""The commands of ``nanobraid chat`` that put prompts together from chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanobraid.chunked import ChunkedLLM, ChunkedOutput, ChunkType
from nanobraid.commands._chunk_view import guess_figures, memory_figures, show_chunks, show_figures
from nanobraid.commands._terminal import TextOut, note, printable
from nanobraid.composition import Blend, Reuse, reuse_options
from nanobraid.errors import FormatError, InvalidArgumentError, ModelIOError
from nanobraid.llm import LLM
from nanobraid.sampling_params import SamplingParams

HELP = """\
/system TEXT      the system message, of the conversation too
/context TEXT     add a context to the prompt of /infer; @FILE for the text of a file
/query TEXT       the question of that prompt
/infer            answer the question; the answer is kept as an output
/outputs          the answers that are kept, by number (also /output)
/use-output N     answer N becomes a context
/delete-output N  forget answer N
/chunks           all chunks: tokens, uses, hits and memory of keys and values (also /list)
/stats            counters, memory, and what /infer would cost now
/mode [M]         how contexts are reused: exact, isolated, blend, or blend RATIO
/save FILE        write chunks and outputs to a file
/load FILE        read such a file
/clear [WHAT]     forget the conversation and the contexts and question of /infer; or only
                  WHAT: system, context, query or outputs"""


class UsageError(InvalidArgumentError):
    """A command was given what it does not take."""


class ChunkCommands:
    """The prompt that the commands put together, and its chunks.

    Args:
        llm: The model.
        params: How answers are sampled.
        system: The system message so far.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._made: ChunkedLLM | None = None
        self._out = TextOut()
        self.system_text = system
        self._system: str | None = None
        self._contexts: list[str] = []
        self._query: str | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/context": self._add_context,
            "/query": self._set_query,
            "/infer": self._infer,
            "/output": self._show_outputs,
            "/outputs": self._show_outputs,
            "/use-output": self._use_output,
            "/delete-output": self._delete_output,
            "/chunks": self._show_chunks,
            "/list": self._show_chunks,
            "/stats": self._show_stats,
            "/mode": self._set_mode,
            "/save": self._save,
            "/load": self._load,
        }

    def knows(self, command: str) -> bool:
        """Whether there is such a command here."""
        return command in self._commands

    def run(self, command: str, argument: str) -> None:
        """Runs a command.

        Raises:
            NanobraidError: It cannot be done; nothing has changed.
        """
        self._commands[command](argument)

    @property
    def _chunked(self) -> ChunkedLLM:
        if self._made is None:  # a model without a chat template can still be talked about
            self._made = ChunkedLLM(self._llm)
        return self._made

    # ---- parts of the prompt ----

    def _set_system(self, text: str) -> None:
        if not text:
            note(f"System message: {self.system_text or 'none'}")
            return
        self._system = self._chunked.register_chunk(text, ChunkType.SYSTEM_PROMPT)
        self.system_text = text
        note(self._registered("System message", self._system))

    def _add_context(self, text: str) -> None:
        content = _text_of(text)
        metadata = {"file": text[1:]} if text.startswith("@") else None
        chunk_id = self._chunked.register_chunk(content, ChunkType.CONTEXT, metadata)
        self._contexts.append(chunk_id)
        note(self._registered(f"Context {len(self._contexts)}", chunk_id))

    def _set_query(self, text: str) -> None:
        if not text:
            raise UsageError("/query TEXT: the question is missing")
        self._query = self._chunked.register_chunk(text, ChunkType.QUERY)
        note(self._registered("Question", self._query))

    def _registered(self, what: str, chunk_id: str) -> str:
        return f"{what}: {self._chunked.get_chunk(chunk_id).token_count} tokens, {chunk_id[:8]}"

    def _parts(self) -> tuple[str, str, list[str]]:
        if self._query is None:
            raise UsageError("/infer: there is no question yet; /query TEXT sets it")
        if self._system is None:
            if not self.system_text:
                raise UsageError("/infer: there is no system message yet; /system TEXT sets it")
            self._system = self._chunked.register_chunk(self.system_text, ChunkType.SYSTEM_PROMPT)
        return self._system, self._query, self._contexts

    def clear(self, what: str) -> str:
        """Forgets parts of the prompt; returns what to say.

        Raises:
            UsageError: There is no such part.
        """
        if what == "outputs":
            handles = self._chunked.get_retained_outputs()
            for handle in handles:
                self._forget(handle)
            return f"{len(handles)} outputs are forgotten."
        if what not in ("", "system", "context", "query"):
            raise UsageError(f"/clear {printable(what, 40)}: there are system, context, query and outputs")
        if what == "system":
            self._system = self.system_text = None
            return "The system message is forgotten."
        if what in ("", "context"):
            self._contexts.clear()
        if what in ("", "query"):
            self._query = None
        return {"": "The conversation is forgotten.", "context": "The contexts are forgotten."}.get(
            what, "The question is forgotten."
        )

    # ---- answers ----

    def _infer(self, argument: str) -> None:
        _refuse_argument("/infer", argument)
        system, query, contexts = self._parts()
        final: ChunkedOutput | None = None
        stopped = False
        pieces = self._chunked.generate_from_chunks(
            system, query, contexts, self._params, stream=True, retain_output=True
        )
        with contextlib.closing(pieces):
            try:
                for piece in pieces:
                    self._out.write(piece.text)
                    final = piece.final_output
            except KeyboardInterrupt:
                stopped = True
        self._out.write("\n")
        if stopped or final is None or final.reuse is None:
            note("[stopped]")
            return
        reuse = final.reuse
        note(
            f"[output {final.retained_seq_id}: {len(final.token_ids)} tokens; {reuse.mode_served}: "
            f"{reuse.exact_prefix} prompt tokens from the prefix cache, {reuse.isolated} from chunks, "
            f"{reuse.recomputed + reuse.computed} computed; first token after {reuse.ttft_ms:.0f} ms]"
        )

    def _handle(self, command: str, argument: str) -> int:
        kept = self._chunked.get_retained_outputs()
        if not argument.isascii() or not argument.isdigit() or int(argument[:9]) not in kept:
            there = ", ".join(map(str, kept)) or "none"
            raise UsageError(
                f"{command} N: N is the number of an output, got {printable(argument, 40)!r}; there are: {there}"
            )
        return int(argument[:9])

    def _use_output(self, argument: str) -> None:
        handle = self._handle("/use-output", argument)
        kept = self._chunked.get_retained_outputs()[handle]
        if not kept.text:
            raise UsageError(f"/use-output {handle}: the answer is empty")
        chunk_id = self._chunked.register_output_chunk_from_retained(handle)
        self._contexts.append(chunk_id)
        note(self._registered(f"Context {len(self._contexts)}", chunk_id))

    def _delete_output(self, argument: str) -> None:
        handle = self._handle("/delete-output", argument)
        self._forget(handle)
        note(f"Output {handle} is forgotten.")

    def _forget(self, handle: int) -> None:
        chunk_id = self._chunked.get_retained_outputs()[handle].output_chunk_id
        self._chunked.release_retained_output(handle)
        others = [kept.output_chunk_id for kept in self._chunked.get_retained_outputs().values()]
        if chunk_id is not None and chunk_id not in others:
            self._chunked.delete_chunk(chunk_id)
            self._contexts = [context for context in self._contexts if context != chunk_id]

    def _show_outputs(self, argument: str) -> None:
        _refuse_argument("/outputs", argument)
        kept = self._chunked.get_retained_outputs()
        if not kept:
            note("There are no outputs. /infer makes one.")
        for handle, output in kept.items():
            origin = "approximate" if output.tainted_origin else "exact"
            note(f"{handle}: {output.completion_length} tokens, {origin}: {printable(output.text, 60)}")

    # ---- what there is ----

    def _show_chunks(self, argument: str) -> None:
        _refuse_argument("/chunks", argument)
        chunks = self._chunked.list_chunks()
        roles = []
        for chunk in chunks:
            here = ["system"] if chunk.chunk_id == self._system else []
            here += [f"context {i}" for i, c in enumerate(self._contexts, 1) if c == chunk.chunk_id]
            roles.append(here + (["query"] if chunk.chunk_id == self._query else []))
        show_chunks(chunks, roles, self._chunked.get_chunk_stats())

    def _show_stats(self, argument: str) -> None:
        _refuse_argument("/stats", argument)
        show_figures("Chunks", self._chunked.get_chunk_stats())
        show_figures("Memory", memory_figures(self._llm))
        if guessed := guess_figures(self._llm):
            show_figures("Guessed tokens", guessed)
        if self._query is not None and (self._system or self.system_text):
            show_figures("/infer would need", self._chunked.preview_composition(*self._parts()))

    def _set_mode(self, argument: str) -> None:
        if argument:
            self._chunked.mode = _mode_of(argument)
        reuse = self._chunked.mode
        options = reuse_options(reuse)
        ratio = f" {options['ratio']:g}" if "ratio" in options else ""
        note(f"Contexts are reused in the mode {options['reuse']}{ratio}.")

    # ---- files ----

    def _save(self, argument: str) -> None:
        path = _path_of("/save", argument)
        prompt = {"system": self._system, "contexts": self._contexts, "query": self._query}
        self._chunked.save(path, {"chat": {**prompt, "system_text": self.system_text}})
        count = len(self._chunked.list_chunks())
        note(f"{count} chunks and {len(self._chunked.get_retained_outputs())} outputs are in {path}.")

    def _load(self, argument: str) -> None:
        report = self._chunked.load(_path_of("/load", argument))
        prompt: Any = report.extra.get("chat") if isinstance(report.extra, dict) else None
        if isinstance(prompt, dict):
            ids = report.chunk_ids
            self._system = ids.get(str(prompt.get("system")))
            self._query = ids.get(str(prompt.get("query")))
            contexts = prompt.get("contexts")
            self._contexts = [ids[c] for c in contexts if c in ids] if isinstance(contexts, list) else []
            text = prompt.get("system_text")
            self.system_text = text if isinstance(text, str) else None
        note(f"{len(report.chunk_ids)} chunks and {len(report.outputs)} outputs were read.")


def _refuse_argument(command: str, argument: str) -> None:
    if argument:
        raise UsageError(f"{command} takes nothing, got {printable(argument, 40)!r}")


def _path_of(command: str, argument: str) -> Path:
    if not argument:
        raise UsageError(f"{command} FILE: the name of the file is missing")
    return Path(argument).expanduser()


def _text_of(argument: str) -> str:
    """A text, or what is in @FILE."""
    if not argument or argument == "@":
        raise UsageError("/context TEXT or /context @FILE: the text is missing")
    if not argument.startswith("@"):
        return argument
    path = Path(argument[1:]).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise ModelIOError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not text:
        raise UsageError(f"{path} is empty")
    return text


def _mode_of(argument: str) -> Reuse:
    name, _, ratio = argument.partition(" ")
    if name == "exact" and not ratio:
        return "exact"
    if name == "isolated" and not ratio:
        return "isolated"
    if name == "blend":
        try:
            reuse = Blend(float(ratio)) if ratio else Blend()
            reuse_options(reuse)
            return reuse
        except ValueError:
            pass
    raise UsageError(
        f"/mode {printable(argument, 40)}: there are exact, isolated, blend, and blend RATIO with a number in (0, 1]"
    )
