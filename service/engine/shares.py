"""How clients share a device: each one's jobs have a queue of their own, and the queues take turns."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

from service.engine.fair_queue import Group, Queued


class Share:
    """The jobs of one client, in groups that take turns by work done per job.

    used: work done for the client, divided by its weight; the client with the smallest value is next. jobs:
    the number of its jobs with steps left, those between two phases included.
    """

    def __init__(self, client: str, number: int) -> None:
        self.client = client
        self.number = number
        self.weight = 1.0
        self.used = 0.0
        self.jobs = 0
        self.groups: dict[Hashable, Group] = {}
        self._turns: list[tuple[float, int, Group]] = []  # of all groups, sorted
        self._numbers = 0  # of groups so far

    @property
    def turn(self) -> tuple[float, int]:
        """The sort key of shares; the smallest is next. Of equal ones, the client that came last is."""
        return self.used, -self.number

    @property
    def next_group(self) -> Group:
        """The group whose turn it is. There must be one."""
        return self._turns[0][2]

    def join(self, job: Queued) -> None:
        """Put a job into the group of its phase."""
        # A new group starts at the level of the next one: it does not catch up on work done before it came.
        level = self._turns[0][0] if self._turns else 0.0
        phase = job.phase
        if phase.group not in self.groups:
            self._numbers += 1
            self.groups[phase.group] = Group(phase.group, self._numbers, phase.row_cost, level)
            insort(self._turns, self.groups[phase.group].turn)
        group = self.groups[phase.group]
        self._withdraw(group)
        group.join(job, level)
        insort(self._turns, group.turn)

    def spend(self, key: Hashable, work: float) -> None:
        """Account for work done for jobs of a group."""
        group = self.groups[key]
        self.used += work / self.weight
        self._withdraw(group)
        group.spend(work)
        insort(self._turns, group.turn)

    def leave(self, job: Queued, group: Group) -> None:
        """Take a job out of its group at the end of its phase."""
        group.leave(job)
        self._drop_empty(group)

    def cancel(self, job: Queued, group: Group) -> None:
        """Take an unfinished job out of its group."""
        group.cancel(job)
        self._drop_empty(group)

    def _drop_empty(self, group: Group) -> None:
        """Forget a group without jobs."""
        if not group.queue:
            del self.groups[group.key]
            self._withdraw(group)

    def _withdraw(self, group: Group) -> None:
        """Remove a group from the turns, before its turn changes or when it has no jobs."""
        del self._turns[bisect_left(self._turns, group.turn)]


class Shares:
    """The shares of clients that have jobs, and of those without jobs that have used more than `level`.

    level: the least that a client with queued jobs has used. A client that comes starts there, so it does not
    catch up on work done before it came; one that comes back with a larger value keeps it.
    """

    def __init__(self) -> None:
        self._shares: dict[str, Share] = {}
        self._numbers = 0  # of shares so far
        self._level = 0.0

    def enter(self, client: str, weight: float) -> Share:
        """The share of a client for a new job."""
        share = self._shares.get(client)
        if share is None or not share.jobs:
            self._forget_idle()
            share = self._shares.get(client) or self._new(client)
        share.weight = weight
        share.jobs += 1
        return share

    def _new(self, client: str) -> Share:
        self._numbers += 1
        self._shares[client] = share = Share(client, self._numbers)
        share.used = self._level
        return share

    def _forget_idle(self) -> None:
        """Forget clients without jobs whose use gives others no advantage any more."""
        for share in list(self._shares.values()):
            if not share.jobs and share.used <= self._level:
                del self._shares[share.client]

    def exit(self, share: Share) -> None:
        """Count a job as ended. When no client has a job left, every client's use is set to 0."""
        share.jobs -= 1
        if not any(other.jobs for other in self._shares.values()):
            self._shares.clear()
            self._level = 0.0

    def in_turn(self) -> list[Share]:
        """The shares with jobs in groups, the next one first."""
        return sorted(
            (share for share in self._shares.values() if share.groups), key=lambda share: share.turn
        )

    def raise_level(self) -> None:
        """Call after work was accounted for."""
        used = min((share.used for share in self._shares.values() if share.groups), default=self._level)
        self._level = max(self._level, used)
