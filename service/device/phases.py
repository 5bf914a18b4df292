"""The phases of a job: what its images run on, one phase after the other, and what that costs.

A phase is a run of UNet calls of one model at one size. Most jobs have one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from itertools import groupby

from models.conditioning.prompt_schedule import Composition, compose
from models.conditioning.text_encoder import Context
from models.latent_diffusion import LatentDiffusion
from models.sampling.guidance import CONDITIONAL, UNCONDITIONAL, StepRows, cfg_run, composed
from models.sampling.samplers import first_call, schedule_steps
from models.sampling.table import Plan
from service.device.controls import ControlUse, ReferenceUse
from service.engine.job import Job, ModelKey, Segment


@dataclass(frozen=True)
class PhaseOutline:
    """What is known of a phase before the job starts.

    key: its model; width, height: of the image in pixels; plan, rows: one line and one StepRows for each UNet
    call; composition: the conditions that rows name, if they are more than the prompt and its negative.
    """

    key: ModelKey
    width: int
    height: int
    plan: Plan
    rows: tuple[StepRows, ...]
    composition: Composition | None = None

    @property
    def kinds(self) -> tuple[int, ...] | None:
        """Of each condition of a composition, UNCONDITIONAL or CONDITIONAL; None without a composition."""
        if self.composition is None:
            return None
        return tuple(UNCONDITIONAL if negative else CONDITIONAL for negative in self.composition.is_negative)

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
    outline.rows are indices of these rows. None for a model without context. controls, references: in the
    job's order.
    """

    outline: PhaseOutline
    group: Hashable
    bundle: LatentDiffusion
    context: Context | None
    controls: tuple[ControlUse, ...] = ()
    references: tuple[ReferenceUse, ...] = ()

    @property
    def plan(self) -> Plan:
        return self.outline.plan

    def controls_at(self, call: int) -> tuple[ControlUse, ...]:
        """The controls that act at a call, counted from 0."""
        return tuple(use for use in self.controls if use.acts_at(call, len(self)))

    def references_at(self, call: int) -> tuple[ReferenceUse, ...]:
        """The reference images that act at a call."""
        return tuple(use for use in self.references if use.acts_at(call, len(self)))

    def __len__(self) -> int:
        """UNet calls of each image."""
        return len(self.outline.plan)


def outlines(job: Job, plan_of: Callable[[Job], Plan]) -> tuple[PhaseOutline, ...]:
    """The phases of a job. plan_of: the sampler's plan of a job."""
    plan = plan_of(job)
    rows = cfg_run(job.guided_rows, len(plan), job.guidance_start, job.guidance_end, job.guidance_rescale)
    composition = composition_of(job, len(plan))
    if composition:
        rows = tuple(map(composed, rows, composition.calls))
    whole = PhaseOutline(job.model_key, job.width, job.height, plan, rows, composition)
    return with_refiner(whole, job)


def with_refiner(whole: PhaseOutline, job: Job) -> tuple[PhaseOutline, ...]:
    """A phase, with its last part as a phase of the job's refiner; it goes on from the same latent."""
    if job.refiner is None:
        return (whole,)
    calls = len(whole.plan)
    switch = first_call(job.sampler, calls, job.refiner.switch_at)
    return whole.part(0, switch), replace(whole.part(switch, calls), key=ModelKey(job.refiner.model))


def composition_of(job: Job, calls: int) -> Composition | None:
    """The prompts of each of the first `calls` UNet calls of a job; None if its prompts are plain."""
    if job.prompt_syntax == "plain":
        return None
    return compose(job.prompt, job.negative_prompt, calls, schedule_steps(job.sampler, job.steps))
