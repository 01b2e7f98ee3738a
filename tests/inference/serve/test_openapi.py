"""`/openapi.json`, and schemathesis: requests made of it, good and bad, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from inference.engine.load import load_engine
from inference.serve.limits import Limits
from tests.inference.serve.serving import Running, serving
from tests.waiting import PATIENCE

EXAMPLES = {"GET": 2, "POST": 15}  # of a route


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    engine = load_engine(tiny, device="cpu", window=8, max_tokens=256, max_sessions=2)
    with serving(engine, Limits(clip_wall=5.0, max_tokens=8), stage="sft") as running:
        yield running


CHECKED = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def statuses(operation: Any, server: Running) -> set[int]:
    """Of the answers to requests that are made for a route, each of them checked."""
    seen = set()

    @settings(
        max_examples=EXAMPLES[operation.method.upper()], deadline=None, database=None,
        derandomize=True, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        answer = case.call(base_url=server.http, timeout=PATIENCE)
        seen.add(answer.status_code)
        case.validate_response(answer, checks=CHECKED)

    check()
    return seen


def test_requests_of_the_document_get_what_it_says(server: Running) -> None:
    """No 5xx, no status, type or body that the document does not have."""
    document = server.get("/openapi.json").json()
    found: list[Any] = list(schemathesis.openapi.from_dict(document).get_all_operations())
    seen = {one.ok().label: statuses(one.ok(), server) for one in found}
    assert seen["POST /v1/chat/completions"] >= {200, 400}
    assert seen["GET /v1/models/{model}"] == {404}
    assert {label.split()[1] for label in seen} == set(document["paths"])
    server.wait(0)
