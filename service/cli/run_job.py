"""Runs one job on an engine in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from models.formats.identify import Source
from service.engine.events import Done, Event, Failed, Started, Stepped
from service.engine.job import AdapterKey, Job
from service.errors import ServiceError, from_code
from service.model_paths import TINY_VAE, locate_vaes
from service.settings import Settings


def run_job(job: Job, settings: Settings, sources: Mapping[str, Source]) -> Done:
    """Run one job on an engine in this process, with a progress bar. Raises the job's ServiceError."""
    from tqdm import tqdm

    from service.device.loading import build  # torch
    from service.engine.engine import Engine

    logging.basicConfig(format="ldm: %(message)s")
    logging.getLogger(build.__module__).setLevel(logging.INFO)  # to log the number of threads
    used = {key.model: sources[key.model] for key in job.model_keys}
    vaes = with_names_of(locate_vaes(settings.vae, sources), used)
    tiny = with_names_of(locate_vaes(settings.tiny_vae, sources, TINY_VAE), used)
    settings = replace(settings, vae=vaes, tiny_vae=tiny)
    settings = with_used_adapters(settings, job)
    runner = build(settings, used)
    results: list[Done | ServiceError] = []
    with tqdm(total=job.n * job.steps, unit="step", leave=False) as bar:

        def emit(event: Event) -> None:
            if isinstance(event, Started):
                bar.reset(event.steps)
            elif isinstance(event, Stepped):
                bar.update(next(each.steps for each in event.jobs if each.job == job.id) - bar.n)
            elif isinstance(event, Done):
                results.append(event)
            elif isinstance(event, Failed):
                results.append(from_code(event.code))

        engine = Engine(runner, emit, settings.max_rows, settings.decode_chunk, time.monotonic)
        engine.submit(job)
        while engine.busy:
            engine.tick()
    result = results[0]
    if isinstance(result, ServiceError):
        raise result
    return result


def with_used_adapters(settings: Settings, job: Job) -> Settings:
    """The settings without the LoRAs, controls and reference adapters that a job does not use."""
    names = {key.name for key in job.weights_keys if isinstance(key, AdapterKey)}
    loras = {weights.name for weights in job.loras}

    def used(entries: Sequence[str], names: Collection[str] = names) -> tuple[str, ...]:
        return tuple(entry for entry in entries if entry.partition("=")[0] in names)

    return replace(
        settings,
        lora=used(settings.lora, loras),
        controlnet=used(settings.controlnet),
        reference_adapter=used(settings.reference_adapter),
    )


def with_names_of(vaes: Mapping[str, Path], used: Collection[str]) -> tuple[str, ...]:
    """The VAEs of models that are used, as settings name them."""
    return tuple(f"{model}={path}" for model, path in vaes.items() if model in used)
