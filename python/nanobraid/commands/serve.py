"""Serve a model over HTTP with the interfaces of OpenAI and Anthropic.

  nanobraid serve
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}]}'

Needs 'nanobraid[server]'. The page at / talks to the model and shows what it does. SIGTERM
or Ctrl-C finishes what runs (see --drain-timeout) and ends with exit code 0; a second one
ends at once. --config reads options from a TOML file, their names without the dashes;
what the command line says comes first.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from nanobraid.chunk_cache import BLOCK_TOKENS
from nanobraid.commands import _options
from nanobraid.commands._terminal import note
from nanobraid.errors import InvalidArgumentError, UnsupportedError
from nanobraid.llm import LLM

_ENVIRONMENT_KEY = "NANOBRAID_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("served", nargs="?", metavar="MODEL", help="the same as --model")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="0 for any free one (default: %(default)s)")
    group.add_argument(
        "--served-model-name", nargs="+", default=[], metavar="NAME", help="what requests and answers call the model"
    )
    group.add_argument(
        "--api-key",
        nargs="+",
        default=[],
        metavar="KEY",
        help=f"requests need one of these keys; also in the environment variable {_ENVIRONMENT_KEY}, with commas",
    )
    group.add_argument(
        "--allowed-origins", nargs="+", default=[], metavar="URL", help="web pages that may use it, or '*' (CORS)"
    )
    group.add_argument(
        "--max-body-bytes", type=int, default=16 << 20, metavar="N", help="longest request (default: 16 MiB)"
    )
    group.add_argument("--request-timeout", type=float, metavar="S", help="seconds a request may take (default: any)")
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that running requests are given at the end (default: %(default)g)",
    )
    group.add_argument(
        "--tool-call-parser", metavar="NAME", help="hermes, qwen3_coder, llama3_json, mistral (default: by model)"
    )
    group.add_argument(
        "--reasoning",
        choices=("auto", "on", "off"),
        default="auto",
        help="text in think tags goes to reasoning_content (default: if the model has such tags)",
    )
    group.add_argument("--reasoning-field", action="store_true", help="send it as 'reasoning' too")
    group.add_argument("--strict", action="store_true", help="refuse fields that are in no interface")
    group.add_argument("--no-page", action="store_true", help="no page at /")
    group.add_argument("--no-access-log", action="store_true", help="no line for every request")
    group.add_argument("--json-log", action="store_true", help="log lines as JSON")
    group.add_argument("--config", metavar="FILE", help="a TOML file with options")
    _options.add_model_options(parser)
    parser.set_defaults(max_waiting=1024, parser=parser)
    for action in parser._actions:
        if action.dest == "max_waiting":
            action.help = "requests that may wait; more are answered with 503 (default: 1024)"


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    try:
        import orjson  # noqa: F401
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
        import uvloop  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"the server needs the package {error.name}: pip install 'nanobraid[server]'") from None
    if options.config is not None:
        options = _with_file(options)
    if options.served is not None:
        options.model = options.served
    return _serve(options)


def _serve(options: argparse.Namespace) -> int:
    from nanobraid.async_engine import AsyncEngine
    from nanobraid.server import running
    from nanobraid.server.app import create_app
    from nanobraid.server.settings import Settings

    keys = [*options.api_key, *(key for key in os.environ.get(_ENVIRONMENT_KEY, "").split(",") if key)]
    settings = Settings(
        served_model_names=tuple(options.served_model_name),
        api_keys=tuple(dict.fromkeys(keys)),
        allowed_origins=tuple(options.allowed_origins),
        max_body_bytes=options.max_body_bytes,
        request_timeout_s=options.request_timeout,
        drain_timeout_s=options.drain_timeout,
        strict=options.strict,
        tool_call_parser=options.tool_call_parser,
        reasoning={"auto": None, "on": True, "off": False}[options.reasoning],
        reasoning_field=options.reasoning_field,
        page=not options.no_page,
        log_requests=not options.no_access_log,
    )
    if not 0 <= options.port <= 65535:
        raise InvalidArgumentError(f"--port must be from 0 to 65535, got {options.port}")
    is_local = options.host in running.LOOPBACK
    running.set_up_logs(as_json=options.json_log)
    with running.bound_socket(options.host, options.port) as listener, _options.make_llm(options) as llm:
        engine = AsyncEngine(llm)
        hosts = frozenset(("127.0.0.1", "[::1]", "localhost")) if is_local and not settings.api_keys else None
        app = create_app(engine, settings, model=options.model, allowed_hosts=hosts)
        if not is_local:
            what = (
                "no API key is set: anyone who reaches it can use it" if not settings.api_keys else "without encryption"
            )
            note(f"Warning: listening at {options.host}, {what}. See SECURITY.md.")

        def started(port: int) -> None:
            _introduce(llm, app.service.name, _url(options.host, port), has_key=bool(settings.api_keys))

        running.serve(app, listener, started=started)
    return 0


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
    return f"http://{shown}:{port}"


def _introduce(llm: LLM, name: str, url: str, *, has_key: bool) -> None:
    config, stats = llm.config, llm.stats()
    key = " \\\n    -H 'authorization: Bearer YOUR_KEY'" if has_key else ""
    note(
        f"{name}: {config['architecture']}, {config['num_layers']} layers, {config['weight_bytes'] / 1e6:.0f} MB of "
        f"weights, {config['backend']} kernels, {config['num_threads']} threads\n"
        f"KV cache: {BLOCK_TOKENS * stats['blocks_total']} tokens ({stats['kv_bytes'] / 2**20:.0f} MiB, "
        f"{config['kv_dtype']}, {stats['kv_bytes_per_token'] / 1e3:.1f} kB a token), "
        f"at most {config['max_model_len']} a request\n{_streaming(config, stats)}"
        f"Ready at {url} (the page), {url}/v1 (OpenAI), {url} (Anthropic). Try:\n\n"
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\\n"
        f'    -d \'{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}\'\n'
    )
    sys.stderr.flush()


def _streaming(config: dict[str, Any], stats: dict[str, Any]) -> str:
    if not stats["streamed_layers"]:
        return ""
    source = "host memory" if config["backend"].startswith("cuda") else "disk"
    return (
        f"Weights: {stats['weight_resident_bytes'] / 1e6:.0f} MB in memory; {stats['streamed_layers']} of "
        f"{config['num_layers']} layers are read from {source} in each step\n"
    )


def _with_file(options: argparse.Namespace) -> argparse.Namespace:
    """The options with those of the file, which come before defaults and behind the command line."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        text = Path(options.config).read_text(encoding="utf-8")
        values = toml.loads(text)
    except (OSError, UnicodeDecodeError, toml.TOMLDecodeError) as error:
        raise InvalidArgumentError(f"--config: cannot read {options.config}: {error}") from None
    parser: argparse.ArgumentParser = options.parser
    actions = {
        flag.lstrip("-"): action for action in parser._actions for flag in action.option_strings if flag != "--config"
    }
    arguments: list[str] = []
    for name, value in values.items():
        action = actions.get(name.replace("_", "-"))
        if action is None or name in ("help", "h", "debug", "log-level"):
            raise InvalidArgumentError(f"--config: {options.config} has {name!r}, which is no option of 'serve'")
        flag = action.option_strings[-1]
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise InvalidArgumentError(f"--config: {name} must be true or false, got {value!r}")
            arguments += [flag] if value else []
        elif isinstance(value, bool | dict):
            raise InvalidArgumentError(f"--config: {name} must be a text or a number, got {value!r}")
        else:
            arguments += [flag, *map(str, value if isinstance(value, list) else [value])]
    from_file = parser.parse_args(arguments)
    defaults = parser.parse_args([])
    merged = vars(options).copy()
    for name, value in vars(from_file).items():
        if name in merged and merged[name] == getattr(defaults, name):
            merged[name] = value
    return argparse.Namespace(**merged)
