"""`LLM`: a model, ready to generate. The main class of the package."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, overload

from nanobraid import _core, _draft_model, _logging
from nanobraid._compose import Composing
from nanobraid._draft import Draft, Prepared
from nanobraid._driver import Call, Driver
from nanobraid._kv_selftest import check_kv_format, is_tested
from nanobraid._model_file import ensure_file
from nanobraid._options import (
    FUSION,
    MAX_INT,
    backend_of,
    kv_store,
    optional_size,
    require_flag,
    require_one_of,
    trace_file,
)
from nanobraid._requests import Prompts, call_options, encode_prompts, params_for, request_options
from nanobraid._scoring import Scoring
from nanobraid.chat_template import ChatTemplate, Message
from nanobraid.chunk_cache import ChunkCache
from nanobraid.errors import core_errors
from nanobraid.kv_policy import KvPolicy, parse
from nanobraid.outputs import RequestOutput, StreamPiece
from nanobraid.sampling_params import SamplingParams, require_int
from nanobraid.speculative import SpeculativeConfig, core_options
from nanobraid.streaming import StreamingConfig
from nanobraid.streaming import core_options as streaming_options
from nanobraid.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from nanobraid._chat_inputs import ChatOptions
    from nanobraid._progress import PromptBar

_MAX_THREADS = 256
_DTYPES = ("auto", "int8", "bf16", "f32")
_KV_DTYPES = ("auto", "bf16", "f16", "f32", "int8", "mixed", "int4")


class LLM(Composing, Scoring):
    """A language model loaded for generation on this machine.

    Several threads may use one LLM at the same time, and several streams may be open at once: all their requests share
    one continuous batch. Ctrl-C during a call cancels that call's requests and raises KeyboardInterrupt; the LLM stays
    usable, as it does after every error.

    Args:
        model: The path of a ``.braid`` or GGUF file or of a Hugging Face folder; ``org/name[:quant]``; a known name
            (``smollm2-135m``); or the name of a file in the cache. A model that is not on this machine is downloaded,
            and a folder is exported to bf16 into the cache once; both are announced on stderr.
        device: ``auto`` for a GPU if one is usable, else the processor; ``cpu`` for the best kernels of the processor;
            ``cuda`` for the GPU, never anything else; or the name of one kernel table as listed by ``nanobraid doctor``
            (``avx2``, ``reference``; ``cpu:avx2`` is the same).
        dtype: Type of the activations that enter matrix products: ``int8`` (per 32 values; the default on the CPU),
            ``bf16`` (the default on a GPU) or ``f32``. The weights keep the format of the file; on a GPU, those
            of less than 8 bits, and 8-bit floats, become bf16.
        kv_dtype: Type of the stored keys and values: ``bf16``, ``f16`` (within 65504), ``f32``, ``int8`` (8.25 bits a
            number), ``mixed`` (keys as int8, values of 4 bits; 6.6 bits) or ``int4`` (both of 4 bits; 5.06 bits).
            ``auto`` is bf16, and f32 on ``reference``.
            The first time that a model is loaded with a quantized type, a self-test measures what that changes.
        force_kv_dtype: Use `kv_dtype` even if that changes the predictions of this model too much; see
            ``config["kv_selftest"]``.
        kv_policy: Which keys and values requests keep and see that do not say it themselves, see `SamplingParams`.
        num_threads: Threads of computation; None for one per processor that this process may use.
        max_model_len: Longest prompt plus answer in tokens; None for what the model file states.
        max_num_seqs: Most requests computed in one step.
        max_batch_tokens: Most tokens computed in one step; a longer prompt is computed in slices.
        max_waiting: Most requests that may wait; one more raises `OverloadedError`. None: no limit.
        kv_cache_bytes: Memory for keys and values in bytes; None for what `max_num_seqs` full contexts need, but at
            most a quarter of the memory available, or 85 % of what the GPU has free.
        enable_prefix_caching: Keep keys and values of finished requests while memory lasts, and reuse them for prompts
            that begin with the same tokens. Changes no token. None is True.
        deterministic: Equal requests give equal tokens however they are batched. On the CPU this always holds. On a GPU
            it holds for up to 8 tokens in a step; with True for any number, with one, slower path for all.
        enforce_eager: On a GPU, start kernels one by one. Else the work of a step that decodes is kept (a CUDA graph)
            and started at once. Changes no token. The processor has no such graphs. None is False.
        fusion: Which operators run as one fused kernel instead of as several small ones. ``auto``: each whose result is
            as accurate for this model, which a GPU is measured for when the model is loaded (the kernels of the
            processor give equal bits in both forms); ``on``: all that the device has; ``off``: none. See
            ``config["fusion"]``, and ``fused_ops`` and ``composed_ops`` in `stats`.
        seed: Default for requests whose `SamplingParams` have none. Equal prompts with an equal seed give equal text.
        trace_path: A file for a trace of every step and request, for ui.perfetto.dev or chrome://tracing; it is
            replaced, written while the LLM runs and complete when that is closed. Has times and numbers of tokens, no
            text. None: no trace.
        kv_store_path: A directory, made if it is not there, where keys and values of finished prompts, answers and
            chunks are kept, so that another LLM of the same model and options need not compute them again. Changes no
            token. Several processes may share it. Without prefix caching, chunks alone are kept. None: nothing is.
        kv_store_bytes: Most that all files in it may take; what was not used for longest goes first. None is 8 GiB.
        speculative_config: Guess coming tokens, so that one step verifies several; changes no token, see
            `SpeculativeConfig`. On a GPU only with `deterministic`. None: one token a step and answer.
        streaming_config: Keep weights within a budget of memory and read the layers that do not fit from disk, on a
            GPU from host memory, each step; changes no token, see `StreamingConfig`. None: all weights are in memory.

    Raises:
        InvalidArgumentError: An option is outside its range.
        UnsupportedError: The device or option is not available, or `kv_dtype` harms this model; the message says why.
        ModelNotFoundError: There is no such model.
        DownloadError: The model could not be downloaded.
        FormatError: The model file is damaged.
        ModelIOError: The model file cannot be read, `trace_path` not be written, `kv_store_path` not be used, or there
            is no room for the layers that are streamed.
        OutOfMemoryError: Weights, or keys and values, do not fit in memory.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        force_kv_dtype: bool = False,
        kv_policy: KvPolicy | str = "full",
        num_threads: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        max_batch_tokens: int = 512,
        max_waiting: int | None = None,
        kv_cache_bytes: int | None = None,
        enable_prefix_caching: bool | None = None,
        deterministic: bool | None = None,
        enforce_eager: bool | None = None,
        fusion: str = "auto",
        seed: int | None = None,
        trace_path: str | os.PathLike[str] | None = None,
        kv_store_path: str | os.PathLike[str] | None = None,
        kv_store_bytes: int | None = None,
        speculative_config: SpeculativeConfig | None = None,
        streaming_config: StreamingConfig | None = None,
    ) -> None:
        from nanobraid import models

        backend = backend_of(device)
        require_one_of("dtype", dtype, _DTYPES)
        require_one_of("kv_dtype", kv_dtype, _KV_DTYPES)
        require_one_of("fusion", fusion, FUSION)
        limits: dict[str, Any] = {
            "max_model_len": optional_size("max_model_len", max_model_len),
            "max_num_seqs": require_int("max_num_seqs", max_num_seqs, 1, MAX_INT, "an integer >= 1"),
            "max_batch_tokens": require_int("max_batch_tokens", max_batch_tokens, 1, MAX_INT, "an integer >= 1"),
            "max_waiting": optional_size("max_waiting", max_waiting),
            "kv_cache_bytes": optional_size("kv_cache_bytes", kv_cache_bytes, 2**62),
            "enforce_eager": require_flag("enforce_eager", enforce_eager, False),
        }
        threads = optional_size("num_threads", num_threads, _MAX_THREADS)
        self._enable_prefix_caching = require_flag("enable_prefix_caching", enable_prefix_caching, True)
        is_deterministic = require_flag("deterministic", deterministic, False)
        is_forced = require_flag("force_kv_dtype", force_kv_dtype, False)
        self._seed = SamplingParams(seed=seed).seed
        self._kv_policy = parse(kv_policy)
        trace = trace_file(trace_path)
        store, store_bytes = kv_store(kv_store_path, kv_store_bytes)
        speculative = core_options(speculative_config)
        streaming = streaming_options(streaming_config)

        path = ensure_file(model)
        _logging.follow_python_level()
        self._tokenizer = Tokenizer(path)
        with core_errors():
            digests = models.digest_dir() if store or streaming or is_tested(kv_dtype) else None
            self._model = _core.Model(
                str(path),
                backend,
                dtype,
                threads,
                is_deterministic,
                digest_directory=digests,
                fusion=fusion,
                streaming=streaming,
            )
            self._kv_selftest = check_kv_format(self._model, self._tokenizer, kv_dtype, path.name, force=is_forced)
            draft_model = _draft_model.load(
                speculative_config,
                self._tokenizer,
                backend=backend,
                dtype=dtype,
                threads=threads,
                deterministic=is_deterministic,
                fusion=fusion,
            )
            engine = _core.Engine(
                self._model,
                kv_dtype=kv_dtype,
                enable_prefix_caching=self._enable_prefix_caching,
                trace_path=trace,
                kv_store_path=store,
                kv_store_bytes=store_bytes,
                speculative=speculative,
                draft_model=draft_model,
                **limits,
            )
        if self._model.expanded:
            warnings.warn(
                f"{path}: quantized weights become bf16 on {self._model.backend}, which has no kernels for them yet",
                stacklevel=2,
            )
        self._path = path
        self._streaming_config = streaming_config
        self._kv_dtype = engine.kv_dtype
        self._speculative_config = speculative_config
        self._max_model_len = engine.max_model_len
        self._driver = Driver(engine)
        self._chunks = ChunkCache(self._driver, self._tokenizer)
        self._chat_template: ChatTemplate | None = None
        _logging.log_loaded(path, self._model, self._kv_dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({str(self._path)!r}, backend={self._model.backend!r}, max_model_len={self._max_model_len})"

    def close(self) -> None:
        """Gives the memory back. Later calls raise `InvalidArgumentError`; closing twice is allowed.

        With a `kv_store_path`, waits at most 10 s for what is still to be written there.
        """
        self._driver.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def chunks(self) -> ChunkCache:
        """The chunks that are kept for `compose`."""
        return self._chunks

    @property
    def config(self) -> dict[str, Any]:
        """Facts about the model and how it runs.

        ``architecture``, ``num_layers``, ``hidden_size``, ``num_heads``, ``num_kv_heads``, ``head_dim``,
        ``vocab_size``, ``sliding_window``, ``rope_scaling``, ... from the file; ``path``, ``backend``, ``dtype``,
        ``kv_dtype``, ``kv_policy``, ``num_threads``, ``max_model_len``, ``enable_prefix_caching``, ``weight_bytes`` and
        ``load_seconds`` of this LLM. ``fusion`` says which ``operators`` are ``fused`` or ``composed``, and the
        ``errors`` that were measured: each of one operator, with its bound and the layer it was found in.
        ``kv_selftest`` says what a quantized `kv_dtype` changes (mean ``kl`` to f32 in nats, ``floor_kl`` of bf16, the
        difference ``cost``, which has a ``limit``; ``agreement`` of the most likely token); None: nothing to measure.
        """
        return {
            **self._model.config,
            "path": str(self._path),
            "backend": self._model.backend,
            "dtype": self._model.dtype,
            "kv_dtype": self._kv_dtype,
            "kv_policy": str(self._kv_policy),
            "speculative_config": None if self._speculative_config is None else asdict(self._speculative_config),
            "streaming_config": None if self._streaming_config is None else asdict(self._streaming_config),
            "kv_selftest": self._kv_selftest,
            "num_threads": self._model.num_threads,
            "max_model_len": self._max_model_len,
            "enable_prefix_caching": self._enable_prefix_caching,
            "weight_bytes": self._model.weight_bytes,
            "load_seconds": self._model.load_seconds,
            "fusion": self._model.fusion,
        }

    def stats(self) -> dict[str, Any]:
        """Counters of the engine: requests running and waiting, blocks of keys and values, steps, tokens, seconds.

        Speeds too: ``tokens_per_s`` (generated, per second in which there was work), ``read_gb_per_s`` (weights, keys
        and values per second of forward pass), and both with the prefix ``recent_`` over the last 128 steps. The prefix
        ``disk_`` is about `kv_store_path`: tokens and chunks that came from there, misses by reason, writes.
        ``kv_bytes_per_token`` is that of a block; ``kv_requests`` has a row for each policy: how many ``running``
        requests, ``bytes`` of the blocks they own now, ``largest_bytes`` of one. ``peak_rss_bytes`` is of the process.
        ``fused_ops`` and ``composed_ops`` count calls of operators that ran as one kernel and as several, and each of
        them behind a further ``_``. With a `speculative_config`: ``num_drafts``, ``draft_tokens`` that were verified,
        ``accepted_draft_tokens``, their share ``draft_acceptance``, ``tokens_per_decode`` (an answer gets in a step)
        and ``draft_saved_seconds``, an estimate from what steps of so many rows took; of a draft model
        ``draft_model_seconds``, ``draft_model_tokens`` (read, guesses too) and ``draft_kv_bytes`` (reserved).
        With a `streaming_config`: ``weight_resident_bytes`` of ``weight_budget_bytes``, and of the ``streamed_layers``
        what was read (``streamed_bytes``, ``streamed_gb_per_s``) and the seconds that steps waited for it,
        ``streamed_wait_seconds``; ``streamed_direct``: past the page cache or, on a GPU, from pinned memory.
        """
        return self._driver.stats()

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        timeout_s: float | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continues prompts, all of them as one continuous batch.

        Args:
            prompts: A text, a list of texts, or a list of token id lists. In texts, the spelling of control tokens is
                text.
            sampling_params: For all prompts, or one for each. None is ``SamplingParams()``.
            cache_salt: Namespace of the prefix cache: requests of different ones never share keys and values, nor can
                tell by their times what others have asked.
            timeout_s: Seconds after which a request ends with what it has, finish reason ``timeout``. None: no limit.
            progress: Show a progress bar on stderr, if that is a terminal. None: with more than one prompt.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            InvalidArgumentError: A prompt is empty, too long or has ids outside the vocabulary; or the number of
                sampling parameters is not that of the prompts. Nothing has been computed then.
            OverloadedError: There are more prompts than `max_waiting` allows.
        """
        texts, prompt_ids = encode_prompts(self._tokenizer, prompts)
        params = params_for(sampling_params, len(prompt_ids))
        shared = call_options(cache_salt, timeout_s, streams=False)
        options = [self._request(ids, p, i) | shared for i, (ids, p) in enumerate(zip(prompt_ids, params, strict=True))]
        drafts = [Draft(self._tokenizer, what, p) for what, p in zip(options, params, strict=True)]
        results: list[RequestOutput | None] = [None] * len(prompt_ids)
        if progress is None:
            progress = len(prompt_ids) > 1
        call = Call(streams=False)
        try:
            with self._driver.together():
                for i, ids in enumerate(prompt_ids):
                    self._driver.submit(call, i, ids, **options[i])
            with _progress_bar(len(prompt_ids)) if progress and sys.stderr.isatty() else nullcontext() as bar:
                while outputs := self._driver.wait(call):
                    for i, output in outputs:
                        drafts[i].add(output)
                        ended = output.finish_reason is not None and drafts[i].finished
                        if ended:
                            results[i] = drafts[i].result(texts[i], prompt_ids[i])
                        if bar is not None:
                            bar.add(tokens=len(output.token_ids), prompts=int(ended))
        except BaseException:
            self._driver.cancel(call)
            raise
        return [result for result in results if result is not None]

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> Generator[StreamPiece, None, None]:
        """Continues one prompt, piece by piece, as soon as there is a new whole character.

        Closing the iterator early (leaving the loop and dropping it, or ``close()``) cancels the request.

        Args:
            prompt: A text or a list of token ids.
            sampling_params: None is ``SamplingParams()``.
            cache_salt: As for `generate`.
            timeout_s: As for `generate`.

        Returns:
            An iterator of pieces; the last one of each answer has its finish reason. With ``n`` > 1 the pieces of the
            answers come mixed, see ``StreamPiece.index``. The request starts with the first ``next()``.

        Raises:
            InvalidArgumentError: As `generate`; at once, before the iteration begins. Later, by the iteration, if the
                options leave no token to choose.
        """
        return self._stream(self._prepare(prompt, sampling_params, cache_salt, timeout_s))

    def _prepare(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None,
        cache_salt: str,
        timeout_s: float | None,
        *,
        streams: bool = True,
        only_score: bool = False,
    ) -> Prepared:
        text_or_ids: Any = prompt if isinstance(prompt, str) else [prompt]
        (text,), (ids,) = encode_prompts(self._tokenizer, text_or_ids)
        (params,) = params_for(sampling_params, 1)
        options = self._request(ids, params, room=0 if only_score else 1)
        options |= call_options(cache_salt, timeout_s, streams=streams)
        if only_score:
            options["max_tokens"] = 0
        draft = Draft(self._tokenizer, options, params)
        return Prepared(text, ids, options, draft)

    def _stream(self, request: Prepared) -> Generator[StreamPiece, None, None]:
        call = Call(streams=True)
        try:
            self._driver.submit(call, 0, request.ids, **request.options)
            while not request.draft.finished:
                for _, output in self._driver.wait(call):
                    yield from request.draft.pieces(output)
        finally:  # also when the consumer closes the iterator; after the end there is nothing left to cancel
            self._driver.cancel(call)

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        cache_salt: str = "",
        timeout_s: float | None = None,
        stream: Literal[False] = False,
    ) -> RequestOutput: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        cache_salt: str = "",
        timeout_s: float | None = None,
        stream: Literal[True],
    ) -> Generator[StreamPiece, None, None]: ...
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        cache_salt: str = "",
        timeout_s: float | None = None,
        stream: bool = False,
    ) -> RequestOutput | Generator[StreamPiece, None, None]:
        """Answers a conversation, using the model's own chat template.

        Whatever the messages spell, it never becomes a control token (see `ChatTemplate.encode`).

        Args:
            messages: ``[{"role": "user", "content": "Hello"}, ...]``.
            sampling_params: None is ``SamplingParams()``.
            add_generation_prompt: End the prompt with the beginning of the assistant's answer.
            cache_salt: As for `generate`.
            timeout_s: As for `generate`.
            stream: Return an iterator of pieces instead, as `stream` does.

        Returns:
            The answer; its ``prompt`` is the rendered conversation.

        Raises:
            InvalidArgumentError: `messages` is not a conversation, or longer than the context.
            ChatTemplateError: The model has no template, or the template failed or refused the conversation.
        """
        ids = self.encode_chat(messages, add_generation_prompt=add_generation_prompt)
        if stream:
            return self.stream(ids, sampling_params, cache_salt=cache_salt, timeout_s=timeout_s)
        (output,) = self.generate([ids], sampling_params, cache_salt=cache_salt, timeout_s=timeout_s)
        prompt = self._tokenizer.decode(ids, skip_special_tokens=False)
        return RequestOutput(**{**vars(output), "prompt": prompt})

    def encode_chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """Returns the token ids that `chat` would give to the model.

        Args:
            messages: As for `chat`.
            options: ``add_generation_prompt``, ``tools``, ``template_kwargs`` and ``continue_final_message``, as for
                `ChatTemplate.render`.

        Raises:
            InvalidArgumentError, ChatTemplateError: As `ChatTemplate.render`; or the model has no template.
        """
        if self._chat_template is None:
            self._chat_template = ChatTemplate.of(self._tokenizer)
        return self._chat_template.encode(messages, self._tokenizer, **options)

    def _request(
        self, ids: list[int], params: SamplingParams, index: int | None = None, room: int = 1
    ) -> dict[str, Any]:
        where = "the prompt" if not index else f"prompt {index}"
        return request_options(
            self._tokenizer,
            ids,
            params,
            where=where,
            room=room,
            max_model_len=self._max_model_len,
            default_seed=self._seed,
            default_policy=self._kv_policy,
        )


def _progress_bar(total: int) -> PromptBar:
    from nanobraid import _progress

    return _progress.PromptBar(total)
