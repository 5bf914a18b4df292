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
from models.checkpoint.folder import weights_in
from models.errors import CheckpointError
from models.formats import companions
from models.latent_diffusion import LatentDiffusion
from models.spec import ModelSpec
from models.stopwatch import Stopwatch
from service.device.determinism import configure_determinism
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.device.select import choose_device, choose_dtype, prepare_for_device
from service.device.threads import choose_threads, read_host
from service.model_paths import locate_embeddings, locate_loras, locate_vaes
from service.settings import Settings

log = logging.getLogger(__name__)


def build(settings: Settings, paths: Mapping[str, Path], watch: Stopwatch | None = None) -> TorchRunner:
    """A runner with as many models loaded as fit in memory, at least the first one.

    `watch` takes the time of each part. Raises CheckpointError, or ValueError for an unknown device.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    configure_cpu(settings)
    vocabulary = Path(settings.vocabulary) if settings.vocabulary else None
    vaes = {paths[name]: path for name, path in locate_vaes(settings.vae, paths).items()}
    embeddings: list[textual_inversion.Embedding] = []

    def load_model(path: Path) -> LatentDiffusion:
        bundle = load(path, device, dtype, settings.allow_pickle, vocabulary, watch, settings.prediction)
        if path in vaes:
            bundle = replacement_vae.replaced(bundle, vaes[path], device, dtype, settings.allow_pickle)
        return prepare_for_device(textual_inversion.teach(bundle, embeddings), device)

    registry = Registry(
        paths,
        load_model,
        lambda spec: weights_in(spec) * dtype.itemsize,
        settings.model_memory,
        settings.allow_pickle,
        settings.prediction,
    )
    check_companions(registry.specs, paths, vocabulary)
    for name, spec in registry.specs.items():
        if paths[name] in vaes:  # a VAE that does not fit must fail now, not when its model is loaded
            replacement_vae.open_vae(vaes[paths[name]], spec.autoencoder, "cpu", settings.allow_pickle)
    if files := locate_embeddings(settings.embedding):
        embeddings += textual_inversion.read_all(files, registry.specs.values(), settings.allow_pickle)
        registry.specs = {name: with_embeddings(spec, embeddings) for name, spec in registry.specs.items()}
    if files := locate_loras(settings.lora):
        loras = lora.open_loras(files, registry.specs, device, settings.allow_pickle)
        registry.offer(loras, lora.apply, partial(lora.changed_bytes, dtype=dtype), settings.lora_sets)
    if watch:
        watch.lap("device")
    registry.load_all()
    return TorchRunner(registry, settings.buckets, settings.invariant, settings.step_memory, device)


def configure_cpu(settings: Settings) -> None:
    """Set the number of CPU threads and the arithmetic, and log the number."""
    default = torch.get_num_threads()
    threads = choose_threads(settings.threads, default, os.environ, read_host())
    # Setting torch's own default again would change how it starts threads, so it is left alone.
    unchanged = threads.number == default and not settings.threads
    configure_determinism(0 if unchanged else threads.number, settings.invariant)
    rounded = "" if torch.get_num_threads() == threads.number else ", rounded down to a power of two"
    log.info("threads: %d, %s%s", torch.get_num_threads(), threads.reason, rounded)


def check_companions(
    specs: Mapping[str, ModelSpec], paths: Mapping[str, Path], vocabulary: Path | None
) -> None:
    """Raise CheckpointError if a model's vocabulary file is missing."""
    for name, spec in specs.items():
        if spec.uses_bert_tokens and companions.find(paths[name], vocabulary) is None:
            raise CheckpointError(f"{name}: {companions.WANTED}")


def with_embeddings(spec: ModelSpec, embeddings: Sequence[textual_inversion.Embedding]) -> ModelSpec:
    """The spec with the names of the embeddings that fit the model."""
    return replace(spec, embeddings=tuple(one.name for one in embeddings if one.fits(spec)))
