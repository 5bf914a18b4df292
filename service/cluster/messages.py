"""What engine replicas send to API replicas, besides the progress and results of jobs."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Metric

from service.catalogue import Catalogue
from service.engine.events import LoadedModel, Stepped
from service.worker.backend import ReplicaState
from service.worker.protocol import Offer


@dataclass(frozen=True)
class EngineReport:
    """The state of an engine replica.

    loaded: the loaded models; families: the metrics of its worker; calls: the newest UNet calls, the oldest
    first; calls_made: the number of all calls so far.
    """

    replica: ReplicaState
    catalogue: Catalogue
    offer: Offer
    loaded: tuple[LoadedModel, ...]
    families: tuple[Metric, ...]
    calls: tuple[Stepped, ...]
    calls_made: int
