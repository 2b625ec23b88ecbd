"""The API against requests generated from its own OpenAPI description."""

from __future__ import annotations

from pathlib import Path

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from crosslayer.serve.app import create_app


def test_no_request_breaks_the_server(root: Path):
    app = create_app([root], hosts=["testserver"], port=80)
    operations = [found.ok() for found in schemathesis.openapi.from_asgi("/api/openapi.json", app).get_all_operations()]
    assert len(operations) > 20
    with TestClient(app, base_url="http://testserver") as client:
        real = {e["kind"]: e["id"] for e in client.get("/api/library").json()}
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def holds(case: schemathesis.Case) -> None:
            # A random id would only test the lookup.
            kind = next((k for k in real if case.path.startswith(f"/api/{k}s/")), None)
            if kind is not None:
                case.path_parameters["id"] = real[kind]
            case.call_and_validate(checks=[not_a_server_error])

        holds()
