"""The oracles of composed prompts: that they agree with each other and with full prefill, and that defects show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chunk_oracle import (
    DEFECTS,
    Composed,
    Oracle,
    Segment,
    rotate,
    select_first,
    select_first_share,
    share_of,
    tokens_of,
)
from hf_weights import frequencies, rope_of
from tiny_hf import config_of, forward, tensors_of, write_folder

SAME = 1e-9
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": config_of("llama", num_hidden_layers=3),
    "linear": config_of("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama3": config_of("llama", rope_scaling=LLAMA3),
    "yarn": config_of("qwen3", rope_scaling=YARN),
    "mistral": config_of("mistral", num_hidden_layers=3, sliding_window=12),
    "qwen2": config_of("qwen2"),
    "qwen2-half-windowed": config_of("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": config_of("qwen3"),
}
SCALED = ("linear", "llama3", "yarn")


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(0, 300, count))


PREFIX, FIRST, SECOND, QUERY = (
    Segment(ids(5, 1)),
    Segment(ids(13, 2), True),
    Segment(ids(9, 3), True),
    Segment(ids(6, 4)),
)
BETWEEN, SINGLE = Segment(ids(3, 5)), Segment(ids(1, 6), True)
PROMPT = [PREFIX, FIRST, SECOND, QUERY]
PROMPTS = {
    "prefix, chunks, query": PROMPT,
    "text between": [PREFIX, FIRST, BETWEEN, SECOND, QUERY],
    "a chunk first": [FIRST, SECOND, QUERY],
    "the same twice": [PREFIX, FIRST, FIRST, SINGLE, QUERY],
    "a chunk last": [PREFIX, FIRST, SECOND],
}
ANCHORED = [PREFIX, Segment(FIRST.tokens, True, ids(4, 7)), Segment(SECOND.tokens, True, (11,)), QUERY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chunk_oracle")
    for name, config in MODELS.items():
        write_folder(root / name, config, tensors_of(config, seed=5))
    return root


def apart(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def last_rows(composed: Composed, segments: Sequence[Segment]) -> Any:
    """The logits of the last segment's tokens; of a chunk, of the last one, which is always computed."""
    return composed.logits[-1 if segments[-1].is_chunk else -len(segments[-1].tokens) :]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("sink", ["mask", "keep"])
@pytest.mark.parametrize("name", MODELS)
def test_two_formulations_of_each_mode_agree(folder: Path, name: str, sink: str, prompt: str) -> None:
    oracle, segments = Oracle(folder / name), PROMPTS[prompt]
    some = [*select_first(segments, 3)[1:], select_first(segments, 99)[-1]]
    for moved, masked in (
        (oracle.isolated(segments, sink), oracle.isolated_by_mask(segments, sink)),
        (oracle.blend(segments, some, sink), oracle.blend_by_mask(segments, some, sink)),
    ):
        assert moved.positions.tolist() == masked.positions.tolist()
        assert apart(moved.logits, masked.logits) < SAME
        assert apart(moved.keys, masked.keys) < SAME
        assert apart(moved.values, masked.values) < SAME
    assert set(some) < set(moved.positions)


@pytest.mark.parametrize("name", MODELS)
def test_everything_recomputed_is_full_prefill(folder: Path, name: str) -> None:
    oracle = Oracle(folder / name)
    for segments in (*PROMPTS.values(), ANCHORED):
        everything = select_first(segments, 1000)
        for sink in ("mask", "keep"):
            blend = oracle.blend(segments, everything, sink)
            assert not blend.hidden.any()
            assert apart(blend.logits, oracle.full(tokens_of(segments))) < SAME
    assert everything == oracle.select_deviation(ANCHORED, 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_isolation_is_no_full_prefill_but_where_one_chunk_comes_first(folder: Path, name: str) -> None:
    oracle = Oracle(folder / name)
    alone = [FIRST, QUERY]
    assert apart(oracle.isolated(alone, "mask").logits, oracle.full(tokens_of(alone))) < SAME
    assert oracle.select_deviation(alone, 1.0) == select_first(alone, 5) == []
    for segments in (*PROMPTS.values(), ANCHORED):
        full = oracle.full(tokens_of(segments))
        masked, kept = (last_rows(oracle.isolated(segments, sink), segments) for sink in ("mask", "keep"))
        assert apart(masked, full[-len(masked) :]) > 1e-3
        assert apart(kept, full[-len(kept) :]) > 1e-3
        assert apart(masked, kept) > 1e-3


def test_the_order_of_chunks_matters_and_each_order_has_its_oracle(folder: Path) -> None:
    oracle = Oracle(folder / "llama")
    swapped = [PREFIX, SECOND, FIRST, QUERY]
    one, other = oracle.isolated(PROMPT, "mask"), oracle.isolated(swapped, "mask")
    assert apart(last_rows(one, PROMPT), last_rows(other, swapped)) > 1e-3
    assert apart(other.logits, oracle.isolated_by_mask(swapped, "mask").logits) < SAME


def test_an_anchored_chunk_equals_a_pass_behind_its_anchor_and_no_other(folder: Path) -> None:
    for name in MODELS:
        oracle = Oracle(folder / name)
        chunk = ANCHORED[1]
        whole = oracle.isolated(ANCHORED, "keep")
        _, keys, values = oracle.prefill([*chunk.anchor, *chunk.tokens])
        used = frequencies(rope_of(oracle.config), oracle.dim)[0]
        offset = len(PREFIX.tokens) - len(chunk.anchor)
        assert apart(whole.values[:, 5:18], values[:, 4:]) < SAME
        assert apart(whole.keys[:, 5:18], rotate(keys[:, 4:], offset * used)) < SAME
        far = Oracle(folder / name, "anchor_global").isolated(ANCHORED, "keep")
        assert apart(whole.logits, far.logits) > 1e-3
        assert apart(whole.logits, oracle.isolated(PROMPT, "keep").logits) > 1e-3
    with pytest.raises(ValueError, match="anchored"):
        oracle.isolated_by_mask(ANCHORED, "keep")


def test_an_anchor_that_is_the_true_prefix_makes_the_chunk_exact(folder: Path) -> None:
    for name in MODELS:
        oracle = Oracle(folder / name)
        segments = [PREFIX, Segment(FIRST.tokens, True, PREFIX.tokens), QUERY]
        composed = oracle.isolated(segments, "keep")
        assert apart(last_rows(composed, segments), oracle.full(tokens_of(segments))[-6:]) < SAME
        assert max(oracle.deviations(segments).values()) < SAME


def changed(segments: Sequence[Segment], position: int) -> list[Segment]:
    """The prompt with another token at `position`."""
    out, begin = [], 0
    for segment in segments:
        tokens = list(segment.tokens)
        if begin <= position < begin + len(tokens):
            tokens[position - begin] = (tokens[position - begin] + 1) % 300
        out.append(Segment(tuple(tokens), segment.is_chunk, segment.anchor))
        begin += len(tokens)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_nothing_sees_what_follows_it(folder: Path, name: str) -> None:
    """Another token at j leaves keys and values before j as they were, bit for bit, at every layer."""
    selected = [6, 9, 14, 19, 25]
    seen = 0
    for segments in (PROMPT, ANCHORED):
        for position in (0, 5, 8, 9, 14, 20, 25, 27, 32):
            for defect in (None, "future_seen"):
                oracle = Oracle(folder / name, defect)
                before = oracle.blend(segments, selected, "mask")
                after = oracle.blend(changed(segments, position), selected, "mask")
                same = np.array_equal(before.keys[:, :position], after.keys[:, :position])
                same &= np.array_equal(before.values[:, :position], after.values[:, :position])
                assert same or defect
                seen += not same
                assert apart(before.keys[:, position], after.keys[:, position]) > 1e-3
    assert seen > 2


def test_the_choice_of_what_is_recomputed(folder: Path) -> None:
    oracle = Oracle(folder / "llama")
    found = oracle.deviations(PROMPT)
    assert list(found) == list(range(5, 27))
    full = oracle.prefill(tokens_of(PROMPT))[1]
    isolated = oracle.isolated(PROMPT, "keep").keys
    assert found == pytest.approx(
        {
            i: sum((full[1, i, h] - isolated[1, i, h]) @ (full[1, i, h] - isolated[1, i, h]) for h in range(2))
            for i in found
        }
    )
    for ratio, count in ((0.0, 0), (0.01, 1), (0.5, 11), (0.51, 12), (1.0, 22)):
        chosen = oracle.select_deviation(PROMPT, ratio)
        assert len(chosen) == count
        assert chosen == sorted(chosen)
        left = [value for position, value in found.items() if position not in chosen]
        assert not chosen or not left or min(found[position] for position in chosen) >= max(left)
    assert select_first(PROMPT, 2) == [5, 6, 18, 19]
    assert select_first([FIRST, SECOND, SINGLE, QUERY], 2) == [13, 14, 22]
    assert select_first_share(PROMPT, 0.2) == [5, 6, 7, 18, 19]
    assert select_first_share([PREFIX, FIRST, SINGLE, SECOND], 1.0) == list(range(5, 27))
    assert list(oracle.deviations([PREFIX, SECOND, SINGLE])) == list(range(5, 14))
    assert [share_of(0.55, 100), share_of(0.15, 100), share_of(0.15, 101), share_of(1e-6, 3)] == [55, 15, 16, 1]
    with pytest.raises(ValueError, match="position 0"):
        oracle.blend(PROMPT, [0], "mask")


def test_equal_deviations_go_to_the_lower_position(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(folder / "llama")
    monkeypatch.setattr(oracle, "deviations", lambda _: {9: 1.0, 6: 1.0, 12: 2.0, 7: 1.0})
    assert oracle.select_deviation(PROMPT, 0.75) == [6, 7, 12]


@pytest.mark.parametrize("name", MODELS)
def test_a_moved_key_is_the_key_of_that_position(folder: Path, name: str) -> None:
    """At any distance, with the norm it had: the scaled frequencies, and no attention factor."""
    oracle = Oracle(folder / name)
    tokens = list(FIRST.tokens)
    alone = np.tri(len(tokens), dtype=np.bool_)
    _, near, _ = oracle.masked_forward(tokens, np.arange(len(tokens)), alone)
    for offset in (1, 100, 1000, 5000, 30000):
        _, far, _ = oracle.masked_forward(tokens, np.arange(len(tokens)) + offset, alone)
        moved = oracle.move(near, offset)
        assert apart(moved, far) < 1e-8
        assert apart(np.linalg.norm(moved, axis=-1), np.linalg.norm(near, axis=-1)) < SAME
        unscaled = Oracle(folder / name, "unscaled_move").move(near, offset)
        assert (apart(unscaled, far) > 1e-2) == (name in SCALED)
        twice = Oracle(folder / name, "factor_twice").move(near, offset)
        assert (apart(np.linalg.norm(twice, axis=-1), np.linalg.norm(near, axis=-1)) > 1e-2) == (name == "yarn")


SHOWN_BY = {
    "future_seen": ("llama", PROMPT),
    "unscaled_move": ("llama3", PROMPT),
    "factor_twice": ("yarn", PROMPT),
    "moved_in_place": ("llama", PROMPT),
    "not_moved": ("llama", PROMPT),
    "off_by_one": ("llama", PROMPT),
    "sink_kept": ("llama", PROMPT),
    "first_chunk_hidden": ("llama", PROMPTS["a chunk first"]),
    "anchor_global": ("llama", ANCHORED),
    "chunk_dropped": ("llama", PROMPT),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_shows(folder: Path, defect: str) -> None:
    """Far above the tolerance of any comparison with an engine in float32."""
    name, segments = SHOWN_BY[defect]
    selected = [position for position in (7, 15, 20, 24) if position in select_first(segments, 99)]
    right = Oracle(folder / name).blend(segments, selected, "mask")
    wrong = Oracle(folder / name, defect).blend(segments, selected, "mask")
    assert apart(last_rows(right, segments), last_rows(wrong, segments)) > 1e-2


def test_what_the_oracle_cannot_judge_is_refused(folder: Path, tmp_path: Path) -> None:
    config = config_of("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match="dynamic"):
        Oracle(write_folder(tmp_path / "dynamic", config, tensors_of(config)))
    config = config_of("llama")
    tensors = tensors_of(config)
    tensors["model.layers.1.self_attn.o_proj.bias"] = np.ones(64, np.float32)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.bias"):
        Oracle(write_folder(tmp_path / "bias", config, tensors))
    oracle = Oracle(folder / "llama")
    with pytest.raises(ValueError, match="sink"):
        oracle.isolated(PROMPT, "drop")
    with pytest.raises(ValueError, match="anchor"):
        oracle.isolated([Segment((1,), False, (2,))], "mask")
    with pytest.raises(ValueError, match="no defect"):
        Oracle(folder / "llama", "unknown")


OUR_NAMES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "o_proj": "attn_output",
    "lm_head": "output",
    **{f"{name}_proj": f"attn_{name}" for name in "qkv"},
    **{f"{name}_norm": f"attn_{name}_norm" for name in "qk"},
    **{f"{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def our_name(name: str) -> str:
    """model.layers.1.self_attn.q_proj.bias is blk.1.attn_q.bias."""
    parts = [part for part in name.split(".") if part not in ("model", "self_attn", "mlp")]
    if parts == ["norm", "weight"]:
        return "output_norm.weight"
    return ".".join({"layers": "blk", **OUR_NAMES}.get(part, part) for part in parts)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_full_prefill_is_that_of_the_other_forward_pass_of_the_tests(folder: Path, name: str) -> None:
    config = MODELS[name]
    tokens = list(ids(40, 8))
    weights = {our_name(tensor): values for tensor, values in tensors_of(config, seed=5).items()}
    assert apart(Oracle(folder / name).full(tokens), forward(config, weights, tokens)) < SAME


def test_the_attention_factor_is_in_queries_and_keys(folder: Path) -> None:
    """As figures: 0.1 ln 4 + 1 on each side; a key without RoPE's rotation has that factor more than its norm."""
    yarn, plain = Oracle(folder / "yarn"), Oracle(folder / "qwen3")
    assert yarn.factor == pytest.approx(1.1386294361119891)
    assert yarn.frequencies[0] == plain.frequencies[0]
    assert yarn.frequencies[-1] == pytest.approx(plain.frequencies[-1] / 4)
    ours, theirs = (oracle.prefill([5, 7])[1][0] for oracle in (yarn, plain))
    assert np.linalg.norm(ours, axis=-1) == pytest.approx(yarn.factor * np.linalg.norm(theirs, axis=-1))
    # At one token, attention is that token's value whatever the scores: the factor acts only from two tokens on.
    yarn.factor = 1.0
    assert apart(yarn.full([5]), Oracle(folder / "yarn").full([5])) < SAME
    assert apart(yarn.full([5, 7]), Oracle(folder / "yarn").full([5, 7])) > 1e-3


def test_full_prefill_is_that_of_transformers(tmp_path: Path) -> None:
    """Every family of the seeded models, at a length where scaling and windows act."""
    torch = pytest.importorskip("torch", reason="torch, the oracle's base, is not installed")
    pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
    from seeded_models import FAMILIES, VOCAB_SIZE, build_family

    tokens = [int(i) for i in np.random.default_rng(1).integers(0, VOCAB_SIZE, 200)]
    for family in FAMILIES:
        model = build_family(family)
        model.save_pretrained(tmp_path / family.name)
        with torch.inference_mode():
            theirs = model(torch.tensor([tokens])).logits[0].numpy()
        ours = Oracle(tmp_path / family.name).full(tokens)
        assert apart(ours, theirs) < 1e-4 * np.abs(theirs).max(), family.name
