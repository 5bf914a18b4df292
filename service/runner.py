"""Jobs on the device: start, step, finish. The only module of the service that imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import load
from models.denoiser import guide
from models.latent_diffusion import LatentDiffusion
from models.samplers import Plan, plan, step
from models.spec import ModelSpec
from service.errors import NonFinite, OutOfMemory
from service.job import ImageKey, Job, Shape
from service.registry import Registry
from service.settings import Settings

SHOWN = 80  # characters of a prompt's overflow that a warning repeats


@dataclass
class ImageState:
    """One image between two UNet calls."""

    x: Tensor  # (C, h, w) float32, on the device
    generator: torch.Generator  # on the CPU, so that a seed means the same everywhere
    done: int = 0  # lines of the plan behind it
    noise: Tensor | None = None  # drawn for the next line; a call that fails and runs again draws no other


@dataclass
class JobState:
    """What a job's images share, and the images."""

    job: Job
    bundle: LatentDiffusion
    plan: Plan
    contexts: Tensor  # (1 or 2, L, C): null context first where guidance needs both
    images: list[ImageState]


class TorchRunner:
    """The engine's runner on real models.

    A row's last bits depend on how many rows run with it, never on which; so calls run in few sizes, the
    text of a job always runs as one pair and D runs one picture at a time.
    """

    def __init__(self, registry: Registry[LatentDiffusion], buckets: Sequence[int]) -> None:
        self.registry = registry
        self.buckets = tuple(buckets)
        self.jobs: dict[str, JobState] = {}
        self.plans: dict[str, Plan] = {}

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """Name -> spec of every model; loads those that are not yet."""
        return {name: replace(self.registry[name].spec, name=name) for name in self.registry}

    def shape(self, job: Job) -> Shape:
        bundle = self.registry[job.model]
        latent = bundle.spec.latent_shape(job.width, job.height)
        context = (bundle.spec.text.tokens, bundle.spec.unet.context_width)
        self.plans[job.id] = plan(bundle.schedule, job.sampler, job.steps, job.eta, job.strength)
        return Shape((job.model, latent, context), len(self.plans[job.id]), latent[1] * latent[2])

    @torch.inference_mode()
    def start(self, job: Job) -> tuple[str, ...]:
        bundle = self.registry[job.model]
        shape = bundle.spec.latent_shape(job.width, job.height)
        with out_of_memory_refused():
            pair = bundle.conditioner([job.negative_prompt, job.prompt])  # (2, L, C)
            images = [self._first(job.seed + index, shape, pair.device) for index in range(job.n)]
        used = {0.0: pair[:1], 1.0: pair[1:]}.get(job.guidance_scale, pair)
        self.jobs[job.id] = JobState(job, bundle, self.plans[job.id], used, images)
        return tuple(warnings(bundle, job))

    def _first(self, seed: int, shape: tuple[int, int, int], device: torch.device) -> ImageState:
        generator = torch.Generator("cpu").manual_seed(seed)
        return ImageState(torch.randn(shape, generator=generator).to(device), generator)

    @torch.inference_mode()
    def step(self, keys: Sequence[ImageKey]) -> int:
        states = [self.jobs[key.job] for key in keys]
        images = [state.images[key.index] for state, key in zip(states, keys, strict=True)]
        with out_of_memory_refused():
            x_next, rows = self._step(states, images)
        for image, x in zip(images, x_next, strict=True):
            image.x, image.done, image.noise = x, image.done + 1, None
        return rows

    def _step(self, states: list[JobState], images: list[ImageState]) -> tuple[Tensor, int]:
        """x_next (I, C, h, w) of I images, and the rows of the call."""
        x = torch.stack([image.x for image in images])  # (I, C, h, w)
        taken = [state.plan.lines[image.done] for state, image in zip(states, images, strict=True)]
        table = torch.from_numpy(np.stack(taken))  # (I, 5) float64
        lines = table.to(x.device, torch.float32)  # (I, 5)
        scale = torch.tensor([state.job.guidance_scale for state in states]).to(x.device, torch.float32)

        rows = [index for index, state in enumerate(states) for _ in state.contexts]  # row -> image
        last = torch.tensor(rows).bincount().cumsum(0) - 1  # each image's conditional row
        first = last - torch.tensor([len(state.contexts) - 1 for state in states])  # no guidance: the same
        bucket = self._bucket(len(rows))
        rows += rows[:1] * (bucket - len(rows))
        context = torch.cat([state.contexts for state in states])  # (R, L, C)
        context = torch.cat([context, context[:1].expand(bucket - len(context), -1, -1)])

        row_image = torch.tensor(rows, device=x.device)
        eps = self._predict(states[0].bundle, x[row_image], lines[row_image], context)  # (R, C, h, w)
        guided = guide(eps[first.to(x.device)], eps[last.to(x.device)], scale)
        return step(x, guided, lines, self._noise(images, table)), bucket

    def _predict(self, bundle: LatentDiffusion, x: Tensor, lines: Tensor, context: Tensor) -> Tensor:
        """THE UNet call: every row at its own timestep."""
        return bundle.denoiser(x * lines[:, 1, None, None, None], lines[:, 0], context)

    def _bucket(self, rows: int) -> int:
        return next(size for size in self.buckets if size >= rows)

    def _noise(self, images: list[ImageState], table: Tensor) -> Tensor | None:
        """One draw from each image's generator whose line asks for it; None if none does."""
        asks = (table[:, 4] != 0).tolist()
        if not any(asks):
            return None
        for image, ask in zip(images, asks, strict=True):
            if ask and image.noise is None:
                image.noise = torch.randn(image.x.shape, generator=image.generator)
        none = torch.zeros(images[0].x.shape)
        draws = [image.noise if ask else none for image, ask in zip(images, asks, strict=True)]
        return torch.stack(draws).to(images[0].x.device)

    @torch.inference_mode()
    def finish(self, key: ImageKey) -> bytes:
        state = self.jobs[key.job]
        with out_of_memory_refused():
            x = state.bundle.decode(state.images[key.index].x[None])[0]  # (3, H, W)
            if not torch.isfinite(x).all():
                raise NonFinite
            pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(1, 2, 0).contiguous().cpu().numpy().tobytes()

    def discard(self, job: str) -> None:
        self.jobs.pop(job, None)
        self.plans.pop(job, None)


@contextmanager
def out_of_memory_refused() -> Iterator[None]:
    """Raise OutOfMemory, which has an answer of its own, where torch finds no memory on its device."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory from error


def warnings(bundle: LatentDiffusion, job: Job):
    """What the client should know about its own words."""
    for name, text in (("prompt", job.prompt), ("negative_prompt", job.negative_prompt)):
        if cut := bundle.conditioner.overflow(text):
            shown = cut if len(cut) <= SHOWN else cut[:SHOWN] + "..."
            yield f"{name} is longer than the model reads; left out: {shown}"


def choose_device(name: str) -> torch.device:
    """The device of a setting; raises ValueError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name}; {torch.cuda.device_count()} CUDA devices are visible")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of a setting; auto is the fast one of the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (AMX or AVX512-BF16)."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    probes = (getattr(torch.cpu, name, None) for name in names)
    return any(probe is not None and probe() for probe in probes)


def build(settings: Settings, paths: Mapping[str, Path]) -> TorchRunner:
    """A runner with no model loaded yet. Raises ValueError for a device that is not there."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    return TorchRunner(Registry(paths, lambda path: load(path, device, dtype)), settings.buckets)
