"""Placement without anything that makes it fast: every sum over jobs is computed each time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from service.worker.placement import SLACK, Move, Placement
from service.worker.site import Kind, Placed, Site


class PlainPlacement(Placement):
    """The same rules as Placement, written down directly."""

    def work(self, replica: int) -> float:
        return self._plain_seconds(jobs_at(self._sites[replica]))

    def _cost(self, placed: Placed, replica: int) -> float:
        site = self._sites[replica]
        seconds = self._plain_seconds([*jobs_at(site), placed])
        return seconds + self._loading(placed.kind.key, site)

    def moves(self, among: Collection[int]) -> list[Move]:
        waiting = {number: jobs for number, site in self._sites.items() if (jobs := waiting_at(site))}
        work = {number: self.work(number) for number in self._sites.keys() | set(among)}
        moves: list[Move] = []
        for target in sorted((n for n in among if not self._sites[n].coming), key=work.__getitem__):
            busier = [n for n in waiting if n != target and work[n] > work[target] * (1 + SLACK)]
            for source in sorted(busier, key=work.__getitem__, reverse=True):
                held = [p for p in waiting[source] if self._sites[target].has(p.kind.key)]
                candidates = [*held[:1], *waiting[source][:1]]
                chosen = [p for p in candidates if self._cost(p, target) * (1 + SLACK) < work[source]]
                if chosen:
                    moves.append(Move(chosen[0].job.id, source, target))
                    self._redirect(chosen[0], target)
                    waiting[source].remove(chosen[0])
                    work[source] = self.work(source)
                    break
        return moves

    def _plain_seconds(self, jobs: list[Placed]) -> float:
        kinds: defaultdict[Kind, list[Placed]] = defaultdict(list)
        for placed in jobs:
            kinds[placed.kind].append(placed)
        return sum(self._plain_seconds_of_kind(kind, same) for kind, same in kinds.items())

    def _plain_seconds_of_kind(self, kind: Kind, jobs: list[Placed]) -> float:
        rows = sum(placed.steps * placed.rows for placed in jobs)
        calls = max(rows / self.max_rows, *(placed.steps / placed.job.n for placed in jobs), 0.0)
        return calls * self.times.seconds(kind, kind.pixels, rows / calls) if calls else 0.0


def jobs_at(site: Site) -> list[Placed]:
    """The jobs of a replica, without those that leave it and with those that move to it."""
    return [*(placed for placed in site.jobs.values() if placed.target is None), *site.coming.values()]


def waiting_at(site: Site) -> list[Placed]:
    return [placed for placed in site.jobs.values() if not placed.started and placed.target is None]
