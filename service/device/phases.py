"""The phases of a job: what its images run on, one phase after the other, and what that costs.

A phase is a run of UNet calls of one model at one size. Most jobs have one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from itertools import groupby

from models.conditioning.text_encoder import Context
from models.latent_diffusion import LatentDiffusion
from models.sampling.guidance import StepRows, cfg_run
from models.sampling.samplers import first_call
from models.sampling.table import Plan
from service.engine.job import Job, ModelKey, Segment


@dataclass(frozen=True)
class PhaseOutline:
    """What is known of a phase before the job starts.

    key: its model; width, height: of the image in pixels; plan, rows: one line and one StepRows for each UNet
    call.
    """

    key: ModelKey
    width: int
    height: int
    plan: Plan
    rows: tuple[StepRows, ...]

    def part(self, first: int, last: int) -> PhaseOutline:
        """The calls from number `first` to before number `last`, counted from 0."""
        return replace(self, plan=self.plan.part(first, last), rows=self.rows[first:last])

    def segments(self, group: Hashable, row_cost: float) -> tuple[Segment, ...]:
        """The calls of the phase, as the scheduler needs to know them."""
        counts = groupby(len(each.rows) for each in self.rows)
        return tuple(Segment(group, count, len(list(calls)), row_cost) for count, calls in counts)


@dataclass(frozen=True)
class Phase:
    """A phase of a job that has started. `outline`, and what the model makes of the job's inputs for it.

    group: of Shape: images with equal groups may share a UNet call. context: one row for each condition;
    outline.rows are indices of these rows. None for a model without context.
    """

    outline: PhaseOutline
    group: Hashable
    bundle: LatentDiffusion
    context: Context | None

    @property
    def plan(self) -> Plan:
        return self.outline.plan

    def __len__(self) -> int:
        """UNet calls of each image."""
        return len(self.outline.plan)


def outlines(job: Job, plan_of: Callable[[Job], Plan]) -> tuple[PhaseOutline, ...]:
    """The phases of a job. plan_of: the sampler's plan of a job."""
    plan = plan_of(job)
    rows = cfg_run(job.guidance_scale, len(plan), job.guidance_start, job.guidance_end, job.guidance_rescale)
    whole = PhaseOutline(job.model_key, job.width, job.height, plan, rows)
    return with_refiner(whole, job)


def with_refiner(whole: PhaseOutline, job: Job) -> tuple[PhaseOutline, ...]:
    """A phase, with its last part as a phase of the job's refiner; it goes on from the same latent."""
    if job.refiner is None:
        return (whole,)
    calls = len(whole.plan)
    switch = first_call(job.sampler, calls, job.refiner.switch_at)
    return whole.part(0, switch), replace(whole.part(switch, calls), key=ModelKey(job.refiner.model))
