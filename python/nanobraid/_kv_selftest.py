"""Whether a format of keys and values is sound for a model: measured when the two first meet, remembered afterwards.

A quantized format changes what a model predicts, a little as a rule, ruinously for some models. The core reads a text
with the format and with f32 (`cpp/engine/kv_selftest.h`); here the result meets the format's limit and goes to a file
of the cache. Its name follows from all that the result does: the model's bytes, the kernels, the text, the core.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from nanobraid import __version__, _core
from nanobraid._logging import logger
from nanobraid._options import require_one_of
from nanobraid.errors import ModelIOError, UnsupportedError, core_errors
from nanobraid.models._cache import kv_selftest_dir
from nanobraid.tokenizer import Tokenizer

_LAYOUT = 1  # raised when equal input must be measured again although the version is the same
_NUMBERS = ("cost", "kl", "floor_kl", "worst_kl", "agreement", "seconds")
_COUNTS = ("tokens", "positions")
_TEXTS = ("model", "kv_dtype", "backend", "dtype")


def is_tested(kv_dtype: str) -> bool:
    """Whether a format is one that a model may not bear."""
    return kv_dtype in _core.kv_limits()


def check_kv_format(
    model: _core.Model, tokenizer: Tokenizer, kv_dtype: str, name: str, *, force: bool
) -> dict[str, Any] | None:
    """What a format costs a model; None for one that need not be measured.

    Args:
        model: Loaded with a ``digest_directory``; no engine runs it yet.
        tokenizer: Of the model.
        kv_dtype: The format, or ``auto``.
        name: Of the model, for people.
        force: A format that costs too much is a warning instead of an error.

    Raises:
        UnsupportedError: The format costs more than its limit.
    """
    if not is_tested(kv_dtype):
        return None
    limit = _core.kv_limits()[kv_dtype]
    tokens = tokenizer.encode(_core.selftest_text())
    with core_errors():
        place = _place(model.kv_fingerprint(kv_dtype), tokens)
        found = _recall(place)
        remembered = found is not None
        if found is None:
            found = _measure(model, kv_dtype, tokens, name)
            _remember(place, found)
        is_within = found["cost"] <= limit
        if not is_within:
            text = _core.kv_refusal(kv_dtype, found["cost"], name, "force_kv_dtype=True (--force-kv-dtype)")
            if not force:
                raise UnsupportedError(text)
            logger.warning("forced: %s", text)
    if not found["positions"]:
        logger.warning("%s: the context is too short to test %s keys and values", name, kv_dtype)
    elif not remembered:
        logger.info("%s: %s KV costs %.2g nats (limit %g)", name, kv_dtype, found["cost"], limit)
    figures = {key: found[key] for key in (*_NUMBERS, *_COUNTS)}
    return {**figures, "limit": limit, "within_limit": is_within, "remembered": remembered}


def measured(path: str, kv_dtype: str) -> dict[str, Any]:
    """What a format costs the model of a file on this machine's best device, measured now.

    Raises:
        InvalidArgumentError: The format is not one that is tested.
        NanobraidError: As `LLM`.
    """
    require_one_of("kv_dtype", kv_dtype, tuple(_core.kv_limits()))
    tokens = Tokenizer(path).encode(_core.selftest_text())
    with core_errors():
        found = _measure(_core.Model(path), kv_dtype, tokens, Path(path).name)
    return {**found, "limit": _core.kv_limits()[kv_dtype]}


def result_line(found: dict[str, Any]) -> str:
    """One line for people."""
    limit = _core.kv_limits().get(found["kv_dtype"], math.inf)
    if not found["positions"]:
        verdict = "not tested: the context is too short"
    else:
        verdict = f"cost {found['cost']:.2g} nats, limit {limit:g}" + ("" if found["cost"] <= limit else ": refused")
    return f"{found['kv_dtype']} keys and values on {found['backend']} with {found['dtype']} activations: {verdict}"


def known_results() -> list[dict[str, Any]]:
    """All results that the cache remembers, of any model and version, by model and format."""
    try:
        found = [_recall(path) for path in sorted(kv_selftest_dir().glob("*.json"))]
    except (OSError, ModelIOError):
        return []
    return sorted((row for row in found if row is not None), key=lambda row: (row["model"], row["kv_dtype"]))


def _measure(model: _core.Model, kv_dtype: str, tokens: list[int], name: str) -> dict[str, Any]:
    facts = {"model": name, "kv_dtype": kv_dtype, "backend": model.backend, "dtype": model.dtype}
    return {**facts, **model.measure_kv_format(kv_dtype, tokens)}


def _place(fingerprint: str, tokens: list[int]) -> Path | None:
    """The file of a result; None without a cache."""
    digest = hashlib.sha256()
    parts = ["nanobraid KV self-test", str(_LAYOUT), __version__, _core_build(), fingerprint, json.dumps(tokens)]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.encode())
    try:
        return kv_selftest_dir() / f"{digest.hexdigest()}.json"
    except ModelIOError:
        return None


def _core_build() -> str:
    """Other kernels may have other mistakes: a core that was built again measures again."""
    status = os.stat(_core.__file__)
    return f"{status.st_size} {status.st_mtime_ns}"


def _recall(path: Path | None) -> dict[str, Any] | None:
    """What was written, if all of it is there; None otherwise."""
    if path is None:
        return None
    try:
        entry = json.loads(path.read_bytes())
        found = entry["found"]
        whole = isinstance(found, dict) and entry["sha256"] == _checksum(found)
        whole = whole and all(type(found[key]) is float and not math.isnan(found[key]) for key in _NUMBERS)
        whole = whole and all(type(found[key]) is int for key in _COUNTS)
        whole = whole and all(type(found[key]) is str for key in _TEXTS)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if whole else None


def _remember(path: Path | None, found: dict[str, Any]) -> None:
    """Writes a result, as a whole or not at all; whatever is in the way, it is only measured again."""
    if path is None:
        return
    text = json.dumps({"found": found, "sha256": _checksum(found)})
    import tempfile  # takes time that only the first load of a format has

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")  # mode 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        logger.info("the self-test of KV formats is not remembered: %s", error)


def _checksum(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
