"""The prompts of `kv_quality.py`: needles in shuffled project notes (RAG), and one text cut into chunks (DOC).

Both are lists of token ids, made without any engine, so that every mode and every backend sees the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from nanobraid.chat_template import ChatTemplate
from nanobraid.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
# File and first token of each text. All but the licence were written for this folder; a model may know that by heart.
TEXTS = (
    ("eval/text/mixed.txt", 0),
    ("eval/text/mixed.txt", 1200),
    ("eval/text/allotments.txt", 0),
    ("eval/text/counter.txt", 0),
    ("eval/text/quarry.txt", 0),
    ("LICENSE", 0),
)
ANCHORS = ("none", "bos", "prefix", "before")
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Piece:
    """Token ids of a part of a prompt; of a chunk, also those it is encoded behind."""

    tokens: tuple[int, ...]
    chunk: bool = False
    anchor: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """One prompt: prefix + chunks + query, and the tokens that are known to follow, which are scored."""

    name: str
    prefix: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]
    query: tuple[int, ...]
    answer: tuple[int, ...]

    def prompt(self) -> list[int]:
        return [token for part in (self.prefix, *self.chunks, self.query) for token in part]

    def pieces(self, anchor: str, bos: int, query: Sequence[int]) -> list[Piece]:
        """The prompt in pieces, every chunk encoded behind `anchor`, then `query`.

        anchor: "none"; "bos", one token; "prefix", the prompt's own; "before", all that stands before the chunk: then
        nothing is approximate, and a mode must reach full prefill.
        """
        out = [Piece(self.prefix)]
        for chunk in self.chunks:
            before = tuple(token for piece in out for token in piece.tokens)
            anchors = {"none": (), "bos": (bos,), "prefix": self.prefix, "before": before}
            out.append(Piece(chunk, True, anchors[anchor]))
        return [*out, Piece(tuple(query))]

    def reversed(self) -> Case:
        return replace(self, chunks=self.chunks[::-1])

    def scored_query(self) -> list[int]:
        """Query and answer without its last token: the last len(answer) rows predict the answer."""
        return [*self.query, *self.answer[:-1]]


def doc_cases(
    encode: Encode, *, windows: int = 1, prefix: int = 32, chunk: int = 192, chunks: int = 4, rest: int = 64
) -> list[Case]:
    """One text after another: a prefix, chunks that continue it, and the tokens that follow.

    windows: of each text, each `rest` tokens behind the one before it: other cuts, and other tokens that are scored.
    """
    cases = []
    for name, begin in [(name, first + i * rest) for name, first in TEXTS for i in range(windows)]:
        ids = encode((ROOT / name).read_text(encoding="utf-8"))[begin:][: prefix + chunk * chunks + rest]
        if len(ids) < prefix + chunk * chunks + rest:
            raise ValueError(f"{name}: {len(ids)} tokens from token {begin}, too few")
        cuts = [prefix + chunk * i for i in range(chunks + 1)]
        parts = tuple(tuple(ids[a:b]) for a, b in pairwise(cuts))
        after = ids[cuts[-1] :]
        cases.append(Case(f"{Path(name).stem}@{begin}", tuple(ids[:prefix]), parts, (after[0],), tuple(after[1:])))
    return cases


_NAMES = ("Heron", "Basalt", "Juniper", "Lantern", "Meridian", "Saffron", "Tundra", "Willow")
_LEADERS = ("Aisha Rahman", "Tomas Berg", "Lucia Moretti", "Kenji Sato", "Grace Mensah", "Pavel Novak", "Ines Duarte")
_PLACES = ("Rotterdam", "Nairobi", "Lyon", "Osaka", "Tallinn", "Valparaiso", "Halifax", "Porto")
_GOALS = (
    "replace the pumps of the northern plant without stopping production for more than a day",
    "bring the records of the old archive into a form that can be searched by place and year",
    "cut the energy used by the cold store by a third before the next summer",
    "train forty volunteers who can test the water of the lake every week",
    "move the timetable service to new machines while the old ones keep running",
    "measure the noise along the ring road by day and by night for a whole year",
)
_NEWS = (
    "The supplier has confirmed delivery, but two of the five boxes will come later than planned.",
    "The first test failed because a cable had been labelled wrongly; the second one passed.",
    "The budget was approved with a small cut, which the team will make up by travelling less.",
    "Visitors from the city council came on Tuesday and asked mostly about safety.",
    "A new colleague has joined and will look after the measurements from next month on.",
    "The schedule has one week of reserve left, and nobody wants to touch it yet.",
    "The report of the second quarter is late, since three tables had to be computed again.",
    "The old documentation turned out to describe a version that was never installed.",
)
SYSTEM = "You are a careful assistant. You answer from the project notes, with the exact figures that stand there."
_HERE = "@@notes@@"
_CODE = "@@code@@"


def project_note(name: str, code: str, draw: random.Random) -> str:
    """A page about a project; the code stands in the middle."""
    news = draw.sample(_NEWS, 3)
    leader, place, members = draw.choice(_LEADERS), draw.choice(_PLACES), draw.randint(3, 19)
    day, time = draw.choice(("Monday", "Wednesday", "Thursday")), f"{draw.randint(8, 16)}:{draw.choice(('00', '30'))}"
    return (
        f"Project {name}\nLed by {leader} in {place}, with a team of {members}. The aim is to {draw.choice(_GOALS)}. "
        f"{news[0]}\nThe access code of project {name} is {code}. It is needed at the gate and in every order.\n"
        f"{news[1]} {news[2]} The next meeting is on {day} at {time}.\n\n"
    )


def rag_cases(tokenizer: Tokenizer, draws: int = 6, documents: int = 6) -> list[Case]:
    """Per draw, `documents` of eight notes in random order, a question about one, and the digits of its code.

    Each note is encoded alone; the text around them is that of the model's own chat template.
    """
    cases = []
    for number in range(draws):
        draw = random.Random(1000 + number)
        codes = {name: str(draw.randint(10000, 99999)) for name in _NAMES}
        notes = {name: project_note(name, code, draw) for name, code in codes.items()}
        chosen = draw.sample(_NAMES, documents)
        asked = draw.choice(chosen)
        question = f"What is the access code of project {asked}? Answer with the code only."
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Project notes:\n\n{_HERE}{question}"},
            {"role": "assistant", "content": _CODE},
        ]
        rendered = ChatTemplate.of(tokenizer).render(messages, add_generation_prompt=False)
        before, _, rest = rendered.partition(_HERE)
        query = rest.partition(_CODE)[0]
        # A template that writes the beginning token itself must not get a second one.
        prefix = tokenizer.encode(before, add_special_tokens=False, parse_special=True)
        if tokenizer.add_bos and prefix[0] != tokenizer.bos_token_id:
            prefix = tokenizer.encode(before, parse_special=True)

        def plain(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False, parse_special=False, at_start=False))

        cases.append(
            Case(
                f"draw {number}: {asked}",
                tuple(prefix),
                tuple(plain(notes[name]) for name in chosen),
                tuple(tokenizer.encode(query, add_special_tokens=False, parse_special=True, at_start=False)),
                plain(codes[asked]),
            )
        )
    return cases
