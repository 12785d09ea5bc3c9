"""``/openapi.json``: what the server takes and answers, as an OpenAPI 3.1 document made from the models of requests."""

from __future__ import annotations

from typing import Any

from nanobraid import __version__
from nanobraid.server import exposition, messages, responses, schema
from nanobraid.server.edge import is_anthropic
from nanobraid.server.openapi_schemas import ANSWERS, MESSAGE, PROMPT, REF, TOOL, WRITTEN
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
    for name in ("max_tokens", "max_output_tokens"):
        if name in made["properties"]:
            limits = {"minimum": 1, "maximum": service.max_model_len}
            number = {"type": "integer", **limits}
            made["properties"][name] = number if name in shape.need else {"anyOf": [number, {"type": "null"}]}
    return made


def _request_schemas(kind: type[Request], service: Service) -> dict[str, Any]:
    """The schema of a body and those it refers to."""
    made = kind.model_json_schema(ref_template=REF + "{model}")
    found: dict[str, Any] = made.pop("$defs", {})
    properties = made["properties"]
    for name, written in WRITTEN.items():
        if name in properties and name != "prompt":
            properties[name] = written
    if kind is schema.CompletionRequest:
        properties["prompt"] = PROMPT
        made["required"] = ["prompt"]
    if "messages" in properties:
        limits = {"minItems": 1, "maxItems": 65536}
        properties["messages"] = {"type": "array", "items": MESSAGE, **limits}
    if "tools" in properties:
        properties["tools"] = {"anyOf": [{"type": "array", "items": TOOL, "maxItems": 1024}, {"type": "null"}]}
    if "model" in properties:
        properties["model"] = {"enum": [*service.names, None]}
    for name in ("max_tokens", "max_completion_tokens"):
        for choice in properties.get(name, {}).get("anyOf", ()):
            if choice.get("type") == "integer":
                choice |= {"minimum": 1, "maximum": service.max_model_len}
    for name, reason in UNSUPPORTED.get(kind, {}).items():
        properties[name] = {"type": "null", "description": f"Not supported. {reason}".strip()}
    if service.settings.strict:
        made["additionalProperties"] = False
    return {**found, kind.__name__: made}
