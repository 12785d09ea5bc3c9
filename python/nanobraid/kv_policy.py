"""Which keys and values of a request are kept and seen: all, none, or by a rule of positions.

A policy bounds the memory of a long context, at a price in quality. Every token keeps its true position. Whatever does
not see all that precedes it is never put into the prefix cache, so it cannot reach a request without a policy; and a
policy that drops nothing of a text changes no token of it.

    nb.SamplingParams(kv_policy="sliding_window(192, sinks=4)")
    nb.LLM("smollm2-135m", kv_policy=nb.kv_policy.budget(512))
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from nanobraid.errors import InvalidArgumentError

_BLOCK = 16
_MOST = 2**30


@dataclass(frozen=True)
class _Option:
    name: str
    default: int | None = None
    low: int = 1
    multiple: int = 1


_WINDOW = _Option("window", 256)
_PREFIX = _Option("prefix", 0, low=0)

# The one table of policies: names, options in order, and what is said of them to users.
_POLICIES: dict[str, tuple[_Option, ...]] = {
    "full": (),
    "none": (),
    "sliding_window": (_Option("window"), _Option("sinks", 4, low=0)),
    "prefix_window": (_Option("prefix", low=0), _Option("window")),
    "strided": (_Option("stride"), _WINDOW, _PREFIX),
    "block": (
        _Option("block_size", low=_BLOCK, multiple=_BLOCK),
        _Option("keep", low=_BLOCK, multiple=_BLOCK),
        _WINDOW,
        _PREFIX,
    ),
    "budget": (_Option("tokens", low=_BLOCK, multiple=_BLOCK), _WINDOW, _PREFIX),
    "chunk_summary": (_WINDOW, _Option("group", 64, low=_BLOCK, multiple=_BLOCK)),
}

NAMES = tuple(_POLICIES)


@dataclass(frozen=True)
class KvPolicy:
    """A policy and its options, as the functions of this module and `parse` make it.

    Attributes:
        name: One of `NAMES`.
        options: Every option of the policy by name, in order, in tokens (`stride`: in blocks of 16 tokens).
    """

    name: str
    options: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in _POLICIES:
            raise InvalidArgumentError(f"kv_policy must be one of {', '.join(NAMES)}, got {self.name!r}")
        given = dict(self.options)
        known = _POLICIES[self.name]
        for name in given:
            if name not in {option.name for option in known}:
                allowed = ", ".join(option.name for option in known) or "no options"
                raise InvalidArgumentError(f"kv_policy {self.name} has no option {name!r}: {allowed}")
        complete = []
        for option in known:
            value = given.get(option.name, option.default)
            if value is None:
                raise InvalidArgumentError(f"kv_policy {self.name} needs the option {option.name}")
            if type(value) is not int or not option.low <= value <= _MOST or value % option.multiple != 0:
                which = f"a multiple of {option.multiple}" if option.multiple > 1 else "an integer"
                raise InvalidArgumentError(
                    f"kv_policy {self.name}: {option.name} must be {which} in [{option.low}, 2**30], got {value!r}"
                )
            complete.append((option.name, value))
        object.__setattr__(self, "options", tuple(complete))
        if self.name == "block" and self["keep"] > self["block_size"]:
            raise InvalidArgumentError(
                f"kv_policy block: keep must not exceed block_size ({self['block_size']}), got {self['keep']}"
            )

    def __getitem__(self, option: str) -> int:
        return dict(self.options)[option]

    def __str__(self) -> str:
        """As `parse` takes it, with every option."""
        known = _POLICIES[self.name]
        inside = [
            str(value) if known[i].default is None else f"{name}={value}"
            for i, (name, value) in enumerate(self.options)
        ]
        return f"{self.name}({', '.join(inside)})" if inside else self.name

    @property
    def key_rule(self) -> tuple[str, int, int, int, int]:
        """What the engine is told: rule, prefix, window, period and keep (see cpp/ops/key_policy.h)."""
        of = dict(self.options)
        rules = {
            "sliding_window": ("window", of.get("sinks", 0), 0, 0),
            "prefix_window": ("window", of.get("prefix", 0), 0, 0),
            "strided": ("strided", of.get("prefix", 0), of.get("stride", 0), 0),
            "block": ("block", of.get("prefix", 0), of.get("block_size", 0), of.get("keep", 0)),
            "budget": ("budget", of.get("prefix", 0), 0, of.get("tokens", 0) // _BLOCK),
            "chunk_summary": ("summary", 0, of.get("group", 0), 0),
        }
        rule, prefix, period, keep = rules.get(self.name, (self.name, 0, 0, 0))
        return (rule, prefix, of.get("window", 1), period, keep)


def full() -> KvPolicy:
    """Everything is kept: the default."""
    return KvPolicy("full")


def none() -> KvPolicy:
    """Nothing is kept from one token to the next: all is computed again. For comparisons."""
    return KvPolicy("none")


def sliding_window(window: int, sinks: int = 4) -> KvPolicy:
    """Each token sees the first `sinks` tokens and the last `window`, itself included. Memory stays constant.

    Source: Xiao et al. 2023 (StreamingLLM), with true positions.
    """
    return KvPolicy("sliding_window", (("window", window), ("sinks", sinks)))


def prefix_window(prefix: int, window: int) -> KvPolicy:
    """Each token sees the first `prefix` tokens, such as a system prompt, and the last `window`."""
    return KvPolicy("prefix_window", (("prefix", prefix), ("window", window)))


def strided(stride: int, window: int = 256, prefix: int = 0) -> KvPolicy:
    """Of what is older than the window every `stride`-th block of 16 tokens stays."""
    return KvPolicy("strided", (("stride", stride), ("window", window), ("prefix", prefix)))


def block(block_size: int, keep: int, window: int = 256, prefix: int = 0) -> KvPolicy:
    """Of what is older than the window the last `keep` tokens of each `block_size` stay (multiples of 16)."""
    return KvPolicy("block", (("block_size", block_size), ("keep", keep), ("window", window), ("prefix", prefix)))


def budget(tokens: int, window: int = 256, prefix: int = 0) -> KvPolicy:
    """Of what is older than the window `tokens` stay (a multiple of 16). Memory stays constant.

    Blocks of 16 tokens stay by a score that knows nothing of the question: how often 2 divides the number of the block
    (counted from 1), younger ones first among equals; what stays is spread evenly.
    """
    return KvPolicy("budget", (("tokens", tokens), ("window", window), ("prefix", prefix)))


def chunk_summary(window: int = 256, group: int = 64) -> KvPolicy:
    """Experimental: what is older than the window is seen as one mean key and value for each `group` of tokens.

    A summary is made once, of un-rotated keys, stands in the middle of its group and weighs as much as `group` keys.
    On the default model hardly better than dropping those tokens (KL 0.63 against 0.70 on texts of 1,024 tokens).
    """
    return KvPolicy("chunk_summary", (("window", window), ("group", group)))


def parse(policy: KvPolicy | str) -> KvPolicy:
    """A policy from its name, with options in brackets: ``"sliding_window(192, sinks=4)"``.

    Args:
        policy: The text, or a policy, which is returned as it is.

    Raises:
        InvalidArgumentError: Naming what is wrong and what is allowed.
    """
    if isinstance(policy, KvPolicy):
        return policy
    if not isinstance(policy, str):
        raise InvalidArgumentError(f"kv_policy must be a KvPolicy or its name, got {policy!r}")
    name, _, rest = policy.strip().partition("(")
    if name.strip() not in _POLICIES:
        raise InvalidArgumentError(f"kv_policy must be one of {', '.join(NAMES)}, got {policy!r}")
    if not rest:
        return KvPolicy(name.strip())
    try:
        call = ast.parse(policy.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        if any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        positional = [_whole_number(argument) for argument in call.args]
        named = [(str(keyword.arg), _whole_number(keyword.value)) for keyword in call.keywords]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise InvalidArgumentError(
            "kv_policy is a name with whole numbers in brackets, such as 'sliding_window(192, sinks=4)', "
            f"got {policy!r}"
        ) from None
    known = [option.name for option in _POLICIES[name.strip()]]
    if len(positional) > len(known):
        raise InvalidArgumentError(f"kv_policy {name.strip()} has {len(known)} options, got {policy!r}")
    options = [*zip(known, positional, strict=False), *named]
    if len({option for option, _ in options}) < len(options):
        raise InvalidArgumentError(f"kv_policy gives an option twice: {policy!r}")
    return KvPolicy(name.strip(), tuple(options))


def _whole_number(node: ast.expr) -> int:
    value = ast.literal_eval(node)
    if type(value) is not int:
        raise ValueError
    return value
