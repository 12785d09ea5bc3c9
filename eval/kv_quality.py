"""How far reused context is from full prefill, per mode and share of recomputed tokens.

    python eval/kv_quality.py                                        # the default model, both plans, all modes
    python eval/kv_quality.py --plans doc --modes mask 'mask, 15 %' --json doc.json
    python eval/kv_quality.py --bands                                # the default model's published bands must hold

RAG: six of eight generated project notes, a question, the digits of its answer. DOC: one text cut into a prefix, four
chunks and what follows. Figures and modes are those of `kv_metrics.py`, prompts those of `kv_plans.py`; activations and
keys are float32 unless said otherwise. Beside the modes stand full prefill with the chunks in reverse order, and with
the KV formats of --yardsticks. Exits with 1 where a mode that has nothing to approximate is off full prefill, where KL
rises with the share recomputed beyond what the choice of texts explains, and with --bands where a band is left.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nanobraid as nb
from kv_metrics import CONTROLS, MODES, Backend, Mode, Served, bands_left, failures, measure, report_of
from kv_plans import Case, Piece, doc_cases, rag_cases


class Engine:
    """The engine as what is measured."""

    def __init__(self, llm: nb.LLM) -> None:
        tokenizer = llm.tokenizer
        # A model without a token that begins texts has its chunks anchored on the one that ends them.
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_ids[0]
        self._llm = llm

    def full(self, tokens: Sequence[int], rows: int) -> NDArray[np.float32]:
        return self._llm.logits(list(tokens))[-rows:]

    def full_greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        (out,) = self._llm.generate([list(tokens)], greedy_params(count))
        return list(out.token_ids)

    def composed(self, pieces: Sequence[Piece], mode: Mode, rows: int) -> NDArray[np.float32]:
        return self._llm.composed_logits(segments_of(pieces), reuse=reuse_of(mode))[-rows:]

    def composed_greedy(self, pieces: Sequence[Piece], mode: Mode, count: int) -> Served:
        out = self._llm.compose(segments_of(pieces), greedy_params(count), reuse=reuse_of(mode))
        assert out.reuse is not None
        chunks = sum(len(piece.tokens) for piece in pieces if piece.chunk)
        return Served(list(out.token_ids), chunks if out.reuse.is_exact else out.reuse.recomputed)


def greedy_params(count: int) -> nb.SamplingParams:
    return nb.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def segments_of(pieces: Sequence[Piece]) -> list[nb.Segment]:
    return [nb.Segment(piece.tokens, chunk=piece.chunk, anchor=piece.anchor) for piece in pieces]


def reuse_of(mode: Mode) -> nb.Isolated | nb.Blend:
    if mode.ratio is None:
        return nb.Isolated(sink=mode.sink)
    return nb.Blend(ratio=mode.ratio, select=mode.select, sink=mode.sink)


def print_table(plan: str, report: dict[str, Any]) -> None:
    print(f"\n{plan.upper()}, {len(report['texts'])} texts, prompts of {min(report['tokens'])} tokens or more")
    print("| mode | recomputed | KL | 95 % | p50 | p95 | p99 | max | top-1 | Δ log p | same greedy | worst text |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, row in report["rows"].items():
        low, high = row["kl_95"]
        found = f"; answers {row['answers']['right']} of {row['answers']['of']}" if "answers" in row else ""
        cells = [
            name,
            f"{100 * row['recomputed']:.0f} %",
            f"{row['kl']:.4f}",
            f"{low:.3f}-{high:.3f}",
            *(f"{row[key]:.3f}" for key in ("kl_p50", "kl_p95", "kl_p99", "kl_max")),
            f"{100 * row['top1']:.1f} %",
            f"{row['gold_logprob_minus_full']:+.3f}",
            f"{row['greedy_same_median']:.0f}{found}",
            f"{row['worst_text']} {row['worst_text_kl']:.3f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def cases_of(plan: str, tokenizer: nb.Tokenizer, count: int | None, windows: int) -> list[Case]:
    cases = rag_cases(tokenizer) if plan == "rag" else doc_cases(tokenizer.encode, windows=windows)
    return cases[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="f32", help="activations: auto, int8, bf16, f32")
    parser.add_argument("--kv-dtype", default="f32")
    parser.add_argument("--plans", nargs="+", choices=["rag", "doc"], default=["rag", "doc"])
    parser.add_argument("--modes", nargs="+", choices=[mode.name for mode in MODES], help="beside the controls")
    parser.add_argument("--yardsticks", nargs="*", default=["bf16"], help="KV formats of further full prefills")
    parser.add_argument("--texts", type=int, help="the first so many texts of a plan")
    parser.add_argument("--windows", type=int, default=1, help="prompts cut from each text of DOC, 3 at most")
    parser.add_argument("--greedy", type=int, default=32, help="tokens generated to find the first divergence")
    parser.add_argument("--exact-kl", type=float, default=1e-5, help="how far off an exact position may be, in nats")
    parser.add_argument("--bands", action="store_true", help="fail where a band of the default model is left")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    wanted = [mode for mode in MODES if args.modes is None or mode in CONTROLS or mode.name in args.modes]

    def opened(kv_dtype: str) -> nb.LLM:
        return nb.LLM(args.model, device=args.device, dtype=args.dtype, kv_dtype=kv_dtype, max_model_len=2048)

    llm = opened(args.kv_dtype)
    yardsticks: dict[str, Backend] = {f"full, {kv} keys and values": Engine(opened(kv)) for kv in args.yardsticks}
    facts = {key: llm.config[key] for key in ("backend", "dtype", "kv_dtype")}
    report: dict[str, Any] = {"model": args.model, **facts, "exact_kl": args.exact_kl, "plans": {}}
    failed: list[str] = []
    for plan in args.plans:
        cases = cases_of(plan, llm.tokenizer, args.texts, args.windows)
        measured = measure(Engine(llm), cases, wanted, args.greedy, yardsticks)
        found = report["plans"][plan] = report_of(measured, cases, with_answers=plan == "rag")
        print_table(plan, found)
        failed += [f"{plan}, {line}" for line in failures(measured, args.exact_kl)]
        failed += bands_left(plan, found["rows"]) if args.bands else []
    report["failed"] = failed
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
