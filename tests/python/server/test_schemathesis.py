"""Requests made from our own OpenAPI document, right and wrong ones: never a 5xx, no answer that is not in it.

NANOBRAID_TEST_FULL=1 makes ten times as many.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from engine_threads import THREADS
from http_checks import check_envelope

import nanobraid as nb

schemathesis = pytest.importorskip("schemathesis")
jsonschema = pytest.importorskip("jsonschema")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

EXAMPLES = 120 if os.environ.get("NANOBRAID_TEST_FULL") == "1" else 12
# Of requests that the document allows, at least so many are served; other versions of hypothesis make others. It cannot
# say that names of tools differ, that a named tool is there, that no two messages of the assistant follow each other.
SHARE = 0.4


@pytest.fixture(scope="module")
def shared_server(model_path: Any) -> Iterator[Any]:
    """An engine of its own, because chunks stay in it."""
    from conftest import running

    options: dict[str, Any] = {"num_threads": THREADS, "max_model_len": 2048, "max_num_seqs": 4}
    with nb.LLM(model_path, **options) as llm, running(nb.AsyncEngine(llm)) as server:
        yield server


@pytest.fixture(scope="module")
def document(shared_server: Any) -> dict[str, Any]:
    response = shared_server.client.get("/openapi.json")
    assert response.status_code == 200
    made: dict[str, Any] = response.json()
    return made


def test_the_document_is_valid_and_complete(shared_server: Any, document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    schemathesis.openapi.from_dict(document).validate()
    broken = {**document, "paths": {"/x": {"get": {"responses": []}}}}
    with pytest.raises(ValueError, match="is not of type"):
        schemathesis.openapi.from_dict(broken).validate()
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    known = {(path, method) for path, methods in document["paths"].items() for method in methods}
    undocumented = {"/", "/v1/embeddings", "/openapi.json"}
    for route in shared_server.app._app.routes:
        if route.path in undocumented:
            continue
        for method in route.methods - {"HEAD"}:
            assert (route.path.replace(":path}", "}"), method.lower()) in known, route.path


def _cheap(document: dict[str, Any]) -> dict[str, Any]:
    """The document with limits under which a thousand requests take seconds, all within the server's."""
    made = copy.deepcopy(document)
    limits = {"ResponsesRequest": "max_output_tokens"}
    for name in ("ChatRequest", "CompletionRequest", "RenderRequest", "ResponsesRequest", "MessagesRequest"):
        schema = made["components"]["schemas"][name]
        limit = limits.get(name, "max_tokens")
        schema["properties"][limit] = {"type": "integer", "minimum": 1, "maximum": 3}
        if "n" in schema["properties"]:
            schema["properties"]["n"] = {"type": "integer", "minimum": 1, "maximum": 2}
        schema["required"] = sorted({*schema.get("required", ()), limit})
        schema["properties"].pop("timeout_s", None)
        for fewer in ("min_tokens", "chunks"):  # at most max_tokens; chunks that exist
            if "anyOf" in schema["properties"].get(fewer, {}):
                schema["properties"][fewer] = {
                    "enum": [None, *([0, 1] if fewer == "min_tokens" else [[{"text": "It is."}]])]
                }
        schema["properties"].pop("max_completion_tokens", None)
        for choice in schema["properties"].get("tools", {}).get("anyOf", ()):
            choice["maxItems"] = 1
        if "messages" in schema["properties"]:
            schema["properties"]["messages"]["maxItems"] = 2
    return made


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/chat/completions/render"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/v1/chunks"),
    ("POST", "/v1/chunks"),
    ("GET", "/v1/chunks/{chunk}"),
    ("DELETE", "/v1/chunks/{chunk}"),
    ("POST", "/v1/chunks/{chunk}/pin"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("method, path", OPERATIONS)
def test_answers_are_those_of_the_document(
    shared_server: Any, document: dict[str, Any], method: str, path: str, mode: Any
) -> None:
    if mode is GenerationMode.NEGATIVE and method != "POST":
        pytest.skip("every text is a possible id")
    made = schemathesis.openapi.from_dict(_cheap(document))
    made.config.update(base_url=shared_server.url)
    operation = made[path][method]
    wanted = set(document["paths"][path][method.lower()]["responses"])
    counts = {"all": 0, "fine": 0}

    @seed(7)
    @settings(
        max_examples=EXAMPLES * 2 if mode is GenerationMode.POSITIVE else EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call(timeout=30)
        counts["all"] += 1
        counts["fine"] += response.status_code == 200
        assert response.status_code < 500, response.text
        if response.status_code in (404, 405) and "/{" not in path:
            return  # a request for something else
        assert str(response.status_code) in wanted | {"405"}, response.text
        if response.status_code != 200:
            if path.startswith("/v1/messages"):
                jsonschema.validate(response.json(), document["components"]["schemas"]["AnthropicError"])
            else:
                check_envelope(response.status_code, response.json())
            assert response.headers["x-request-id"]
        elif not response.headers["content-type"][0].startswith("text/event-stream"):
            case.validate_response(response, checks=[schemathesis.checks.CHECKS.get_one("response_schema_conformance")])

    check()
    assert counts["all"] >= EXAMPLES // 2
    print(method, path, counts)
    if mode is GenerationMode.POSITIVE and "{" not in path:
        assert counts["fine"] >= SHARE * counts["all"], f"the document allows too much that is refused: {counts}"
    stats = shared_server.engine.stats()
    assert stats["running"] == stats["waiting"] == 0


@pytest.mark.parametrize("last", [0, 7, 10, 99, 100, 49151])
def test_the_pattern_of_token_ids_ends_at_the_vocabulary(last: int) -> None:
    from nanobraid.server.openapi import _up_to

    for number in {*range(0, 200), last - 1, last, last + 1, 10 * last + 9, 99_999}:
        assert bool(re.match(_up_to(last), str(number))) == (0 <= number <= last), number


def test_numbers_without_a_fraction_are_integers(shared_server: Any) -> None:
    """As JSON Schema has it."""
    body = {"prompt": [504.0, 3575], "max_tokens": 2.0, "temperature": 0, "n": 1.0, "stop_token_ids": [5.0]}
    answer = shared_server.post("/v1/completions", body).json()
    assert answer["usage"]["completion_tokens"] == 2 and answer["usage"]["prompt_tokens"] == 2
    for wrong in (1.5, "2", True):
        for field in ("max_tokens", "n", "seed"):
            assert shared_server.post("/v1/completions", {**body, field: wrong}).status_code == 400
        assert shared_server.post("/v1/completions", {**body, "prompt": [504, wrong]}).status_code == 400
        assert shared_server.post("/v1/responses", {"input": "x", "max_output_tokens": wrong}).status_code == 400
    assert shared_server.post("/v1/responses", {"input": "x", "max_output_tokens": 1.0}).status_code == 200
