"""Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)

from service.engine.events import Incident, Stage, Stepped
from service.engine.graph_counts import GraphCounts
from service.errors import TABLE

REFUSALS = tuple(code for status, _, code in TABLE.values() if status == 429)
# Upper bounds of the buckets of histograms.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one application. Their names and units are part of the service's interface."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no annotation here
        self.registry = CollectorRegistry()
        self.elsewhere: Sequence[Metric] = ()  # metrics of the same names in other processes
        self.labels: Mapping[str, str] = {}  # additional ones of the metrics of this process
        self.requests = self._counter("ldm_requests", "HTTP responses", "method", "route", "status")
        self.rejected = self._counter(
            "ldm_rejected", "Requests answered with an error, by its code", "reason"
        )
        self.cancelled = self._counter("ldm_cancelled", "Jobs cancelled, by stage (queued, running)", "stage")
        self.images = self._counter("ldm_images", "Images returned to clients")
        self.out_of_memory = self._counter(
            "ldm_out_of_memory",
            "Out-of-memory errors on the device by stage, also if a retry succeeded",
            "stage",
            "replica",
        )
        self.non_finite = self._counter(
            "ldm_non_finite",
            "NaN or Inf values detected by stage, also if a retry in float32 succeeded",
            "stage",
            "replica",
        )
        self.overflowed_models = self._counter(
            "ldm_overflowed_models",
            "Models that run in bfloat16 because they overflowed in float16",
            "replica",
        )
        self.key_requests = self._counter("ldm_key_requests", "Requests, by the name of their API key", "key")
        self.key_images = self._counter(
            "ldm_key_images", "Images returned to clients, by the name of the API key", "key"
        )
        self.key_steps = self._counter(
            "ldm_key_steps", "Steps of images (UNet evaluations), by the name of the API key", "key"
        )
        self.key_device_seconds = self._counter(
            "ldm_key_device_seconds",
            "Seconds of UNet calls, shared by rows, by the name of the API key",
            "key",
        )
        self.key_refused = self._counter(
            "ldm_key_refused",
            "Requests refused with a 429, by the name of the API key and the code",
            "key",
            "reason",
        )
        self._key_names: set[str] = set()
        self.network_calls = self._counter(
            "ldm_network_calls",
            "Calls of networks on CUDA: direct, replayed from a CUDA graph, recorded as one, or failed to be",
            "how",
            "replica",
        )
        self.graphs_dropped = self._counter(
            "ldm_graphs_dropped", "CUDA graphs that were dropped for others, or with their model", "replica"
        )
        self.graph_bytes = self._gauge("ldm_graph_bytes", "Device memory that CUDA graphs occupy", "replica")
        self.worker_restarts = self._counter("ldm_worker_restarts", "Worker processes that exited", "replica")
        self.unreadable_messages = self._counter(
            "ldm_unreadable_messages", "Messages between API process and worker that could not be decoded"
        )
        self.job_store_errors = self._counter(
            "ldm_job_store_errors", "Failed calls of the shared job store (setting job_store)"
        )
        self.webhooks = self._counter(
            "ldm_webhooks", "Webhooks of ended jobs, by outcome (delivered, failed)", "outcome"
        )
        self.webhook_retries = self._counter(
            "ldm_webhook_retries", "Further attempts to deliver a webhook after a failed one"
        )
        self.webhooks_pending = self._gauge("ldm_webhooks_pending", "Webhooks that are being delivered")
        self.jobs_running = self._gauge("ldm_jobs_running", "Jobs that have started")
        self.jobs_waiting = self._gauge("ldm_jobs_waiting", "Jobs in the queue that have not started")
        self.queue_size = self._gauge(
            "ldm_queue_size", "Limit of jobs accepted and not yet answered (setting queue_size)"
        )
        self.ready = self._gauge("ldm_ready", "1 if a model is loaded and the service is not shutting down")
        self.device_memory = self._gauge(
            "ldm_device_memory_bytes",
            "Device memory used by the worker (used) and available (total)",
            "kind",
            "replica",
        )
        self.replica_ready = self._gauge("ldm_replica_ready", "1 if the replica takes jobs", "replica")
        self.replica_jobs = self._gauge(
            "ldm_replica_jobs", "Jobs that the replica runs or that wait for it", "replica"
        )
        self.start_seconds = self._gauge(
            "ldm_start_seconds",
            "Duration of the worker's last start, by part and in total",
            "part",
            "replica",
        )
        self.unet_rows = self._histogram(
            "ldm_unet_rows", "Rows of a UNet call without padding", ROWS, "replica"
        )
        self.padded_rows = self._counter(
            "ldm_unet_padded_rows", "Padding rows added to UNet calls", "replica"
        )
        self.step_seconds = self._histogram("ldm_step_seconds", "Duration of a UNet call", SECONDS, "replica")
        self.decode_seconds = self._histogram(
            "ldm_decode_seconds", "Duration of the VAE decoding of an image or tile", SECONDS, "replica"
        )
        self.part_seconds = self._histogram(
            "ldm_request_seconds",
            "Duration of a request by part (queue, denoise, decode, total)",
            SECONDS,
            "part",
        )
        self._create_series()

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(name, documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, documentation, labels, buckets=buckets, registry=self.registry)

    def _create_series(self) -> None:
        """Start every series at 0: rate() in Prometheus needs a sample before the first event."""
        for stage in ("queued", "running"):
            self.cancelled.labels(stage)
        for outcome in ("delivered", "failed"):
            self.webhooks.labels(outcome)
        for _, _, code in TABLE.values():
            self.rejected.labels(code)

    def add_replica(self, replica: str) -> None:
        """Start every series of a replica at 0."""
        self.worker_restarts.labels(replica)
        self.overflowed_models.labels(replica)
        self.count_graphs(replica, GraphCounts(), GraphCounts())
        self.padded_rows.labels(replica)
        for histogram in (self.unet_rows, self.step_seconds, self.decode_seconds):
            histogram.labels(replica)
        for stage in get_args(Stage):
            self.out_of_memory.labels(stage, replica)
            self.non_finite.labels(stage, replica)

    def set_keys(self, names: set[str]) -> None:
        """Start every series of the keys with these names at 0, and forget those of all others."""
        counters = self.key_requests, self.key_images, self.key_steps, self.key_device_seconds
        for name in self._key_names - names:
            for counter in counters:
                counter.remove(name)
            for code in REFUSALS:
                self.key_refused.remove(name, code)
        for name in names:
            for counter in counters:
                counter.labels(name)
            for code in REFUSALS:
                self.key_refused.labels(name, code)
        self._key_names = set(names)

    def refused(self, key: str, code: str) -> None:
        """Count a request of a key that was refused with a 429."""
        if key in self._key_names:  # not if it was revoked just now
            self.key_refused.labels(key, code).inc()

    def used(self, key: str, images: int, steps: int, device_seconds: float) -> None:
        """Count what a job of a key has used."""
        if key in self._key_names:
            self.key_images.labels(key).inc(images)
            self.key_steps.labels(key).inc(steps)
            self.key_device_seconds.labels(key).inc(device_seconds)

    def stepped(self, replica: str, event: Stepped) -> None:
        """Count one UNet call."""
        self.unet_rows.labels(replica).observe(event.rows)
        self.padded_rows.labels(replica).inc(event.padded - event.rows)
        self.step_seconds.labels(replica).observe(event.seconds)

    def count_incident(self, replica: str, incident: Incident) -> None:
        """Count a failure in the worker, recovered or not."""
        counter = self.out_of_memory if incident.kind == "out_of_memory" else self.non_finite
        counter.labels(incident.stage, replica).inc()

    def count_graphs(self, replica: str, now: GraphCounts, before: GraphCounts) -> None:
        """Count the network calls of a worker since an earlier report of it."""
        for how in ("direct", "replayed", "recorded", "failed"):
            self.network_calls.labels(how, replica).inc(getattr(now, how) - getattr(before, how))
        self.graphs_dropped.labels(replica).inc(now.dropped - before.dropped)
        self.graph_bytes.labels(replica).set(now.bytes)

    def started(self, replica: str, total: float, parts: Mapping[str, float], memory: int) -> None:
        """Record a worker's start: its seconds in total and by part, and the bytes of the device's memory."""
        self.device_memory.labels("total", replica).set(memory)
        for part, seconds in {**parts, "total": total}.items():
            self.start_seconds.labels(part, replica).set(seconds)

    def answered(self, images: int, timings: Mapping[str, float]) -> None:
        """Count an answered job; `timings` in seconds."""
        self.images.inc(images)
        for part, seconds in timings.items():
            self.part_seconds.labels(part).observe(seconds)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """The metrics of this process, with the samples of those in other processes."""
        for family in self.registry.collect():
            if self.labels:
                family.samples = [
                    sample._replace(labels={**sample.labels, **self.labels}) for sample in family.samples
                ]
            family.samples += [
                sample for other in self.elsewhere if other.name == family.name for sample in other.samples
            ]
            yield family
