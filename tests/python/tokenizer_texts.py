"""Texts that tokenizer tests compare on: words, scripts, emoji, code, numbers and noise, the same for the same seed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

# Numbers that Unicode 17 added. Digits() of `tokenizers` takes them from the Rust release it was compiled with, while
# its own \p{N}, that of `tiktoken` and ours are those of Unicode 16.
NUMBERS_SINCE_17 = set(range(0x11DE0, 0x11DEA)) | set(range(0x16FF4, 0x16FF7))

WHITESPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
NEARLY_WHITESPACE = "\x1c\x1f\u180e\u200b\u2060\ufeff"
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'RE", "'Ve", "'M", "'lL", "'D", "'\u017f",
                "\u2019s", "'", "''", "'x", "'r", "'l", "'v"]  # fmt: skip
EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👨🏿‍🚀", "❤️", "🤷🏻‍♀️", "1️⃣", "🫠"]
CODE = [
    "def f(x: int) -> list[int]:\n    return [x] * 3\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\r\n",
    "SELECT * FROM t WHERE id=1 AND name LIKE '%x%';",
    '{"key": [1, 2.5e-3, null], "k2": "v\\n"}',
    '<div class="a b">&nbsp;</div><!-- x -->',
    "https://example.com/a?b=c&d=%20#e",
    "if(x!=y||!z&&w){}  // comment\n\n\n#include <vector>",
]
WORDS = (
    "the of and to in a is that it was for on are with as his they be at one have this from by hot word but what some "
    "we can out other were all there when up use your how said an each she which do their time if will way about many "
    "then them write would like so these her long make thing see him two has look more day could go come did number "
    "sound no most people my over know water than call first who may down side been now find tokenizer inference"
)
SCRIPTS = {
    "cjk": (0x4E00, 0x9FFF), "kana": (0x3041, 0x30FF), "hangul": (0xAC00, 0xD7A3), "cyrillic": (0x400, 0x4FF),
    "arabic": (0x600, 0x6FF), "hebrew": (0x5D0, 0x5EA), "devanagari": (0x900, 0x97F), "thai": (0xE01, 0xE5B),
    "greek": (0x370, 0x3FF), "latin": (0xC0, 0x24F), "combining": (0x300, 0x36F), "symbols": (0x2190, 0x2BFF),
    "punctuation": (0x2010, 0x206F), "numbers": (0x2150, 0x218B), "circled": (0x2460, 0x24FF),
    "maths": (0x1D400, 0x1D7FF),
    "private": (0xE000, 0xE0FF), "emoji": (0x1F300, 0x1FAFF), "egyptian": (0x13000, 0x1342F),
    "cjk_b": (0x20000, 0x2A6DF),
    "tags": (0xE0000, 0xE007F), "fullwidth": (0xFF01, 0xFFEE), "tibetan": (0xF20, 0xF33),
}  # fmt: skip


def fragments(rng: random.Random) -> dict[str, Callable[[], str]]:
    """Named makers of short pieces of text."""
    words = WORDS.split()

    def run(choices: str, most: int) -> str:
        return "".join(rng.choice(choices) for _ in range(rng.randint(1, most)))

    def script() -> str:
        first, last = SCRIPTS[rng.choice(list(SCRIPTS))]
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8)))

    def combined() -> str:
        return "".join(
            rng.choice("aeionuAEO") + run("\u0300\u0301\u0308\u0327\u20dd", 3) for _ in range(rng.randint(1, 4))
        )

    def word() -> str:
        text = rng.choice(words)
        return rng.choice([text, text, text, text.capitalize(), text.upper()])

    def anything() -> str:
        code_point = rng.choice([rng.randint(0, 0xFFFF), rng.randint(0, 0x10FFFF)])
        return "" if 0xD800 <= code_point < 0xE000 or code_point in NUMBERS_SINCE_17 else chr(code_point)

    return {
        "words": lambda: " ".join(word() for _ in range(rng.randint(1, 8))),
        "space": lambda: rng.choice([" ", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n", "    "]),
        "whitespace": lambda: run(WHITESPACE, 6),
        "nearly": lambda: run(WHITESPACE + NEARLY_WHITESPACE, 4),
        "digits": lambda: run("0123456789", 9),
        "numbers": lambda: run("0123456789٠٣९①½Ⅷ²", 5),
        "number": lambda: f"{rng.uniform(-1e6, 1e6):,.{rng.randint(0, 4)}f}",
        "contraction": lambda: word() + rng.choice(CONTRACTIONS) + rng.choice(["", " ", word()]),
        "apostrophes": lambda: rng.choice(CONTRACTIONS),
        "emoji": lambda: rng.choice(EMOJI) * rng.randint(1, 2),
        "code": lambda: rng.choice(CODE),
        "punctuation": lambda: run("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", 6),
        "ascii": lambda: run("".join(map(chr, range(32, 127))), 20),
        "control": lambda: run("".join(map(chr, range(0, 32))) + "\x7f\x80\x9f", 3),
        "script": script,
        "combined": combined,
        "anything": anything,
        "letters": lambda: rng.choice("abzÀ漢") * rng.choice([10, 60, 200]),
        "alternating": lambda: rng.choice(["ab", "aab", " a", "\n ", "=-", "漢字"]) * rng.choice([5, 40]),
    }


def make_texts(seed: int, count: int) -> list[str]:
    """`count` texts, each of up to ten fragments; the same for the same seed."""
    return list(_made_texts(seed, count))


@cache
def _made_texts(seed: int, count: int) -> tuple[str, ...]:
    rng = random.Random(seed)
    makers = list(fragments(rng).values())
    texts = ["", " ", "  ", "\n", "a", "'", "\ufffd", "\x00"]
    while len(texts) < count:
        texts.append("".join(rng.choice(makers)() for _ in range(rng.randint(1, 10))))
    return tuple(texts)


def sweep_texts() -> Iterator[str]:
    """Every code point before, between and behind letters, digits, spaces and symbols, 64 to a text.

    From 0x20000 on, where nearly all are ideographs or unassigned, every 13th, but for the assigned ones of plane 14;
    with NANOBRAID_TEST_FULL=1 all.
    """
    step = 1 if os.environ.get("NANOBRAID_TEST_FULL") == "1" else 13
    swept = [*range(0x20000), *range(0x20000, 0xE0000, step), *range(0xE0000, 0xE0200), *range(0xE0200, 0x110000, step)]
    code_points = [c for c in swept if not 0xD800 <= c < 0xE000 and c not in NUMBERS_SINCE_17]
    for i in range(0, len(code_points), 64):
        yield "".join(f"a{c}1{c}  {c}b!{c}\n{c}" for c in map(chr, code_points[i : i + 64]))


def compare(texts: Iterable[Any], ours: Callable[[Any], Any], expected: Callable[[Any], Any], at_least: int) -> None:
    """Fails unless both functions agree on every text (or sequence of ids) and there are `at_least` of them."""
    count = 0
    mismatches = []
    for text in texts:
        count += 1
        if (got := ours(text)) != (wanted := expected(text)):
            mismatches.append((text, got, wanted))
    shown = "\n".join(f"{text!r}\n  got      {got}\n  expected {wanted}" for text, got, wanted in mismatches[:3])
    assert not mismatches, f"{len(mismatches)} of {count} texts differ:\n{shown}"
    assert count >= at_least


def random_ids(seed: int, vocab_size: int, count: int) -> list[list[int]]:
    """Sequences of any ids, most of which are no valid UTF-8."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(0, 20))] for _ in range(count)]
