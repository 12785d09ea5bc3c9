"""The child process in which chat templates run; started by chat_template.py, never imported by the package.

A template comes with a model file and is untrusted. The jinja2 sandbox keeps it from reaching Python, but not from
looping for ever or multiplying a string by ten billion, often inside one C call that nothing in the same process could
stop. So it runs here, under limits of memory and processor time, and the parent kills this process at the deadline.

Protocol, on stdin and stdout: a length of 4 bytes (big-endian), then that much JSON. One ready message first, then one
answer per request. The end of stdin ends the process.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_MIB = 1 << 20


class _Refusal(jinja2.TemplateError):
    """Raised by a template through ``raise_exception``."""


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks answers for training; here it only gives out its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja2's own filter: that one escapes characters for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _vm_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 256 * _MIB


def _set_limits(memory_bytes: int, cpu_s: int) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft_cpu = int(usage.ru_utime + usage.ru_stime) + cpu_s
    for what, wanted in ((resource.RLIMIT_AS, _vm_bytes() + memory_bytes), (resource.RLIMIT_CPU, soft_cpu)):
        hard = resource.getrlimit(what)[1]
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(what, (soft, hard))


def _render(request: dict[str, Any]) -> dict[str, Any]:
    try:
        template = _compile(request["template"])
        texts = [template.render(**variables) for variables in request["variables"]]
    # A template can do anything wrong: TypeError, UndefinedError, OverflowError, SecurityError, ...
    except Exception as error:
        return {"error": _describe(error, request)}
    if sum(len(text) for text in texts) > request["max_chars"]:
        return {"error": f"the chat template produced more than {request['max_chars']} characters"}
    return {"texts": texts}


def _describe(error: Exception, request: dict[str, Any]) -> str:
    match error:
        case jinja2.TemplateSyntaxError():
            return f"the chat template is wrong at line {error.lineno}: {error.message}"
        case _Refusal():
            return f"the chat template refused the conversation: {error.message}"
        case MemoryError():
            return f"the chat template needed more than its {request['memory_bytes'] // _MIB} MiB of memory"
        case RecursionError():
            return "the chat template nests too deeply"
    return f"the chat template failed: {type(error).__name__}: {str(error)[:1000]}"


def _send(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    sys.stdout.buffer.write(len(data).to_bytes(4, "big") + data)
    sys.stdout.buffer.flush()


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send({"ready": True})
    while len(head := sys.stdin.buffer.read(4)) == 4:
        request = json.loads(sys.stdin.buffer.read(int.from_bytes(head, "big")))
        _set_limits(request["memory_bytes"], request["cpu_s"])
        answer = _render(request)
        try:
            _send(answer)
        except MemoryError as error:
            _send({"error": _describe(error, request)})


if __name__ == "__main__":
    _main()
