"""Texts that quality is measured on: four that come with the package, and made-up ones in which a code is hidden.

The four were written for this project and stand nowhere else, so no model has read them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from nanobraid.errors import InvalidArgumentError
from nanobraid.tokenizer import Tokenizer

_FOLDER = Path(__file__).with_name("text")
_SUBJECTS = ("The ferry", "The mill", "The orchestra", "The bakery", "The observatory", "The garden", "The workshop",
             "The library", "The school", "The lighthouse", "The market", "The museum")  # fmt: skip
_VERBS = ("opens", "was repaired", "moved its stores", "received visitors", "bought new tools", "lost a roof tile",
          "changed its hours", "hired a clerk", "asked for advice", "held a meeting")  # fmt: skip
_PLACES = ("by the river", "behind the station", "on the hill", "near the old bridge", "at the edge of the town",
           "in the next valley", "beside the canal", "under the chestnut trees")  # fmt: skip
_TIMES = ("before the first frost", "on a wet Tuesday", "in the early spring", "after the long holiday",
          "towards the end of June", "while the road was closed", "during the quiet weeks", "a year ago")  # fmt: skip
_ENDS = ("and nobody was surprised.", "which pleased the neighbours.", "so the committee wrote a short report.",
         "and the work took longer than planned.", "but the costs stayed small.", "as the newspaper had expected.",
         "and two people offered their help.", "which is still talked about.")  # fmt: skip
_NAMES = ("Heron", "Basalt", "Juniper", "Lantern", "Meridian", "Saffron", "Tundra", "Willow")


def texts() -> dict[str, str]:
    """The texts of the package by name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.txt"))}


def sentence(draw: random.Random) -> str:
    """One of some 60,000 sentences."""
    words = (draw.choice(options) for options in (_SUBJECTS, _VERBS, _PLACES, _TIMES, _ENDS))
    return " ".join(words)


def prose(tokenizer: Tokenizer, num_tokens: int, draw: random.Random) -> list[int]:
    """Exactly so many tokens of made-up sentences."""
    ids: list[int] = []
    text = ""
    while len(ids) < num_tokens:
        text += " ".join(sentence(draw) for _ in range(num_tokens // 16 + 1)) + " "
        ids = tokenizer.encode(text)
    return ids[:num_tokens]


@dataclass(frozen=True)
class Needle:
    """A document in which a code is hidden, then the beginning of a sentence that asks for it.

    Attributes:
        length: Tokens that were asked for.
        depth: Where the code stands: 0 behind the first sentence, 1 behind the last.
        prompt: Token ids of document and question.
        answer: Token ids of the code.
        position: Token at which the sentence with the code begins.
    """

    length: int
    depth: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    position: int


def needle(tokenizer: Tokenizer, length: int, depth: float, number: int, seed: int) -> Needle:
    """The document of a length, depth and number; the text around the code depends on seed and number alone.

    Raises:
        InvalidArgumentError: The length has no room for code and question.
    """
    draw = random.Random(f"{seed} {number}")
    name, code = draw.choice(_NAMES), str(draw.randint(10000, 99999))
    asked = f"The access code of the project {name} is"
    hidden, question = f"{asked} {code}. ", f"\n\n{asked}"
    room = length - len(tokenizer.encode(hidden + question)) - 16
    if room < 16:
        raise InvalidArgumentError(f"needle_lengths must leave room for code and question, got {length}")
    sentences = [sentence(draw) + " "]
    used = len(tokenizer.encode(sentences[0]))
    while True:
        more = sentence(draw) + " "
        used += len(tokenizer.encode(more, add_special_tokens=False, at_start=False))
        if used > room:
            break
        sentences.append(more)
    # Behind the first sentence at least: models do not read the very beginning, which their attention rests on.
    at = 1 + round(depth * (len(sentences) - 1))
    before = "".join(sentences[:at])
    prompt = tokenizer.encode(before + hidden + "".join(sentences[at:]).rstrip() + question)
    answer = tokenizer.encode(f" {code}", add_special_tokens=False, at_start=False)
    return Needle(length, depth, tuple(prompt), tuple(answer), len(tokenizer.encode(before)))
