"""Prometheus metrics."""

from __future__ import annotations

import pytest
from prometheus_client.metrics import MetricWrapperBase

from service.engine.graph_counts import NO_GRAPHS, GraphCounts
from service.metrics import Metrics
from tests.helpers.environment import ROOT

METRICS = [metric for metric in vars(Metrics()).values() if isinstance(metric, MetricWrapperBase)]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric._name)
def test_the_readme_describes_every_metric(metric: MetricWrapperBase):
    (family,) = metric.describe()
    name = family.name + ("_total" if family.type == "counter" else "")
    labels = ", ".join(f"`{label}`" for label in metric._labelnames) or "none"
    row = f"| `{name}` | {family.type} | {labels} | {family.documentation} |"
    assert row in (ROOT / "service/README.md").read_text().splitlines()


def test_a_counter_has_a_zero_before_its_first_event():
    metrics = Metrics()
    metrics.add_replica("0")
    value = metrics.registry.get_sample_value
    assert value("ldm_rejected_total", {"reason": "queue_full"}) == 0
    assert value("ldm_non_finite_total", {"stage": "step", "replica": "0"}) == 0


def test_samples_of_other_processes_are_shown_beside_those_of_this_one():
    here, there = Metrics(), Metrics()
    here.labels = {"api_replica": "0"}
    there.add_replica("7")
    here.elsewhere = [family for family in there.registry.collect() if family.name == "ldm_worker_restarts"]
    lines = here.text().decode().splitlines()
    assert 'ldm_worker_restarts_total{replica="7"} 0.0' in lines
    assert 'ldm_images_total{api_replica="0"} 0.0' in lines
    assert len([line for line in lines if line.startswith("# TYPE ldm_worker_restarts_total")]) == 1


def test_network_calls_of_a_worker_are_counted_on_by_the_next_one():
    metrics = Metrics()
    metrics.add_replica("0")
    first, later = GraphCounts(direct=3, replayed=1), GraphCounts(direct=4, replayed=9, dropped=1, bytes=7)
    metrics.count_graphs("0", first, NO_GRAPHS)
    metrics.count_graphs("0", later, first)
    metrics.count_graphs("0", first, NO_GRAPHS)  # of another worker
    value = metrics.registry.get_sample_value
    calls = [value("ldm_network_calls_total", {"how": how, "replica": "0"}) for how in ("direct", "replayed")]
    assert calls == [7, 10]
    assert value("ldm_graphs_dropped_total", {"replica": "0"}) == 1
    assert value("ldm_graph_bytes", {"replica": "0"}) == 0
