"""KV policies in the engine: against a slow oracle under the same mask; bit for bit where nothing is hidden."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from chunk_oracle import Oracle, rotate
from engine_threads import THREADS
from hf_weights import Array
from numpy.typing import NDArray
from oracle_subject import Subject
from test_chunk_oracle import ids

import nanobraid as nb
from nanobraid import kv_policy
from nanobraid._core import available_backends
from nanobraid.errors import InvalidArgumentError, UnsupportedError
from nanobraid.kv_policy import KvPolicy

TOLERANCE = 1e-4
TEXT = ids(150, 9)
SMALL = [
    kv_policy.sliding_window(20),
    kv_policy.sliding_window(33, sinks=0),
    kv_policy.prefix_window(19, 16),
    kv_policy.strided(3, window=20, prefix=5),
    kv_policy.block(48, 16, window=17),
    kv_policy.budget(32, window=10, prefix=16),
    kv_policy.chunk_summary(window=24, group=32),
]
LOSSY = [name for name in kv_policy.NAMES if name not in ("full", "none")]

Mask = NDArray[np.bool_]


def _twos(number: int) -> int:
    return 0 if number % 2 else 1 + _twos(number // 2)


def _stays(policy: KvPolicy, key: int, prefix: int, tail: int) -> bool:
    """Of a key in a block before the tail, which begins with block `tail`."""
    of, block = dict(policy.options), key // 16
    if policy.name == "strided":
        return block % of["stride"] == 0
    if policy.name == "block":
        return key % of["block_size"] >= of["block_size"] - of["keep"]
    old = range(-(-prefix // 16), tail)
    ranked = sorted(old, key=lambda block: (-_twos(block + 1), -block))
    return block in ranked[: of["tokens"] // 16]


def sees(policy: KvPolicy, row: int, key: int) -> bool:
    """Token by token, as the documentation of the policies says it."""
    of = dict(policy.options)
    window, prefix = of["window"], of.get("prefix", of.get("sinks", 0))
    if key > row or key < prefix or key > row - window:
        return key <= row
    oldest_seen = max(0, row - window + 1)
    if policy.name == "chunk_summary":
        return key // of["group"] >= oldest_seen // of["group"]
    if policy.name in ("sliding_window", "prefix_window"):
        return False
    return key // 16 >= oldest_seen // 16 or _stays(policy, key, prefix, oldest_seen // 16)


def mask_of(policy: KvPolicy, count: int) -> Mask:
    return np.array([[sees(policy, row, key) for key in range(count)] for row in range(count)])


class Summarizing(Oracle):
    """Rows see a group of tokens that their policy hides as one key: the mean before rotation, in the middle."""

    def logits(self, tokens: tuple[int, ...], policy: KvPolicy, *, weighted: bool = True) -> Array:
        count, group = len(tokens), policy["group"]
        positions = np.arange(count)
        visible = mask_of(policy, count)
        begins = np.arange(0, count - group + 1, group)
        causal = positions[:, None] >= positions[None, :]
        hides = np.array([[not visible[row, begin] and causal[row, begin] for begin in begins] for row in positions])
        bias = np.concatenate([np.zeros(count), np.full(len(begins), math.log(group) if weighted else 0.0)])
        x = self.tensors["model.embed_tokens.weight"][list(tokens)]
        for layer in range(self.num_layers):
            q, k, v = self._project(layer, x, positions)
            plain = self._project(layer, x, np.zeros_like(positions))[1]
            means = np.stack([plain[begin : begin + group].mean(axis=0) for begin in begins])
            means = rotate(means, (begins + group // 2)[:, None, None] * self.frequencies)
            values = np.stack([v[begin : begin + group].mean(axis=0) for begin in begins])
            out = np.zeros_like(q)
            for head in range(self.heads):
                of = head * self.kv_heads // self.heads
                keys = np.concatenate([k[:, of], means[:, of]])
                scores = q[:, head] @ keys.T / math.sqrt(self.dim) + bias
                scores = np.where(np.concatenate([visible, hides], axis=1), scores, -np.inf)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ np.concatenate([v[:, of], values[:, of]])
            x = self._finish_layer(layer, x, out.reshape(count, -1))
        return self._head(x)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("kv_policy")
    return {name: Subject(name, root) for name in ("llama", "yarn", "mistral")}


def opened(subject: Subject, backend: str = "auto", **options: Any) -> nb.LLM:
    return nb.LLM(subject.path, **{"device": backend, "dtype": "f32", "kv_dtype": "f32", "num_threads": 1, **options})


def apart(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("policy", SMALL, ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", ["llama", "yarn", "mistral"])
def test_every_policy_is_its_mask(subjects: dict[str, Subject], name: str, policy: KvPolicy, backend: str) -> None:
    oracle = Summarizing(subjects[name].folder)
    if policy.name == "chunk_summary":
        if name == "mistral":
            with (
                opened(subjects[name], backend, kv_policy=policy) as llm,
                pytest.raises(UnsupportedError, match="chunk_summary is not offered for models"),
            ):
                llm.logits(TEXT)
            return
        want = oracle.logits(TEXT, policy)
    else:
        want = oracle.masked_forward(TEXT, np.arange(len(TEXT)), mask_of(policy, len(TEXT)))[0]
    full = oracle.full(TEXT)
    for rows in (512, 40):
        with opened(subjects[name], backend, kv_policy=policy, max_batch_tokens=rows) as llm:
            got = llm.logits(TEXT)
        assert apart(got, want) < TOLERANCE
    if name != "mistral":
        assert apart(full, want) > 10 * TOLERANCE, "the policy changes nothing here"


def test_the_bias_of_summaries_counts(subjects: dict[str, Subject]) -> None:
    policy = SMALL[-1]
    oracle = Summarizing(subjects["llama"].folder)
    assert apart(oracle.logits(TEXT, policy), oracle.logits(TEXT, policy, weighted=False)) > 10 * TOLERANCE


@pytest.fixture(scope="module")
def llm(subjects: dict[str, Subject]) -> Iterator[nb.LLM]:
    with opened(subjects["llama"], kv_dtype="bf16", num_threads=THREADS) as llm:
        yield llm


def big(name: str) -> KvPolicy:
    """One that no text of these tests outgrows."""
    options = {"prefix_window": "(0, 4096)", "strided": "(4, window=4096)", "block": "(64, 16, window=4096)"}
    return kv_policy.parse(
        name + options.get(name, {"budget": "(16, window=4096)", "sliding_window": "(4096)"}.get(name, "(window=4096)"))
    )


def answer(llm: nb.LLM, policy: KvPolicy | None, prompt: tuple[int, ...] = TEXT) -> nb.RequestOutput:
    params = nb.SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, logprobs=0, prompt_logprobs=0, kv_policy=policy
    )
    return llm.generate([list(prompt)], params)[0]


def bits(output: nb.RequestOutput) -> tuple[Any, ...]:
    choice = output.outputs[0]
    return tuple(choice.token_ids), repr(choice.logprobs), repr(output.prompt_logprobs)


@pytest.mark.parametrize("name", LOSSY)
def test_a_window_longer_than_the_text_is_full(llm: nb.LLM, name: str) -> None:
    exact, windowed = answer(llm, None), answer(llm, big(name))
    assert bits(windowed) == bits(exact)
    assert windowed.reuse is not None
    assert windowed.reuse.is_exact


def test_none_is_full_computed_again(llm: nb.LLM) -> None:
    before = llm.stats()["prompt_tokens"]
    exact, again = answer(llm, None, TEXT[:30]), answer(llm, kv_policy.none(), TEXT[:30])
    assert bits(again) == bits(exact)
    assert again.num_cached_tokens == 0
    assert llm.stats()["blocks_owned"] == 0
    assert llm.stats()["prompt_tokens"] - before >= 30 + 30 * 40


@pytest.mark.parametrize("policy", SMALL, ids=lambda policy: policy.name)
def test_what_a_policy_left_serves_no_exact_request(llm: nb.LLM, policy: KvPolicy) -> None:
    prompt = ids(140, 50 + SMALL.index(policy))
    lossy = answer(llm, policy, prompt)
    assert lossy.reuse is not None
    assert lossy.reuse.policy_applied
    assert not lossy.reuse.is_exact
    with_cache = answer(llm, None, prompt)
    assert with_cache.reuse is not None
    assert with_cache.reuse.is_exact
    longer = (*prompt, *lossy.outputs[0].token_ids, 7)
    params = nb.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    assert llm.generate([list(longer)], params)[0].num_cached_tokens <= 144
    assert bits(lossy) == bits(answer(llm, policy, prompt)), "the cache changes what a policy sees"


def test_policies_side_by_side(llm: nb.LLM) -> None:
    policies: list[KvPolicy | None] = [None, *SMALL, kv_policy.none()]
    alone = [answer(llm, policy) for policy in policies]
    params = [
        nb.SamplingParams(
            temperature=0, max_tokens=40, ignore_eos=True, logprobs=0, prompt_logprobs=0, kv_policy=policy
        )
        for policy in policies
    ]
    together = llm.generate([list(TEXT)] * len(policies), params)
    assert [bits(output) for output in together] == [bits(output) for output in alone]
    assert len({bits(output)[1] for output in together}) == len(SMALL) + 1, "policies differ, but for none and full"


@pytest.mark.parametrize("policy", SMALL, ids=lambda policy: policy.name)
def test_several_answers_and_little_memory(subjects: dict[str, Subject], policy: KvPolicy, llm: nb.LLM) -> None:
    """A pool in which answers preempt each other changes no bit."""
    block = llm.stats()["kv_bytes"] // llm.stats()["blocks_total"]
    params = nb.SamplingParams(temperature=0.9, seed=4, n=3, max_tokens=50, ignore_eos=True, logprobs=0)
    params = nb.SamplingParams(**{**vars(params), "kv_policy": policy})
    prompts = [list(ids(40 + 10 * i, 70 + i)) for i in range(5)]
    want = [llm.generate([prompt], params)[0] for prompt in prompts]
    options = {"kv_dtype": "bf16", "kv_cache_bytes": 20 * block, "max_batch_tokens": 24, "num_threads": THREADS}
    with opened(subjects["llama"], **options) as small:
        got = small.generate(prompts, params)
        assert small.stats()["preemptions"] > 0
    for a, b in zip(want, got, strict=True):
        assert [c.token_ids for c in a.outputs] == [c.token_ids for c in b.outputs]
        assert [repr(c.logprobs) for c in a.outputs] == [repr(c.logprobs) for c in b.outputs]


@pytest.mark.parametrize(
    ("policy", "blocks"), [("sliding_window(32)", 10), ("budget(32, window=32)", 14), ("prefix_window(32, 16)", 11)]
)
def test_memory_stays_constant(subjects: dict[str, Subject], llm: nb.LLM, policy: str, blocks: int) -> None:
    """A text of the whole context in a pool of a few blocks, in which a full request does not even fit."""
    block = llm.stats()["kv_bytes"] // llm.stats()["blocks_total"]
    options = {"kv_dtype": "bf16", "kv_cache_bytes": blocks * block, "max_batch_tokens": 16, "num_threads": THREADS}
    with opened(subjects["llama"], **options) as small:
        room = small.config["max_model_len"] - 200
        prompt = list(ids(200, 3))
        params = nb.SamplingParams(temperature=0, max_tokens=room, ignore_eos=True, kv_policy=policy)
        (output,) = small.generate([prompt], params)
        assert len(output.outputs[0].token_ids) == room
        assert output.outputs[0].finish_reason == "length"
        with pytest.raises(InvalidArgumentError, match="the whole pool has"):
            small.generate([prompt], nb.SamplingParams(temperature=0, max_tokens=room))
        (wide,) = llm.generate([prompt], params)
        assert wide.outputs[0].token_ids == output.outputs[0].token_ids


def test_the_default_of_a_model_and_what_a_request_says(subjects: dict[str, Subject], llm: nb.LLM) -> None:
    policy = SMALL[0]
    with opened(subjects["llama"], kv_dtype="bf16", kv_policy=str(policy), num_threads=THREADS) as windowed:
        assert windowed.config["kv_policy"] == str(policy)
        assert bits(answer(windowed, None)) == bits(answer(llm, policy))
        assert bits(answer(windowed, kv_policy.full())) == bits(answer(llm, None))
    assert llm.config["kv_policy"] == "full"
    with pytest.raises(InvalidArgumentError, match="kv_policy must be one of"):
        opened(subjects["llama"], kv_policy="half")


def test_not_with_reused_chunks(llm: nb.LLM) -> None:
    parts = [nb.Segment(TEXT[:20]), nb.Segment(TEXT[20:60], chunk=True), nb.Segment(TEXT[60:70])]
    params = nb.SamplingParams(temperature=0, max_tokens=4, kv_policy="sliding_window(8)")
    with pytest.raises(UnsupportedError, match="kv_policy other than full cannot be had together with chunks"):
        llm.compose(parts, params, reuse=nb.Isolated())
    assert llm.compose(parts, params).reuse.policy_applied  # type: ignore[union-attr]
    with pytest.raises(UnsupportedError, match="kv_policy none gives one answer"):
        llm.generate([list(TEXT)], nb.SamplingParams(n=2, kv_policy="none"))


@pytest.mark.parametrize("make", [kv_policy.full, kv_policy.none])
def test_exact_policies_say_so(llm: nb.LLM, make: Callable[[], KvPolicy]) -> None:
    report = answer(llm, make()).reuse
    assert report is not None
    assert report.is_exact
    assert not report.policy_applied
