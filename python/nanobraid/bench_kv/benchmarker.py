"""`KVCacheBenchmarker`: one model under every way to keep keys and values."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nanobraid import __version__, models
from nanobraid._model_file import ensure_file
from nanobraid.bench_kv import worker
from nanobraid.bench_kv.config import BenchmarkConfig, Config, QualityConfig
from nanobraid.bench_kv.machine import cpu_name
from nanobraid.bench_kv.memory import MIB
from nanobraid.bench_kv.methods import DEFAULTS, ENGINE_BLOCK, Case, make_case, sweep
from nanobraid.bench_kv.quality import QualityJob
from nanobraid.bench_kv.speed import SpeedJob, kept_blocks, params, read_kept, recompute
from nanobraid.errors import InvalidArgumentError, NanobraidError, UnsupportedError
from nanobraid.llm import LLM
from nanobraid.sampling_params import require_int
from nanobraid.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST = 2**31 - 1


def _count(name: str, value: object, low: int = 1) -> int:
    return require_int(name, value, low, _MOST, f"an integer >= {low}")


class KVCacheBenchmarker:
    """Generates and measures with every method of `methods.NAMES`.

    `benchmark_method` and `run` measure each method in a process of its own, so that no method pays for the memory of
    another; the methods named ``generate_...`` run in this one, and keep their engines until `close`. All are greedy
    and follow one stop rule.

    Args:
        model: As `LLM` takes it, or an `LLM`, whose file is then used; or a `Config`, whose other fields then take the
            place of the arguments of these names.
        tokenizer: Makes tokens of prompts and texts of tokens; None takes the model's own.
        device: As `LLM` takes it.
        dtype: Type of activations, as `LLM` takes it.
        kv_dtype: Type of keys and values of the methods that name none.
        batch_size: Prompts that run at once.
        max_model_len: The context; full_cache reserves this for each prompt of a batch. None: as long as the longest
            prompt and its answer, the least that contiguous memory could be.
        num_threads: As `LLM` takes it.
        max_batch_tokens: As `LLM` takes it.
        stop_at_eos: Stop at the end-of-sequence token, in every method. False: every answer has exactly as many tokens
            as were asked for, so that times can be compared.
        rounds: Timed runs over all prompts; times are medians.
        seed: Of made-up prompts and documents.

    Raises:
        InvalidArgumentError: A value is outside its range, or the tokenizer is that of another model.
        ModelNotFoundError: There is no such model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LLM | Config = models.DEFAULT_MODEL,
        tokenizer: Tokenizer | None = None,
        device: str = "auto",
        *,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        batch_size: int = 1,
        max_model_len: int | None = None,
        num_threads: int | None = None,
        max_batch_tokens: int = 512,
        stop_at_eos: bool = False,
        rounds: int = 1,
        seed: int = 42,
    ) -> None:
        if isinstance(model, Config):
            given = (device, dtype, batch_size, seed)
            if given != ("auto", "auto", 1, 42):
                raise InvalidArgumentError("device, dtype, batch_size and seed are those of the Config; leave them out")
            device, dtype, batch_size, seed = model.device, model.dtype, model.batch_size, model.seed
            model = model.model_name
        name = model.config["path"] if isinstance(model, LLM) else model
        self.model = ensure_file(name)
        own = Tokenizer(self.model)
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            raise InvalidArgumentError(
                f"tokenizer must be a nanobraid.Tokenizer or None, got {type(tokenizer).__name__}"
            )
        if tokenizer is not None and tokenizer.vocab_size != own.vocab_size:
            raise InvalidArgumentError(
                f"tokenizer has {tokenizer.vocab_size} tokens, the model's own {own.vocab_size}: leave it out"
            )
        if stop_at_eos not in (True, False):
            raise InvalidArgumentError(f"stop_at_eos must be True or False, got {stop_at_eos!r}")
        self.tokenizer = tokenizer or own
        self.device = device
        self.kv_dtype = kv_dtype
        self.batch_size = _count("batch_size", batch_size)
        self.max_model_len = None if max_model_len is None else _count("max_model_len", max_model_len, 32)
        self.stop_at_eos = stop_at_eos
        self.rounds = _count("rounds", rounds)
        self.seed = _count("seed", seed, 0)
        self._options: dict[str, Any] = {
            "device": device,
            "num_threads": num_threads,
            "max_batch_tokens": max_batch_tokens,
        }
        self._dtype = dtype
        self._llms: dict[str, LLM] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the engines of the ``generate_...`` methods back; they are made again when they are needed."""
        for llm in self._llms.values():
            llm.close()
        self._llms.clear()

    # --- generating, in this process ---

    def generate_no_cache(self, prompt: str, max_new_tokens: int = 32) -> tuple[str, int]:
        """Computes the whole text again for every token.

        Args:
            prompt: The text to continue.
            max_new_tokens: Most tokens to generate; exactly so many without `stop_at_eos`.

        Returns:
            Prompt and answer as one text, and the number of new tokens.

        Raises:
            InvalidArgumentError: The prompt is empty or too long; or, here and below, a parameter is outside its range.
            UnsupportedError: The device does not offer the method.
        """
        text, count, _ = self._generate(make_case("no_cache"), prompt, max_new_tokens)
        return text, count

    def generate_with_cache(self, prompt: str, max_new_tokens: int = 32) -> tuple[str, int]:
        """Keeps all keys and values; arguments and result as `generate_no_cache`."""
        text, count, _ = self._generate(make_case("paged_attention"), prompt, max_new_tokens)
        return text, count

    def generate_with_sliding_window(
        self, prompt: str, max_new_tokens: int = 32, window_size: int = 256, *, sinks: int = 4
    ) -> tuple[str, int]:
        """Keeps the last `window_size` tokens and the first `sinks`; otherwise as `generate_no_cache`."""
        case = make_case("sliding_window", window_size=window_size, sinks=sinks)
        return self._generate(case, prompt, max_new_tokens)[:2]

    def generate_with_prefix_window(
        self, prompt: str, max_new_tokens: int = 32, window_size: int = 256, prefix_len: int = 32
    ) -> tuple[str, int]:
        """Keeps the first `prefix_len` tokens and the last `window_size`; otherwise as `generate_no_cache`."""
        case = make_case("prefix_window", window_size=window_size, prefix_len=prefix_len)
        return self._generate(case, prompt, max_new_tokens)[:2]

    def generate_with_strided_cache(
        self, prompt: str, max_new_tokens: int = 32, window_size: int = 256, stride: int = 4, prefix_len: int = 0
    ) -> tuple[str, int]:
        """Keeps prefix and window, and every `stride`-th older block of 16 tokens; otherwise as `generate_no_cache`."""
        case = make_case("strided_cache", window_size=window_size, stride=stride, prefix_len=prefix_len)
        return self._generate(case, prompt, max_new_tokens)[:2]

    def generate_with_block_cache(  # noqa: PLR0917 (a known interface)
        self,
        prompt: str,
        max_new_tokens: int = 32,
        window_size: int = 256,
        block_size: int = 64,
        keep_per_block: int = 16,
        prefix_len: int = 0,
    ) -> tuple[str, int]:
        """Keeps prefix and window, and of older tokens the last `keep_per_block` of each `block_size` (multiples of
        16); otherwise as `generate_no_cache`."""
        case = make_case(
            "block_cache",
            window_size=window_size,
            block_size=block_size,
            keep_per_block=keep_per_block,
            prefix_len=prefix_len,
        )
        return self._generate(case, prompt, max_new_tokens)[:2]

    def generate_with_budget_cache(
        self, prompt: str, max_new_tokens: int = 32, window_size: int = 256, old_budget: int = 64, prefix_len: int = 0
    ) -> tuple[str, int]:
        """Keeps prefix and window, and `old_budget` older tokens (a multiple of 16); otherwise as
        `generate_no_cache`."""
        case = make_case("budget_cache", window_size=window_size, old_budget=old_budget, prefix_len=prefix_len)
        return self._generate(case, prompt, max_new_tokens)[:2]

    def generate_with_quantized_kv(
        self, prompt: str, max_new_tokens: int = 32, mode: str = "int8"
    ) -> tuple[str, int, float]:
        """Keeps keys and values in the format `mode`: ``int8``, ``int4`` or ``mixed``.

        Args:
            prompt: The text to continue.
            max_new_tokens: As for `generate_no_cache`.
            mode: The format.

        Returns:
            Prompt and answer as one text, the number of new tokens, and MiB of the blocks taken at the end.
        """
        case = make_case(f"quant_{mode}") if mode in ("int8", "int4", "mixed") else None
        if case is None:
            raise InvalidArgumentError(f"mode must be one of int8, int4, mixed, got {mode!r}")
        text, count, used = self._generate(case, prompt, max_new_tokens)
        return text, count, used / MIB

    def generate_with_paged_attention(
        self, prompt: str, max_new_tokens: int = 32, block_size: int = ENGINE_BLOCK
    ) -> tuple[str, int, float, float, int]:
        """The engine as it is.

        Args:
            prompt: The text to continue.
            max_new_tokens: As for `generate_no_cache`.
            block_size: Tokens of a block: 16, and nothing else.

        Returns:
            Prompt and answer as one text, the number of new tokens, MiB of the blocks taken, MiB of the tokens in them,
            and the number of blocks.

        Raises:
            UnsupportedError: Another block size is asked for.
        """
        if block_size != ENGINE_BLOCK:
            raise UnsupportedError(f"block_size={block_size!r}: blocks of this engine have {ENGINE_BLOCK} tokens")
        text, count, used = self._generate(make_case("paged_attention"), prompt, max_new_tokens)
        stats = self._llm(make_case("paged_attention")).stats()
        block_bytes = stats["kv_bytes"] // stats["blocks_total"]
        # Keys and values of the last token are never needed, so never made.
        stored = len(self.tokenizer.encode(prompt)) + count - 1
        return text, count, used / MIB, stored * block_bytes / ENGINE_BLOCK / MIB, used // block_bytes

    def generate_with_chunked_cache(
        self, prompt: str, max_new_tokens: int = 32, chunk_size: int = 64, keep_last: int = 256
    ) -> tuple[str, int, float]:
        """Keeps the last `keep_last` tokens, and of older ones a mean of each `chunk_size` (experimental).

        Arguments and result are otherwise those of `generate_with_quantized_kv`.
        """
        case = make_case("chunked_cache", chunk_size=chunk_size, keep_last=keep_last)
        text, count, used = self._generate(case, prompt, max_new_tokens)
        return text, count, used / MIB

    def _llm(self, case: Case) -> LLM:
        kv_dtype = case.kv_dtype or self.kv_dtype
        if kv_dtype not in self._llms:
            self._llms[kv_dtype] = LLM(
                self.model,
                dtype=self._dtype,
                kv_dtype=kv_dtype,
                max_model_len=self.max_model_len,
                max_num_seqs=1,
                enable_prefix_caching=False,
                **self._options,
            )
        return self._llms[kv_dtype]

    def _generate(self, case: Case, prompt: str, max_new_tokens: int) -> tuple[str, int, int]:
        """Text, new tokens, and bytes of the blocks of keys and values while it was generated."""
        _count("max_new_tokens", max_new_tokens)
        llm = self._llm(case)
        ids = self._encode(prompt)
        if case.kind == "recomputed":
            new = recompute(llm, [ids], max_new_tokens, self.stop_at_eos, lambda: None)[0].token_ids
            return self.tokenizer.decode([*ids, *new]), len(new), 0
        new, kept = read_kept(llm, ids, params(case, max_new_tokens, self.stop_at_eos))
        kept = kept or kept_blocks(llm, case, ids, len(new))
        stats = llm.stats()
        return self.tokenizer.decode([*ids, *new]), len(new), kept * (stats["kv_bytes"] // stats["blocks_total"])

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.check_token_ids(prompt)
        if not ids:
            raise InvalidArgumentError("a prompt must not be empty")
        return list(ids)

    # --- measuring, each method in a process of its own ---

    def benchmark_method(  # noqa: PLR0917 (a known interface)
        self,
        prompts: Sequence[str | Sequence[int]],
        method: str = "no_cache",
        max_new_tokens: int = 32,
        window_size: int = DEFAULTS["window_size"],
        block_size: int = DEFAULTS["block_size"],
        chunk_size: int = DEFAULTS["chunk_size"],
        keep_last: int = DEFAULTS["keep_last"],
        mode: str = DEFAULTS["mode"],
        prefix_len: int = DEFAULTS["prefix_len"],
        stride: int = DEFAULTS["stride"],
        keep_per_block: int = DEFAULTS["keep_per_block"],
        old_budget: int = DEFAULTS["old_budget"],
        *,
        sinks: int = DEFAULTS["sinks"],
        quality: QualityConfig | None = None,
    ) -> dict[str, Any]:
        """Measures one method.

        A parameter that the method does not read must be left at its default.

        Args:
            prompts: Texts, or lists of token ids.
            method: One of `methods.NAMES`.
            max_new_tokens: For each prompt.
            window_size: Last tokens that stay, of the methods with a window.
            block_size: Of block_cache: tokens of a group, a multiple of 16.
            chunk_size: Of chunked_cache: tokens of a group, a multiple of 16.
            keep_last: Of chunked_cache: last tokens that stay.
            mode: Must agree with the method's name, which says it already.
            prefix_len: First tokens that stay: of prefix_window, strided_cache, block_cache and budget_cache.
            stride: Of strided_cache: every so many old blocks of 16 tokens one stays.
            keep_per_block: Of block_cache: last tokens of each group that stay, a multiple of 16.
            old_budget: Of budget_cache: old tokens that stay, a multiple of 16.
            sinks: Of sliding_window: first tokens that stay.
            quality: Measure quality under the method too.

        Returns:
            ``method``, ``elapsed_sec`` (median of the rounds), ``total_new_tokens``, ``tokens_per_sec``,
            ``cpu_mem_used_mb`` (the peak of resident memory while it ran, less what was resident with the model
            loaded), ``gpu_peak_mb`` (None on the processor), ``est_kv_cache_mb_avg`` (the blocks of keys and values
            that a prompt keeps while it is answered, mean over the prompts, read from the engine), and every
            parameter, None where it is not read. Beside them ``ttft_ms``, ``latency_ms`` (a whole request) and
            ``ms_per_token``, medians; ``peak_rss_mb`` (the whole process), ``memory_source``, ``kv_cache_bytes`` (the
            most of a batch, slices of prompts included), ``kv_pool_bytes``, ``elapsed_sec_rounds``, ``token_ids``,
            ``backend``, ``dtype``, ``kv_dtype``, ``kv_policy``, ``num_threads``, ``max_model_len``, ``batch_size``;
            and ``quality``, if asked for. MB are MiB.

        Raises:
            InvalidArgumentError: As above, or there are no prompts.
            UnsupportedError: The engine does not offer the method here.
            OutOfMemoryError: It does not fit into memory.
        """
        case = make_case(
            method,
            window_size=window_size,
            block_size=block_size,
            chunk_size=chunk_size,
            keep_last=keep_last,
            mode=mode,
            prefix_len=prefix_len,
            stride=stride,
            keep_per_block=keep_per_block,
            old_budget=old_budget,
            sinks=sinks,
        )
        return self._measure(case, self._encode_all(prompts), _count("max_new_tokens", max_new_tokens), quality)

    def run(
        self,
        prompts: Sequence[str | Sequence[int]],
        config: BenchmarkConfig | None = None,
        *,
        max_new_tokens: int = 32,
        quality: QualityConfig | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Measures many methods, one after the other.

        Args:
            prompts: As for `benchmark_method`.
            config: Which; None is ``BenchmarkConfig()``.
            max_new_tokens: For each prompt.
            quality: Measure quality too. Of a method with several sizes, greedy tokens and needles are measured with
                the default size, or the first.
            progress: Called with the name of each method before it runs.

        Returns:
            What `report` renders: ``model``, how it was run, and ``rows``, each with ``label`` and ``status``: ``ok``;
            ``refused``, where the engine does not offer it; or ``failed``; the latter with ``message``.
        """
        config = BenchmarkConfig() if config is None else config
        cases = sweep(config.methods, config.window_sizes, config.block_sizes, config.chunk_sizes)
        ids = self._encode_all(prompts)
        _count("max_new_tokens", max_new_tokens)
        rows = []
        for case in cases:
            if progress is not None:
                progress(case.label)
            row: dict[str, Any] = {"label": case.label, "method": case.method, "status": "ok"}
            try:
                row |= self._measure(case, ids, max_new_tokens, quality, only_texts=not _is_first(case, cases))
            except (InvalidArgumentError, UnsupportedError) as error:
                row |= {"status": "refused", "message": str(error)}
            except NanobraidError as error:
                row |= {"status": "failed", "message": str(error)}
            rows.append(row)
        return {
            "version": __version__,
            "cpu": cpu_name(),
            "model": self.model.name,
            "prompt_tokens": [len(prompt) for prompt in ids],
            "max_new_tokens": max_new_tokens,
            "batch_size": self.batch_size,
            "rounds": self.rounds,
            "stop_at_eos": self.stop_at_eos,
            "seed": self.seed,
            "quality": None if quality is None else vars(quality),
            "rows": rows,
        }

    def _encode_all(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        if isinstance(prompts, str) or not prompts:
            raise InvalidArgumentError("prompts must be a list of texts or of token id lists, not empty")
        return [self._encode(prompt) for prompt in prompts]

    def _measure(
        self,
        case: Case,
        prompts: list[list[int]],
        max_new_tokens: int,
        quality: QualityConfig | None,
        only_texts: bool = False,
    ) -> dict[str, Any]:
        needed = max(map(len, prompts)) + max_new_tokens
        if self.max_model_len is not None and needed > self.max_model_len:
            raise InvalidArgumentError(
                f"max_model_len must be at least {needed} for these prompts, got {self.max_model_len}"
            )
        found = worker.run(
            SpeedJob(
                str(self.model),
                {**self._options, "dtype": self._dtype},
                self.kv_dtype,
                case,
                prompts,
                max_new_tokens,
                self.batch_size,
                self.max_model_len or -(-needed // ENGINE_BLOCK) * ENGINE_BLOCK,
                self.rounds,
                self.stop_at_eos,
                self.seed,
            )
        )
        names = ("elapsed_sec", "total_new_tokens", "tokens_per_sec", "cpu_mem_used_mb", "gpu_peak_mb")
        out: dict[str, Any] = {"method": case.method, **{name: found.pop(name) for name in names}}
        out |= {name: case.params.get(name) for name in DEFAULTS if name != "mode"}
        out["mode"] = case.kv_dtype
        out |= {
            **found,
            "kv_policy": case.policy or ("recomputed" if case.kind == "recomputed" else "full"),
            "batch_size": self.batch_size,
        }
        if quality is not None:
            job = QualityJob(str(self.model), self._options, self.kv_dtype, case, quality, self.seed, None, only_texts)
            out["quality"] = worker.run(job)
        return out


def _is_first(case: Case, cases: Sequence[Case]) -> bool:
    """Whether it has the default size of its method, or the first where none has."""
    same = [each for each in cases if each.method == case.method]
    usual = [each for each in same if each == make_case(case.method)]
    return case == (usual or same)[0]
