"""The command line: reads arguments, runs a command, and turns every error into one line and an exit code.

Generated text and results go to stdout, everything else to stderr. Exit codes: 0 success, 2 error, 130 interrupted by
Ctrl-C, 141 the reader of our output has gone.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from nanobraid import __version__, _logging
from nanobraid.commands import bench, bench_kv, chat, doctor, export, generate, inspect, models, pull, serve
from nanobraid.errors import InvalidArgumentError, NanobraidError

_COMMANDS = (generate, chat, serve, bench, bench_kv, export, inspect, doctor, pull, models)
_USAGE = {
    "generate": "nanobraid generate [PROMPT] [OPTIONS]",
    "export": "nanobraid export SRC -o FILE --dtype DTYPE [OPTIONS]",
    "inspect": "nanobraid inspect FILE [OPTIONS]",
    "pull": "nanobraid pull [NAME]",
    "serve": "nanobraid serve [MODEL] [OPTIONS]",
}


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments like every other error: in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        message = message.replace("argument COMMAND: invalid choice", "no such command")
        raise InvalidArgumentError(f"{message} (try '{self.prog} --help')")


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nanobraid",
        description="Runs open-weight language models on this machine.",
        epilog="'nanobraid COMMAND --help' explains a command. The default model is fetched when it is first used.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nanobraid {__version__}")
    _add_common(parser, None)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for module in _COMMANDS:
        name = module.__name__.rsplit(".", 1)[1].replace("_", "-")
        description = (module.__doc__ or "").strip()
        command = subparsers.add_parser(
            name,
            usage=_USAGE.get(name, f"nanobraid {name} [OPTIONS]"),
            help=description.splitlines()[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        _add_common(command, argparse.SUPPRESS)
        command.set_defaults(run=module.run)
    return parser


def _add_common(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Options that may stand before or after the command; there they must not overwrite the former's values."""
    group = parser.add_argument_group("messages")
    group.add_argument(
        "--log-level", choices=tuple(_logging.LEVELS), default=default, help="print log lines of this level and above"
    )
    group.add_argument("--debug", action="store_true", default=default or False, help="show the traceback of an error")


def _report(error: BaseException, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    message = str(error) if isinstance(error, NanobraidError) else f"internal: {type(error).__name__}: {error}"
    print(f"nanobraid: error: {' '.join(message.split())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments or os.environ.get("NANOBRAID_LOG") == "debug"
    try:
        try:
            parser = _build_parser()
            options = parser.parse_args(arguments)
            if options.command is None:
                parser.print_help(sys.stderr)
                return 2
            _logging.show_on_stderr(options.log_level or _env_level(), loading=sys.stderr.isatty())
            status = int(options.run(options))
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            sys.stdout.flush()
            return 130
    except BrokenPipeError:
        # Whatever is still buffered must not fail again when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # a user never sees a traceback unless asked for
        _report(error, debug)
        return 2


def _env_level() -> str:
    level = os.environ.get("NANOBRAID_LOG", "")
    return level if level in _logging.LEVELS else "warning"  # the core has already complained about another one
