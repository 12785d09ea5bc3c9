"""Types of the compiled core. The package wraps these; user code should not import this module."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

__version__: str

class CoreError(Exception):
    """Raised by the core; `code` is one of the ErrorCode names. The package maps it to `nanobraid.errors`."""

    code: str

def build_info() -> dict[str, Any]:
    """Compiler, build type, sanitizers and options this extension was built with."""

def cpu_features() -> list[str]:
    """Instruction set extensions of this processor that kernels may use."""

def available_backends() -> list[str]:
    """Names of the kernel tables this machine can run, best last."""

def cuda_status() -> str:
    """'usable: NVIDIA H200, 139.8 GiB', or why the CUDA backend cannot be used here."""

def default_num_threads() -> int: ...
def memory_status() -> dict[str, int]:
    """Bytes of this process: rss_bytes, peak_rss_bytes; and of the machine: available_bytes."""

def set_log_level(level: str) -> None: ...
def set_log_sink(sink: Callable[[str, str], None] | None) -> None:
    """`sink(level, line)` is called with the GIL held; None restores stderr."""

def selftest_text() -> str:
    """The text whose tokens `Model.measure_kv_format` is given."""

def kv_limits() -> dict[str, float]:
    """The formats of keys and values that are tested for each model, and the most that they may cost."""

def kv_refusal(kv_dtype: str, cost: float, model: str, force: str) -> str:
    """Why a format is refused for a model; `force` is how to have it all the same."""

def inspect_file(path: str) -> dict[str, Any]:
    """Metadata and tensor directory of a model file, without reading tensors.

    Keys: format, version, file_bytes, fingerprint ('' for GGUF), parts (paths), sections (list of (name, offset,
    bytes); empty for GGUF), metadata (list of (key, type, text)), tensors (list of (name, format, shape, bytes)).
    """

_MetadataValue = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]

class BraidWriter:
    """Writes a `.braid` file, tensor after tensor; the file appears under its name when it is complete.

    As a context manager it finishes the file on leaving the block, and leaves nothing behind after an exception.
    """

    def __init__(
        self, path: str, metadata: Mapping[str, _MetadataValue], tensors: Sequence[tuple[str, str, Sequence[int]]]
    ) -> None:
        """`tensors`: (name, format, shape) in order of execution, the last dimension a row.

        An int becomes u32 if it fits, else i64, else u64; a float f32; a list is of one type, an empty one of u32; a
        str is written as UTF-8, lone surrogates of `surrogateescape` as the bytes they stand for.
        """
    def write(self, index: int, data: Buffer) -> None:
        """Appends bytes to tensor `index`; tensors in order, each whole before the next."""
    def finish(self) -> None:
        """Waits until the file is on disk, then gives it its name, replacing a file that has it."""
    def __enter__(self) -> BraidWriter: ...
    def __exit__(self, exc_type: object, exc_value: object, traceback: object) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def file_bytes(self) -> int: ...

class ModelFile:
    """A `.braid` or GGUF file (all parts of a split one), opened without reading tensors."""

    def __init__(self, path: str) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def kind(self) -> str:
        """'braid', 'GGUF' or 'safetensors'."""
    @property
    def version(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents in hexadecimal as a .braid file says; '' for GGUF."""
    def verify(self, progress: Callable[[int, int], None] | None = None) -> bool:
        """Reads everything and compares every checksum; raises CoreError (format) naming the section or tensor that
        differs. False, at once, for GGUF, which has no checksums. `progress(bytes done, bytes in all)`."""
    def check_weights(
        self, progress: Callable[[int, int], None] | None = None
    ) -> tuple[list[tuple[str, int, int]], list[tuple[str, str]]]:
        """Reads every tensor; gives (name, NaNs, infinities) of those that have some, and (name, format) of those
        that cannot be unpacked."""
    def metadata(self) -> dict[str, Any]:
        """Values of every key: bool, int, float, str (bytes that are not UTF-8 as lone surrogates), or lists of one."""
    def tensors(self) -> list[tuple[str, str, list[int], int]]:
        """(name, format, shape, bytes) in file order; a format that cannot be unpacked has the file's own spelling."""
    def read(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """Bytes of a tensor as they stand in the file; Q and K rows of a GGUF file may be interleaved."""
    def read_rows(self, name: str, row_begin: int = 0, num_rows: int | None = None) -> NDArray[np.float32]:
        """Unpacked rows, float32[num_rows, shape[-1]]; a vector is one row."""

def unpack_weights(format: str, data: bytes, cols: int) -> NDArray[np.float32]:
    """Whole rows of `cols` weights in the layout of a file, as f32 [rows, cols].

    Raises CoreError: unsupported for an unknown format, invalid_argument if rows or blocks are not whole.
    """

def list_safetensors(path: str) -> list[tuple[str, str, list[int], int]]:
    """(name, dtype, shape, bytes) of every tensor of a safetensors file, in the order of the data; reads the header."""

def open_safetensors(
    path: str,
    files: Sequence[str],
    tensors: Sequence[tuple[str, int, str]],
    metadata: Mapping[str, _MetadataValue],
    matrices: Sequence[tuple[str, str, int, Mapping[str, tuple[int, str]]]] = ...,
) -> ModelFile:
    """A model of safetensors files: `tensors` are (name, index of the file, name in the file); `path` is for messages.

    Its kind is 'safetensors', its version 0.
    """

def check_model(file: ModelFile) -> None:
    """Raises what loading would say about architecture, facts and names of tensors, without reading weights."""

def encode_text(file: ModelFile, text: str) -> list[int]:
    """Token ids of a text by the tokenizer in a file's metadata, with the special tokens it adds."""

def measure_inputs(
    file: ModelFile,
    token_ids: Sequence[int],
    sequence_len: int,
    num_threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, NDArray[np.float32]]], NDArray[np.float32]]:
    """Mean squares of the columns that enter the matrices of each layer, and of those that enter the head.

    Keys of a layer: qkv, attention_out, gate_up, down. Runs one layer at a time; `progress` is told layers.
    """

def quantize(
    format: str, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None, num_threads: int = 0
) -> bytes:
    """Packs a matrix row by row; scales of w8, w8_channel and w4 are searched, errors weighted by `importance`."""

def packing_error(format: str, rows: NDArray[np.float32], packed: bytes, num_threads: int = 0) -> tuple[float, float]:
    """(sum of squared differences of weights and their packed values, sum of squared weights)."""

class Tokenizer:
    def __init__(self, path: str) -> None: ...
    @staticmethod
    def from_gguf(data: bytes, name: str) -> Tokenizer:
        """The tokenizer of a GGUF file that is in memory; `name` is for messages."""
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of the tokens that encode() makes only with parse_special=True (<|im_end|>, ...)."""
    def token_bytes(self) -> list[bytes | None]:
        """For every token the bytes it stands for; None for control and unknown tokens, which are no text."""
    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = False, at_start: bool = True
    ) -> list[int]: ...
    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def find_token(self, text: str) -> int | None: ...
    def stream(
        self,
        skip_special_tokens: bool = True,
        at_start: bool = True,
        stop: list[str] = ...,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> TextStream: ...

class TextStream:
    def push(self, token_id: int) -> str: ...
    def finish(self) -> str: ...
    @property
    def stop_reason(self) -> str | None: ...

class Model:
    """Weights packed for one backend, with the thread pool that runs it."""

    def __init__(
        self,
        path: str,
        backend: str = "",
        dtype: str = "auto",
        num_threads: int = 0,
        deterministic: bool = False,
        digest_directory: str | None = None,
        fusion: str = "auto",
        measure_fusion: bool = False,
        streaming: tuple[int, int, int, int, str, int] | None = None,
    ) -> None:
        """digest_directory: the identity of the files is established, for a KV store, and remembered there unless
        that is empty. measure_fusion: errors of fused operators are measured even if no decision depends on them.
        streaming: bytes for weights (0: the least), layers kept at the beginning and at the end, layers read ahead,
        directory of packed layers, most bytes of them there (0: no limit); it needs a digest_directory."""
    @property
    def config(self) -> dict[str, Any]:
        """architecture, num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size,
        max_position_embeddings, rope_theta, rope_scaling ("none", "linear", "llama3", "yarn", "divisors"),
        sliding_window (0: none), qkv_bias, qk_norm, tie_word_embeddings, ..."""
    @property
    def backend(self) -> str: ...
    @property
    def dtype(self) -> str:
        """The type of activations entering matrix products: int8, bf16 or f32."""
    @property
    def num_threads(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def expanded(self) -> bool:
        """Whether quantized matrices became bf16, for want of kernels of the device."""

    @property
    def fusion(self) -> dict[str, Any]:
        """ "asked" (auto, on, off); "operators": name to "fused" or "composed"; "errors": a list of dicts of operator,
        quantity, error, bound and layer (None: the head), empty if not measured; "seconds" that measuring took."""
    def kv_fingerprint(self, kv_dtype: str) -> str:
        """Hexadecimal identity of all that predictions with this format follow from: weights, kernels, numerics. For a
        model with a digest_directory."""
    def measure_kv_format(self, kv_dtype: str, text_token_ids: Sequence[int]) -> dict[str, Any]:
        """Lets the model read the first 512 tokens of a text, with the format and with f32. No engine may run it
        meanwhile. kl (mean, nats; inf where a prediction is not a number), floor_kl (of bf16, where activations are
        int8), cost (their difference), worst_kl, agreement (share of positions with the same most likely token),
        tokens, positions (0: the context is too short to measure anything), seconds."""
    @property
    def load_seconds(self) -> float: ...

class StepOutput:
    """What one step did for one answer to a request."""

    @property
    def request_id(self) -> int: ...
    @property
    def choice(self) -> int:
        """Which of its n answers."""
    @property
    def token_ids(self) -> list[int]:
        """New tokens, in order; empty while the prompt is being computed."""
    @property
    def finish_reason(self) -> str | None:
        """None while running, else 'stop' (end-of-sequence token, not included in the tokens), 'length', 'abort',
        'timeout' or 'error'."""
    @property
    def error(self) -> tuple[str, str] | None:
        """Code and message: with 'error' what was wrong with the request, with 'abort' what failed, if anything did."""
    @property
    def logprobs(self) -> list[list[tuple[int, float, int]]] | None:
        """If asked for: for each token of token_ids a list of (token, logprob, rank), first the token itself, then the
        most likely tokens."""
    @property
    def prompt_logprobs(self) -> list[list[tuple[int, float, int]]] | None:
        """With the final output of a request that asked for them: entry i is such a list for prompt token i + 1."""
    @property
    def prompt_logits(self) -> NDArray[np.float32] | None:
        """With the final output of a request that asked for them: float32[num_prompt_tokens, vocab_size]; where chunks
        were reused, of the tokens behind the last one."""
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def reuse(self) -> dict[str, Any]:
        """mode, and how many prompt tokens are exact_prefix, isolated, recomputed and computed."""
    @property
    def metrics(self) -> dict[str, float]:
        """queue_ms, ttft_ms, total_ms (so far)."""

class Outbox:
    """What an engine has to say to one reader. Outputs of one answer that nobody has read yet become one."""

    def __init__(self, *, wake_each_step: bool = True) -> None:
        """False: wake the reader only when an answer has ended."""
    def wait(self, seconds: float) -> list[StepOutput]:
        """Waits (GIL released) for what the reader wants to be woken for, then returns all that is there."""
    def wait_brief(self, seconds: float) -> list[tuple[int, StepOutput | list[int]]]:
        """As `wait`, with the numbers of the requests. Of an output that is nothing but tokens of the first answer to a
        request, only these."""
    def wait_for_ends(self, seconds: float) -> bool:
        """Waits (GIL released) until every answer has ended; whether they have."""
    def close(self) -> None:
        """Wakes the reader; nothing is waited for any more."""
    @property
    def closed(self) -> bool: ...
    @property
    def num_unfinished(self) -> int:
        """Answers whose end has not been put in yet."""

class Engine:
    """One scheduler and KV pool over one model, with a thread that makes the steps. Any thread may call anything."""

    def __init__(
        self,
        model: Model,
        *,
        kv_dtype: str = "auto",
        max_model_len: int = 0,
        max_num_seqs: int = 16,
        max_batch_tokens: int = 512,
        max_waiting: int = 0,
        kv_cache_bytes: int = 0,
        enable_prefix_caching: bool = True,
        trace_path: str = "",
        kv_store_path: str = "",
        kv_store_bytes: int = 0,
        speculative: tuple[str, int, int, int, bool] | None = None,
        draft_model: Model | None = None,
        enforce_eager: bool = False,
    ) -> None:
        """Zero means the default: max_model_len from the file, max_waiting unlimited, kv_cache_bytes a memory share.

        trace_path: a file for a Chrome trace of the steps; empty for none. Raises CoreError (io) if it is not writable.
        kv_store_path: a directory where at most kv_store_bytes of keys and values are kept; empty for none. The model
        must have a digest_directory. Raises CoreError (io) if it cannot be used.
        speculative: method, num_draft_tokens, prompt_lookup_min, prompt_lookup_max, adaptive; None for none.
        draft_model: of the method "draft", on the backend of `model`, and of no other engine.
        """
    def submit(
        self,
        outbox: Outbox,
        prompt_token_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int | None,
        ignore_eos: bool,
        stop_token_ids: Sequence[int],
        logit_bias: dict[int, float],
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        min_tokens: int = 0,
        bad_words_token_ids: Sequence[Sequence[int]] = ...,
        allowed_token_ids: Sequence[int] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        prompt_logits: bool = False,
        cache_salt: str = "",
        n: int = 1,
        stop_tokenizer: Tokenizer | None = None,
        stop: list[str] = ...,
        timeout_seconds: float = 0.0,
        guided: Any = None,
        streams: bool = True,
        chunks: Sequence[tuple[int, int, Sequence[int]]] = ...,
        reuse: str = "exact",
        mask_sink: bool = True,
        ratio: float = 0.15,
        select: str = "deviation",
        only_chunks: bool = False,
        pin_chunks: bool = False,
        key_policy: tuple[str, int, int, int, int] = ...,
        speculative: bool | None = None,
    ) -> int:
        """Queues a request whose outputs go to the outbox, and returns its id. max_tokens == 0 is allowed only with
        prompt_logprobs, prompt_logits or only_chunks.
        `chunks` are (begin, count, anchor token ids) of parts of the prompt, `reuse` says how they are used.
        `key_policy` is `KvPolicy.key_rule`.
        With `only_chunks` nothing but them is computed.
        `guided` is None or has ``matcher()``, which is called for each answer (see nanobraid.guided).
        Prompts that are computed beside a request that `streams` are cut so that steps stay short.

        Raises CoreError (invalid_argument, overloaded) and leaves the engine unchanged on bad input.
        """
    def cancel(self, request_id: int) -> None:
        """Stops a request; the next step reports it with finish_reason 'abort'. Unknown ids are ignored."""
    def cancel_all(self, outbox: Outbox) -> None:
        """Stops all requests of an outbox."""
    def num_cached(self, token_ids: Sequence[int], cache_salt: str = "") -> int:
        """How many of the first tokens the prefix cache could give now."""
    def find_chunk(self, token_ids: Sequence[int], anchor_token_ids: Sequence[int], cache_salt: str = "") -> int:
        """Id of the chunk with this content, or 0."""
    def list_chunks(self, cache_salt: str = "") -> list[dict[str, Any]]:
        """id, token_ids, anchor_token_ids, ready, pinned, users, hits, blocks of the chunks of a namespace."""
    def remove_chunk(self, id: int) -> bool:
        """It cannot be found any more, and goes when nobody uses it; False if there is none."""
    def pin_chunk(self, id: int, pinned: bool) -> bool:
        """Pinned chunks are not evicted; False if there is none."""
    def hold(self) -> None:
        """What is submitted until `release` enters one step together. Calls may nest."""
    def release(self) -> None: ...
    def drain(self, seconds: float) -> bool:
        """Refuses new requests and waits (GIL released) until those there have ended; whether they have."""
    def close(self) -> None:
        """Ends what runs with 'abort' and stops the thread; called by that thread itself, it does not wait."""
    @property
    def is_this_thread(self) -> bool:
        """Whether the caller is the thread that makes the steps."""
    def stats(self) -> dict[str, Any]:
        """running, waiting, blocks_total, blocks_free, blocks_owned, kv_bytes, workspace_bytes, steps, forward_seconds,
        sample_seconds, plan_seconds, drawn_on_device, graphs_recorded, graph_steps, generated_tokens,
        prompt_tokens."""
    @property
    def kv_dtype(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
