"""Options that several commands share. Each is the Python argument of the same name, with dashes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nanobraid.errors import DownloadError, InvalidArgumentError
from nanobraid.kv_policy import NAMES
from nanobraid.llm import LLM
from nanobraid.models import DEFAULT_MODEL, Offer, ensure
from nanobraid.sampling_params import SamplingParams
from nanobraid.speculative import METHODS, SpeculativeConfig
from nanobraid.streaming import StreamingConfig

_MODEL_FIELDS = (
    "device",
    "dtype",
    "kv_dtype",
    "kv_policy",
    "force_kv_dtype",
    "num_threads",
    "max_model_len",
    "max_num_seqs",
    "max_batch_tokens",
    "max_waiting",
    "kv_cache_bytes",
    "enforce_eager",
    "fusion",
    "trace_path",
    "kv_store_path",
    "kv_store_bytes",
)
# Options that begin with --stream-, and the fields of `StreamingConfig`.
_STREAM_FIELDS = {
    "keep_first": "keep_first_k",
    "keep_last": "keep_last_k",
    "prefetch": "prefetch_layers",
    "cache_dir": "cache_dir",
    "cache_bytes": "cache_bytes",
}
_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_tokens",
    "seed",
    "ignore_eos",
    "stop_token_ids",
    "logit_bias",
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds --model and the options of `LLM`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="a .braid or GGUF file, a Hugging Face folder, org/name[:quant] or a known name (default: %(default)s)",
    )
    group.add_argument("-y", "--yes", action="store_true", help="download a model from a hub without asking")
    group.add_argument(
        "--device", default="auto", help="auto, cpu, or a backend that 'nanobraid doctor' lists (default: auto)"
    )
    group.add_argument("--dtype", default="auto", help="activations: auto, int8, bf16 or f32 (default: auto)")
    group.add_argument(
        "--kv-dtype", default="auto", help="keys and values: auto, bf16, f16, f32, int8, mixed or int4 (default: auto)"
    )
    group.add_argument(
        "--kv-policy",
        default="full",
        metavar="POLICY",
        help=f"keys and values that requests keep and see: {', '.join(NAMES)}, with options as in "
        "'sliding_window(1024, sinks=4)' (default: full)",
    )
    group.add_argument(
        "--force-kv-dtype",
        action="store_true",
        help="use --kv-dtype even if its self-test says that it harms the model",
    )
    group.add_argument("--num-threads", "--threads", type=int, metavar="N", help="default: one per usable processor")
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest prompt plus answer (default: what the file states)"
    )
    group.add_argument("--max-num-seqs", type=int, default=16, metavar="N", help="requests in one step (default: 16)")
    group.add_argument(
        "--max-batch-tokens", type=int, default=512, metavar="N", help="tokens in one step (default: 512)"
    )
    group.add_argument("--max-waiting", type=int, metavar="N", help="requests that may wait (default: no limit)")
    group.add_argument(
        "--kv-cache-bytes", type=int, metavar="N", help="for keys and values (default: at most a quarter of memory)"
    )
    group.add_argument(
        "--enforce-eager",
        action="store_true",
        help="on a GPU, start kernels one by one, not a whole step at once (CUDA graphs)",
    )
    group.add_argument(
        "--fusion",
        default="auto",
        help="run operators as one fused kernel: auto (where it is accurate for the model), on or off (default: auto)",
    )
    group.add_argument("--trace-path", metavar="FILE", help="write a trace of the steps for ui.perfetto.dev")
    group.add_argument(
        "--kv-store-path", metavar="DIR", help="keep keys and values there, so that they survive a restart"
    )
    group.add_argument("--kv-store-bytes", type=int, metavar="N", help="most that they may take there (default: 8 GiB)")
    group.add_argument(
        "--speculative",
        metavar="METHOD",
        help=f"guess coming tokens and verify several in a step, which changes no token: {', '.join(METHODS)}",
    )
    group.add_argument(
        "--num-draft-tokens", type=int, metavar="N", help="most tokens guessed for a request in a step (default: 4)"
    )
    group.add_argument(
        "--draft-model", metavar="MODEL", help="the model that guesses, of --speculative draft; named as --model"
    )
    group.add_argument(
        "--stream-weights",
        type=_stream_budget,
        metavar="BYTES",
        help="most memory for weights, or 'least'; layers that do not fit are read in each step, from disk or, "
        "by a GPU, from host memory",
    )
    group.add_argument("--stream-keep-first", type=int, metavar="N", help="layers kept in memory, from the first on")
    group.add_argument("--stream-keep-last", type=int, metavar="N", help="layers kept in memory, up to the last")
    group.add_argument("--stream-prefetch", type=int, metavar="N", help="layers read ahead (default: 2)")
    group.add_argument("--stream-cache-dir", metavar="DIR", help="where packed layers are kept (default: in the cache)")
    group.add_argument(
        "--stream-cache-bytes",
        type=int,
        metavar="N",
        help="most that packed layers may take there; the oldest unused ones go (default: no limit)",
    )


def add_sampling_options(
    parser: argparse.ArgumentParser, *, temperature: float, top_k: int, top_p: float, max_tokens: int | None
) -> None:
    """Adds the fields of `SamplingParams`, with the defaults of a command."""
    group = parser.add_argument_group("sampling")
    tokens = "as many as fit" if max_tokens is None else str(max_tokens)
    group.add_argument(
        "--max-tokens",
        type=_max_tokens,
        default=max_tokens,
        metavar="N",
        help=f"most tokens to generate, or 'none' for as many as fit (default: {tokens})",
    )
    group.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    group.add_argument("--top-k", type=int, default=top_k, metavar="K", help="-1 is off (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=top_p, metavar="P", help="1 is off (default: %(default)s)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off (default: 0)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off (default: 1)")
    group.add_argument("--seed", type=int, metavar="N", help="for repeatable draws (default: random)")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    group.add_argument(
        "--stop-token-ids", type=_token_ids, default=(), metavar="ID,ID", help="further tokens that end the text"
    )
    group.add_argument(
        "--logit-bias", type=_logit_bias, metavar="ID=X,ID=X", help="added to the logits of these tokens"
    )


def make_llm(options: argparse.Namespace, **overrides: Any) -> LLM:
    """Loads the model that the options ask for; asks before it is downloaded from a hub."""
    values = {field: getattr(options, field) for field in _MODEL_FIELDS}
    values["speculative_config"] = _speculative_config(options)
    values["streaming_config"] = _streaming_config(options)
    return LLM(model_path(options), **{**values, **overrides})


def _speculative_config(options: argparse.Namespace) -> SpeculativeConfig | None:
    """What --speculative and the options of it say."""
    given = {
        field: getattr(options, field)
        for field in ("num_draft_tokens", "draft_model")
        if getattr(options, field) is not None
    }
    if options.speculative == "draft" and options.draft_model is not None:
        given["draft_model"] = ensure(options.draft_model, confirm=None if options.yes else _ask)
    if options.speculative is not None:
        return SpeculativeConfig(method=options.speculative, **given)
    if given:
        raise InvalidArgumentError(f"--{next(iter(given)).replace('_', '-')} is given without --speculative")
    return None


def _streaming_config(options: argparse.Namespace) -> StreamingConfig | None:
    """What --stream-weights and the options of it say."""
    given = {name: getattr(options, f"stream_{name}") for name in _STREAM_FIELDS}
    given = {_STREAM_FIELDS[name]: value for name, value in given.items() if value is not None}
    if options.stream_weights is None:
        if given:
            name = next(flag for flag, field in _STREAM_FIELDS.items() if field in given)
            raise InvalidArgumentError(f"--stream-{name.replace('_', '-')} is given without --stream-weights")
        return None
    return StreamingConfig(budget_bytes=options.stream_weights or None, **given)


def model_path(options: argparse.Namespace) -> Path:
    """Finds the model that --model names; asks before it is downloaded from a hub, unless there is a --yes."""
    return ensure(options.model, confirm=None if options.yes else _ask)


def _ask(offer: Offer) -> None:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise DownloadError(
            f"{offer.repo} is not on this machine, and there is no terminal to ask whether to download {offer}: run "
            f"'nanobraid pull {offer.repo}' first, or add --yes"
        )
    print(f"Download {offer}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise DownloadError(f"{offer.repo} was not downloaded")


def make_sampling_params(options: argparse.Namespace) -> SamplingParams:
    """Returns the sampling parameters that the options ask for; made before the model is loaded, to fail early."""
    return SamplingParams(**{field: getattr(options, field) for field in _SAMPLING_FIELDS})


def require_at_least(flag: str, value: int, low: int) -> int:
    """Checks an integer option of a command.

    Raises:
        InvalidArgumentError: It is smaller than `low`.
    """
    if value < low:
        raise InvalidArgumentError(f"{flag} must be an integer >= {low}, got {value}")
    return value


def _max_tokens(text: str) -> int | None:
    return None if text == "none" else int(text)


def _stream_budget(text: str) -> int:
    """0 stands for 'least'."""
    value = 0 if text == "least" else int(text)
    if text != "least" and value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, or 'least', got {text!r}")
    return value


def _token_ids(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _logit_bias(text: str) -> dict[int, float]:
    pairs = (part.split("=") for part in text.split(",") if part)
    return {int(token_id): float(value) for token_id, value in pairs}


# argparse names the function in its message: "invalid int value: 'x'".
_max_tokens.__name__ = "int"
_stream_budget.__name__ = "number of bytes"
_token_ids.__name__ = "token id list"
_logit_bias.__name__ = "logit bias"
