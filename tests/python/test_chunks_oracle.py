"""Composed prompts in the engine against the slow oracle, in every mode, and that the oracle's defects would show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from chunk_oracle import DEFECTS, Oracle, Segment, as_served, select_first_share
from numpy.typing import NDArray
from oracle_subject import Subject
from test_chunk_oracle import ANCHORED, MODELS, PROMPT, PROMPTS, SHOWN_BY

import nanobraid as nb
from nanobraid._core import available_backends

TOLERANCE = 1e-4
# The engine refuses models whose layers differ in attention.
NAMES = [name for name in MODELS if name != "qwen2-half-windowed"]
COMPOSED = {name: prompt for name, prompt in PROMPTS.items() if not prompt[-1].is_chunk} | {"anchored": ANCHORED}
REUSES: list[nb.Isolated | nb.Blend] = [
    nb.Isolated("mask"),
    nb.Isolated("keep"),
    *(nb.Blend(ratio, sink="mask") for ratio in (0.05, 0.15, 0.5, 1.0)),
    *(nb.Blend(ratio, sink="keep") for ratio in (0.05, 0.5)),
    *(nb.Blend(ratio, "first", "mask") for ratio in (0.05, 0.3)),
]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("chunks_oracle")
    return {name: Subject(name, root) for name in NAMES}


@pytest.fixture(params=available_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def selected(oracle: Oracle, segments: Sequence[Segment], reuse: nb.Isolated | nb.Blend) -> list[int]:
    if isinstance(reuse, nb.Isolated):
        return []
    segments = as_served(segments, reuse.sink)
    if reuse.select == "first":
        return select_first_share(segments, reuse.ratio)
    return oracle.select_deviation(segments, reuse.ratio)


def engine_rows(llm: nb.LLM, segments: Sequence[Segment], reuse: nb.Isolated | nb.Blend) -> NDArray[np.float32]:
    given = [nb.Segment(segment.tokens, chunk=segment.is_chunk, anchor=segment.anchor) for segment in segments]
    return llm.composed_logits(given, reuse=reuse)


def opened(subject: Subject, backend: str, kv_dtype: str = "f32") -> nb.LLM:
    return nb.LLM(
        subject.path, device=backend, dtype="f32", kv_dtype=kv_dtype, force_kv_dtype=kv_dtype != "f32", num_threads=1
    )


def apart(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("name", NAMES)
def test_every_mode_is_its_oracle(subjects: dict[str, Subject], name: str, backend: str) -> None:
    oracle = Oracle(subjects[name].folder)
    with opened(subjects[name], backend) as llm:
        for segments in COMPOSED.values():
            for reuse in REUSES:
                want = oracle.blend(segments, selected(oracle, segments, reuse), reuse.sink)
                got = engine_rows(llm, segments, reuse)
                assert apart(got, want.logits[-len(got) :]) < TOLERANCE, (segments, reuse)


@pytest.mark.parametrize("kv_dtype", ["bf16", "f16", "int8", "mixed", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_formats_cost_what_they_cost_without_chunks(subjects: dict[str, Subject], name: str, kv_dtype: str) -> None:
    """Composed prompts are as far from those of f32 keys and values as whole prompts are, up to a small factor.

    Where tokens are computed again because they deviate, a format may choose others, and is then another approximation.
    """
    whole = [token for segment in PROMPT for token in segment.tokens]
    with opened(subjects[name], "auto") as exact, opened(subjects[name], "auto", kv_dtype) as llm:
        plain = apart(exact.logits(whole), llm.logits(whole))
        for segments in COMPOSED.values():
            for reuse in REUSES:
                first, again = engine_rows(llm, segments, reuse), engine_rows(llm, segments, reuse)
                assert first.tobytes() == again.tobytes()
                if isinstance(reuse, nb.Isolated) or reuse.select == "first":
                    assert 0 < apart(engine_rows(exact, segments, reuse), first) <= 5 * plain, (segments, reuse)


LONE = [
    [Segment((5, 6, 7, 8)), Segment((9,), True), Segment((10, 11)), Segment(tuple(range(20, 40)), True), Segment((3,))],
    [Segment((9,), True, (4, 5)), Segment((10, 11)), Segment((12,), True, (7, 8)), Segment((13, 14))],
    [Segment((5, 6, 7, 8)), Segment((9,), True), Segment((10, 11))],
]


@pytest.mark.parametrize("prompt", range(len(LONE)))
def test_a_chunk_of_one_token_is_not_lost(subjects: dict[str, Subject], prompt: int) -> None:
    """Masked, it is computed as the tokens around it, and counted so; seen, it is a chunk like others."""
    oracle, segments = Oracle(subjects["llama"].folder), LONE[prompt]
    given = [nb.Segment(segment.tokens, chunk=segment.is_chunk, anchor=segment.anchor) for segment in segments]
    with opened(subjects["llama"], "reference") as llm:
        for reuse in REUSES:
            want = oracle.blend(segments, selected(oracle, segments, reuse), reuse.sink)
            got = engine_rows(llm, segments, reuse)
            assert apart(got, want.logits[-len(got) :]) < TOLERANCE, reuse
        params = nb.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        for sink, counted in (("mask", (20, 1, 0)[prompt]), ("keep", (21, 2, 1)[prompt])):
            report = llm.compose(given, params, reuse=nb.Isolated(sink)).reuse  # type: ignore[arg-type]
            assert report is not None
            assert report.isolated == counted
            assert report.mode_served == ("isolated" if counted else "exact")


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_would_show(subjects: dict[str, Subject], defect: str) -> None:
    """The engine is far from the oracle of each known error, by what the comparison above would see."""
    name, segments = SHOWN_BY[defect]
    reuse = nb.Blend(0.15) if segments is PROMPT else nb.Isolated()
    chosen = selected(Oracle(subjects[name].folder), segments, reuse)
    with opened(subjects[name], "reference") as llm:
        got = engine_rows(llm, segments, reuse)
    wrong = Oracle(subjects[name].folder, defect).blend(segments, chosen, reuse.sink)
    assert apart(got, wrong.logits[-len(got) :]) > 100 * TOLERANCE
