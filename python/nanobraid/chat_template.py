"""Chat templates: from messages to the prompt the model was trained on.

Two dangers are handled here. The template is code from a model file: it runs in a sandbox, in a child process with
limits (see _template_worker.py). And the messages come from users: whatever they spell, they never become control
tokens (see `ChatTemplate.encode`).
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanobraid._chat_inputs import (
    Message,
    check_messages,
    check_template_kwargs,
    check_tools,
    map_strings,
    strings_of,
)
from nanobraid.errors import ChatTemplateError, InvalidArgumentError
from nanobraid.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Message", "check_messages"]

# Isolated and without site-packages: a quick start that no environment variable can change.
_START = "import sys, runpy; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
_START_S = 20.0  # for starting the child, usually 0.05 s; not part of a template's deadline
_MEMORY_BYTES = 256 << 20
_MAX_CHARS = 16 << 20
_FIRST_MARK = 0x100000  # plane 16 is private use: no text has a meaning for these characters


class _Worker:
    """The child process. Restarted after a template had to be stopped, and in a forked process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def call(self, request: dict[str, Any], timeout_s: float, max_answer_bytes: int) -> dict[str, Any]:
        with self._lock:
            try:
                self._start()
                answer = self._exchange(json.dumps(request).encode(), timeout_s, max_answer_bytes)
            except BaseException:  # Ctrl-C too: an answer that nobody read would be taken for the next one's
                self.stop()
                raise
            if "error" in answer:
                self.stop()  # it may have grown to its limit of memory; a new one costs 50 ms
            return answer

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None or self._pid != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _start(self) -> None:
        if self._process is not None and self._pid == os.getpid() and self._process.poll() is None:
            return
        self.stop()
        folders: list[str] = []
        for package in ("jinja2", "markupsafe"):
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise ChatTemplateError(f"chat templates need the Python package {package}, which is not installed")
            folder = str(Path(spec.origin).parent.parent)
            if folder not in folders:
                folders.append(folder)
        script = str(Path(__file__).with_name("_template_worker.py"))
        # A session of its own: Ctrl-C in a terminal is for the program, not for the child.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, script, *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        self._pid = os.getpid()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self._exchange(b"", _START_S, 1 << 10)

    def _exchange(self, data: bytes, timeout_s: float, max_answer_bytes: int) -> dict[str, Any]:
        """Writes a request, if there is one, and reads an answer, both before the deadline."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + timeout_s
        unsent = memoryview(len(data).to_bytes(4, "big") + data if data else b"")
        answer = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if unsent:
                selector.register(process.stdin, selectors.EVENT_WRITE)
            while True:
                remaining = deadline - time.monotonic()
                events = selector.select(remaining) if remaining > 0 else []
                if not events:
                    raise ChatTemplateError(f"the chat template did not finish within {timeout_s:g} seconds")
                for key, _ in events:
                    if key.fileobj is process.stdin:
                        try:
                            unsent = unsent[os.write(process.stdin.fileno(), unsent) :]
                        except BrokenPipeError:
                            unsent = memoryview(b"")
                        if not unsent:
                            selector.unregister(process.stdin)
                        continue
                    block = os.read(process.stdout.fileno(), 1 << 16)
                    if not block:
                        raise ChatTemplateError(
                            "the chat template was stopped: it exceeded its limit of memory or processor time"
                        )
                    answer += block
                    if len(answer) >= 4:
                        size = int.from_bytes(answer[:4], "big")
                        if size > max_answer_bytes:
                            raise ChatTemplateError(f"the chat template produced more than {max_answer_bytes} bytes")
                        if len(answer) >= 4 + size:
                            result = json.loads(answer[4:])
                            assert isinstance(result, dict)
                            return result


_worker = _Worker()
atexit.register(_worker.stop)


def _printable(text: str) -> str:
    """One line without control characters: what a template says goes to logs and terminals."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:500]


class ChatTemplate:
    """A model's chat template (jinja2), rendered with a deadline and a memory limit.

    The environment is that of Hugging Face templates: `ImmutableSandboxedEnvironment` with ``trim_blocks`` and
    ``lstrip_blocks``, loop controls, the ``generation`` tag, ``tojson`` without HTML escapes, ``raise_exception`` and
    ``strftime_now``. Safe to use from several threads; renderings run one at a time.

    Args:
        source: The template.
        bos_token: Value of the template's variable ``bos_token``.
        eos_token: Value of the template's variable ``eos_token``.
        timeout_s: Seconds of wall-clock time that one rendering may take.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", timeout_s: float = 2.0) -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._timeout_s = timeout_s

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, timeout_s: float = 2.0) -> ChatTemplate:
        """Returns the chat template of a model.

        Raises:
            ChatTemplateError: The model has none.
        """
        if not tokenizer.chat_template:
            raise ChatTemplateError(
                "the model file has no chat template: use generate() with a prompt in the model's own format"
            )
        bos = tokenizer.bos_token_id
        eos = tokenizer.eos_token_ids
        return cls(
            tokenizer.chat_template,
            bos_token="" if bos is None else tokenizer.token_text(bos),
            eos_token=tokenizer.token_text(eos[0]) if eos else "",
            timeout_s=timeout_s,
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """Returns the prompt of a conversation as text. To run it, use `encode`: it keeps users' text harmless.

        Args:
            messages: The conversation, see `check_messages`.
            add_generation_prompt: End with the beginning of the assistant's answer.
            tools: What the model may call, in OpenAI's form (``{"type": "function", "function": {...}}``): the
                template's variable ``tools``. Whether it describes them is the template's business.
            template_kwargs: Further variables of the template, such as ``{"enable_thinking": False}``.
            continue_final_message: End inside the last message, the assistant's, so that the model goes on with it. To
                be given with ``add_generation_prompt=False``.

        Raises:
            InvalidArgumentError: `messages` is not a conversation, `tools` are none, `template_kwargs` names a variable
                that the template gets from elsewhere, or there is no message to continue.
            ChatTemplateError: The template is wrong, refuses the conversation, or exceeds a limit.
        """
        inputs = _Inputs.checked(messages, tools, template_kwargs, add_generation_prompt, continue_final_message)
        end_mark = next(_free_chars(self.source, *inputs.strings())) if continue_final_message else None
        return self._render([inputs], end_mark)[0]

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Returns the prompt of a conversation as token ids; only the template's own text makes control tokens.

        To know afterwards which characters came from the user, every character of the messages, tools and further
        variables with which a control token could begin (``<`` for ``<|im_end|>``) is rendered as a private-use
        character that occurs nowhere else. Templates may trim, cut and repeat such text; what they add themselves keeps
        its plain characters. The prompt is cut at the control tokens that are spelled in plain characters, and the text
        between them is encoded, with the private characters turned back, as text only.

        A template that looks for such characters in a message (``</think>``) or escapes them would render something
        else. This is noticed by comparing with a rendering of the messages as they are; then only the first character
        of spelled-out control tokens is replaced. If even that changes what such a template does, the message stays
        text: harmless, though perhaps not what the template intended.

        Args:
            messages: The conversation, see `check_messages`.
            tokenizer: The tokenizer of the same model.
            add_generation_prompt: As for `render`, and so the following.
            tools: What the model may call.
            template_kwargs: Further variables of the template.
            continue_final_message: End inside the last message.

        Raises:
            InvalidArgumentError, ChatTemplateError: As `render`.
        """
        token_ids: list[int] = []
        for part in self.parts(
            messages,
            tokenizer,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            template_kwargs=template_kwargs,
            continue_final_message=continue_final_message,
        ):
            if isinstance(part, int):
                token_ids.append(part)
            else:
                token_ids += tokenizer.encode(
                    part, add_special_tokens=False, parse_special=False, at_start=not token_ids
                )
        return token_ids

    def parts(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int | str]:
        """Returns the prompt of a conversation as control tokens and the texts between them, none of them empty.

        The texts are text only: encoded one by one, they and the control tokens are what `encode` returns.

        Args:
            messages: As for `encode`, and so the following.
            tokenizer: The tokenizer of the same model.
            add_generation_prompt: End the prompt with the beginning of the assistant's answer.
            tools: What the model may call.
            template_kwargs: Further variables of the template.
            continue_final_message: End inside the last message.

        Raises:
            InvalidArgumentError, ChatTemplateError: As `encode`.
        """
        inputs = _Inputs.checked(messages, tools, template_kwargs, add_generation_prompt, continue_final_message)
        specials = [text for text in tokenizer.special_tokens if text]
        first_chars = {text[0] for text in specials}
        free = _free_chars(self.source, *specials, *inputs.strings())
        end_mark = next(free) if continue_final_message else None
        to_chars: dict[int, str] = {}
        if not first_chars & set().union(*inputs.strings()):
            marked = self._render([inputs], end_mark)[0]
        else:
            marks = dict(zip(sorted(first_chars), free, strict=False))
            to_marks = str.maketrans(marks)
            to_chars = str.maketrans({mark: char for char, mark in marks.items()})
            plain, marked = self._render([inputs, inputs.mapped(lambda text: text.translate(to_marks))], end_mark)
            if marked.translate(to_chars) != plain:
                spelled = _SpelledTokens(specials)
                marked = self._render([inputs.mapped(lambda text: spelled.mark(text, marks))], end_mark)[0]
        if not specials:
            return [marked] if marked else []
        cut = re.compile("(" + "|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True)) + ")")
        return [
            tokenizer.special_tokens[part] if i % 2 == 1 else part.translate(to_chars)
            for i, part in enumerate(cut.split(marked))
            if part
        ]

    def _render(self, all_inputs: list[_Inputs], end_mark: str | None) -> list[str]:
        variables = [{**inputs.variables(end_mark), **self._tokens} for inputs in all_inputs]
        num_chars = sum(len(text) for inputs in all_inputs for text in inputs.strings())
        max_chars = _MAX_CHARS + 8 * num_chars
        request = {
            "template": self.source,
            "variables": variables,
            "memory_bytes": _MEMORY_BYTES + 64 * num_chars,
            "cpu_s": math.ceil(self._timeout_s) + 1,
            "max_chars": max_chars,
        }
        # JSON spells a character in at most 12 bytes (a surrogate pair).
        answer = _worker.call(request, self._timeout_s, 12 * max_chars + 1024)
        if "error" in answer:
            raise ChatTemplateError(_printable(str(answer["error"])))
        return [_cut_at(end_mark, str(text)) for text in answer["texts"]]


def _free_chars(*texts: str) -> Iterator[str]:
    """Private-use characters that are in none of the texts."""
    taken = set().union(*texts)
    return (chr(code) for code in range(_FIRST_MARK, sys.maxunicode - 1) if chr(code) not in taken)


def _cut_at(end_mark: str | None, text: str) -> str:
    """The rendering up to the mark behind the last message; a space follows it unless the template trims."""
    if end_mark is None:
        return text
    end = text.rfind(end_mark)
    if end < 0:
        raise ChatTemplateError("the chat template leaves out the final message, which was to be continued")
    return text[:end] if text.startswith(" ", end + 1) else text[:end].rstrip()


@dataclass(frozen=True)
class _Inputs:
    """What a template is given, checked."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]
    add_generation_prompt: bool

    @classmethod
    def checked(
        cls,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> _Inputs:
        conversation = check_messages(messages)
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidArgumentError(
                    "continue_final_message cannot be together with add_generation_prompt: an answer is either begun "
                    "or continued"
                )
            last = conversation[-1]
            if last["role"] != "assistant" or not isinstance(last["content"], str):
                raise InvalidArgumentError(
                    f"continue_final_message needs a last message of the assistant with text as content, got one of "
                    f"role {last['role']!r}"
                )
        return cls(
            conversation, check_tools(tools), check_template_kwargs(template_kwargs), bool(add_generation_prompt)
        )

    def strings(self) -> list[str]:
        """Every text of the user's."""
        return list(strings_of([self.messages, self.tools, *self.template_kwargs.values()]))

    def mapped(self, change: Callable[[str], str]) -> _Inputs:
        """The same with every text changed, but for the names of variables."""
        messages, tools, values = map_strings([self.messages, self.tools, list(self.template_kwargs.values())], change)
        names = self.template_kwargs
        return _Inputs(messages, tools, dict(zip(names, values, strict=True)), self.add_generation_prompt)

    def variables(self, end_mark: str | None) -> dict[str, Any]:
        """The variables of a template; with the mark, and a space to see trimming, behind the last message."""
        messages = self.messages
        if end_mark is not None:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + end_mark + " "}]
        return {
            "messages": messages,
            "add_generation_prompt": self.add_generation_prompt,
            "tools": self.tools,
            "documents": None,
            **self.template_kwargs,
        }


class _SpelledTokens:
    """Finds control tokens that are spelled out in a text, and the beginning of one at its end."""

    def __init__(self, specials: list[str]) -> None:
        # A look-ahead, so that overlapping ones are all found.
        self._begin = re.compile("(?=" + "|".join(re.escape(text) for text in specials) + ").", re.DOTALL)
        self._prefixes = {text[:n] for text in specials for n in range(1, len(text))}
        self._longest = max(len(text) for text in specials)

    def mark(self, text: str, marks: Mapping[str, str]) -> str:
        chars = list(text)
        for match in self._begin.finditer(text):
            chars[match.start()] = marks[text[match.start()]]
        for start in range(max(0, len(text) - self._longest), len(text)):
            if text[start:] in self._prefixes:  # the next message might complete it
                chars[start] = marks[text[start]]
        return "".join(chars)
