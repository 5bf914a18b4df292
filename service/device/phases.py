"""The phases of a job: what its images run on, one phase after the other, and what that costs.

A phase is a run of UNet calls of one model at one size. Most jobs have one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Protocol

import numpy as np

from models.adapters.controls import is_active
from models.conditioning.prompt_schedule import Composition, compose
from models.conditioning.text_encoder import Context
from models.latent_diffusion import LatentDiffusion
from models.sampling.guidance import CONDITIONAL, UNCONDITIONAL, StepRows, cfg_rows, cfg_run, composed
from models.sampling.samplers import first_call, schedule_steps
from models.sampling.table import Plan
from models.spec import ModelSpec
from models.tiles import Tiles, cut
from service.device.context_keys import ContextKeys
from service.device.controls import ControlUse, ReferenceUse
from service.engine.job import FeatureCache, Hires, Job, JobControl, ModelKey, Segment

CONTROL_COST = 0.4  # work of a row of a control network, as a part of that of a row of its UNet


class Window(Protocol):
    """The part of a run in which something acts."""

    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...


@dataclass(frozen=True)
class PhaseOutline:
    """What is known of a phase before the job starts.

    key: its model; width, height: of the image in pixels; plan, rows: one line and one StepRows for each UNet
    call; prompt, negative_prompt: the conditions that rows name, or composition, if they are more than these;
    before, run: calls of the pass before those of this phase, and in total (0: the phase is all of it);
    upscaler: how the image of the phase before becomes this one's, or "" if the latent stays as it is;
    tiles: of an upscaling model, which run one after the other, on the grid of latent cells; cache: deep
    features that calls reuse.
    """

    key: ModelKey
    width: int
    height: int
    plan: Plan
    rows: tuple[StepRows, ...]
    prompt: str
    negative_prompt: str
    composition: Composition | None = None
    before: int = 0
    run: int = 0
    upscaler: str = ""
    tiles: Tiles | None = None
    noise_level: int = 0
    cache: FeatureCache | None = None

    @cached_property
    def reuses(self) -> tuple[bool, ...]:
        """Whether each call reuses deep features: not every interval-th call, nor one with other rows."""
        reuses: list[bool] = []
        age = 0  # calls since the features were computed
        for call, own in enumerate(self.rows):
            age += 1
            is_old = self.cache is None or age >= self.cache.interval
            reuses.append(bool(call) and not is_old and own.rows == self.rows[call - 1].rows)
            age = age if reuses[-1] else 0
        return tuple(reuses)

    @property
    def kinds(self) -> tuple[int, ...] | None:
        """Of each condition of a composition, UNCONDITIONAL or CONDITIONAL; None without a composition."""
        if self.composition is None:
            return None
        return tuple(UNCONDITIONAL if negative else CONDITIONAL for negative in self.composition.is_negative)

    def part(self, first: int, last: int) -> PhaseOutline:
        """The calls from number `first` to before number `last`, counted from 0."""
        plan, run = self.plan.part(first, last), self.run or len(self.plan)
        return replace(self, plan=plan, rows=self.rows[first:last], before=self.before + first, run=run)

    def acts_at(self, use: Window, call: int) -> bool:
        """Whether a control or reference image acts at a call of the phase, counted from 0."""
        return is_active(self.before + call, self.run or len(self.plan), use.start, use.end)

    def segments(
        self,
        group: Hashable,
        row_cost: float,
        controls: Sequence[JobControl] = (),
        reuse_saves: float = 0.0,
    ) -> tuple[Segment, ...]:
        """The calls of the phase, as the scheduler needs to know them.

        controls: those whose networks run at every step; reuse_saves: part of a call's work that reused deep
        features save, which is spread evenly over a segment's calls.
        """
        sizes = [
            (len(own.rows), sum(self._control_rows(control, call) for control in controls))
            for call, own in enumerate(self.rows)
        ]
        segments, end = [], 0
        for (rows, extra), calls in groupby(sizes):
            begin, end = end, end + len(list(calls))
            saved = rows * reuse_saves * sum(self.reuses[begin:end]) / (end - begin)
            segments.append(
                Segment(group, rows, end - begin, row_cost, (extra * CONTROL_COST - saved) * row_cost)
            )
        return tuple(segments)

    def _control_rows(self, control: JobControl, call: int) -> int:
        """Rows of a control network's call."""
        if not self.acts_at(control, call):
            return 0
        own, kinds = self.rows[call].rows, self.kinds
        only_conditional = control.mode == "control"
        conditions = own if kinds is None else [kinds[row] for row in own]
        return sum(not (only_conditional and condition == UNCONDITIONAL) for condition in conditions)


@dataclass(frozen=True)
class Phase:
    """A phase of a job that has started. `outline`, and what the model makes of the job's inputs for it.

    group: of Shape: images with equal groups may share a UNet call. context: one row for each condition;
    outline.rows are indices of these rows. None for a model without context. attended: the context's keys and
    values, for a UNet with cross-attention. controls, references: in the job's order.
    """

    outline: PhaseOutline
    group: Hashable
    bundle: LatentDiffusion
    context: Context | None
    attended: ContextKeys | None = None
    controls: tuple[ControlUse, ...] = ()
    references: tuple[ReferenceUse, ...] = ()

    @property
    def plan(self) -> Plan:
        return self.outline.plan

    def controls_at(self, call: int) -> tuple[ControlUse, ...]:
        """The controls that act at a call, counted from 0."""
        return tuple(use for use in self.controls if self.outline.acts_at(use, call))

    def references_at(self, call: int) -> tuple[ReferenceUse, ...]:
        """The reference images that act at a call."""
        return tuple(use for use in self.references if self.outline.acts_at(use, call))

    def __len__(self) -> int:
        """UNet calls of each image."""
        return len(self.outline.plan)


def outlines(
    job: Job, plan_of: Callable[[Job], Plan], specs: Mapping[str, ModelSpec]
) -> tuple[PhaseOutline, ...]:
    """The phases of a job. plan_of: the sampler's plan of a job; specs: of all models, by name."""
    first = outline(job, plan_of(job))
    if job.hires is None:
        return with_refiner(first, job)
    alone = second_pass(job, job.hires)
    second = outline(alone, plan_of(alone), schedule_steps(job.sampler, job.steps))
    if not job.hires.model:
        return first, *with_refiner(replace(second, upscaler=job.hires.upscaler), job)
    middle = upscaling(job, job.hires, specs[job.hires.upscaler], plan_of)
    return first, middle, *with_refiner(replace(second, upscaler="lanczos"), job)


def upscaling(job: Job, hires: Hires, spec: ModelSpec, plan_of: Callable[[Job], Plan]) -> PhaseOutline:
    """The phase of an upscaling model with its default settings, one run for each tile."""
    defaults, side = spec.defaults, spec.unet_spec.factor
    height, width = (-(-each // side) * side for each in (job.height, job.width))
    tiles = cut(height, width, spec.tile)
    run = plan_of(
        replace(
            job,
            model=spec.name,
            sampler=defaults.sampler,
            steps=defaults.steps,
            eta=defaults.eta,
            spacing=None,
            strength=1.0,
        )
    )
    texts = (hires.prompt, hires.negative_prompt) if spec.reads_prompts else ("", "")
    rows = cfg_rows(defaults.guidance_scale if spec.guided and texts[0] != texts[1] else 1.0)
    count, factor = len(tiles.corners), spec.autoencoder.factor
    plan = replace(run, coeffs=np.tile(run.coeffs, (count, 1)))
    size = factor * tiles.size[1], factor * tiles.size[0]
    return PhaseOutline(
        ModelKey(spec.name), *size, plan, (rows,) * len(plan), *texts,
        upscaler=spec.name, tiles=tiles, noise_level=defaults.noise_level,
    )  # fmt: skip


def second_pass(job: Job, hires: Hires) -> Job:
    """The second pass, as a job of its own."""
    return replace(
        job,
        width=hires.width,
        height=hires.height,
        steps=hires.steps,
        strength=hires.strength,
        prompt=hires.prompt,
        negative_prompt=hires.negative_prompt,
    )


def outline(job: Job, plan: Plan, first_pass: int | None = None) -> PhaseOutline:
    """A pass of a job. first_pass: for a second pass, the steps that prompt schedules count in the first."""
    rows = cfg_run(job.guided_rows, len(plan), job.guidance_start, job.guidance_end, job.guidance_rescale)
    composition = composition_of(job, len(plan), first_pass)
    if composition:
        rows = tuple(map(composed, rows, composition.calls))
    texts = job.prompt, job.negative_prompt
    level = job.noise_level
    return PhaseOutline(
        job.model_key, job.width, job.height, plan, rows, *texts, composition,
        noise_level=level, cache=job.feature_cache,
    )  # fmt: skip


def with_refiner(whole: PhaseOutline, job: Job) -> tuple[PhaseOutline, ...]:
    """A phase, with its last part as a phase of the job's refiner; it goes on from the same latent."""
    if job.refiner is None:
        return (whole,)
    calls = len(whole.plan)
    switch = first_call(job.sampler, calls, job.refiner.switch_at)
    refined = replace(whole.part(switch, calls), key=ModelKey(job.refiner.model), upscaler="")
    return whole.part(0, switch), refined


def composition_of(job: Job, calls: int, first_pass: int | None) -> Composition | None:
    """The prompts of each of the first `calls` UNet calls of a pass; None if its prompts are plain.

    In a second pass, which has the job's `strength` of its steps, only these steps count.
    """
    if job.prompt_syntax == "plain":
        return None
    steps = job.steps if first_pass is None else max(1, int(job.steps * job.strength + 1e-9))
    counted = schedule_steps(job.sampler, steps)
    return compose(job.prompt, job.negative_prompt, calls, counted, first_pass)
