"""What is known of a job before it starts: its phases, and the groups and work of their UNet calls."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from cachetools import LRUCache

from models.latent_diffusion import LatentDiffusion
from models.networks.deep_features import shallow_share
from models.sampling.samplers import plan
from models.sampling.schedule import Schedule
from models.sampling.table import Plan
from models.spec import ModelSpec
from models.tiles import cut
from service.device.cpu_backend import needs_torch
from service.device.inputs import conditioning_input, prompt_options
from service.device.phases import PhaseOutline, outlines
from service.device.registry import Registry
from service.engine.job import Job, JobControl, Segment, Shape
from service.errors import ModelUnreadable

MAX_PLANS = 1024  # cached; a plan depends on the model, sampler, steps, eta, strength and spacing


class JobShapes:
    """The shapes and phases of jobs of the registry's models. compiles: as in TorchRunner."""

    def __init__(self, registry: Registry[LatentDiffusion], compiles: bool = False) -> None:
        self._registry = registry
        self._compiles = compiles
        self._plans: LRUCache[tuple[Any, ...], Plan] = LRUCache(MAX_PLANS)
        self._schedules = {name: Schedule(spec.schedule) for name, spec in registry.specs.items()}

    @property
    def _specs(self) -> dict[str, ModelSpec]:
        return self._registry.specs

    def renew(self, models: Iterable[str]) -> None:
        """Account for models whose specs have changed, or are new."""
        changed = set(models)
        self._schedules |= {name: Schedule(self._specs[name].schedule) for name in changed}
        for key in [key for key in self._plans if key[0] in changed]:
            del self._plans[key]

    def shape(self, job: Job, full_precision: bool = False) -> Shape:
        """The job's calls, as the engine needs to know them. Raises ModelUnreadable."""
        parts, segments = 1, list[Segment]()
        for outline in self.outlines(job):
            (h, w), parts = self._tiles(job, outline)
            running = self._running_controls(job) if outline.key == job.model_key else ()
            cache, spec = outline.cache, self._specs[outline.key.model]
            saves = 1 - shallow_share(spec.unet_spec, cache.branch) if cache else 0.0
            segments += outline.segments(self.group(job, outline, full_precision), h * w, running, saves)
        return Shape(tuple(segments), parts)

    def outlines(self, job: Job) -> tuple[PhaseOutline, ...]:
        """The job's phases. Raises ModelUnreadable for a model that was served by an earlier worker only."""
        phases = outlines(job, self._plan, self._specs)
        if any(phase.key.model not in self._specs for phase in phases):
            raise ModelUnreadable
        return phases

    def group(self, job: Job, outline: PhaseOutline, full_precision: bool) -> Hashable:
        """The group of a phase's calls: see Shape."""
        channels, *_ = self._specs[outline.key.model].latent_shape(outline.width, outline.height)
        size, _ = self._tiles(job, outline)
        shape, context = (channels, *size), self._context_shape(job, outline)
        apart = self._compiles and needs_torch(job)
        return (outline.key, shape, context, full_precision, job.tiling, apart)

    def _tiles(self, job: Job, outline: PhaseOutline) -> tuple[tuple[int, int], int]:
        """The latent's size (h, w) in a phase, or that of its tiles in upscaling, and the number of tiles."""
        spec = self._specs[outline.key.model]
        _, h, w = spec.latent_shape(outline.width, outline.height)
        size, corners = cut(h, w, spec.tile if job.scale else max(h, w))
        return size, len(corners)

    def _plan(self, job: Job) -> Plan:
        settings = (job.sampler, job.steps, job.eta, job.strength, job.spacing)
        key = (job.model, *settings)
        if key not in self._plans:
            self._plans[key] = plan(self._schedules[job.model], *settings)
        return self._plans[key]

    def _running_controls(self, job: Job) -> tuple[JobControl, ...]:
        """The job's controls whose networks run at every step."""
        once = {option.name for option in self._specs[job.model].controls if not option.every_step}
        return tuple(control for control in job.controls if control.name not in once)

    def _context_shape(self, job: Job, outline: PhaseOutline) -> tuple[int, int] | None:
        """(L, C). How many chunks a long prompt has is known only once the model's tokenizer is loaded."""
        model, spec = outline.key.model, self._specs[outline.key.model]
        shape = spec.context_shape
        if prompt_options(job).chunked and self._registry.is_loaded(model):
            shape = self._registry[model].context_shape(conditioning_input(job, outline, spec.label_cell))
        if shape is None or not spec.takes_neighbours:
            return shape
        return shape[0] + len(job.references), shape[1]
