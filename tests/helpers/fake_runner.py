"""A runner that counts steps instead of computing them, and the engine on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from service.engine.engine import Engine
from service.engine.events import Cancelled, Done, Failed
from service.engine.job import ImageKey, Job, ModelKey, Segment, Shape, WeightsKey
from service.engine.row_limits import MemoryUse
from service.engine.runner import Call, DecodedImage, Preview, padded_size
from service.errors import NonFinite, OutOfMemory


def make_job(name: str, **changes) -> Job:
    fields = {
        "model": "m", "prompt": "p", "negative_prompt": "", "width": 8, "height": 8, "steps": 3,
        "guidance_scale": 3.0, "seed": 0, "n": 1, "sampler": "ddim", "eta": 0.0,
    }  # fmt: skip
    return Job(id=name, **(fields | changes))


class Clock:
    """Seconds that pass only when a test adds some."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def segments_of(job: Job, full_precision: bool) -> tuple[Segment, ...]:
    """Of a job with a sampler of this name: "interval" has one row in its last step, "two_phases" has another
    group and twice the cost after its first step."""
    rows = 1 if job.guidance_scale in (0.0, 1.0) else 2
    group, later = (job.model, job.width, full_precision), (job.model, 2 * job.width, full_precision)
    if job.sampler == "interval" and job.steps > 1:
        return Segment(group, rows, job.steps - 1, 1.0), Segment(group, 1, 1, 1.0)
    if job.sampler == "two_phases" and job.steps > 1:
        return Segment(group, rows, 1, 1.0), Segment(later, rows, job.steps - 1, 1.0)
    return (Segment(group, rows, job.steps, 1.0),)


class CountingRunner:
    """Counts steps instead of computing them; a job whose prompt is the name of a method fails there.

    Other prompts: "oom" runs out of memory, "broken" always gives NaN, "wobbly" gives NaN except in full
    precision. An image needs two calls of prepare() between two phases. fits_rows: most rows of a call that
    fit in memory; fits_models: most models that fit.
    """

    def __init__(
        self,
        buckets: Sequence[int] = (8,),
        clock: Clock | None = None,
        fits_rows: int = 1024,
        fits_models: int = 9,
    ) -> None:
        self.buckets = tuple(buckets)
        self.clock = clock or Clock()
        self.fits_rows = fits_rows
        self.fits_models = fits_models
        self.loaded: list[str] = []
        self.steps: Counter[ImageKey] = Counter()
        self.prepared: Counter[ImageKey] = Counter()  # calls of prepare()
        self.full_precision: dict[str, bool] = {}  # job id -> as given to shape()
        self.started: dict[str, Job] = {}
        self.measures = False
        self.decode_batch = 1
        self.late = False  # whether images are decoded while the next call runs
        self.decoding: list[tuple[ImageKey, Job]] = []
        self.overflows: list[str] = []  # jobs that were possible in full precision only

    def shape(self, job: Job, full_precision: bool = False) -> Shape:
        self.break_at("shape", job)
        self.full_precision[job.id] = full_precision
        return Shape(segments_of(job, full_precision))

    def load(self, job: Job, busy: Collection[WeightsKey]) -> bool:
        self.break_at("load", job)
        if job.model not in self.loaded:
            kept = [model for model in self.loaded if ModelKey(model) in busy]
            if len(kept) >= self.fits_models:
                return False
            self.loaded = [*kept, job.model]
        return True

    def load_models(self, keys: Sequence[WeightsKey], busy: Collection[WeightsKey]) -> bool:
        return all(self.load(make_job("", model=key.model), busy) for key in keys)

    def unload_model(self, model: str) -> None:
        self.loaded = [name for name in self.loaded if name != model]

    def install(self, contents: Sequence[str]) -> tuple[str, ...]:
        return tuple(contents)

    def make_room(self, busy: Collection[WeightsKey]) -> None:
        self.loaded = [model for model in self.loaded if ModelKey(model) in busy]

    def start(self, job: Job, full_precision: bool = False) -> tuple[str, ...]:
        assert self.full_precision[job.id] == full_precision
        assert job.model in self.loaded
        self.break_at("start", job)
        self.started[job.id] = job
        for index in range(job.n):
            self.steps.pop(ImageKey(job.id, index), None)
            self.prepared.pop(ImageKey(job.id, index), None)
        return ()

    def segment(self, key: ImageKey) -> Segment:
        """The segment of the image's next call, which requires that the image was prepared for it."""
        job = self.started[key.job]
        shape = Shape(segments_of(job, self.full_precision[key.job]))
        segment = shape.segment(self.steps[key])
        assert self.prepared[key] == 2 * (segment.group != shape.segments[0].group)
        return segment

    def step(self, keys: Sequence[ImageKey]) -> Call:
        jobs = {key.job: self.started[key.job] for key in keys}
        segments = [self.segment(key) for key in keys]
        rows = sum(segment.rows for segment in segments)
        size = padded_size(rows, self.buckets)
        self.clock.now += 0.01
        for job in jobs.values():
            self.break_at("step", job)
        if (len(keys) > 1 and size > self.fits_rows) or any(job.prompt == "oom" for job in jobs.values()):
            raise OutOfMemory
        assert len({segment.group for segment in segments}) == 1
        assert all(job.model in self.loaded for job in jobs.values())
        self.clock.now += 0.01 * rows
        self.steps.update(keys)
        return Call(size, tuple(name for name, job in jobs.items() if self.is_broken(job)), self.use(size))

    def is_broken(self, job: Job) -> bool:
        return job.prompt == "broken" or (job.prompt == "wobbly" and not self.full_precision[job.id])

    def use(self, size: int) -> MemoryUse | None:
        """Memory after a call with rows of 90 bytes, if self.measures."""
        return MemoryUse(size, 90 * size, 100 * self.fits_rows) if self.measures else None

    def prepare(self, key: ImageKey) -> bool:
        self.clock.now += 0.05
        self.break_at("prepare", self.started[key.job])
        self.prepared[key] += 1
        return self.prepared[key] == 2

    def preview(self, key: ImageKey) -> Preview:
        self.break_at("preview", self.started[key.job])
        return Preview(1, 1, b"abc")

    def settle(self) -> tuple[str, ...]:
        return ()

    def count_overflow(self, job: Job) -> bool:
        self.overflows.append(job.id)
        return len(self.overflows) == 2

    def decode(self, keys: Sequence[ImageKey]) -> None:
        for key in keys:
            self.clock.now += 0.05
            self.break_at("finish", self.started[key.job])
            job = self.started[key.job]
            assert self.steps[key] == job.steps or job.prompt == "interrupted"
        self.decoding += [(key, self.started[key.job]) for key in keys]

    def decoded(self, wait: bool) -> list[DecodedImage]:
        ended, self.decoding = (self.decoding, []) if wait or not self.late else ([], self.decoding)
        return [
            DecodedImage(key, b"%d" % (job.seed + key.image), 0.05)
            for key, job in ended
            if self.started.get(key.job) is job
        ]

    def discard(self, job: str) -> None:
        self.started.pop(job, None)
        self.full_precision.pop(job, None)

    def break_at(self, where: str, job: Job) -> None:
        if job.prompt == where:
            raise NonFinite if where == "finish" else RuntimeError("injected")


def engine_on(runner: CountingRunner, decode_chunk: int = 100) -> tuple[Engine, list]:
    events: list = []
    return Engine(runner, events.append, runner.buckets[-1], decode_chunk, runner.clock), events


def run(jobs: Sequence[Job], max_rows: int = 8, **of_runner) -> tuple[list, CountingRunner]:
    runner = CountingRunner((max_rows,), **of_runner)
    engine, events = engine_on(runner)
    for job in jobs:
        engine.submit(job)
    while engine.busy:
        engine.tick()
    return events, runner


def of(events: Sequence, kind: type) -> list:
    return [event for event in events if isinstance(event, kind)]


def outcomes(events: Sequence) -> dict[str, str]:
    """Job id -> "done", "cancelled" or the error code of its failure."""
    ends = of(events, Done | Failed | Cancelled)
    return {end.job: end.code if isinstance(end, Failed) else type(end).__name__.lower() for end in ends}
