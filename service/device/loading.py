"""Build the runner and the models around it, as the settings say."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from models.adapters import lora
from models.checkpoint.parts import count_parameters
from models.dtypes import choose_dtype
from models.formats.identify import Source
from models.latent_diffusion import LatentDiffusion
from models.stopwatch import Stopwatch
from service.catalogue import Catalogue
from service.device.adapter_store import AdapterStore
from service.device.contention import sparing_threads
from service.device.cpu_backend import CpuBackend, choose_backend
from service.device.determinism import configure_determinism
from service.device.graphs import Graphs
from service.device.library import Library
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.device.select import choose_device
from service.device.threads import ENVIRONMENT, choose_threads, read_host
from service.settings import Settings

log = logging.getLogger(__name__)


def build(
    settings: Settings,
    paths: Mapping[str, Path | Source],
    watch: Stopwatch | None = None,
    catalogue: Catalogue | None = None,
) -> TorchRunner:
    """A runner with as many of the models in `paths` loaded as fit in memory, at least the first one.

    `catalogue`: other files that may be used, whose models are loaded at their first request. `watch`
    measures the time of each part. Raises CheckpointError, or ValueError for an unknown device.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    backend = choose_backend(settings.backend, device, dtype, settings.invariant)
    configure_cpu(settings)
    library = Library(settings, paths, device, dtype, catalogue or Catalogue(), watch, CpuBackend(backend))
    contents = library.read(catalogue or Catalogue())
    library.check_given(contents.specs)
    registry: Registry[LatentDiffusion] = Registry(
        library.given,
        lambda source: library.load(source, registry.contents),
        lambda spec: count_parameters(spec) * dtype.itemsize,
        settings.model_memory,
    )
    registry.offer(
        lambda spec, names: library.open_loras(spec, names, registry.contents),
        lora.apply,
        partial(lora.changed_bytes, dtype=dtype),
        settings.lora_sets,
    )
    registry.adapters = AdapterStore(library.adapters.open)
    registry.install(contents)
    if watch:
        watch.lap("device")
    registry.load_all(library.given)
    return TorchRunner(
        registry,
        settings.buckets,
        settings.invariant,
        settings.step_memory,
        device,
        library.read,
        Graphs() if settings.no_graphs else None,
        compiles=backend != "torch",
        threads=sparing_threads() if may_spare_threads(settings, backend, device, os.environ) else None,
    )


def may_spare_threads(
    settings: Settings, backend: str, device: torch.device, environ: Mapping[str, str]
) -> bool:
    """Whether the number of threads may change: it was not given, and no promise depends on it.

    With `invariant` the bits of images must not depend on other programs. OpenVINO has its own threads.
    """
    is_given = settings.threads or any(environ.get(variable) for variable in ENVIRONMENT)
    return device.type == "cpu" and backend == "torch" and not settings.invariant and not is_given


def configure_cpu(settings: Settings) -> None:
    """Set the number of CPU threads and the arithmetic, and log the number."""
    default = torch.get_num_threads()
    threads = choose_threads(settings.threads, default, os.environ, read_host()).share(settings.replica_count)
    # Setting torch's own default again would change how it starts threads, so it is left alone.
    unchanged = threads.number == default and not settings.threads
    configure_determinism(0 if unchanged else threads.number, settings.invariant)
    rounded = "" if torch.get_num_threads() == threads.number else ", rounded down to a power of two"
    log.info("threads: %d, %s%s", torch.get_num_threads(), threads.reason, rounded)
