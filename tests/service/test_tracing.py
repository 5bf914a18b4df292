"""Traces of requests, as an OTLP receiver gets them from a real server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.helpers.environment import ROOT
from tests.helpers.servers import wait_until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def receiver() -> Iterator[tuple[str, list[Span]]]:
    """The URL of an OTLP endpoint, and the spans that it has received."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.headers.get("content-encoding", "identity") == "identity"
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_request_is_one_trace_through_all_parts(start_server, tmp_path):
    log = tmp_path / "log"
    with (
        receiver() as (url, spans),
        log.open("w") as stderr,
        start_server(stderr=stderr, LDM_TRACE_ENDPOINT=url, OTEL_BSP_SCHEDULE_DELAY="100") as server,
    ):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = server.client.post("/generate", json={"prompt": "p", "steps": 4}, headers=headers)
        assert answer.status_code == 200
        wait_until(lambda: "POST /generate" in [span.name for span in spans])
        found = {span.name: span for span in spans if span.trace_id.hex() == TRACE}
        line = next(json.loads(line) for line in log.read_text().splitlines() if "POST /generate" in line)

    root, job = found["POST /generate"], found["job"]
    assert root.parent_span_id.hex() == PARENT
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{root.span_id.hex()}-01"
    assert line["trace_id"] == TRACE
    parts = [found[name] for name in ("queue", "text", "denoise", "decode")]
    assert {span.parent_span_id for span in parts} == {job.span_id}
    assert {job.parent_span_id, found["encode"].parent_span_id} == {root.span_id}
    moments = [moment for span in parts for moment in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert moments == sorted(moments)
    assert root.start_time_unix_nano <= job.start_time_unix_nano
    assert job.end_time_unix_nano <= found["encode"].start_time_unix_nano
    steps = {one.key: one.value.int_value for one in found["denoise"].attributes}
    assert steps["ldm.steps"] == 4
    assert not [span for span in spans if "health" in span.name]


def test_without_the_setting_nothing_of_opentelemetrys_sdk_is_imported():
    code = (
        "import sys; from service.api.app import create_app; from service.settings import Settings; "
        "create_app(Settings()); print([n for n in sys.modules if n.startswith('opentelemetry.sdk')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
