"""OpenTelemetry traces, off by default: one trace for each request, sent over OTLP.

The spans of a request: the request itself; `job`, from the queue to its last image, and below it `queue`,
`text` (context and initial latents), `denoise` and `decode`, as the worker measured them; `encode`, of the
files. The worker sends no spans. Nothing of OpenTelemetry is imported unless traces are on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from starlette.types import Scope

from service.engine.events import Done
from service.engine.job import Job
from service.logs import trace_id
from service.settings import SettingError, Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

UNTRACED = ("/health", "/metrics", "/page/")  # beginnings of paths that clients poll


class RequestTrace(Protocol):
    """The span of one request."""

    @property
    def header(self) -> tuple[bytes, bytes]:
        """The response header `traceresponse`, with the ids of trace and span as in W3C Trace Context."""

    def end(self, route: str | None, status: int) -> None:
        """Name the span by its route, and record the status of the response."""


class Tracing(Protocol):
    """Spans, or nothing."""

    def request(self, scope: Scope) -> AbstractContextManager[RequestTrace | None]:
        """The span of a request, within the trace that the header `traceparent` names; None without one."""

    def job(self, job: Job) -> AbstractContextManager[None]:
        """The span of a job."""

    def parts(self, job: Job, done: Done) -> None:
        """The spans of the parts of the job that has finished just now, below that of the job."""

    def encode(self, images: int) -> AbstractContextManager[None]:
        """The span of the encoding of files."""

    def shut_down(self) -> None:
        """Send the spans that were not sent yet."""


class NoTracing:
    """Traces are off."""

    def request(self, scope: Scope) -> AbstractContextManager[None]:
        return nullcontext()

    def job(self, job: Job) -> AbstractContextManager[None]:
        return nullcontext()

    def parts(self, job: Job, done: Done) -> None:
        pass

    def encode(self, images: int) -> AbstractContextManager[None]:
        return nullcontext()

    def shut_down(self) -> None:
        pass


class OtelRequestTrace:
    """See RequestTrace."""

    def __init__(self, span: Span, method: str) -> None:
        self.span = span
        self.method = method

    @property
    def header(self) -> tuple[bytes, bytes]:
        ids = self.span.get_span_context()
        text = f"00-{ids.trace_id:032x}-{ids.span_id:016x}-{int(ids.trace_flags):02x}"
        return b"traceresponse", text.encode()

    def end(self, route: str | None, status: int) -> None:
        from opentelemetry.trace import StatusCode

        if route:
            self.span.update_name(f"{self.method} {route}")
            self.span.set_attribute("http.route", route)
        self.span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self.span.set_status(StatusCode.ERROR)


class OtelTracing:
    """See Tracing. The variables OTEL_* of the SDK apply: sampling, resource attributes, limits."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("ldm")

    @contextmanager
    def request(self, scope: Scope) -> Iterator[RequestTrace | None]:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if scope["path"].removeprefix(scope.get("root_path", "")).startswith(UNTRACED):
            yield None
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent, method = TraceContextTextMapPropagator().extract(headers), scope["method"]
        attributes = {"http.request.method": method}
        with self.tracer.start_as_current_span(
            method, parent, kind=SpanKind.SERVER, attributes=attributes
        ) as span:
            token = trace_id.set(f"{span.get_span_context().trace_id:032x}")
            try:
                yield OtelRequestTrace(span, method)
            finally:
                trace_id.reset(token)

    @contextmanager
    def job(self, job: Job) -> Iterator[None]:
        attributes: dict[str, str | int] = {
            "ldm.job": job.id,
            "ldm.model": job.model,
            "ldm.images": job.n,
            "ldm.steps": job.steps,
            "ldm.sampler": job.sampler,
            "ldm.width": job.width,
            "ldm.height": job.height,
        }
        with self.tracer.start_as_current_span("job", attributes=attributes):
            yield

    def parts(self, job: Job, done: Done) -> None:
        now = time.time_ns()
        seconds = {
            "queue": done.queue,
            "text": done.start,
            "denoise": done.denoise - done.start,
            "decode": done.decode,
        }
        begin = now - int(sum(seconds.values()) * 1e9)
        for name, duration in seconds.items():
            end = begin + int(max(duration, 0.0) * 1e9)
            attributes = {"ldm.steps": job.steps, "ldm.images": job.n} if name == "denoise" else None
            self.tracer.start_span(name, start_time=begin, attributes=attributes).end(end)
            begin = end

    @contextmanager
    def encode(self, images: int) -> Iterator[None]:
        with self.tracer.start_as_current_span("encode", attributes={"ldm.images": images}):
            yield

    def shut_down(self) -> None:
        self.provider.shutdown()


def open_tracing(settings: Settings) -> Tracing:
    """Traces to the endpoint of the settings, if there is one. Raises SettingError without the packages."""
    if not settings.trace_endpoint:
        return NoTracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SettingError("trace_endpoint needs OpenTelemetry: pip install '.[tracing]'") from None
    resource = Resource.create({"service.name": "ldm"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=settings.trace_endpoint.rstrip("/") + "/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OtelTracing(provider)
