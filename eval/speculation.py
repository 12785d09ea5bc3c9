"""What guessing coming tokens gains: decode speed of answers that copy their context, and of prose, with and without.

    python eval/speculation.py
    python eval/speculation.py --methods ngram suffix --num-draft-tokens 8 --rounds 7
    python eval/speculation.py --model target.gguf --threads 2 --output results.txt

The sides are engines of this process over the same file and answer the same prompts in turn, greedy, one at a time.
There are two without guesses, loaded before and after the other: where in memory a model happens to lie makes a
difference of a few per cent, which is larger than what is looked for in prose. Speed is that of tokens after the first
one; a ratio is the median over rounds of speeds measured side by side, with that of the two taken as their mean.
`control` is the ratio of the two: how far off one of 1 may be.
The texts must be the same on both sides, or the script exits with 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import nanobraid as nb
from nanobraid.bench_kv.machine import cpu_name
from nanobraid.speculative import METHODS

CODE = '''class Account:
    """A bank account with a history of its transfers."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance = self.balance + amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("the balance is too low")
        self.balance = self.balance - amount
        self.history.append(("withdraw", amount))
'''
TABLE = "| city | country | river | founded |\n|---|---|---|---|\n" + "\n".join(
    f"| {city} | {country} | {river} | {year} |"
    for city, country, river, year in (
        ("Lisbon", "Portugal", "Tagus", 1147),
        ("Vienna", "Austria", "Danube", 881),
        ("Prague", "Czechia", "Vltava", 885),
        ("Cologne", "Germany", "Rhine", 50),
        ("Lyon", "France", "Rhone", 43),
        ("Turin", "Italy", "Po", 28),
    )
)
ARTICLE = (
    "The harbour of Marrow Bay was built in 1871 by fishermen who had lost their boats in three winters of storms. "
    "The stone came from the hill behind the church and was carried down on sledges by oxen. "
    "The lighthouse at the end of the pier burned oil until 1924 and has been lit by electricity ever since. "
    "The keeper wrote in his book that no ship had been lost within sight of the tower for forty years. "
    "Today the harbour is used by small boats, and the old warehouse is a museum of nets, sails and maps."
)
#: What is copied, and how an answer begins to.
COPYING = {
    "code edit": f"Original file:\n\n{CODE}\nThe same file, `balance` renamed to `total`:\n\nclass Account:\n",
    "table": f"{TABLE}\n\nThe same table again:\n\n| city | country |",
    "quotes": f'Article: {ARTICLE}\n\nAll sentences of the article, in quotes, in their order:\n\n1. "The harbour of',
}
PROSE = {
    "story": "Once upon a time, in a village at the edge of a dark forest, there lived an old clockmaker who",
    "essay": "There are three reasons why people in cities walk less than they did a hundred years ago. The first is",
    "letter": "Dear Margaret,\n\nThank you for your letter, which arrived on Tuesday. The garden is",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--answers", nargs="+", choices=list(COPYING | PROSE), default=list(COPYING | PROSE))
    parser.add_argument("--methods", nargs="+", default=["ngram", "suffix"], help=f"of {' '.join(METHODS)}")
    parser.add_argument("--draft-model", help="of the method draft")
    parser.add_argument("--num-draft-tokens", type=int, default=8)
    parser.add_argument("--not-adaptive", action="store_true", help="always as many guesses as there are")
    parser.add_argument("--tokens", type=int, default=160, help="of each answer (default: 160)")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one that does not (default: 5)")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, help="also write the table here")
    args = parser.parse_args()
    lines = [f"{args.model}, {cpu_name()}, {args.tokens} tokens, at most {args.num_draft_tokens} guesses"]
    columns = f"{'plain':>8} {'guessing':>9} {'ratio':>6} {'right':>7} {'a step':>7} {'control':>8}"
    lines.append(f"{'method':8} {'answer':10} {columns}")
    wrong = False
    options = {"max_model_len": 2048, "max_num_seqs": 1, "num_threads": args.threads}
    for method in args.methods:
        draft_model = args.draft_model if method == "draft" else None
        config = nb.SpeculativeConfig(
            method, args.num_draft_tokens, adaptive=not args.not_adaptive, draft_model=draft_model
        )
        with (
            nb.LLM(args.model, **options) as plain,
            nb.LLM(args.model, speculative_config=config, **options) as guesses,
            nb.LLM(args.model, **options) as also_plain,
        ):
            ratios = {}
            for name in args.answers:
                prompt = (COPYING | PROSE)[name]
                row, same = _measure((plain, also_plain), guesses, prompt, args.tokens, args.rounds)
                wrong = wrong or not same
                ratios[name] = row[2]
                figures = f"{row[0]:8.1f} {row[1]:9.1f} {row[2]:6.2f} {100 * row[3]:5.0f} % {row[4]:7.2f} {row[5]:8.2f}"
                lines.append(f"{method:8} {name:10} {figures}" + ("" if same else "  DIFFERENT TEXT"))
            for what, names in (("copying", COPYING), ("prose", PROSE)):
                measured = [ratios[name] for name in names if name in ratios]
                if not measured:
                    continue
                mean = statistics.geometric_mean(measured)
                lines.append(f"{method:8} {what:10} {'':18} {mean:6.2f} (geometric mean)")
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    return 1 if wrong else 0


def _measure(
    plain: tuple[nb.LLM, nb.LLM], guessing: nb.LLM, prompt: str, num_tokens: int, rounds: int
) -> tuple[tuple[float, float, float, float, float, float], bool]:
    """Tokens/s of both sides, the ratio, the share of right guesses, tokens of a step, the ratio of the two without
    guesses; and whether the texts agree."""
    params = nb.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    sides = [plain[0], guessing, plain[1]]
    rows = []
    same = True
    before: dict[str, float] = {}
    for turn in range(rounds + 1):
        if turn == 1:
            before = guessing.stats()
        speeds, texts = [0.0] * 3, []
        for i in [(turn + k) % 3 for k in range(3)]:
            output = sides[i].generate(prompt, params)[0]
            speeds[i] = output.metrics.tokens_per_s
            texts.append(output.token_ids)
        same = same and all(text == texts[0] for text in texts)
        rows.append(((speeds[0] + speeds[2]) / 2, speeds[1], speeds[2] / speeds[0]))
    after = guessing.stats()
    drafted, accepted = (after[key] - before[key] for key in ("draft_tokens", "accepted_draft_tokens"))
    theirs, ours, control = (statistics.median(row[which] for row in rows[1:]) for which in range(3))
    ratio = statistics.median(row[1] / row[0] for row in rows[1:])
    steps = rounds * (num_tokens - 1) - accepted
    return (theirs, ours, ratio, accepted / max(drafted, 1), 1 + accepted / steps, control), same


if __name__ == "__main__":
    sys.exit(main())
