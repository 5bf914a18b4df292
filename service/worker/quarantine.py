"""The rule by which the service finds out which job makes the workers die. No clocks, no processes.

There is a worker for each replica, and each has its own jobs. A worker's end has a cause:

- "crash": it exited or was ended by a signal of its own making (SIGSEGV, SIGABRT, ...), it stalled, or the
  kernel recorded that it killed a process because memory ran out.
- "kill": a signal such as SIGKILL, which an operator, a container runtime or the kernel may have sent.

The rule:

1. **Suspects.** A job is a suspect after 2 ends of workers in which it had started. An end before it had
   started counts half, or fully if no job had started. A suspect runs alone; nothing else follows from it.
2. **A fair chance.** A suspect is sent only to a worker that has been ready for the job's quiet time, 1 s at
   first. Other jobs run meanwhile, and have finished before the suspect is sent. So workers that are killed
   right after they became ready say nothing about any suspect.
3. **Evidence** is only the end of a worker in which the job was alone.
   - A crash always counts. A job is refused after 2.
   - A kill counts if the job was a suspect, so had its fair chance. The job's next quiet time is half as long
     again as the killed worker was ready, so that somebody who kills workers at some age or at intervals will
     next kill one without the job, and that clears the job of all kills. A job is refused after 3 kills at
     the same step, give or take one, or after 6 at any.

The bound: S is the time of a worker's start, D the time that the job runs before its worker dies (the stall
limit where it stalls), W the time that the jobs before it take, alone if they became suspects with it. A job
that crashes its workers is refused after at most 6 (S + D) + 2 (W + 1 s), one that is killed at the same step
each time after at most 7 S + 13 D + 9 W + 7 s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Cause = Literal["crash", "kill"]

SUSPICION = 2.0  # ends of workers after which a job runs alone
MAX_CRASHES = 2  # crashes of workers in which a job was alone, after which the job is refused
MAX_KILLS_AT_ONE_STEP = 3  # kills at about the same step in which a suspect was alone, before it is refused
MAX_KILLS = 6  # kills at any steps in which a suspect was alone, before it is refused
QUIET_SECONDS = 1.0  # the first quiet time


@dataclass
class Record:
    """One unanswered job, and the evidence against it."""

    worker: int | None = None  # that the job was sent to; workers are numbered by replica
    started: bool = False  # in that worker
    steps: int = 0  # done in that worker
    suspicion: float = 0.0  # number of ended workers that had the job
    crashes: int = 0  # of workers in which the job was alone
    kills: list[int] = field(default_factory=list)  # for each kill of a worker with this job alone, its steps
    quiet: float = QUIET_SECONDS  # seconds that a worker must have been ready before the job is sent to it

    @property
    def suspect(self) -> bool:
        return self.suspicion >= SUSPICION

    @property
    def guilty(self) -> bool:
        """Whether the job is refused."""
        last = self.kills[-MAX_KILLS_AT_ONE_STEP:]
        repeated = len(last) == MAX_KILLS_AT_ONE_STEP and max(last) - min(last) <= 1
        return self.crashes >= MAX_CRASHES or repeated or len(self.kills) >= MAX_KILLS


class Release(NamedTuple):
    """The jobs that may be sent now.

    jobs: to any worker but the reserved one; suspect: to the reserved worker, which then has no other job.
    """

    jobs: list[str]
    reserved: int | None
    suspect: str | None


class Quarantine:
    """Decides which jobs the workers get, and which jobs are refused because they make workers die."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def add(self, job: str) -> None:
        self._records[job] = Record()

    def remove(self, job: str) -> None:
        """Forget a job that is answered or cancelled."""
        self._records.pop(job, None)

    def send(self, job: str, worker: int) -> None:
        """Record that a job was sent to a worker."""
        self._records[job].worker = worker

    def recall(self, job: str) -> None:
        """Record that a worker has given a job back before it started; unknown jobs are ignored."""
        if record := self._records.get(job):
            record.worker = None

    def start(self, job: str) -> None:
        """Record that its worker has started a job; unknown jobs are ignored."""
        if record := self._records.get(job):
            record.started = True

    def step(self, job: str, steps: int) -> None:
        """Record how many steps of a job its worker has done; unknown jobs are ignored."""
        if record := self._records.get(job):
            record.steps = steps

    def worker_of(self, job: str) -> int | None:
        """The worker that has a job; None if none has."""
        record = self._records.get(job)
        return record.worker if record else None

    def jobs_of(self, worker: int) -> list[str]:
        """The jobs that were sent to a worker."""
        return [job for job, record in self._records.items() if record.worker == worker]

    def release(self, ages: Mapping[int, float]) -> Release:
        """The jobs to send now. ages: ready workers, and for how many seconds each has been ready."""
        jobs = [job for job, record in self._records.items() if record.worker is None and not record.suspect]
        first = self._first_suspect()
        reserved = self._reserve(first, ages) if first else None
        if reserved is None or self.jobs_of(reserved):
            return Release(jobs, reserved, None)
        return Release(jobs, reserved, next(job for job, record in self._records.items() if record is first))

    def quiet_left(self, ages: Mapping[int, float]) -> float:
        """Seconds until a worker can be reserved for the next suspect; 0 if none has to wait for that."""
        first = self._first_suspect()
        if first is None or first.worker is not None:
            return 0.0
        return max(0.0, first.quiet - max(ages.values(), default=0.0))

    def end(self, worker: int, cause: Cause, age: float) -> list[str]:
        """Judge the end of a worker that had been ready for `age` seconds. Returns the jobs to refuse.

        Refused jobs are forgotten; all others may be sent to another worker.
        """
        sent = [record for record in self._records.values() if record.worker == worker]
        if len(sent) == 1:
            self._add_evidence(sent[0], cause, age)
        for record in self._records.values():
            if cause == "kill" and record.worker != worker:
                record.kills, record.quiet = [], QUIET_SECONDS
        self._add_suspicion(sent)
        for record in sent:
            record.worker, record.started, record.steps = None, False, 0
        guilty = [job for job, record in self._records.items() if record.guilty]
        for job in guilty:
            del self._records[job]
        return guilty

    def _add_evidence(self, record: Record, cause: Cause, age: float) -> None:
        if cause == "crash":
            record.crashes += 1
        elif record.suspect:
            record.kills.append(record.steps)
            record.quiet = 1.5 * age + 0.5

    def _add_suspicion(self, sent: Sequence[Record]) -> None:
        any_started = any(record.started for record in sent)
        for record in sent:
            record.suspicion += 1.0 if record.started or not any_started else 0.5

    def _first_suspect(self) -> Record | None:
        """The suspect that runs now, or next."""
        suspects = [record for record in self._records.values() if record.suspect]
        return next((record for record in suspects if record.worker is not None), next(iter(suspects), None))

    def _reserve(self, suspect: Record, ages: Mapping[int, float]) -> int | None:
        """The worker that the suspect has, or the one with the fewest jobs that is old enough, if any."""
        if suspect.worker is not None:
            return suspect.worker
        old = [worker for worker, age in ages.items() if age >= suspect.quiet]
        return min(old, key=lambda worker: (len(self.jobs_of(worker)), worker), default=None)
