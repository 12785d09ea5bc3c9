"""The methods: which format and policy each of them is, and which parameters it reads.

One table. A parameter that a method does not read must be left at its default: what is given is used or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanobraid import kv_policy
from nanobraid.errors import InvalidArgumentError
from nanobraid.kv_policy import KvPolicy
from nanobraid.sampling_params import require_int

ENGINE_BLOCK = 16  # tokens of a block of keys and values
MODES = ("int8", "int4", "mixed")
DEFAULTS: dict[str, Any] = {
    "window_size": 256,
    "block_size": 64,
    "chunk_size": 64,
    "keep_last": 256,
    "mode": "int8",
    "prefix_len": 32,
    "stride": 4,
    "keep_per_block": 16,
    "old_budget": 64,
    "sinks": 4,
}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: As users write it.
        uses: The parameters it reads.
        kv_dtype: Type of keys and values; None: that of the benchmark.
        policy: Makes the policy of its parameters; None: everything is kept.
        kind: How it is run: "engine" as it is; "recomputed", each token by a new request; "reserved", the engine with
            all memory of full contexts touched.
        advice: When to use it, in a sentence that holds whatever is measured.
    """

    name: str
    advice: str
    uses: tuple[str, ...] = ()
    kv_dtype: str | None = None
    policy: Callable[[Mapping[str, int]], KvPolicy] | None = None
    kind: str = "engine"


_WINDOWED = ("window_size", "prefix_len")
_TABLE = (
    Method(
        "no_cache",
        "The yardstick of time: every token computes the whole text again, so its cost grows with the square of the "
        "length. There is no reason to use it.",
        kind="recomputed",
    ),
    Method(
        "full_cache",
        "The yardstick of memory: each sequence owns the whole context from the beginning, whether it needs it or not. "
        "Its answers are those of paged_attention, which needs less.",
        kind="reserved",
    ),
    Method(
        "sliding_window",
        "Keeps memory and time per token constant, however long a text becomes. For streams whose meaning is local; "
        "what left the window cannot be asked for any more. Keep the sinks: predictions lean on the first tokens.",
        uses=("window_size", "sinks"),
        policy=lambda p: kv_policy.sliding_window(p["window_size"], p["sinks"]),
    ),
    Method(
        "prefix_window",
        "A window that also keeps the beginning, as long as the instructions are: for assistants whose rules must last "
        "while the conversation goes on.",
        uses=_WINDOWED,
        policy=lambda p: kv_policy.prefix_window(p["prefix_len"], p["window_size"]),
    ),
    Method(
        "strided_cache",
        "Every so many old blocks stay, so a part of everything can be found; memory still grows, more slowly. Which "
        "part stays is chance: for gist, never for facts.",
        uses=(*_WINDOWED, "stride"),
        policy=lambda p: kv_policy.strided(p["stride"], p["window_size"], p["prefix_len"]),
    ),
    Method(
        "block_cache",
        "As strided_cache, with longer pieces that stay together, farther apart.",
        uses=(*_WINDOWED, "block_size", "keep_per_block"),
        policy=lambda p: kv_policy.block(p["block_size"], p["keep_per_block"], p["window_size"], p["prefix_len"]),
    ),
    Method(
        "budget_cache",
        "As sliding_window, plus a fixed number of old tokens spread over the text: memory is constant, and something "
        "of everything stays.",
        uses=(*_WINDOWED, "old_budget"),
        policy=lambda p: kv_policy.budget(p["old_budget"], p["window_size"], p["prefix_len"]),
    ),
    Method(
        "quant_int8",
        "The first thing to try: half the memory of 16 bits, nothing is forgotten, at any length.",
        kv_dtype="int8",
    ),
    Method(
        "quant_int4",
        "For the longest contexts that must fit. Measure it on the model that is used: models with large key biases "
        "do not bear 4-bit keys.",
        kv_dtype="int4",
    ),
    Method(
        "quant_mixed",
        "Keys of 8 bits, values of 4: the small format for general use, because errors of keys cost far more than "
        "errors of values.",
        kv_dtype="mixed",
    ),
    Method(
        "paged_attention",
        "The engine as it is: blocks are taken when they are needed. Loses nothing and is the default; combine it "
        "with a quantized format before anything that forgets.",
    ),
    Method(
        "chunked_cache",
        "Experimental, not recommended: what is older than the window is seen as means of groups, which keep next to "
        "nothing of it. It costs summaries and forgets like a window.",
        uses=("chunk_size", "keep_last"),
        policy=lambda p: kv_policy.chunk_summary(p["keep_last"], p["chunk_size"]),
    ),
)
METHODS = {method.name: method for method in _TABLE}
NAMES = tuple(METHODS)
_MODE_OF = {"quant_int8": "int8", "quant_int4": "int4", "quant_mixed": "mixed"}


@dataclass(frozen=True)
class Case:
    """A method with its parameters, as plain data that goes to another process.

    Attributes:
        method: Name of the method.
        params: The parameters it reads.
        kv_dtype: Type of keys and values, or None for that of the benchmark.
        policy: Text of the policy, as `kv_policy.parse` takes it, or None.
        kind: See `Method`.
    """

    method: str
    params: dict[str, int] = field(default_factory=dict)
    kv_dtype: str | None = None
    policy: str | None = None
    kind: str = "engine"

    @property
    def label(self) -> str:
        """Name and parameters in one word."""
        inside = ", ".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.method}({inside})" if inside else self.method


def method_of(name: str) -> Method:
    """Raises InvalidArgumentError, with all names, where there is none of this name."""
    if not isinstance(name, str) or name not in METHODS:
        raise InvalidArgumentError(f"method must be one of {', '.join(NAMES)}, got {name!r}")
    return METHODS[name]


def make_case(name: str, **given: Any) -> Case:
    """A method with parameters; those left out have their defaults.

    Raises:
        InvalidArgumentError: There is no such method or parameter; a value is outside its range; or a parameter that
            this method does not read is not at its default.
    """
    method = method_of(name)
    for key in given:
        if key not in DEFAULTS:
            raise InvalidArgumentError(f"{key!r} is no parameter of a method: {', '.join(DEFAULTS)}")
    values = {**DEFAULTS, **given}
    for key, value in values.items():
        if key in method.uses or value == DEFAULTS[key] or (key == "mode" and value == _MODE_OF.get(name)):
            continue
        if key == "block_size" and name == "paged_attention" and value == ENGINE_BLOCK:
            continue  # true, and all it can be
        why = f"; its blocks have {ENGINE_BLOCK} tokens" if key == "block_size" else ""
        raise InvalidArgumentError(f"{key}={value!r} has no effect on {name}{why}: leave it out")
    params = {
        key: require_int(key, values[key], 0 if key in ("prefix_len", "sinks") else 1, 2**30, "an integer in range")
        for key in method.uses
    }
    policy = None
    if method.policy is not None:
        try:
            policy = str(method.policy(params))
        except InvalidArgumentError as error:
            shown = ", ".join(f"{key}={value}" for key, value in params.items())
            raise InvalidArgumentError(f"{name} with {shown}: {error}") from None
    return Case(name, params, method.kv_dtype, policy, method.kind)


def sweep(
    names: Sequence[str], window_sizes: Sequence[int], block_sizes: Sequence[int], chunk_sizes: Sequence[int]
) -> list[Case]:
    """Every method once, or once for each size where sizes are given for it.

    Raises:
        InvalidArgumentError: As `make_case`; or a method is named twice, or none is.
    """
    if not names or len(set(names)) < len(names):
        raise InvalidArgumentError(f"methods must be names, none of them twice, got {', '.join(names) or 'none'}")
    swept = {
        "sliding_window": ("window_size", window_sizes),
        "block_cache": ("block_size", block_sizes),
        "chunked_cache": ("chunk_size", chunk_sizes),
    }
    cases = []
    for name in names:
        method_of(name)
        parameter, sizes = swept.get(name, ("", ()))
        if name in swept and not sizes:
            raise InvalidArgumentError(f"{parameter}s must not be empty with the method {name}")
        if len(set(sizes)) < len(sizes):
            raise InvalidArgumentError(f"{parameter}s has a value twice: {list(sizes)}")
        cases += [make_case(name, **{parameter: size}) for size in sizes] if sizes else [make_case(name)]
    return cases
