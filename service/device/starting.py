"""The start of jobs: their models, contexts, controls and reference images."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.conditioning.text_encoder import Context
from models.latent_diffusion import LatentDiffusion
from models.spec import NEIGHBOURS
from service.device import upscaling
from service.device.context_keys import ContextKeys
from service.device.controls import in_float32
from service.device.inputs import (
    conditioning_input,
    neighbours,
    start_control,
    start_images,
    start_reference,
)
from service.device.job_shapes import JobShapes
from service.device.phases import Phase
from service.device.precision import Precision
from service.device.registry import Registry
from service.device.state import JobState
from service.engine.job import AdapterKey, Job


class Starter:
    """Makes the states of jobs."""

    def __init__(
        self,
        registry: Registry[LatentDiffusion],
        shapes: JobShapes,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self._registry = registry
        self._shapes = shapes
        self._precision = precision
        self._device = device

    def start(self, job: Job, full_precision: bool) -> JobState:
        """The state of a job before its first step; full_precision: in float32."""
        state = JobState(job, self._phases(job, full_precision))
        if job.scale:
            upscaling.start_tiles(state)
        else:
            start_images(state)
        return state

    def _phases(self, job: Job, full_precision: bool) -> tuple[Phase, ...]:
        """The phases of a job with their models and contexts."""
        phases = []
        for outline in self._shapes.outlines(job):
            key, group = outline.key, self._shapes.group(job, outline, full_precision)
            bundle = self._precision.in_float32(key) if full_precision else self._registry.bundle(key)
            if job.tiling != "none":
                bundle = bundle.tiled(job.tiling)
            inputs = conditioning_input(job, outline, bundle.spec.label_cell)
            if bundle.spec.takes_neighbours and job.references:
                encoder = self._registry.adapters[AdapterKey("reference_adapter", NEIGHBOURS, job.model)]
                inputs = inputs._replace(neighbours=neighbours(job, encoder, self._device))
            context = bundle.context_pair(inputs)
            phase = Phase(outline, group, bundle, context, attended(bundle, context))
            phases.append(self._with_adapters(job, phase, full_precision) if key == job.model_key else phase)
        return tuple(phases)

    def _with_adapters(self, job: Job, phase: Phase, full_precision: bool) -> Phase:
        """The phase with the job's controls, their images at the phase's size, and reference images."""
        size, adapters = (phase.outline.width, phase.outline.height), self._registry.adapters
        controls = []
        for own in job.controls:
            control = adapters[AdapterKey("control", own.name, job.model)]
            control = in_float32(control) if full_precision else control
            controls.append(start_control(job, own, control, size, self._device))
        references = [
            start_reference(
                own, adapters[AdapterKey("reference_adapter", own.adapter, job.model)], self._device
            )
            for own in job.references
            if own.adapter != NEIGHBOURS
        ]
        return replace(phase, controls=tuple(controls), references=tuple(references))


def attended(bundle: LatentDiffusion, context: Context | None) -> ContextKeys | None:
    """The keys and values of a context; None without cross-attention, and for a UNet that runs compiled."""
    unet = bundle.unet
    if context is None or unet is None or not unet.spec.context_width or bundle.is_compiled:
        return None
    return ContextKeys(unet, context.tokens)
