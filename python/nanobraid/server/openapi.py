"""``/openapi.json``: what the server takes and answers, as an OpenAPI 3.1 document made from the models of requests."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from nanobraid import __version__
from nanobraid.server import exposition, messages, responses, schema
from nanobraid.server.edge import is_anthropic
from nanobraid.server.errors import ApiError
from nanobraid.server.openapi_schemas import ANSWERS, MESSAGE, REF, TOGETHER, TOOL, WRITTEN, or_null
from nanobraid.server.request_shapes import Shape
from nanobraid.server.schema import UNSUPPORTED, Request
from nanobraid.server.service import Service

_MEANINGS = {
    400: "Something is wrong with the request; `param` says where.",
    401: "No API key, or a wrong one.",
    403: "The header `Host` names another machine.",
    404: "There is no such model, chunk or route.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    415: "The body does not say that it is JSON.",
    500: "A defect of nanobraid.",
    503: "The queue is full, or the server is shutting down; see `Retry-After`.",
    504: "The request took longer than it may.",
}
_OF_BODIES = (400, 404, 408, 413, 415, 500, 503)

Body = type[Request] | Shape
# Bodies that are read by tables.
_SHAPES: dict[str, Shape] = {
    "ResponsesRequest": responses.REQUEST,
    "MessagesRequest": messages.REQUEST,
    "CountTokensRequest": messages.COUNT,
}
# Route, method, model or table of the body, answer, whether it streams, what it is for.
_ROUTES: list[tuple[str, str, Body | None, str, bool, str]] = [
    ("/v1/chat/completions", "post", schema.ChatRequest, "ChatCompletion", True, "Answer a conversation"),
    ("/v1/chat/completions/render", "post", schema.RenderRequest, "Rendered", False, "The prompt of a conversation"),
    ("/v1/completions", "post", schema.CompletionRequest, "Completion", True, "Continue texts"),
    ("/v1/responses", "post", responses.REQUEST, "Response", True, "OpenAI's Responses, without state"),
    ("/v1/messages", "post", messages.REQUEST, "Message", True, "Anthropic's Messages"),
    ("/v1/messages/count_tokens", "post", messages.COUNT, "InputTokens", False, "The tokens of a prompt of those"),
    ("/v1/models", "get", None, "Models", False, "The model, under all its names"),
    ("/v1/models/{model}", "get", None, "Model", False, "The model"),
    ("/v1/chunks", "get", None, "Chunks", False, "The registered chunks"),
    ("/v1/chunks", "post", schema.ChunkRequest, "Chunk", False, "Compute a chunk and keep it"),
    ("/v1/chunks/{chunk}", "get", None, "Chunk", False, "A chunk"),
    ("/v1/chunks/{chunk}", "delete", None, "Deleted", False, "Forget a chunk"),
    ("/v1/chunks/{chunk}/pin", "post", schema.PinRequest, "Chunk", False, "Keep a chunk when memory is short"),
    ("/tokenize", "post", schema.TokenizeRequest, "Tokens", False, "The tokens of a text or conversation"),
    ("/detokenize", "post", schema.DetokenizeRequest, "Text", False, "The text of tokens"),
    ("/tokenizer_info", "get", None, "TokenizerInfo", False, "Facts of the tokenizer"),
    ("/health", "get", None, "Status", False, "Whether the process lives"),
    ("/ready", "get", None, "Status", False, "Whether new requests are taken"),
    ("/metrics", "get", None, "", False, "Figures for Prometheus"),
    ("/state", "get", None, "State", False, "What the page shows"),
]


def document(service: Service) -> dict[str, Any]:
    """Returns the document of a server.

    Args:
        service: The model, whose limits are in it.
    """
    components: dict[str, Any] = dict(ANSWERS)
    paths: dict[str, Any] = {}
    for path, method, body, answer, streams, summary in _ROUTES:
        if path == "/state" and not service.settings.page:
            continue
        name = _name_of(body)
        if isinstance(body, Shape):
            components[name] = _shape_schema(body, service)
        elif body is not None and name not in components:
            components |= _request_schemas(body, service)
        paths.setdefault(path, {})[method] = _operation(path, name, answer, streams, summary)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nanobraid",
            "version": __version__,
            "description": "Not in this document: the page at `/`, this document, and `/v1/embeddings`, which is "
            "refused. Where a field may be left out, null says the same.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if service.settings.api_keys else [],
    }


def _name_of(body: Body | None) -> str:
    if isinstance(body, Shape):
        return next(name for name, shape in _SHAPES.items() if shape is body)
    return "" if body is None else body.__name__


def _operation(path: str, body: str, answer: str, streams: bool, summary: str) -> dict[str, Any]:
    content: dict[str, Any] = {exposition.CONTENT_TYPE: {"schema": {"type": "string"}}}
    if answer:
        content = {"application/json": {"schema": {"$ref": REF + answer}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    statuses: tuple[int, ...] = _OF_BODIES if body else (500,)
    if "{" in path:
        statuses += (404,)
    if path == "/ready":
        statuses += (503,)
    if streams:
        statuses += (504,)
    envelope = "AnthropicError" if is_anthropic(path) else "Error"
    error = {"application/json": {"schema": {"$ref": REF + envelope}}}
    answers: dict[str, Any] = {"200": {"description": "As wanted.", "content": content}}
    for status in sorted({*statuses, 401, 403, 413}):
        answers[str(status)] = {"description": _MEANINGS[status], "content": error}
    operation: dict[str, Any] = {"summary": summary, "responses": answers, "parameters": _parameters(path, body)}
    if body:
        reference = {"schema": {"$ref": REF + body}}
        operation["requestBody"] = {"required": True, "content": {"application/json": reference}}
    return operation


def _parameters(path: str, body: str) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
    ]
    if path.startswith("/v1/chunks") and not body:
        parameters.append({"name": "cache_salt", "in": "query", "schema": {"type": "string"}})
    return parameters


def _shape_schema(shape: Shape, service: Service) -> dict[str, Any]:
    """The schema of a body that is read by a table."""
    made = shape.document(service.settings.strict)
    properties = made["properties"]
    for name in ("max_tokens", "max_output_tokens"):
        if name in properties:
            number = {"type": "integer", "minimum": 1, "maximum": service.max_model_len}
            properties[name] = number if name in shape.need else or_null(number)
    if shape in (messages.REQUEST, messages.COUNT):
        efforts = _efforts(service)
        kinds = ("disabled",) * ("none" in efforts) + ("enabled", "adaptive") * ("high" in efforts)
        shapes = shape.fields["thinking"].kinds
        served = [shapes[kind].document(service.settings.strict, "type", kind) for kind in kinds]
        properties["thinking"] = {"anyOf": [*served, {"type": "null"}]}
        if "high" not in efforts:
            properties["output_config"]["anyOf"][0]["properties"]["effort"] = {"type": "null"}
    return made


def _efforts(service: Service) -> list[str]:
    """The values of ``reasoning_effort`` that mean something to this model."""
    found = []
    for effort in responses.EFFORTS:
        with suppress(ApiError):
            service.template_variables(None, effort)
            found.append(effort)
    return found


def _request_schemas(kind: type[Request], service: Service) -> dict[str, Any]:
    """The schema of a body and those it refers to."""
    made = kind.model_json_schema(ref_template=REF + "{model}")
    found: dict[str, Any] = made.pop("$defs", {})
    properties = made["properties"]
    properties |= {name: written for name, written in WRITTEN.items() if name in properties}
    if "messages" in properties:
        conversation = {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 65536}
        properties["messages"] = conversation if "messages" in made.get("required", ()) else or_null(conversation)
    if "tools" in properties:
        properties["tools"] = or_null({"type": "array", "items": TOOL, "maxItems": 1024})
    if kind is schema.CompletionRequest:
        made["required"] = ["prompt"]
    _limit(properties, kind, service)
    for name, reason in UNSUPPORTED.get(kind, {}).items():
        properties[name] = {"type": "null", "description": f"Not supported. {reason}".strip()}
    if kind.__name__ in TOGETHER:
        made["allOf"] = TOGETHER[kind.__name__]
    if service.settings.strict:
        made["additionalProperties"] = False
    return {**found, kind.__name__: made}


def _limit(properties: dict[str, Any], kind: type[Request], service: Service) -> None:
    """Puts the limits of the model into the schema."""
    last = service.tokenizer.vocab_size - 1
    token = {"type": "integer", "minimum": 0, "maximum": last}
    if kind is schema.CompletionRequest:
        properties["prompt"] = _prompt(token, service)
    if "model" in properties:
        properties["model"] = {"enum": [*service.names, None]}
    for name in ("tokens", "stop_token_ids", "allowed_token_ids"):
        for choice in (properties.get(name, {}), *properties.get(name, {}).get("anyOf", ())):
            if choice.get("type") == "array":
                choice["items"] = token
    if "logit_bias" in properties:
        properties["logit_bias"]["anyOf"][0]["propertyNames"] = {"pattern": _up_to(last)}
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        for choice in properties.get(name, {}).get("anyOf", ()):
            if choice.get("type") == "integer":
                choice["maximum"] = service.max_model_len
                choice["minimum"] = int(name != "min_tokens" and kind is not schema.CompletionRequest)
    if "reasoning_effort" in properties:
        properties["reasoning_effort"] = {"enum": [*_efforts(service), None]}


def _prompt(token: dict[str, Any], service: Service) -> dict[str, Any]:
    """The schema of what is continued: an empty text only if the tokenizer puts something before it."""
    text = {"type": "string", "minLength": 0 if service.tokenizer.encode("") else 1}
    tokens = {"type": "array", "items": token, "minItems": 1}
    limits = {"minItems": 1, "maxItems": service.settings.max_prompts}
    several = ({"type": "array", "items": items, **limits} for items in (text, tokens))
    return {"anyOf": [text, tokens, *several]}


def _up_to(last: int) -> str:
    """A pattern of the decimal numbers from 0 to this one."""
    digits = str(last)
    below = [
        f"{digits[:i]}[0-{int(digit) - 1}][0-9]{{{len(digits) - i - 1}}}"
        for i, digit in enumerate(digits)
        if digit > "0"
    ]
    shorter = [f"[0-9]{{1,{len(digits) - 1}}}"] if len(digits) > 1 else []
    return f"^({'|'.join([*shorter, *below, digits])})$"
