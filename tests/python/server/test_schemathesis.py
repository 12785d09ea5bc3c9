"""Requests made from our own OpenAPI document, right and wrong ones: never a 5xx, no answer that is not in it.

NANOBRAID_TEST_FULL=1 makes ten times as many.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
from engine_threads import THREADS
from http_checks import check_envelope

import nanobraid as nb

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

EXAMPLES = 120 if os.environ.get("NANOBRAID_TEST_FULL") == "1" else 12


@pytest.fixture(scope="module")
def shared_server(model_path: Any) -> Iterator[Any]:
    """An engine of its own, because chunks stay in it."""
    from conftest import running

    options: dict[str, Any] = {"num_threads": THREADS, "max_model_len": 256, "max_num_seqs": 4}
    with nb.LLM(model_path, **options) as llm, running(nb.AsyncEngine(llm)) as server:
        yield server


@pytest.fixture(scope="module")
def document(shared_server: Any) -> dict[str, Any]:
    response = shared_server.client.get("/openapi.json")
    assert response.status_code == 200
    made: dict[str, Any] = response.json()
    return made


def test_the_document_is_valid_and_complete(shared_server: Any, document: dict[str, Any]) -> None:
    import jsonschema

    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    known = {(path, method) for path, methods in document["paths"].items() for method in methods}
    undocumented = {"/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/metrics"}
    undocumented |= {"/", "/state", "/openapi.json"}
    for route in shared_server.app._app.routes:
        if route.path in undocumented:
            continue
        for method in route.methods - {"HEAD"}:
            assert (route.path.replace(":path}", "}"), method.lower()) in known, route.path


def _cheap(document: dict[str, Any]) -> dict[str, Any]:
    """The document with limits under which a thousand requests take seconds, all within the server's."""
    made = copy.deepcopy(document)
    for name in ("ChatRequest", "CompletionRequest", "RenderRequest"):
        schema = made["components"]["schemas"][name]
        schema["properties"]["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": 3}
        schema["properties"]["n"] = {"type": "integer", "minimum": 1, "maximum": 2}
        schema["required"] = [*schema.get("required", ()), "max_tokens"]
        schema["properties"].pop("timeout_s", None)
        schema["properties"].pop("max_completion_tokens", None)
        if "messages" in schema["properties"]:
            schema["properties"]["messages"]["maxItems"] = 3
    return made


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/chat/completions/render"),
    ("POST", "/v1/completions"),
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
        max_examples=EXAMPLES,
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
            check_envelope(response.status_code, response.json())
            assert response.headers["x-request-id"]
        elif not response.headers["content-type"][0].startswith("text/event-stream"):
            case.validate_response(response, checks=[schemathesis.checks.CHECKS.get_one("response_schema_conformance")])

    check()
    assert counts["all"] >= EXAMPLES // 2
    print(method, path, counts)
    if mode is GenerationMode.POSITIVE and path in ("/v1/chat/completions/render", "/detokenize", "/tokenize"):
        assert counts["fine"] > 0, counts
    stats = shared_server.engine.stats()
    assert stats["running"] == stats["waiting"] == 0
