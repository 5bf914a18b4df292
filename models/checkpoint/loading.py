"""Loads a checkpoint: identify, open, check, then read the weights."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from models.checkpoint.folder import open_folder
from models.checkpoint.parts import OpenedModel, assign, check, make_on_meta
from models.checkpoint.single_file import open_single_file
from models.checkpoint.tokenizers import give_tokenizers
from models.formats.averages import WeightChoice
from models.formats.identify import Source, identify, refreshed
from models.latent_diffusion import LatentDiffusion, autoencoder_dtype
from models.spec import Prediction
from models.stopwatch import Stopwatch

log = logging.getLogger(__name__)


def load(
    source: str | Path | Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    vocabulary: Path | None = None,
    watch: Stopwatch | None = None,
    prediction: Prediction | None = None,
    weights: WeightChoice = "auto",
) -> LatentDiffusion:
    """The model in a diffusers folder or in a single file, ready to run.

    Files are memory-mapped: unused tensors are never read, the others are moved to the device one by one. On
    the CPU, weights of the file's own dtype may stay mapped: replace such a file, do not write into it.

    source: a path, or a Source, which has its own allow_pickle, prediction and weights. allow_pickle: read
    .bin files if there is no safetensors file, and .ckpt files; they never run code even then. vocabulary:
    BERT's vocab.txt or its folder, for a model that needs it; if None, it is looked for next to the model and
    in the local Hugging Face cache. watch: measures the time of each part. prediction, weights: as for
    identify(). Notes about the files are logged. Never uses the network. Raises CheckpointError, naming
    tensors that are missing, unexpected, misshaped, mistyped or unreadable.
    """
    watch = watch or Stopwatch()
    if not isinstance(source, Source):
        source = identify(source, allow_pickle, prediction, weights)
    opened = open_model(source, device)
    check(opened)
    for note in opened.notes:
        log.warning("%s: %s", opened.spec.name, note)
    watch.lap("headers")
    stage = autoencoder_dtype(opened.spec.autoencoder, dtype, device) or dtype
    for part in opened.parts:
        assign(part, stage if part.network is opened.networks.autoencoder else dtype)
        watch.lap(f"weights of {type(part.network).__name__}")
    give_tokenizers(opened, vocabulary)
    watch.lap("tokenizers")
    for network in opened.networks:
        if network:
            network.requires_grad_(False).eval()
    model = LatentDiffusion(opened.spec, *opened.networks).to(device)
    watch.lap("to the device")
    return model


def open_model(source: Source, device: torch.device | str = "cpu") -> OpenedModel:
    """A model without its weights, which would be read to that device. Raises CheckpointError."""
    source = refreshed(source)
    networks = make_on_meta(source)
    if source.file:
        return open_single_file(source, source.file, networks, device)
    return open_folder(source, networks, device)
