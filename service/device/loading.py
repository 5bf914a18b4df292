"""Load the models given at start-up, and build the runner around them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from models.adapters import lora, replacement_vae, textual_inversion
from models.checkpoint import load
from models.checkpoint.parts import count_parameters
from models.errors import CheckpointError
from models.formats import companions
from models.formats.identify import Source
from models.latent_diffusion import LatentDiffusion
from models.spec import ModelSpec
from models.stopwatch import Stopwatch
from service.device.determinism import configure_determinism
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.device.select import choose_buckets, choose_device, choose_dtype, prepare_for_device
from service.device.threads import choose_threads, read_host
from service.device.torch_errors import translate_oom
from service.model_paths import identify_all, locate_embeddings, locate_loras, locate_vaes
from service.settings import Settings

log = logging.getLogger(__name__)


def build(
    settings: Settings, paths: Mapping[str, Path | Source], watch: Stopwatch | None = None
) -> TorchRunner:
    """A runner with as many models loaded as fit in memory, at least the first one.

    `watch` measures the time of each part. Raises CheckpointError, or ValueError for an unknown device.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    configure_cpu(settings)
    vocabulary = Path(settings.vocabulary) if settings.vocabulary else None
    vaes = locate_vaes(settings.vae, paths)
    embeddings: list[textual_inversion.Embedding] = []

    def load_model(source: Source) -> LatentDiffusion:
        with translate_oom():
            bundle = load(source, device, dtype, vocabulary=vocabulary, watch=watch)
            vae = vaes.get(source.spec.name)
            if vae and not source.vae:  # else it is loaded with the model, which has no VAE of its own
                bundle = replacement_vae.with_vae(bundle, vae, device, dtype, settings.allow_pickle)
            return prepare_for_device(textual_inversion.add_embeddings(bundle, embeddings), device)

    registry = Registry(
        identify_all(paths, settings.allow_pickle, settings.prediction, settings.weights, vaes),
        load_model,
        lambda spec: count_parameters(spec) * dtype.itemsize,
        settings.model_memory,
    )
    check_companions(registry.sources, vocabulary)
    for name, spec in registry.specs.items():
        if vae := vaes.get(name):  # a VAE of the wrong shape fails here, not when its model is loaded
            replacement_vae.open_vae(vae, spec.autoencoder, "cpu", settings.allow_pickle)
    if files := locate_embeddings(settings.embedding):
        embeddings += textual_inversion.read_embeddings(files, registry.specs.values(), settings.allow_pickle)
        registry.specs = {name: with_embeddings(spec, embeddings) for name, spec in registry.specs.items()}
    if files := locate_loras(settings.lora):
        loras = lora.open_loras(files, registry.specs, device, settings.allow_pickle)
        registry.offer(
            loras,
            lora.apply,
            partial(lora.changed_bytes, dtype=dtype),
            settings.lora_sets,
            lora.warning,
            lambda lora: lora.few_step,
        )
    if watch:
        watch.lap("device")
    registry.load_all()
    return TorchRunner(
        registry, choose_buckets(settings.buckets, device), settings.invariant, settings.step_memory, device
    )


def configure_cpu(settings: Settings) -> None:
    """Set the number of CPU threads and the arithmetic, and log the number."""
    default = torch.get_num_threads()
    threads = choose_threads(settings.threads, default, os.environ, read_host()).share(settings.replica_count)
    # Setting torch's own default again would change how it starts threads, so it is left alone.
    unchanged = threads.number == default and not settings.threads
    configure_determinism(0 if unchanged else threads.number, settings.invariant)
    rounded = "" if torch.get_num_threads() == threads.number else ", rounded down to a power of two"
    log.info("threads: %d, %s%s", torch.get_num_threads(), threads.reason, rounded)


def check_companions(sources: Mapping[str, Source], vocabulary: Path | None) -> None:
    """Raise CheckpointError if a model's vocabulary file is missing."""
    for name, source in sources.items():
        if source.spec.uses_bert_tokens and companions.find_vocabulary(source.folder, vocabulary) is None:
            raise CheckpointError(f"{name}: {companions.VOCABULARY_MISSING}")


def with_embeddings(spec: ModelSpec, embeddings: Sequence[textual_inversion.Embedding]) -> ModelSpec:
    """The spec, with the names of the embeddings that fit the model added."""
    return replace(spec, embeddings=tuple(one.name for one in embeddings if one.fits(spec)))
