"""The ASGI application: routes and what they have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request as HttpRequest
from starlette.routing import Route

from nanobraid.async_engine import AsyncEngine
from nanobraid.models import DEFAULT_MODEL
from nanobraid.server import errors, messages, messages_stream, openapi, page, responses, responses_stream, tokens
from nanobraid.server.chat import ChatCall
from nanobraid.server.chunks import Chunks
from nanobraid.server.completions import CompletionCall
from nanobraid.server.edge import Edge, error_answer, json_answer, plain_answer
from nanobraid.server.errors import ApiError
from nanobraid.server.exposition import CONTENT_TYPE
from nanobraid.server.parsing import parse_object
from nanobraid.server.schema import (
    ChatRequest,
    ChunkRequest,
    CompletionRequest,
    DetokenizeRequest,
    PinRequest,
    R,
    RenderRequest,
    TokenizeRequest,
    parse,
)
from nanobraid.server.service import Caller, Service
from nanobraid.server.settings import Settings
from nanobraid.server.sse import ClientGone, EventStream, error_of, guarded, named_events

_GRACE_S = 1.0  # the engine ends a request at its deadline; this is for what comes around it


class Api:
    """The routes of one model."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.chunks = Chunks(service)

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/chat/completions/render", self.render, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/v1/messages", self.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/v1/chunks", self.list_chunks, methods=["GET"]),
            Route("/v1/chunks", self.add_chunk, methods=["POST"]),
            Route("/v1/chunks/{chunk}", self.get_chunk, methods=["GET"]),
            Route("/v1/chunks/{chunk}", self.delete_chunk, methods=["DELETE"]),
            Route("/v1/chunks/{chunk}/pin", self.pin_chunk, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            *self._page_routes(),
        ]

    def _page_routes(self) -> list[Route]:
        if not self.service.settings.page:
            return []
        return [Route("/", self.page, methods=["GET"]), Route("/state", self.state, methods=["GET"])]

    # ---- bodies ----

    async def body(self, http: HttpRequest) -> dict[str, Any]:
        """The JSON object of a request.

        Raises:
            ApiError: There is none, it is too long, or it takes too long to come.
            ClientGone: The client left before it was there.
        """
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise errors.unsupported_media_type()
        settings = self.service.settings
        try:
            data = await asyncio.wait_for(self._read(http), settings.body_timeout_s)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {settings.body_timeout_s:g} s") from None
        return parse_object(data)

    async def _read(self, http: HttpRequest) -> bytes:
        most = self.service.settings.max_body_bytes
        data = bytearray()
        while True:
            message = await http.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            data += message.get("body", b"")
            if len(data) > most:
                raise errors.too_large(most)
            if not message.get("more_body"):
                return bytes(data)

    async def request(self, http: HttpRequest, kind: type[R]) -> R:
        """The checked body of a request.

        Raises:
            ApiError: As `body`, or a field is wrong.
        """
        return parse(kind, await self.body(http), strict=self.service.settings.strict)

    # ---- generation ----

    async def chat(self, http: HttpRequest) -> Any:
        """``POST /v1/chat/completions``."""
        request = await self.request(http, ChatRequest)
        return await self._run(http, ChatCall(self.service, self.chunks, request, caller_of(http)))

    async def completions(self, http: HttpRequest) -> Any:
        """``POST /v1/completions``."""
        request = await self.request(http, CompletionRequest)
        return await self._run(http, CompletionCall(self.service, self.chunks, request, caller_of(http)))

    async def _run(self, http: HttpRequest, call: ChatCall | CompletionCall) -> Any:
        if not call.request.stream:
            return json_answer(200, await self._whole(http, call))
        await self._begin(http, call)
        return EventStream(
            call.events, timeout_s=self._guard_s(call), ping_interval_s=self.service.settings.ping_interval_s
        )

    async def _whole(self, http: HttpRequest, call: ChatCall | CompletionCall) -> dict[str, Any]:
        """The answer of a call."""

        async def work() -> dict[str, Any]:
            await call.prepare()
            return await call.complete()

        return await guarded(http.receive, self._guard_s(call), work())

    async def _begin(self, http: HttpRequest, call: ChatCall | CompletionCall) -> None:
        """Gives a call to the engine; what is wrong with it shows before its stream begins."""

        async def work() -> None:
            await call.prepare()
            await call.start()

        await guarded(http.receive, self._guard_s(call), work())

    async def responses(self, http: HttpRequest) -> Any:
        """``POST /v1/responses``."""
        body = await self.body(http)
        call = self._translated(http, responses.to_chat(body, strict=self.service.settings.strict), responses)
        if not call.request.stream:
            with _renamed(responses):
                completion = await self._whole(http, call)
            return json_answer(200, responses.from_chat(completion, body))
        translator = responses_stream.StreamTranslator(body, id=call.id, created=call.created, model=self.service.name)
        return await self._stream(http, call, translator, responses)

    async def messages(self, http: HttpRequest) -> Any:
        """``POST /v1/messages``."""
        body = await self.body(http)
        call = self._translated(http, messages.to_chat(body, strict=self.service.settings.strict), messages)
        if not call.request.stream:
            with _renamed(messages):
                completion = await self._whole(http, call)
            return json_answer(200, messages.from_chat(completion, body))
        translator = messages_stream.StreamTranslator(body, id=call.id, model=self.service.name)
        return await self._stream(http, call, translator, messages)

    async def count_tokens(self, http: HttpRequest) -> Any:
        """``POST /v1/messages/count_tokens``."""
        chat = messages.to_count(await self.body(http), strict=self.service.settings.strict)
        call = self._translated(http, chat, messages)
        with _renamed(messages):
            await guarded(http.receive, None, call.prepare())
        return json_answer(200, messages.from_count(call.usage.prompt))

    def _translated(self, http: HttpRequest, chat: dict[str, Any], dialect: Any) -> ChatCall:
        with _renamed(dialect):
            request = parse(ChatRequest, chat, strict=self.service.settings.strict)
        return ChatCall(self.service, self.chunks, request, caller_of(http))

    async def _stream(self, http: HttpRequest, call: ChatCall, translator: Any, dialect: Any) -> EventStream:
        async def events(write: Callable[[bytes], None]) -> None:
            def feed(chunk: dict[str, Any]) -> None:
                if made := translator.feed(chunk):
                    write(named_events(made))

            write(named_events(translator.begin()))
            await call.chunks(feed)
            write(named_events(translator.finish()))

        def failed(error: ApiError) -> bytes:
            return named_events(translator.fail(dialect.error_from_chat(error)))

        with _renamed(dialect):
            await self._begin(http, call)
        return EventStream(
            events,
            on_error=failed,
            timeout_s=self._guard_s(call),
            ping_interval_s=self.service.settings.ping_interval_s,
        )

    def _guard_s(self, call: ChatCall | CompletionCall) -> float | None:
        timeout_s = self.service.timeout(call.request)
        return None if timeout_s is None else timeout_s + _GRACE_S

    async def render(self, http: HttpRequest) -> Any:
        """``POST /v1/chat/completions/render``: the prompt of a chat request, without running it."""
        request = await self.request(http, RenderRequest)
        call = ChatCall(self.service, self.chunks, request, caller_of(http))
        await guarded(http.receive, None, call.prepare())
        return json_answer(200, call.rendered())

    async def embeddings(self, http: HttpRequest) -> Any:
        """``POST /v1/embeddings``, which is refused."""
        await self.body(http)
        raise ApiError(400, "embeddings are not supported: this server generates text", code="unsupported_endpoint")

    # ---- models ----

    async def models(self, http: HttpRequest) -> Any:
        """``GET /v1/models``."""
        return json_answer(200, {"object": "list", "data": [self._model(name) for name in self.service.names]})

    async def model(self, http: HttpRequest) -> Any:
        """``GET /v1/models/{id}``."""
        name = http.path_params["model"]
        self.service.check_model(name)
        return json_answer(200, self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "nanobraid",
            "root": self.service.name,
            "max_model_len": self.service.max_model_len,
        }

    # ---- chunks ----

    async def add_chunk(self, http: HttpRequest) -> Any:
        """``POST /v1/chunks``."""
        request = await self.request(http, ChunkRequest)
        self.service.check_model(request.model)
        salt = caller_of(http).salt(request.cache_salt)
        return json_answer(200, await guarded(http.receive, None, self.chunks.register(request, salt)))

    async def list_chunks(self, http: HttpRequest) -> Any:
        """``GET /v1/chunks``."""
        return json_answer(200, await self.chunks.listed(_salt_of(http)))

    async def get_chunk(self, http: HttpRequest) -> Any:
        """``GET /v1/chunks/{id}``."""
        return json_answer(200, await self.chunks.get(http.path_params["chunk"], _salt_of(http)))

    async def delete_chunk(self, http: HttpRequest) -> Any:
        """``DELETE /v1/chunks/{id}``."""
        return json_answer(200, await self.chunks.delete(http.path_params["chunk"], _salt_of(http)))

    async def pin_chunk(self, http: HttpRequest) -> Any:
        """``POST /v1/chunks/{id}/pin``."""
        request = await self.request(http, PinRequest)
        salt = caller_of(http).salt(request.cache_salt)
        work = self.chunks.pin(http.path_params["chunk"], request.pinned, salt)
        return json_answer(200, await guarded(http.receive, None, work))

    # ---- tokens ----

    async def tokenize(self, http: HttpRequest) -> Any:
        """``POST /tokenize``."""
        return json_answer(200, await tokens.tokenize(self.service, await self.request(http, TokenizeRequest)))

    async def detokenize(self, http: HttpRequest) -> Any:
        """``POST /detokenize``."""
        return json_answer(200, tokens.detokenize(self.service, await self.request(http, DetokenizeRequest)))

    async def tokenizer_info(self, http: HttpRequest) -> Any:
        """``GET /tokenizer_info``."""
        return json_answer(200, tokens.tokenizer_info(self.service))

    # ---- state ----

    async def openapi(self, http: HttpRequest) -> Any:
        """``GET /openapi.json``."""
        return json_answer(200, openapi.document(self.service))

    async def health(self, http: HttpRequest) -> Any:
        """``GET /health``: whether the process can serve at all."""
        return json_answer(200, {"status": "ok"})

    async def ready(self, http: HttpRequest) -> Any:
        """``GET /ready``: whether new requests are taken."""
        if self.service.draining:
            raise self.service.busy()
        return json_answer(200, {"status": "ready"})

    async def metrics(self, http: HttpRequest) -> Any:
        """``GET /metrics``, for Prometheus."""
        return plain_answer(200, self.service.metrics.render(), {"content-type": CONTENT_TYPE})

    async def page(self, http: HttpRequest) -> Any:
        """``GET /``: the page."""
        body, headers = page.page()
        return plain_answer(200, body, headers)

    async def state(self, http: HttpRequest) -> Any:
        """``GET /state``: what the page shows."""
        return json_answer(200, page.state(self.service.engine, self.service.live, self.service.name))


@contextmanager
def _renamed(dialect: Any) -> Iterator[None]:
    """Errors of the translated request in terms of the one that was sent."""
    try:
        yield
    except ApiError as error:
        raise dialect.error_from_chat(error) from None


def caller_of(http: HttpRequest) -> Caller:
    """Who sent a request."""
    caller: Caller = http.scope["nanobraid"]
    return caller


def _salt_of(http: HttpRequest) -> str:
    return caller_of(http).salt(http.query_params.get("cache_salt"))


def _http_error(http: HttpRequest, error: Exception) -> Any:
    status = error.status_code if isinstance(error, HTTPException) else 500
    answer = {404: errors.not_found, 405: errors.method_not_allowed}.get(status, errors.internal)()
    return error_answer(answer, http.url.path)


def _api_error(http: HttpRequest, error: Exception) -> Any:
    return error_answer(error_of(error), http.url.path)


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """The answer to nobody."""


def create_app(
    engine: AsyncEngine,
    settings: Settings | None = None,
    *,
    model: str = DEFAULT_MODEL,
    allowed_hosts: frozenset[str] | None = None,
) -> Edge:
    """Returns the ASGI application that serves an engine.

    Args:
        engine: The engine. Whoever made it closes it.
        settings: Options.
        model: What the model was called when it was loaded, from which its public name is made.
        allowed_hosts: As for `Edge`.
    """
    service = Service(engine, settings or Settings(), model)
    api = Api(service)
    handlers: dict[Any, Callable[[HttpRequest, Exception], Any] | Callable[..., Awaitable[Any]]] = {
        HTTPException: _http_error,
        Exception: _api_error,
        ClientGone: lambda http, error: _nothing,
    }
    app = Starlette(routes=api.routes())
    app.router.redirect_slashes = False
    app.middleware_stack = ExceptionMiddleware(app.router, handlers)  # without the one that says 500 in plain text
    patterns = {route.endpoint: route.path_format for route in app.routes if isinstance(route, Route)}
    return Edge(app, service, allowed_hosts, patterns)
