"""Counters and histograms, in a registry of each app's own."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from service.engine.events import Incident, Stepped
from service.errors import TABLE

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What the service counts; names and units are those of the Prometheus text."""

    def __init__(self) -> None:
        disable_created_metrics()  # a line more for each, that no chart shows
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "ldm_requests", "Answers, by route", ["method", "route", "status"], registry=r
        )
        self.rejected = Counter("ldm_rejected", "Requests refused, by reason", ["reason"], registry=r)
        self.cancelled = Counter("ldm_cancelled", "Jobs given up, by stage", ["stage"], registry=r)
        self.images = Counter("ldm_images", "Pictures answered", registry=r)
        self.out_of_memory = Counter(
            "ldm_out_of_memory", "Times that memory ran out, mended or not, by stage", ["stage"], registry=r
        )
        self.non_finite = Counter(
            "ldm_non_finite", "Times that numbers were none, mended or not, by stage", ["stage"], registry=r
        )
        self.worker_restarts = Counter("ldm_worker_restarts", "Workers that ended", registry=r)
        self.unreadable_messages = Counter(
            "ldm_unreadable_messages",
            "Unreadable messages to or from the worker",
            registry=r,
        )
        self.jobs_running = Gauge("ldm_jobs_running", "Jobs that have begun", registry=r)
        self.jobs_waiting = Gauge("ldm_jobs_waiting", "Jobs accepted and not begun", registry=r)
        self.queue_size = Gauge("ldm_queue_size", "Jobs that may be accepted and not answered", registry=r)
        self.ready = Gauge("ldm_ready", "1 where a model is loaded and nothing drains", registry=r)
        self.device_memory = Gauge(
            "ldm_device_memory_bytes", "Of the device: used by the worker, and in total", ["kind"], registry=r
        )
        self.start_seconds = Gauge(
            "ldm_start_seconds", "Of the worker's last start: parts, and total", ["part"], registry=r
        )
        self.unet_rows = Histogram("ldm_unet_rows", "Rows of a UNet call", buckets=ROWS, registry=r)
        self.padded_rows = Counter("ldm_unet_padded_rows", "Rows run only to fill a bucket", registry=r)
        self.step_seconds = Histogram("ldm_step_seconds", "One UNet call", buckets=SECONDS, registry=r)
        self.decode_seconds = Histogram("ldm_decode_seconds", "D, a picture", buckets=SECONDS, registry=r)
        self.part_seconds = Histogram(
            "ldm_request_seconds", "Parts of a request: queue, denoise, decode, total", ["part"],
            buckets=SECONDS, registry=r,
        )  # fmt: skip

        for stage in ("load", "start", "step", "decode"):  # a rate needs the zero before the first
            self.out_of_memory.labels(stage)
            self.non_finite.labels(stage)
        for stage in ("queued", "running"):
            self.cancelled.labels(stage)
        for _, _, code in TABLE.values():
            self.rejected.labels(code)

    def stepped(self, event: Stepped) -> None:
        """Count one UNet call."""
        self.unet_rows.observe(event.rows)
        self.padded_rows.inc(event.padded - event.rows)
        self.step_seconds.observe(event.seconds)

    def count_incident(self, incident: Incident) -> None:
        """Count what went wrong in the worker."""
        counter = self.out_of_memory if incident.kind == "out_of_memory" else self.non_finite
        counter.labels(incident.stage).inc()

    def started(self, total: float, parts: Mapping[str, float], memory: int) -> None:
        """Note a start that took so many seconds; memory: bytes of the device."""
        self.device_memory.labels("total").set(memory)
        for part, seconds in (parts | {"total": total}).items():
            self.start_seconds.labels(part).set(seconds)

    def answered(self, images: int, timings: dict[str, float]) -> None:
        """Count one job that was answered; timings in seconds."""
        self.images.inc(images)
        for part, seconds in timings.items():
            self.part_seconds.labels(part).observe(seconds)

    def text(self) -> bytes:
        """The Prometheus text."""
        return generate_latest(self.registry)
