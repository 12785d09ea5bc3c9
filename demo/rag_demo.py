#!/usr/bin/env python3
"""Questions about documents of this machine: found by words (BM25), answered from chunks that are computed once.

Every passage is a chunk. A question takes the best few, in the order of their rank, wherever they stood before; those
that came up earlier need not be computed again.

    demo/rag_demo.py --mode blend "What may I do with the source code?"
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path

import nanobraid as nb

QUESTIONS = (
    "How do I read a file from a zip archive?",
    "Which exception is raised for a file that is not a zip archive?",
    "How do I turn an object into a JSON string?",
    "How do I close a zip archive after I read a file from it?",
)


def passages(folder: Path | None, words: int) -> list[str]:
    """Texts of about so many words: of the files of a folder, or of what Python says about some of its modules."""
    if folder is not None:
        texts = [path.read_text(errors="replace") for path in sorted(folder.iterdir()) if path.is_file()]
    else:
        items = [item for module in (json, zipfile) for item in vars(module).values() if callable(item)]
        items += [member for item in items if isinstance(item, type) for member in vars(item).values()]
        told = {getattr(item, "__qualname__", ""): getattr(item, "__doc__", "") for item in items}
        texts = [f"{name}: {text}" for name, text in told.items() if name and text]
    found = []
    for text in texts:
        parts = text.split()
        found += [" ".join(parts[i : i + words]) for i in range(0, len(parts), words)]
    return sorted(set(found))


class Ranking:
    """BM25 with its usual constants."""

    def __init__(self, texts: list[str]) -> None:
        self.words = [Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in texts]
        self.mean = sum(map(Counter.total, self.words)) / max(len(texts), 1)
        self.seen = Counter(word for words in self.words for word in words)

    def best(self, question: str, count: int) -> list[int]:
        scores = [self.score(words, set(re.findall(r"[a-z0-9]+", question.lower()))) for words in self.words]
        return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]

    def score(self, words: Counter[str], wanted: set[str]) -> float:
        long = 1.2 * (0.25 + 0.75 * words.total() / self.mean)
        many = len(self.words)
        rare = {word: math.log(1 + (many - self.seen[word] + 0.5) / (self.seen[word] + 0.5)) for word in sorted(wanted)}
        return sum(weight * words[word] * 2.2 / (words[word] + long) for word, weight in rare.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--folder", type=Path, help="text files (default: documentation strings of Python)")
    parser.add_argument("--mode", choices=("exact", "isolated", "blend"), default="blend")
    parser.add_argument("--passages", type=int, default=4, help="for each question (default: 4)")
    parser.add_argument("--words", type=int, default=120, help="of a passage (default: 120)")
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()
    try:
        texts = passages(options.folder, options.words)
        ranking = Ranking(texts)
        with nb.ChunkedLLM(options.model, mode=options.mode) as chunked:
            system = chunked.register_chunk("Answer from the given text, in one sentence.", nb.ChunkType.SYSTEM_PROMPT)
            print(f"{len(texts)} passages, mode {options.mode}")
            for question in options.questions:
                found = [
                    chunked.register_chunk(texts[i], nb.ChunkType.CONTEXT)
                    for i in ranking.best(question, options.passages)
                ]
                query = chunked.register_chunk(question, nb.ChunkType.QUERY)
                params = {"temperature": 0, "max_tokens": options.max_tokens}
                known = sum(chunked.get_chunk(chunk_id).kv_ready for chunk_id in found)
                out = chunked.generate_from_chunks(system, query, found, params)
                r = out.reuse
                assert r is not None
                print(f"\n{question}\n  {' '.join(out.text.split())}")
                print(
                    f"  {r.mode_served}: first token after {r.ttft_ms:.0f} ms; {known} of {len(found)} passages known"
                )
                print(
                    f"  tokens: {r.exact_prefix} exact prefix, {r.isolated} from chunks, "
                    f"{r.recomputed} computed again, {r.computed} computed"
                )
    except (nb.NanobraidError, OSError) as error:
        sys.exit(f"rag_demo: error: {error}")


if __name__ == "__main__":
    main()
