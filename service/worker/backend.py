"""What an API process needs of that which runs its jobs: a supervisor on this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from models.spec import ModelSpec
from service.engine.events import Done
from service.engine.job import Job
from service.keys.client import ANYBODY, Client
from service.metrics import Metrics
from service.settings import Settings
from service.worker.call_log import CallLog
from service.worker.model_table import ModelTable
from service.worker.progress import Progress

Status = Literal["ok", "loading", "failed"]


@dataclass(frozen=True)
class ReplicaState:
    """A replica as /health shows it. jobs: that it runs or that wait for it."""

    number: int
    device: str
    status: Status
    jobs: int


class Backend(Protocol):
    """Runs jobs at replicas: worker.supervisor.Supervisor, or cluster.backend.ClusterBackend.

    calls: the most recent UNet calls; draining: whether no more requests are accepted.
    """

    settings: Settings
    metrics: Metrics
    calls: CallLog
    models: ModelTable
    draining: bool

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """Name -> spec of every model that requests can use."""

    @property
    def slots_in_use(self) -> int:
        """The number of open requests."""

    @property
    def ready(self) -> bool:
        """Whether requests are accepted and will be run."""

    @property
    def running(self) -> int:
        """The number of jobs that have started."""

    @property
    def alive(self) -> bool:
        """Whether the service can serve, now or after a restart of workers."""

    @property
    def replica_states(self) -> Sequence[ReplicaState]:
        """All replicas."""

    def check_open(self) -> None:
        """Raise Draining, Loading or Unavailable if no request can be accepted now."""

    def reserve_slot(self, client: Client = ANYBODY) -> AbstractContextManager[None]:
        """Hold a slot of the queue until the context ends. Raises QueueFull, or as check_open() does."""

    async def run(self, job: Job, progress: Progress | None = None) -> Done:
        """Run a job. Cancelling this coroutine cancels the job.

        progress: updated while the job runs. Raises the ServiceError that the job failed with, and ValueError
        if an unanswered job has the same id.
        """

    def interrupt(self, job_id: str) -> None:
        """End a running job early, with its images as they are; other jobs are left alone."""

    async def rescan(self) -> None:
        """Read the folders of models again; returns when every worker serves what is there.

        Raises DeadlineExceeded.
        """

    async def set_loaded(self, model: str, load: bool) -> None:
        """Load a model at every replica, or unload it where no job uses it any more.

        Raises NotFound, the error that loading failed with, and ModelInUse for a model that was in use until
        the timeout.
        """

    def supervise(self) -> AbstractAsyncContextManager[None]:
        """Keep the replicas running, or in touch with them, for as long as the context lasts."""
