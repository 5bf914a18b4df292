"""Models in other types than the loaded one: float32 for jobs that run again, bfloat16 after overflows."""

from __future__ import annotations

import logging
from collections.abc import Collection
from weakref import WeakKeyDictionary

import torch

from models.latent_diffusion import LatentDiffusion
from models.networks.unet import UNet
from service.device.registry import Registry
from service.device.state import JobState
from service.device.torch_errors import translate_oom
from service.engine.job import Job, ModelKey

log = logging.getLogger(__name__)

MAX_OVERFLOWS = 2  # jobs of a float16 UNet that ran again in float32, after which it becomes bfloat16


class Precision:
    """Copies of models in float32, kept while jobs use them, and which models have overflowed in float16.

    An overflow costs its job a second run in float32, so a UNet that overflows often is replaced by itself in
    bfloat16 for as long as the model is loaded. Jobs under way keep the UNet that they began with. With
    `invariant` no UNet is replaced: the bits of an image would depend on earlier jobs.
    """

    def __init__(self, registry: Registry[LatentDiffusion], invariant: bool) -> None:
        self._registry = registry
        self._invariant = invariant
        self._float32_copies: dict[ModelKey, LatentDiffusion] = {}
        self._overflows: WeakKeyDictionary[UNet, int] = WeakKeyDictionary()

    def in_float32(self, key: ModelKey) -> LatentDiffusion:
        """The model with its LoRAs in float32: a copy, unless the model is loaded in float32."""
        model = self._registry[key.model]
        if model.unet is not None and model.unet.dtype == torch.float32:
            return self._registry.bundle(key)
        if key not in self._float32_copies:
            self._float32_copies[key] = self._registry.merged(model.copy(torch.float32), key)
        return self._float32_copies[key]

    def keep(self, states: Collection[JobState]) -> None:
        """Forget the copies in float32 that none of these jobs uses."""
        if self._float32_copies:
            used = {id(phase.bundle) for state in states for phase in state.phases}
            copies = self._float32_copies.items()
            self._float32_copies = {key: copy for key, copy in copies if id(copy) in used}

    def count_overflow(self, job: Job) -> bool:
        """Count a job that succeeded only in float32. Returns whether its model runs in bfloat16 now.

        Jobs of several models, or with LoRAs, are not counted, since they do not show which weights overflow.
        Raises OutOfMemory.
        """
        name = job.model
        if job.model_key.loras or len(set(job.model_keys)) > 1 or not self._registry.is_loaded(name):
            return False
        model = self._registry[name]
        if model.unet is None or model.unet.dtype != torch.float16:
            return False
        self._overflows[model.unet] = count = self._overflows.get(model.unet, 0) + 1
        if count < MAX_OVERFLOWS:
            return False
        if self._invariant:
            if count == MAX_OVERFLOWS:
                log.warning("%s overflows in float16; use --dtype bfloat16, or jobs run twice", name)
            return False
        with translate_oom():
            self._registry.replace(name, model.with_unet_dtype(torch.bfloat16))
        log.warning("%s overflows in float16; new jobs run in bfloat16", name)
        return True
