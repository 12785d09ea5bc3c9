"""Quality under a cache: what `worker` runs for a job of the kind "quality".

The reference is the same engine with f32 keys and values and nothing forgotten. Predictions of a text come from one
prefill whose every row sees what a step of decoding would see under that cache. Needles are scored with the code known
(teacher forcing): retrieved where each of its tokens is the most likely one, which is what greedy decoding would write.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanobraid.bench_kv import divergence, documents
from nanobraid.bench_kv.config import QualityConfig
from nanobraid.bench_kv.methods import Case
from nanobraid.bench_kv.speed import recompute
from nanobraid.errors import InternalError, InvalidArgumentError
from nanobraid.kv_policy import KvPolicy, sliding_window
from nanobraid.llm import LLM
from nanobraid.sampling_params import SamplingParams, require_int


@dataclass(frozen=True)
class QualityJob:
    """What to measure.

    Attributes:
        model: Path of the model.
        options: Of `LLM`: device, num_threads, max_batch_tokens.
        kv_dtype: Type of keys and values of methods that name none.
        case: The method.
        config: How.
        seed: Of the documents with needles.
        texts: Texts by name; None takes those of the package.
        only_texts: Perplexity and KL alone, for a size among several.
    """

    model: str
    options: dict[str, Any]
    kv_dtype: str
    case: Case
    config: QualityConfig
    seed: int
    texts: dict[str, str] | None = None
    only_texts: bool = False


def measure(job: QualityJob) -> dict[str, Any]:
    """Runs a job.

    Raises:
        NanobraidError: The engine refuses the format or the policy; a text is too short; or a figure is not finite.
    """
    config = job.config
    texts = documents.texts() if job.texts is None else job.texts
    longest = max([config.text_tokens + config.agreement_tokens, *(n + 16 for n in config.needle_lengths)])
    shared: dict[str, Any] = {
        **job.options,
        "dtype": config.dtype,
        "max_model_len": longest,
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
    }
    policy: dict[str, Any] = {} if job.case.policy is None else {"kv_policy": job.case.policy}
    with (
        LLM(job.model, kv_dtype="f32", **shared) as reference,
        LLM(job.model, kv_dtype=job.case.kv_dtype or job.kv_dtype, **policy, **shared) as llm,
    ):
        tokens = {name: _tokens(reference, name, text, config.text_tokens) for name, text in texts.items()}
        out = predictions(reference, llm, tokens)
        if config.agreement_tokens and not job.only_texts:
            out |= agreement(reference, llm, job.case, tokens, config.agreement_tokens)
        if config.needle_lengths and not job.only_texts:
            out["needles"] = needles(reference, llm, config, job.seed)
        out["quality_dtype"] = llm.config["dtype"]
    return out


def _tokens(llm: LLM, name: str, text: str, count: int) -> list[int]:
    ids = llm.tokenizer.encode(text)[:count]
    if len(ids) < 8:
        raise InvalidArgumentError(f"text {name!r} must have at least 8 tokens, got {len(ids)}")
    return ids


def predictions(reference: LLM, llm: LLM, tokens: dict[str, list[int]]) -> dict[str, Any]:
    """Perplexity, and divergence from the reference, over all tokens of all texts."""
    rows: dict[str, dict[str, Any]] = {}
    kl, agree, nll, exact_nll, late = [], [], [], [], []
    for name, ids in tokens.items():
        exact, ours = reference.logits(ids), llm.logits(ids)
        if not np.isfinite(ours).all() or not np.isfinite(exact).all():
            raise InternalError(f"logits of {name} are not finite")
        kl.append(divergence.require_finite(f"KL of {name}", divergence.mean_kl(exact, ours)))
        agree.append(divergence.same_top1(exact, ours))
        nll.append(divergence.negative_log_likelihood(ours, ids))
        exact_nll.append(divergence.negative_log_likelihood(exact, ids))
        late.append(kl[-1][len(ids) // 2 :])
        rows[name] = {
            "tokens": len(ids),
            "kl": float(kl[-1].mean()),
            "top1_agreement": float(agree[-1].mean()),
            "perplexity": divergence.perplexity(divergence.require_finite(f"NLL of {name}", nll[-1])),
        }
    all_kl = np.concatenate(kl)
    return {
        "perplexity": divergence.perplexity(np.concatenate(nll)),
        "reference_perplexity": divergence.perplexity(np.concatenate(exact_nll)),
        "kl": float(all_kl.mean()),
        "kl_p99": float(np.percentile(all_kl, 99)),
        "kl_max": float(all_kl.max()),
        "kl_second_half": float(np.concatenate(late).mean()),
        "top1_agreement": float(np.concatenate(agree).mean()),
        "worst_text": max(rows, key=lambda name: float(rows[name]["kl"])),
        "texts": rows,
    }


def agreement(reference: LLM, llm: LLM, case: Case, tokens: dict[str, list[int]], count: int) -> dict[str, Any]:
    """Greedy continuations of the first three quarters of each text, against those of the reference."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    same, alike, before = [], [], []
    for ids in tokens.values():
        prompt = ids[: len(ids) * 3 // 4]
        theirs = list(reference.generate([prompt], params)[0].token_ids)
        if case.kind == "recomputed":
            ours = recompute(llm, [prompt], count, False, lambda: None)[0].token_ids
        else:
            ours = list(llm.generate([prompt], params)[0].token_ids)
        same.append(divergence.token_agreement_rate(theirs, ours))
        alike.append(divergence.text_similarity(llm.tokenizer.decode(theirs), llm.tokenizer.decode(ours)))
        before.append(divergence.same_tokens(theirs, ours))
    return {
        "token_agreement": statistics.fmean(same),
        "text_similarity": statistics.fmean(alike),
        "first_difference": float(statistics.median(before)),
        "agreement_tokens": count,
    }


def compute_perplexity(
    llm: LLM, texts: Sequence[str], max_length: int = 1024, *, kv_policy: KvPolicy | str | None = None
) -> tuple[float, float]:
    """How likely texts are under a policy, each token given those before it that the policy lets it see.

    Args:
        llm: Its context has room for a text and one token more.
        texts: At least one, each of two tokens or more.
        max_length: Tokens of each text that are scored.
        kv_policy: As in `SamplingParams`.

    Returns:
        Mean negative log-likelihood of a token in nats, and the perplexity, over the tokens of all texts.

    Raises:
        InvalidArgumentError: There is nothing to score, or a text does not fit.
        UnsupportedError: The device does not offer the policy.
    """
    require_int("max_length", max_length, 2, 2**31 - 1, "an integer >= 2")
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, kv_policy=kv_policy)
    nll: list[float] = []
    for text in texts:
        ids = llm.tokenizer.encode(text)[:max_length]
        (out,) = llm.generate([ids], params)
        entries = zip(out.prompt_logprobs or [], ids, strict=True)
        nll += [-entry[token].logprob for entry, token in entries if entry is not None]
    if not nll:
        raise InvalidArgumentError("texts must hold at least two tokens")
    values = divergence.require_finite("log-probabilities of texts", np.array(nll, np.float64))
    return float(values.mean()), divergence.perplexity(values)


def compute_sliding_window_nll(llm: LLM, text: str, window_size: int = 256, *, sinks: int = 4) -> tuple[float, float]:
    """`compute_perplexity` of a whole text under ``sliding_window(window_size, sinks)``."""
    policy = sliding_window(window_size, sinks)
    return compute_perplexity(llm, [text], 2**31 - 1, kv_policy=policy)


@dataclass(frozen=True)
class _Found:
    retrieved: bool
    logprob: float  # of the code, mean over its tokens


def _ask(llm: LLM, needle: documents.Needle) -> _Found:
    ids = [*needle.prompt, *needle.answer]
    (out,) = llm.generate([ids], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    entries = (out.prompt_logprobs or [])[-len(needle.answer) :]
    scored = [entry[token] for entry, token in zip(entries, needle.answer, strict=True) if entry is not None]
    logprobs = np.array([row.logprob for row in scored], np.float64)
    divergence.require_finite("log-probabilities of a needle", logprobs)
    return _Found(all(row.rank == 1 for row in scored), float(logprobs.mean()))


def needles(reference: LLM, llm: LLM, config: QualityConfig, seed: int) -> list[dict[str, Any]]:
    """One row for each length and depth. What the reference does not retrieve is not counted against a method."""
    rows = []
    for length in config.needle_lengths:
        for depth in config.needle_depths:
            asked = [documents.needle(llm.tokenizer, length, depth, i, seed) for i in range(config.needle_draws)]
            exact, ours = [_ask(reference, each) for each in asked], [_ask(llm, each) for each in asked]
            pairs = list(zip(exact, ours, strict=True))
            rows.append(
                {
                    "length": length,
                    "depth": depth,
                    "retrieved": sum(b.retrieved for a, b in pairs if a.retrieved),
                    "of": sum(a.retrieved for a in exact),
                    "asked": len(asked),
                    "gold_logprob": statistics.fmean(b.logprob for b in ours),
                    "gold_logprob_minus_reference": statistics.fmean(b.logprob - a.logprob for a, b in pairs),
                }
            )
    return rows


def needle_rate(rows: Iterable[dict[str, Any]]) -> float | None:
    """Share of the needles found, of those that the reference finds; None if it finds none."""
    rows = list(rows)
    of = sum(row["of"] for row in rows)
    return sum(row["retrieved"] for row in rows) / of if of else None
