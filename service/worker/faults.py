"""Injected failures, for tests only: LDM_FAULTS=step:oom:poison makes a step run out of memory if the
prompt of one of its jobs contains the word "poison".

A fault is `stage:kind:word` or `stage:kind:word:times`; several are separated by commas. It strikes when a
job whose prompt contains the word reaches the stage: every time, or `times` times in a worker's life. The
kind `error` strikes the same job again whatever `times` says: when a failed call is split, that job's part
must fail again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from service.engine.events import Stage
from service.engine.job import ImageKey, Job, Shape, WeightsKey
from service.engine.runner import Call, DecodedImage, Preview, Runner
from service.errors import CaptureFailed, NonFinite, OutOfMemory

STAGES = get_args(Stage)
# Failures of a job: an exception, out of memory, NaN values. Failures of the worker: its CUDA device is lost,
# the capture of a CUDA graph fails; it ends by SIGKILL, SIGSEGV, SIGABRT or exit(), or hangs.
KINDS = ("error", "oom", "nan", "device", "capture", "kill", "segfault", "abort", "exit", "stall")


@dataclass
class Fault:
    """One fault, and the jobs that it has struck. times: 0 for every time."""

    stage: str
    kind: str
    word: str
    times: int = 0
    struck: int = field(default=0, compare=False)
    struck_jobs: set[str] = field(default_factory=set, compare=False)

    def strikes(self, job: str, prompt: str) -> bool:
        """Whether the fault strikes a job that has reached its stage; if so, that is counted."""
        if self.word not in prompt:
            return False
        if self.kind == "error" and job in self.struck_jobs:
            return True
        if self.times and self.struck >= self.times:
            return False
        self.struck += 1
        self.struck_jobs.add(job)
        return True


def read_faults(text: str) -> tuple[Fault, ...]:
    """The faults in the text of the setting. Raises ValueError."""
    return tuple(read_fault(part.strip()) for part in text.split(",") if part.strip())


def read_fault(text: str) -> Fault:
    stage, kind, word, *times = text.split(":")
    fault = Fault(stage, kind, word, int(*times) if times else 0)
    if stage not in STAGES or kind not in KINDS or not word or fault.times < 0:
        raise ValueError(f"{text!r} is not a fault: expected stage:kind:word or stage:kind:word:times")
    return fault


class FaultyRunner:
    """A runner that fails where a fault strikes, and otherwise passes every call on to the inner runner."""

    def __init__(self, inner: Runner, faults: Sequence[Fault]) -> None:
        self.inner = inner
        self.faults = faults
        self.prompts: dict[str, str] = {}

    @property
    def buckets(self) -> tuple[int, ...]:
        return self.inner.buckets

    def shape(self, job: Job, full_precision: bool = False) -> Shape:
        self.prompts[job.id] = job.prompt
        return self.inner.shape(job, full_precision)

    def load(self, job: Job, busy: Collection[WeightsKey]) -> bool:
        self.prompts[job.id] = job.prompt
        self._fail("load", [job.id])
        return self.inner.load(job, busy)

    def load_models(self, keys: Sequence[WeightsKey], busy: Collection[WeightsKey]) -> bool:
        return self.inner.load_models(keys, busy)

    def unload_model(self, model: str) -> None:
        self.inner.unload_model(model)

    def install(self, contents: Any) -> tuple[str, ...]:
        return self.inner.install(contents)

    def make_room(self, busy: Collection[WeightsKey]) -> None:
        self.inner.make_room(busy)

    def start(self, job: Job, full_precision: bool = False) -> tuple[str, ...]:
        self._fail("start", [job.id])
        return self.inner.start(job, full_precision)

    def step(self, keys: Sequence[ImageKey]) -> Call:
        """Step the images; a `nan` fault raises nothing, but its job is non-finite in the returned call."""
        jobs = list(dict.fromkeys(key.job for key in keys))
        self._fail("step", jobs, tuple(kind for kind in KINDS if kind != "nan"))
        call = self.inner.step(keys)
        non_finite = [job for job in jobs if self._kind_of_strike("step", job, ("nan",))]
        return replace(call, non_finite=tuple(dict.fromkeys((*call.non_finite, *non_finite))))

    def settle(self) -> tuple[str, ...]:
        return self.inner.settle()

    def count_overflow(self, job: Job) -> bool:
        return self.inner.count_overflow(job)

    def prepare(self, key: ImageKey) -> bool:
        self._fail("prepare", [key.job])
        return self.inner.prepare(key)

    @property
    def decode_batch(self) -> int:
        return self.inner.decode_batch

    def decode(self, keys: Sequence[ImageKey]) -> None:
        self._fail("decode", [key.job for key in keys])
        self.inner.decode(keys)

    def decoded(self, wait: bool) -> Sequence[DecodedImage]:
        return self.inner.decoded(wait)

    def preview(self, key: ImageKey) -> Preview:
        return self.inner.preview(key)

    def discard(self, job: str) -> None:
        self.prompts.pop(job, None)
        self.inner.discard(job)

    def _fail(self, stage: Stage, jobs: Sequence[str], kinds: Collection[str] = KINDS) -> None:
        """Fail if a fault strikes one of these jobs."""
        for job in jobs:
            if kind := self._kind_of_strike(stage, job, kinds):
                fail(kind)

    def _kind_of_strike(self, stage: Stage, job: str, kinds: Collection[str]) -> str | None:
        """The kind of the first fault that strikes the job; mostly None."""
        candidates = (fault for fault in self.faults if fault.stage == stage and fault.kind in kinds)
        return next((fault.kind for fault in candidates if fault.strikes(job, self.prompts[job])), None)


def fail(kind: str) -> None:
    """Raise an exception, or end or hang this process."""
    match kind:
        case "oom":
            raise OutOfMemory
        case "nan":
            raise NonFinite
        case "error":
            raise RuntimeError("injected by LDM_FAULTS")
        case "capture":
            raise CaptureFailed("operation not permitted when stream is capturing (by LDM_FAULTS)")
        case "device":
            from service.device.torch_errors import translate_device_lost

            with translate_device_lost():
                raise RuntimeError("CUDA error: an illegal memory access was encountered (by LDM_FAULTS)")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "abort":
            os.abort()
        case "exit":
            os._exit(1)
    while True:  # stall, and the wait for a signal
        time.sleep(1)
