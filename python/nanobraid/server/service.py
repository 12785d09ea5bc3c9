"""What every route needs: the engine, its tokenizer, names, and how a request becomes one of the engine's."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nanobraid._chat_inputs import ChatOptions
from nanobraid.async_engine import AsyncEngine
from nanobraid.chat_template import ChatTemplate
from nanobraid.composition import Reuse, ReuseReport, Segment
from nanobraid.errors import InvalidArgumentError, NanobraidError, OverloadedError
from nanobraid.guided import Guided
from nanobraid.models import DEFAULT_MODEL
from nanobraid.outputs import RequestMetrics
from nanobraid.sampling_params import SamplingParams
from nanobraid.server import errors, reasoning
from nanobraid.server.errors import ApiError
from nanobraid.server.generation import ComposedGeneration, Generation
from nanobraid.server.metrics import Metrics
from nanobraid.server.page import LiveRequests
from nanobraid.server.schema import ChatRequest, TokenizeRequest
from nanobraid.server.schema import Generation as GenerationRequest
from nanobraid.server.settings import Settings
from nanobraid.server.sse import error_of
from nanobraid.server.tools import ToolUse
from nanobraid.server.watch import Watch
from nanobraid.tokenizer import Tokenizer

_INLINE_CHARS = 4096  # texts up to here are encoded in the event loop: that takes less time than to go to a thread


@dataclass
class Caller:
    """Who sent a request.

    Attributes:
        request_id: Of the header ``x-request-id``.
        namespace: Of the prefix cache and of chunks; empty unless there are several keys.
        log: Further members of the line in the access log.
        arrived: When its first byte came, by `time.perf_counter`.
    """

    request_id: str
    namespace: str = ""
    log: dict[str, Any] = field(default_factory=dict)
    arrived: float = field(default_factory=time.perf_counter)

    def salt(self, wanted: str | None) -> str:
        """The engine's `cache_salt` for a request that asks for this one."""
        if not self.namespace:
            return wanted or ""
        return self.namespace if wanted is None else f"{self.namespace}:{wanted}"


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0

    def report(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class Service:
    """A model that is served.

    Args:
        engine: The engine, shared with nobody who would close it.
        settings: How it is served.
        given_name: What the model was called when it was loaded.
    """

    def __init__(self, engine: AsyncEngine, settings: Settings, given_name: str = DEFAULT_MODEL) -> None:
        self.engine = engine
        self.settings = settings
        self.tokenizer: Tokenizer = engine.llm.tokenizer
        self.max_model_len: int = engine.llm.config["max_model_len"]
        self.names = settings.served_model_names or (_public_name(given_name),)
        self.created = int(time.time())
        self.tools = ToolUse.of(self.tokenizer, settings.tool_call_parser)
        self.reasons = reasoning.detect_reasoning(self.tokenizer) if settings.reasoning is None else settings.reasoning
        self.metrics = Metrics(self.name, engine)
        self.live = LiveRequests()
        self.draining = False
        self.num_active = 0
        self._idle = asyncio.Event()

    @property
    def name(self) -> str:
        """What answers call the model."""
        return self.names[0]

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """The bytes of every token; None for control tokens."""
        return self.tokenizer.core.token_bytes()

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template.

        Raises:
            ChatTemplateError: It has none.
        """
        return ChatTemplate.of(self.tokenizer)

    def check_model(self, model: str | None) -> None:
        """Raises ApiError unless a request for this model is served here."""
        if model is not None and model not in self.names:
            raise errors.model_not_found(model)

    def namespace_of(self, key: str) -> str:
        """The namespace of an API key."""
        if len(self.settings.api_keys) < 2:
            return ""
        return "key-" + hashlib.sha256(key.encode()).hexdigest()[:16]

    def busy(self) -> ApiError:
        """The refusal of a request while the server ends."""
        return errors.overloaded("the server is shutting down", 5)

    # ---- work that is under way ----

    def enter(self) -> None:
        """A request has begun.

        Raises:
            ApiError: The server ends.
        """
        if self.draining:
            self.metrics.rejected("draining")
            raise self.busy()
        self.num_active += 1

    def leave(self) -> None:
        """A request has ended, its last byte sent."""
        self.num_active -= 1
        if self.num_active == 0:
            self._idle.set()

    async def drain(self) -> bool:
        """Refuses new requests and waits until the running ones have ended, at most as long as the settings say.

        What runs then is stopped and told so. Returns whether everything had ended by itself.
        """
        self.draining = True
        if self.num_active == 0:
            return True
        self._idle.clear()
        with suppress(asyncio.TimeoutError):  # the builtin one only since Python 3.11
            await asyncio.wait_for(self._idle.wait(), self.settings.drain_timeout_s)
            return True
        await self.engine.shutdown(drain=False)
        self._idle.clear()
        if self.num_active > 0:  # they still have to tell their clients
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 2.0)
        return False

    # ---- from a request to the engine's ----

    async def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """The tokens of a text; the spelling of control tokens is text unless it is to be parsed."""
        options = {"add_special_tokens": add_special_tokens, "parse_special": parse_special}
        if len(text) <= _INLINE_CHARS:
            return self.tokenizer.encode(text, **options)
        return await asyncio.to_thread(self.tokenizer.encode, text, **options)

    def chat_options(
        self, request: ChatRequest | TokenizeRequest, tools: list[dict[str, Any]], effort: str | None = None
    ) -> ChatOptions:
        """How a conversation becomes a prompt.

        Args:
            request: Says so.
            tools: Those that the prompt describes; none is an empty list.
            effort: As for `template_variables`.

        Raises:
            ApiError: As `template_variables`.
        """
        continues = bool(request.continue_final_message)
        return {
            "add_generation_prompt": request.add_generation_prompt is not False
            and not (request.add_generation_prompt is None and continues),
            "continue_final_message": continues,
            "tools": tools if tools and self.tools.in_template else None,
            "template_kwargs": self.template_variables(request.chat_template_kwargs, effort),
        }

    def template_variables(self, given: dict[str, Any] | None, effort: str | None) -> dict[str, Any] | None:
        """The variables of a chat template that a request sets.

        Args:
            given: ``chat_template_kwargs``.
            effort: ``reasoning_effort``; ``none`` turns thinking off.

        Raises:
            ApiError: The template cannot do what the effort asks for.
        """
        if effort is None:
            return given
        source = self.tokenizer.chat_template or ""
        variables = {"enable_thinking": effort != "none", "reasoning_effort": effort}
        used = {name: value for name, value in variables.items() if re.search(rf"\b{name}\b", source)}
        if not used and (effort != "none" or self.reasons):
            raise errors.unsupported("reasoning_effort", "the chat template of this model cannot change it")
        return used | (given or {})

    def sampling(
        self,
        request: GenerationRequest,
        *,
        num_prompt: int,
        prompt_field: str,
        max_tokens: int | None,
        max_tokens_field: str = "max_tokens",
        **more: Any,
    ) -> SamplingParams:
        """The sampling parameters of a request.

        Args:
            request: The request.
            num_prompt: Tokens of its prompt.
            prompt_field: The field that holds it.
            max_tokens: Most new tokens; None for as many as fit.
            max_tokens_field: The field that says so.
            more: Further options of `SamplingParams`, `guided` and log-probabilities.

        Raises:
            ApiError: Prompt and answer do not fit the context, or a value is not allowed.
        """
        room = self.max_model_len - num_prompt
        if max_tokens is not None and max_tokens > self.max_model_len:
            raise errors.invalid_value(
                max_tokens_field,
                f"{max_tokens_field} must be at most {self.max_model_len}, the context of this model, got {max_tokens}",
            )
        wanted = 1 if max_tokens is None else max_tokens
        if wanted > room:
            raise errors.context_length_exceeded(prompt_field, num_prompt, wanted, self.max_model_len)
        self._check_tokens(request)
        if request.ignore_eos and more.get("guided") is not None:
            raise errors.invalid_value("ignore_eos", "ignore_eos is not allowed where a grammar says when answers end")
        if request.min_tokens is not None and max_tokens is not None and request.min_tokens > max_tokens:
            raise errors.invalid_value(
                "min_tokens", f"min_tokens must be at most {max_tokens_field}, got {request.min_tokens}"
            )
        options = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "min_tokens": request.min_tokens,
            "ignore_eos": request.ignore_eos,
            "include_stop_str_in_output": request.include_stop_str_in_output,
            "stop": request.stop,
            "stop_token_ids": request.stop_token_ids,
            "kv_policy": request.kv_policy,
            "speculative": request.speculative,
            "n": request.n,
        }
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                seed=None if request.seed is None else request.seed % 2**64,
                logit_bias=request.logit_bias,
                allowed_token_ids=request.allowed_token_ids,
                **{name: value for name, value in options.items() if value is not None},
                **more,
            )
        except NanobraidError as error:
            name = str(error).split(" ", 1)[0].split("[", 1)[0]
            raise errors.of(error, name if name in type(request).model_fields else None) from None

    def _check_tokens(self, request: GenerationRequest) -> None:
        last = self.tokenizer.vocab_size - 1
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            for token_id in getattr(request, name) or ():
                if token_id > last:
                    raise errors.invalid_value(name, f"{name} must hold token ids from 0 to {last}, got {token_id}")

    def timeout(self, request: GenerationRequest) -> float | None:
        """Seconds that a request may take."""
        limits = [s for s in (request.timeout_s, self.settings.request_timeout_s) if s is not None]
        return min(limits, default=None)

    async def begin(
        self,
        prompt: Sequence[int] | Sequence[Segment],
        params: SamplingParams,
        caller: Caller,
        *,
        num_prompt: int,
        salt: str,
        timeout_s: float | None,
        streams: bool,
        reuse: Reuse | None = None,
    ) -> Generation | ComposedGeneration:
        """Gives a request to the engine. What is returned is to be run and to be closed.

        Args:
            prompt: Token ids; with `reuse` segments.
            params: How to sample.
            caller: Who wants it.
            num_prompt: Tokens of the prompt.
            salt: The engine's namespace.
            timeout_s: Seconds it may take.
            streams: Somebody reads the pieces as they come.
            reuse: How chunks are used.

        Raises:
            NanobraidError: The engine does not take it.
        """
        watch = Watch(
            self.metrics,
            self.live,
            request_id=caller.request_id,
            arrived=caller.arrived,
            num_prompt=num_prompt,
            num_answers=params.n,
        )
        given: Any = prompt
        try:
            if reuse is None:
                request = await self.engine.start(given, params, cache_salt=salt, timeout_s=timeout_s, streams=streams)
                watch.accepted()
                return Generation(request, watch, params.n)
            pieces = self.engine.compose(given, params, reuse=reuse, cache_salt=salt, timeout_s=timeout_s, stream=True)
            try:
                first = await anext(pieces, None)  # whether it is taken shows by its first piece
            except BaseException:
                await pieces.aclose()
                raise
            watch.accepted()
            return ComposedGeneration(pieces, first, watch)
        except BaseException:
            watch.close()
            raise

    def answer_to(self, error: NanobraidError, param: str | None) -> ApiError:
        """What the client is told of an error of the engine.

        Args:
            error: Raised when a request was given to it, or while it ran.
            param: The field that is to blame if the request is.
        """
        if isinstance(error, OverloadedError):
            self.metrics.rejected("draining" if self.draining else "queue_full")
            return errors.of(error, retry_after=self._retry_after())
        if isinstance(error, InvalidArgumentError) and self.draining:
            return self.busy()  # the engine has been closed
        if isinstance(error, InvalidArgumentError):
            return errors.of(error, param)
        return error_of(error)

    def _retry_after(self) -> int:
        """Seconds until the queue has probably moved on: what waits, at the speed at which requests have ended."""
        mean_s = self.metrics.mean_request_seconds()
        stats = self.engine.stats()
        waiting, running = int(stats["waiting"]), max(int(stats["running"]), 1)
        return max(1, min(60, math.ceil(waiting * mean_s / running)))


def reuse_report(metrics: RequestMetrics | None, report: ReuseReport | None) -> dict[str, Any]:
    """The member ``nanobraid`` of an answer: what its prompt cost, and whether that was exact."""
    result: dict[str, Any] = {}
    if metrics is not None:
        result |= {"kv_reuse_ratio": round(metrics.kv_reuse_ratio, 4), "ttft_ms": round(metrics.ttft_ms, 3)}
    if report is not None:
        result |= {
            "mode": "exact" if report.is_exact else "approximate",
            "mode_requested": report.mode_requested,
            "mode_served": report.mode_served,
            "exact_prefix": report.exact_prefix,
            "isolated": report.isolated,
            "recomputed": report.recomputed,
            "computed": report.computed,
        }
        if report.downgrade_reason is not None:
            result["downgrade_reason"] = report.downgrade_reason
    return result


def structured(request: GenerationRequest) -> Guided | None:
    """What ``structured_outputs`` asks an answer to look like (vLLM's field).

    Raises:
        ApiError: It is not one of ``json``, ``regex``, ``choice``, ``grammar`` and ``json_object``, or not valid.
    """
    given = request.structured_outputs
    if given is None:
        return None
    kinds = {name: value for name, value in given.items() if value is not None}
    if len(kinds) != 1:
        raise errors.invalid_value(
            "structured_outputs",
            "structured_outputs must have exactly one of json, json_object, regex, choice and grammar",
        )
    ((kind, value),) = kinds.items()
    param = f"structured_outputs.{kind}"
    try:
        match kind:
            case "json":
                return Guided.json_schema(value)
            case "json_object":
                if value is not True:
                    raise errors.invalid_value(param, f"{param} must be true")
                return Guided.json_object()
            case "regex":
                return Guided.regex(value)
            case "choice":
                return Guided.choice(value)
            case "grammar":
                return Guided.grammar(value)
    except NanobraidError as error:
        raise errors.of(error, param) from None
    raise errors.unsupported(param)


def guided_field(request: GenerationRequest) -> str | None:
    """The field by which a request says what its answer must look like."""
    for name in ("structured_outputs", "response_format", "tools"):
        if getattr(request, name, None) is not None:
            return name
    return None


def _public_name(given: str) -> str:
    """A name that says nothing of the folders of this machine."""
    path = Path(given).expanduser()
    if path.suffix in (".gguf", ".braid") or given.startswith(("/", ".", "~")):
        return path.stem if path.suffix in (".gguf", ".braid") else path.resolve().name
    return given
