"""Requests generated from our own OpenAPI document: every operation answers as it says, never with an error of ours."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from .conftest import Server, running, write_models

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
    checks.negative_data_rejection,
]
KNOWN = {"model": "linear", "version": "10"}
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose models may be loaded and unloaded."""
    folder = tmp_path_factory.mktemp("own")
    with running(write_models(folder / "models"), folder / "log") as server:
        yield server
        log = server.log.read_text()
        assert "internal error" not in log and "Traceback" not in log and "Duplicate Operation ID" not in log
        assert server.process.poll() is None


def test_every_operation_answers_as_it_says(own_server: Server) -> None:
    document = schemathesis.openapi.from_url(f"{own_server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:

        @EXAMPLES
        @given(
            case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)),
            named=st.booleans(),
        )
        def ask(case: schemathesis.Case, named: bool) -> None:
            if named:  # else hardly any request would reach a model
                case.path_parameters |= {k: v for k, v in KNOWN.items() if k in case.path_parameters}
                if isinstance(case.body, dict) and "features" in case.body:
                    case.body |= {"model": KNOWN["model"], "version": None}
            response = case.call(timeout=20)
            case.validate_response(response, checks=CHECKS)
            if response.status_code >= 400:
                assert list(response.json()) == ["error"], response.text

        ask()
