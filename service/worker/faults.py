"""Faults on request, for tests only: LDM_FAULTS=step:oom:poison breaks steps of jobs with that word.

A fault is `stage:kind:word`, or `stage:kind:word:times`; several are separated by commas. It strikes where a
job whose prompt holds the word comes to the stage, every time or so many times in a worker's life.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from service.engine.job import ImageKey, Job, ModelKey, Shape
from service.errors import NonFinite, OutOfMemory

STAGES = ("load", "start", "step", "decode")
KINDS = ("error", "oom", "nan", "device", "kill", "stall")


@dataclass(frozen=True)
class Fault:
    """What breaks; times 0: always."""

    stage: str
    kind: str
    word: str
    times: int = 0

    def __str__(self) -> str:
        return ":".join((self.stage, self.kind, self.word, str(self.times)))


def read_faults(text: str) -> tuple[Fault, ...]:
    """The inverse of str(), by commas. Raises ValueError."""
    return tuple(read_fault(part.strip()) for part in text.split(",") if part.strip())


def read_fault(text: str) -> Fault:
    stage, kind, word, *times = text.split(":")
    fault = Fault(stage, kind, word, *map(int, times))
    if stage not in STAGES or kind not in KINDS or not word or fault.times < 0:
        raise ValueError(text)
    return fault


class FaultyRunner:
    """A runner that breaks on request and else does what the inner one does.

    A step that is to give numbers that are none reports so of the job; a picture of such is refused.
    """

    def __init__(self, inner, faults: Sequence[Fault]) -> None:
        self.inner = inner
        self.faults = faults
        self.struck = [0] * len(faults)
        self.prompts: dict[str, str] = {}

    @property
    def specs(self):
        return self.inner.specs

    @property
    def buckets(self) -> tuple[int, ...]:
        return self.inner.buckets

    def shape(self, job: Job, precise: bool = False) -> Shape:
        self.prompts[job.id] = job.prompt
        return self.inner.shape(job, precise)

    def ready(self, job: Job, busy: Collection[ModelKey]) -> bool:
        self._break("load", [job.id])
        return self.inner.ready(job, busy)

    def start(self, job: Job, precise: bool = False) -> tuple[str, ...]:
        self._break("start", [job.id])
        return self.inner.start(job, precise)

    def step(self, keys: Sequence[ImageKey]):
        jobs = list(dict.fromkeys(key.job for key in keys))
        self._break("step", jobs, besides="nan")
        call = self.inner.step(keys)
        broken = [job for job in jobs if self._strikes("step", job, ("nan",))]
        return replace(call, broken=(*call.broken, *broken)) if broken else call

    def settle(self) -> tuple[str, ...]:
        return self.inner.settle()

    def finish(self, key: ImageKey) -> bytes:
        self._break("decode", [key.job])
        return self.inner.finish(key)

    def preview(self, key: ImageKey):
        return self.inner.preview(key)

    def discard(self, job: str) -> None:
        self.prompts.pop(job, None)
        self.inner.discard(job)

    def _break(self, stage: str, jobs: Sequence[str], besides: str = "") -> None:
        """Do what is asked for the first of these jobs that a fault fits."""
        kinds = tuple(kind for kind in KINDS if kind != besides)
        for job in jobs:
            if kind := self._strikes(stage, job, kinds):
                break_with(kind)

    def _strikes(self, stage: str, job: str, kinds: tuple[str, ...]) -> str | None:
        """The kind of the fault that strikes here, counted; None mostly."""
        for index, fault in enumerate(self.faults):
            fits = fault.stage == stage and fault.kind in kinds and fault.word in self.prompts[job]
            if fits and (not fault.times or self.struck[index] < fault.times):
                self.struck[index] += 1
                return fault.kind
        return None


def break_with(kind: str) -> None:
    if kind == "oom":
        raise OutOfMemory
    if kind == "nan":
        raise NonFinite
    if kind == "error":
        raise RuntimeError("a fault, as LDM_FAULTS asks")
    if kind == "device":
        from service.device.torch_errors import (
            translate_device_lost,  # torch: there in any process that runs jobs
        )

        with translate_device_lost():
            raise RuntimeError("CUDA error: an illegal memory access was encountered, as LDM_FAULTS asks")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:  # stall
        time.sleep(1)
