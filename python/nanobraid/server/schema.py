"""The fields of requests: what each may be, and which of the interface are refused.

A field of OpenAI's schema is honoured or refused by name. One that is in no schema is ignored with a line in the debug
log, or refused too where the server is strict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from nanobraid._logging import logger
from nanobraid.server.errors import ApiError, cut, invalid_type, invalid_value, missing, unknown_parameter, unsupported
from nanobraid.server.request_fields import whole, whole_numbers

_MAX_STOPS = 16
_MAX_STOP_CHARS = 4096
_MIN_SEED, _MAX_SEED = -(2**63), 2**63 - 1
_TOKEN_ID = re.compile(r"[0-9]{1,10}\Z")
_MAX_INT = 2**31 - 1


def _wrong_type(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_type", "{message}", {"message": message})


def _wrong_value(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def _stop(value: Any) -> list[str] | None:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _wrong_type("must be a string or a list of strings")
    if len(stops) > _MAX_STOPS or not all(stops) or any(len(stop) > _MAX_STOP_CHARS for stop in stops):
        raise _wrong_value(f"must be at most {_MAX_STOPS} strings of 1 to {_MAX_STOP_CHARS} characters")
    return stops


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _wrong_type("must be an object whose members are token ids")
    bias = {}
    for key, number in value.items():
        if not _TOKEN_ID.match(key):
            raise _wrong_value(f"must have token ids as members, got {cut(repr(key), 40)}")
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise _wrong_type(f"must have numbers as values, got {type(number).__name__} for {key}")
        if not (math.isfinite(number) and -100 <= number <= 100):
            raise _wrong_value(f"must have values from -100 to 100, got {number} for {key}")
        bias[int(key)] = float(number)
    return bias


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for text in value.values()):
        raise _wrong_type("must be an object of strings")
    if len(value) > 16 or any(len(key) > 64 or len(text) > 512 for key, text in value.items()):
        raise _wrong_value("must have at most 16 members, names of 64 and values of 512 characters")
    return dict(value)


Stop = Annotated[
    Any,
    BeforeValidator(_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARS},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_CHARS},
                    "maxItems": _MAX_STOPS,
                },
                {"type": "null"},
            ]
        }
    ),
]
LogitBias = Annotated[
    Any,
    BeforeValidator(_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                },
                {"type": "null"},
            ]
        }
    ),
]
Metadata = Annotated[
    Any,
    BeforeValidator(_metadata),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "additionalProperties": {"type": "string", "maxLength": 512},
                    "propertyNames": {"maxLength": 64},
                    "maxProperties": 16,
                },
                {"type": "null"},
            ]
        }
    ),
]
Int = Annotated[int, BeforeValidator(whole)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=_MAX_INT)]], BeforeValidator(whole_numbers), Field(max_length=1 << 20)
]
Object = dict[str, Any]


class Request(BaseModel):
    """A request body. Nothing is converted: a number in quotes is no number. 2.0 is an integer, as in JSON Schema."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: str | None = None


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None


class Generation(Request):
    """What requests that generate text have in common."""

    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias = None
    max_tokens: Int | None = Field(None, ge=0, le=_MAX_INT)
    n: Int | None = Field(None, ge=1, le=128)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: Int | None = Field(None, ge=_MIN_SEED, le=_MAX_SEED)
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    user: str | None = Field(None, max_length=512)
    # vLLM's
    top_k: Int | None = Field(None, ge=-1, le=_MAX_INT)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: Int | None = Field(None, ge=0, le=_MAX_INT)
    stop_token_ids: TokenIds | None = None
    allowed_token_ids: TokenIds | None = Field(None, min_length=1)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=512)
    structured_outputs: Object | None = None
    # ours
    timeout_s: float | None = Field(None, gt=0)
    kv_policy: str | None = Field(None, min_length=1, max_length=200)
    speculative: bool | None = None
    chunks: list[Any] | None = Field(None, max_length=256)
    reuse: Any = None


class ChatRequest(Generation):
    """``/v1/chat/completions``."""

    messages: list[Any] = Field(min_length=1, max_length=65536)
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=20)
    max_completion_tokens: Int | None = Field(None, ge=1, le=_MAX_INT)
    metadata: Metadata = None
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    modalities: list[str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None
    response_format: Object | None = None
    tools: list[Any] | None = Field(None, max_length=1024)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    # vLLM's
    chat_template_kwargs: Object | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(Generation):
    """``/v1/completions``."""

    prompt: Any = None
    best_of: Int | None = Field(None, ge=1, le=128)
    echo: bool | None = None
    logprobs: Int | None = Field(None, ge=0, le=20)


class TokenizeRequest(Request):
    """``/tokenize``: a text or a conversation."""

    prompt: str | None = None
    messages: list[Any] | None = Field(None, max_length=65536)
    add_special_tokens: bool | None = None
    parse_special: bool | None = None  # llama-server's
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Object | None = None
    tools: list[Any] | None = Field(None, max_length=1024)


class DetokenizeRequest(Request):
    """``/detokenize``."""

    tokens: TokenIds


class RenderRequest(ChatRequest):
    """``/v1/chat/completions/render``: a chat request, of which the prompt is wanted."""


class ChunkRequest(Request):
    """``/v1/chunks``: a text to keep."""

    text: str = Field(min_length=1)
    name: str | None = Field(None, min_length=1, max_length=200)
    pin: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=512)


class PinRequest(Request):
    """``/v1/chunks/{id}/pin``."""

    pinned: bool
    cache_salt: str | None = Field(None, min_length=1, max_length=512)


# Fields of OpenAI's (and vLLM's) schema that are not implemented, with the reason.
UNSUPPORTED: dict[type[Request], dict[str, str]] = {
    ChatRequest: {
        "audio": "models answer with text",
        "function_call": "it was replaced by tool_choice",
        "functions": "it was replaced by tools",
        "moderation": "",
        "prediction": "",
        "prompt_cache_options": "prompts are cached by their content",
        "prompt_cache_retention": "prompts stay cached while there is room",
        "verbosity": "",
        "web_search_options": "",
        "chat_template": "templates come with the model",
        "best_of": "",
        "echo": "",
        "suffix": "",
        "prompt_logprobs": "",
        "guided_json": "use structured_outputs or response_format",
        "guided_regex": "use structured_outputs",
        "guided_choice": "use structured_outputs",
        "guided_grammar": "use structured_outputs",
    },
    CompletionRequest: {
        "suffix": "",
        "use_beam_search": "",
        "prompt_logprobs": "use echo with logprobs",
        "prompt_embeds": "",
        "response_format": "use structured_outputs, or /v1/chat/completions",
        "guided_json": "use structured_outputs",
        "guided_regex": "use structured_outputs",
        "guided_choice": "use structured_outputs",
        "guided_grammar": "use structured_outputs",
    },
}
UNSUPPORTED[RenderRequest] = UNSUPPORTED[ChatRequest]

R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: Mapping[str, Any], *, strict: bool) -> R:
    """Checks a request.

    Args:
        kind: What it is.
        body: The JSON object.
        strict: Refuse fields that are in no schema.

    Raises:
        ApiError: 400, for the first thing that is wrong.
    """
    for name, reason in UNSUPPORTED.get(kind, {}).items():
        if body.get(name) is not None:
            raise unsupported(name, reason)
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise _first(error) from None
    unknown = [*(request.model_extra or {})]
    options = getattr(request, "stream_options", None)
    if options is not None:
        if (options.model_extra or {}).get("include_obfuscation"):
            raise unsupported("stream_options.include_obfuscation")
        unknown += [f"stream_options.{name}" for name in options.model_extra or {} if name != "include_obfuscation"]
    for name in unknown:
        if name in UNSUPPORTED.get(kind, {}):
            continue  # null
        if strict:
            raise unknown_parameter(cut(name, 100))
        logger.debug("server: the field %.100r of a request is in no schema and is ignored", name)
    return request


def _first(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = path(first["loc"])
    kind = first["type"]
    message = f"{param}: {first['msg'][0].lower()}{first['msg'][1:]}"
    if kind == "missing":
        return missing(param)
    if kind.endswith("_type") or kind in ("int_from_float", "invalid_type"):
        return invalid_type(param, message)
    return invalid_value(param, message)


def path(location: tuple[int | str, ...]) -> str:
    """A place in a body as users write it: ``messages[0].role``."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text
