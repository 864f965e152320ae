"""What schemathesis can't know of this service: loaded by tests/e2e/test_openapi.py."""

import os

import schemathesis
from schemathesis import GenerationMode

# The bound of a batch; tests/e2e/test_openapi.py reads it in the source.
BATCH_MAX = int(os.environ["BATCH_MAX"])


@schemathesis.check
def valid_requests_are_served(ctx, response, case):
    """A request that the document allows is served, but for the two rules between parameters that OpenAPI can't state:
    raw keys have no count, and a batch has a bound of its own."""
    if case.meta is None or case.meta.generation.mode != GenerationMode.POSITIVE:
        return
    expected = 200
    count = case.query.get("count")
    if count is not None:
        if case.path == "/key/{length}" and case.query.get("format", "raw") == "raw":
            expected = 400
        elif int(case.path_parameters["length"]) * int(count) > BATCH_MAX:
            expected = 413
    if response.status_code != expected:
        raise AssertionError(f"expected {expected} for a valid request, found {response.status_code}")
    if expected == 200 and case.path == "/key/{length}" and case.method == "GET" and case.query.get("format", "raw") == "raw":
        length = int(case.path_parameters["length"])
        if len(response.content) != length:
            raise AssertionError(f"expected {length} bytes, found {len(response.content)}")
