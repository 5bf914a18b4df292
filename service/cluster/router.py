"""Which engine replica gets a job: for Ray Serve, whose router knows how many jobs each replica has.

Ray copies this module into other processes, so it must not import much.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from service.engine.job import Job, ModelKey


class HoldingRouter(RequestRouter):
    """Prefers replicas that hold a job's model and LoRAs, as long as they have fewer than `enough` jobs.

    Ray sends the job to the replica with the fewest jobs of the first rank in which one has room.
    """

    def initialize_state(self, *, enough: int) -> None:  # type: ignore[override]  # Ray passes it by name
        """enough: jobs that a replica can run in one UNet call."""
        self.enough = enough

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in the order of preference."""
        job = pending_request.args[0] if pending_request and pending_request.args else None
        if not isinstance(job, Job):
            return [candidate_replicas]
        free = [replica for replica in candidate_replicas if self._jobs_at(replica) < self.enough]
        return [*by_what_they_hold(free, job.model_key), candidate_replicas]

    def _jobs_at(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def by_what_they_hold(replicas: Collection[RunningReplica], key: ModelKey) -> list[list[RunningReplica]]:
    """Ranks: those with the model and its LoRAs, those with the model, then the others.

    Of the others, one is the first for each model, so that simultaneous jobs load it once.
    """
    wanted = (str(key), str(ModelKey(key.model)))
    ranks: list[list[RunningReplica]] = [[], [], []]
    for replica in replicas:
        holds = replica.routing_stats.get("holds", ())
        ranks[next((rank for rank, name in enumerate(wanted) if name in holds), 2)].append(replica)
    others = sorted(
        ranks.pop(), key=lambda replica: sha256(f"{key.model} {replica.replica_id}".encode()).digest()
    )
    return [*ranks, others[:1], others[1:]]
