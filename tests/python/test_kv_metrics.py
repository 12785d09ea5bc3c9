"""The figures of `eval/kv_quality.py`, over the oracle of composed prompts: right, and no pass for broken modes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chunk_oracle import Oracle, Segment, select_first_share, tokens_of
from numpy.typing import NDArray
from tiny_hf import config_of, tensors_of, write_folder

import nanobraid as nb
from nanobraid.chat_template import ChatTemplate

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
try:
    import kv_metrics
    import kv_plans
finally:
    sys.path.pop(0)

GREEDY = 2
EXACT_KL = 1e-9


class OracleBackend:
    """The oracle as what is measured; `defect` breaks its composed prompts alone."""

    def __init__(self, folder: Path, defect: str | None = None) -> None:
        self.bos = 1
        self.reference, self.oracle = Oracle(folder), Oracle(folder, defect)

    def full(self, tokens: Sequence[int], rows: int) -> NDArray[np.float32]:
        return self.reference.full(tokens)[-rows:].astype(np.float32)

    def full_greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        out = list(tokens)
        for _ in range(count):
            out.append(int(self.reference.full(out)[-1].argmax()))
        return out[-count:]

    def _served(self, pieces: Sequence[Any], mode: kv_metrics.Mode) -> tuple[Any, int]:
        segments = [Segment(piece.tokens, piece.chunk, piece.anchor) for piece in pieces]
        selected: list[int] = []
        if mode.ratio is not None and mode.select == "first":
            selected = select_first_share(segments, mode.ratio)
        elif mode.ratio is not None:
            selected = self.oracle.select_deviation(segments, mode.ratio)
        return self.oracle.blend(segments, selected, mode.sink).logits, len(selected)

    def composed(self, pieces: Sequence[Any], mode: kv_metrics.Mode, rows: int) -> NDArray[np.float32]:
        return self._served(pieces, mode)[0][-rows:].astype(np.float32)

    def composed_greedy(self, pieces: Sequence[Any], mode: kv_metrics.Mode, count: int) -> kv_metrics.Served:
        *before, last = pieces
        out = list(last.tokens)
        for _ in range(count):
            logits, recomputed = self._served([*before, kv_plans.Piece(tuple(out))], mode)
            out.append(int(logits[-1].argmax()))
        return kv_metrics.Served(out[-count:], recomputed)


def tiny_cases() -> list[kv_plans.Case]:
    """The text plan, small, over bytes."""
    return kv_plans.doc_cases(lambda text: [ord(c) % 300 for c in text[:2000]], prefix=4, chunk=9, chunks=3, rest=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_of("llama")
    return write_folder(tmp_path_factory.mktemp("kv_metrics") / "llama", config, tensors_of(config, seed=5))


def measured(folder: Path, defect: str | None = None, modes: Sequence[Any] = kv_metrics.MODES) -> Any:
    return kv_metrics.measure(OracleBackend(folder, defect), tiny_cases(), modes, GREEDY, {})


@pytest.fixture(scope="module")
def sound(folder: Path) -> Any:
    return measured(folder)


def test_a_sound_engine_passes_and_its_figures_are_those_of_the_definitions(folder: Path, sound: Any) -> None:
    cases = tiny_cases()
    report = kv_metrics.report_of(sound, cases, with_answers=True)
    rows = report["rows"]
    exact = ("full", "control", "control, 15 %", "mask, 100 %", "bos, 100 %", "prefix, 100 %")
    for name in exact:
        assert rows[name]["kl_max"] < EXACT_KL, name
        assert rows[name]["top1"] == 1
        assert rows[name]["greedy_same_tokens"] == [GREEDY] * len(cases)
        assert rows[name]["gold_logprob_minus_full"] == pytest.approx(0, abs=1e-6)
    for name in set(rows) - set(exact):
        assert rows[name]["kl"] > 1e-3, name
        assert rows[name]["kl_p50"] <= rows[name]["kl_p95"] <= rows[name]["kl_p99"] <= rows[name]["kl_max"]
        low, high = rows[name]["kl_95"]
        assert low < rows[name]["kl"] < high
        assert rows[name]["worst_text_kl"] == pytest.approx(kv_metrics.means(sound[name]).max())
    assert rows["mask"]["kl_minus_baseline_95"] == [0, 0]
    assert rows["mask, 15 %"]["recomputed"] == pytest.approx(5 / 27)
    assert rows["mask, first 1 %"]["recomputed"] == pytest.approx(3 / 27)
    assert rows["mask, first 15 %"]["recomputed"] == pytest.approx(6 / 27)

    case = cases[2]
    backend = OracleBackend(folder)
    segments = [Segment(piece.tokens, piece.chunk) for piece in case.pieces("none", 1, case.scored_query())]
    p = np.exp(backend.reference.full(tokens_of(segments))[-7:])
    q = np.exp(backend.oracle.isolated(segments, "mask").logits[-7:])
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    assert sound["mask"][2].kl == pytest.approx((p * np.log(p / q)).sum(axis=1), rel=1e-3)
    assert sound["mask"][2].gold == pytest.approx(np.log(q[np.arange(7), case.answer]), rel=1e-4)
    assert sound["mask"][2].agree.tolist() == (p.argmax(axis=1) == q.argmax(axis=1)).tolist()


@pytest.mark.parametrize("defect", ["off_by_one", "chunk_dropped", "future_seen"])
def test_broken_modes_do_not_reach_full_prefill_where_they_must(folder: Path, sound: Any, defect: str) -> None:
    modes = [mode for mode in kv_metrics.MODES if mode.name in ("control", "control, 15 %", "mask, 100 %")]
    failed = kv_metrics.failures(measured(folder, defect, modes), EXACT_KL)
    assert any(line.startswith("control") for line in failed), failed
    right = {name: sound[name] for name in ("control", "control, 15 %", "mask, 100 %")}
    assert kv_metrics.failures(right, EXACT_KL) == []


def rows_of(kl: Sequence[float], greedy: Sequence[int] = ()) -> list[Any]:
    """Texts of two positions with these mean divergences."""
    agree, gold = np.array([True, False]), np.array([-1.0, -2.0])
    return [
        kv_metrics.Row(f"text {i}", np.array([0.0, 2 * mean]), agree, gold, list(greedy)) for i, mean in enumerate(kl)
    ]


def test_more_recomputed_and_yet_further_off_is_noticed_beyond_noise() -> None:
    falling = {"mask": rows_of([0.3, 0.2, 0.4, 0.3]), "mask, 15 %": rows_of([0.1, 0.25, 0.2, 0.1])}
    assert kv_metrics.failures(falling, EXACT_KL) == []
    rising = {"mask": falling["mask, 15 %"], "mask, 30 %": rows_of([0.12, 0.27, 0.23, 0.11])}
    (line,) = kv_metrics.failures(rising, EXACT_KL)
    assert line.startswith("mask, 30 %: KL rises from that of mask")
    noisy = {"mask": rows_of([0.3, 0.2, 0.4, 0.3]), "mask, 15 %": rows_of([0.5, 0.05, 0.6, 0.2])}
    assert kv_metrics.failures(noisy, EXACT_KL) == []
    (line,) = kv_metrics.failures({"bos, 100 %": rows_of([0, 0, 1e-3])}, 1e-4)
    assert line.startswith("bos, 100 %: KL 0.002")


def test_bands() -> None:
    good = {"mask": {"kl": 0.08, "top1": 0.85}, "prefix, 15 %": {"kl": 0.01, "top1": 0.95}}
    assert kv_metrics.bands_left("doc", good) == []
    assert kv_metrics.bands_left("rag", {"mask": {"kl": 1.0, "top1": 0.1}}) == []
    for worse in ({"kl": 0.081, "top1": 0.85}, {"kl": 0.08, "top1": 0.84}):
        assert len(kv_metrics.bands_left("doc", good | {"mask": worse})) == 1


def test_what_is_not_finite_is_no_figure() -> None:
    case = kv_plans.Case("a text", (1,), ((2,),), (3,), (4, 5))
    good = np.zeros((2, 9), np.float32)
    bad = good.copy()
    bad[1, 4] = np.nan
    assert kv_metrics.compare(case, good, good, []).kl.tolist() == [0, 0]
    with pytest.raises(ValueError, match="a text: a divergence is not finite"):
        kv_metrics.compare(case, good, bad, [])


def test_only_questions_that_full_prefill_answers_are_asked() -> None:
    cases = [kv_plans.Case(str(i), (1,), ((2,),), (3,), (4, i)) for i in range(3)]
    full = [*rows_of([0], [4, 0, 7]), *rows_of([0], [4, 1, 8]), *rows_of([0], [4, 4, 4])]
    mode = [*rows_of([0], [4, 0, 9]), *rows_of([0], [4, 7, 8]), *rows_of([0], [4, 2, 4])]
    assert kv_metrics.answers(mode, full, cases) == {"right": 1, "of": 2}
    assert kv_metrics.answers(full, full, cases) == {"right": 2, "of": 2}
    figures = kv_metrics.summary(mode, full, None)
    assert figures["greedy_same_tokens"] == [2, 1, 1]


def test_intervals_are_paired() -> None:
    """Two modes a constant apart differ by that constant in every resampling, however far texts are apart."""
    wide = rows_of([0.1, 3.0, 0.2, 1.0])
    shifted = rows_of([0.15, 3.05, 0.25, 1.05])
    low, high = kv_metrics.summary(shifted, shifted, wide)["kl_minus_baseline_95"]
    assert (low, high) == (pytest.approx(0.05), pytest.approx(0.05))
    assert kv_metrics.interval(kv_metrics.means(wide)) == kv_metrics.interval(kv_metrics.means(wide))
    low, high = kv_metrics.summary(wide, wide, None)["kl_95"]
    assert high - low > 1


def test_needles_are_in_the_notes_and_a_prompt_is_that_of_the_template(model_path: Path) -> None:
    tokenizer = nb.Tokenizer(model_path)
    cases = kv_plans.rag_cases(tokenizer)
    assert len({case.name for case in cases}) == 6
    template = ChatTemplate.of(tokenizer)
    for case in cases:
        notes = [tokenizer.decode(chunk) for chunk in case.chunks]
        code = tokenizer.decode(case.answer)
        assert code.isdigit() and len(code) == 5
        assert [note.startswith(f"Project {case.name.split()[-1]}\n") for note in notes].count(True) == 1
        assert sum(code in note for note in notes) == 1
        prompt = tokenizer.decode(case.prompt(), skip_special_tokens=False)
        asked = f"Project notes:\n\n{''.join(notes)}What is the access code of project {case.name.split()[-1]}? "
        messages = [
            {"role": "system", "content": kv_plans.SYSTEM},
            {"role": "user", "content": asked + "Answer with the code only."},
        ]
        assert prompt == template.render(messages)
        assert case.pieces("before", 1, case.query)[3].anchor == (*case.prefix, *case.chunks[0], *case.chunks[1])


def test_texts_are_cut_where_they_say(model_path: Path) -> None:
    tokenizer = nb.Tokenizer(model_path)
    cases = kv_plans.doc_cases(tokenizer.encode)
    for (name, begin), case in zip(kv_plans.TEXTS, cases, strict=True):
        ids = tokenizer.encode((kv_plans.ROOT / name).read_text())
        assert [*case.prompt(), *case.answer] == ids[begin : begin + 864]
        assert (len(case.prefix), [len(chunk) for chunk in case.chunks], len(case.answer)) == (32, [192] * 4, 63)
        assert case.reversed().prompt()[32:224] == case.prompt()[608:800]
    moved = kv_plans.doc_cases(tokenizer.encode, windows=3)
    assert moved[::3] == cases
    for before, case in pairwise(moved[:3]):  # scored tokens follow each other
        assert case.prompt()[:-64] == before.prompt()[64:] and before.answer == tuple(case.prompt()[-64:-1])
    with pytest.raises(ValueError, match="too few"):
        kv_plans.doc_cases(tokenizer.encode, chunk=1000)
