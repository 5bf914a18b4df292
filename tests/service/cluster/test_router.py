"""Which engine replicas come first for a job."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.cluster.router import by_what_they_hold
from service.engine.job import LoraWeights, ModelKey

PLAIN = ModelKey("a")
INKED = ModelKey("a", (LoraWeights("ink", 1.0, 1.0),))


@dataclass
class FakeReplica:
    """A replica as Ray's router sees it."""

    replica_id: str
    routing_stats: dict = field(default_factory=dict)


def replica(name: str, *keys: ModelKey) -> FakeReplica:
    return FakeReplica(name, {"holds": [str(key) for key in keys]})


def names(ranks: list[list[FakeReplica]]) -> list[list[str]]:
    return [[one.replica_id for one in rank] for rank in ranks if rank]


def test_replicas_with_the_model_and_its_loras_come_before_those_with_the_model():
    all_three = [replica("none"), replica("model", PLAIN), replica("both", PLAIN, INKED)]
    assert names(by_what_they_hold(all_three, INKED)) == [["both"], ["model"], ["none"]]
    assert names(by_what_they_hold(all_three, PLAIN)) == [["model", "both"], ["none"]]


def test_jobs_of_a_model_that_no_replica_holds_go_to_one_replica_first():
    replicas = [replica(name) for name in "pqrs"]
    first = by_what_they_hold(replicas, PLAIN)
    again = by_what_they_hold(replicas[::-1], PLAIN)
    assert names(first)[0] == names(again)[0]
    assert [len(rank) for rank in names(first)] == [1, 3]
    firsts = {names(by_what_they_hold(replicas, ModelKey(f"m{i}")))[0][0] for i in range(20)}
    assert len(firsts) > 1, "different models go to different replicas"


def test_a_replica_that_has_not_reported_holds_nothing():
    assert names(by_what_they_hold([FakeReplica("new"), replica("old", PLAIN)], PLAIN)) == [["old"], ["new"]]
