"""TorchRunner: starts, steps and decodes jobs on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import torch

from models.adapters.textual_inversion import change_words
from models.latent_diffusion import LatentDiffusion
from models.sampling.guidance import CONDITIONS
from models.spec import ModelSpec
from models.upscalers import LATENT_UPSCALERS
from service.catalogue import Catalogue
from service.device import hires, upscaling
from service.device.contention import SparingThreads
from service.device.contents import Contents
from service.device.cpu_backend import backend_of
from service.device.cuda_graphs import graphs_on
from service.device.decode_line import DecodeLine
from service.device.decoding import Decoder
from service.device.finite import FiniteChecker
from service.device.graphs import Graphs
from service.device.job_shapes import JobShapes
from service.device.job_warnings import warnings_of
from service.device.memory import free_cache, memory_of
from service.device.precision import Precision
from service.device.registry import Registry
from service.device.starting import Starter
from service.device.state import ImageState, JobState, TileRun
from service.device.stepping import Stepper
from service.device.torch_errors import translate_device_lost, translate_oom
from service.device.workspace import Workspace
from service.engine.events import LoadedModel
from service.engine.job import ImageKey, Job, Shape, WeightsKey
from service.engine.runner import Call, DecodedImage, Preview, padded_size
from service.errors import OutOfMemory


class TorchRunner:
    """The engine's runner on real models.

    The last bits of a row depend on the number of rows in its call, but not on the content of the other rows.
    So calls have few sizes, a job's two prompts are always encoded together, and the VAE runs one image at a
    time. With `invariant` there is a single size and no call is ever split, so that other jobs cannot change
    a bit of an image.
    """

    def __init__(
        self,
        registry: Registry[LatentDiffusion],
        buckets: Sequence[int],
        invariant: bool = False,
        room: int = 0,
        device: torch.device | None = None,
        read: Callable[[Catalogue], Contents] = lambda catalogue: Contents(catalogue.number),
        graphs: Graphs | None = None,
        compiles: bool = False,
        threads: SparingThreads | None = None,
    ) -> None:
        """room: bytes that one UNet call may take, 0 for all that is free; graphs: None for the default.

        compiles: models may be compiled, which cannot run some jobs. threads: None for a fixed number.
        """
        self.registry = registry
        self.read = read  # what can be served of a catalogue, for install(); may run in another thread
        self.buckets = tuple(buckets[-1:] if invariant else buckets)
        self.jobs: dict[str, JobState] = {}
        self._threads = threads
        self.device = device = device or torch.device("cpu")
        self.workspace = Workspace(
            device, graphs_on(device) if graphs is None else graphs, memory_of(device), invariant
        )
        self.finite_checker: FiniteChecker[JobState] = FiniteChecker(device)
        self._shapes = JobShapes(registry, compiles)
        self._precision = Precision(registry, invariant)
        self._starter = Starter(registry, self._shapes, self._precision, device)
        self._stepper = Stepper(self.workspace, self.buckets, room)
        self._decoder = Decoder(registry, self.workspace)
        self._line = DecodeLine(self._decoder, self.finite_checker)

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """Name -> spec of every model, loaded or not."""
        return self.registry.specs

    def shape(self, job: Job, full_precision: bool = False) -> Shape:
        return self._shapes.shape(job, full_precision)

    def loaded_models(self) -> tuple[LoadedModel, ...]:
        """The loaded models, each with the type of its weights and the library that runs it."""
        return tuple(
            LoadedModel(name, size, str(model.dtype).removeprefix("torch."), backend_of(model))
            for name, (model, size) in self.registry.loaded().items()
        )

    def install(self, contents: Contents) -> tuple[str, ...]:
        """Serve other models; returns those to unload when no job uses them."""
        sources, words = self.registry.sources.copy(), self.registry.contents.embeddings
        unwanted = self.registry.install(contents)
        self._shapes.renew(
            name for name, source in self.registry.sources.items() if source is not sources.get(name)
        )
        for bundle in {id(each.conditioner): each for each in self.registry.bundles()}.values():
            change_words(bundle, words, contents.embeddings)
        return unwanted

    def load(self, job: Job, busy: Collection[WeightsKey]) -> bool:
        return self.load_models(job.weights_keys, busy)

    @translate_device_lost()
    def load_models(self, keys: Sequence[WeightsKey], busy: Collection[WeightsKey]) -> bool:
        for number, key in enumerate(keys):
            if self.registry.is_ready(key):
                continue
            with translate_oom():
                ready = self.registry.make_ready(key, {*busy, *keys[:number]})
            if not ready and not busy:
                raise OutOfMemory  # the models do not fit together
            if not ready:
                return False
            self._after_swap()
        return True

    @translate_device_lost()
    def make_room(self, busy: Collection[WeightsKey]) -> None:
        """Unload models that are not busy, and free captured graphs and cached memory."""
        self.registry.unload_idle(busy)
        self.workspace.free()
        self._after_swap()

    @translate_device_lost()
    def unload_model(self, model: str) -> None:
        self.registry.unload(model)
        self._after_swap()
        free_cache()

    def _after_swap(self) -> None:
        """Drop the graphs of unloaded models, and measurements, since the free memory has changed."""
        self._stepper.forget_measurements()
        self._decoder.forget_measurements()
        self.workspace.graphs.prune()
        self.workspace.memory.reset()

    @translate_device_lost()
    @torch.inference_mode()
    def start(self, job: Job, full_precision: bool = False) -> tuple[str, ...]:
        with translate_oom():
            state = self._starter.start(job, full_precision)
        self.jobs[job.id] = state
        return warnings_of(state)

    @translate_device_lost()
    @torch.inference_mode()
    def step(self, keys: Sequence[ImageKey]) -> Call:
        states = [self.jobs[key.job] for key in keys]
        images = [state.images[key.image] for state, key in zip(states, keys, strict=True)]
        rows = sum(len(state.rows(image).rows) for state, image in zip(states, images, strict=True))
        size = padded_size(rows, self.buckets)
        checker, graphs = self.finite_checker, self.workspace.graphs
        begin = checker.now()
        if self._threads:
            self._threads.adapt(time.monotonic())
        self._encode_new_tiles(states, images)
        slow_calls = graphs.slow_calls
        new_states, use = self._stepper.advance(states, images, size)
        slow = graphs.slow_calls > slow_calls
        for state, image, new in zip(states, images, new_states, strict=True):
            history = state.phase(image).plan.history
            image.state, image.done, image.noise = new[: 1 + history], image.done + 1, None
            image.deep = None if state.ends_phase(image) else image.deep
            upscaling.after_step(state, image)
        # The only place in a step that waits for the device: on a CPU for this call, on CUDA for the last.
        finite = torch.isfinite(new_states).flatten(1).all(1)
        non_finite = checker.submit(states, finite, begin)
        return Call(size, self._current_jobs(non_finite), use, checker.late, checker.seconds, slow)

    def _encode_new_tiles(self, states: Sequence[JobState], images: Sequence[ImageState]) -> None:
        """Make the concat channels of tiles at their first step: all at once would delay other jobs."""
        for state, image in zip(states, images, strict=True):
            if image.low is not None:
                with translate_oom():
                    concat = state.phase(image).bundle.tile_concat_channels(image.low)
                image.concat, image.low = concat.expand(CONDITIONS, -1, -1, -1), None

    def _current_jobs(self, states: Sequence[JobState]) -> tuple[str, ...]:
        """The distinct ids of these jobs, without jobs that have ended or started again since the call."""
        ids = (state.job.id for state in states if self.jobs.get(state.job.id) is state)
        return tuple(dict.fromkeys(ids))

    @translate_device_lost()
    def settle(self) -> tuple[str, ...]:
        return self._current_jobs(self.finite_checker.flush())

    @translate_device_lost()
    def count_overflow(self, job: Job) -> bool:
        return self._precision.count_overflow(job)

    @translate_device_lost()
    @torch.inference_mode()
    def prepare(self, key: ImageKey) -> bool:
        """One decoding or encoding of an image at most."""
        state = self.jobs[key.job]
        image = state.images[key.image]
        outline = state.next_phase(image).outline
        with translate_oom():
            if outline.tiles:
                upscaling.begin(state, key.image, self._decoder.pixels(state, image))
            elif image.tiles:
                self._prepare_upscaled(state, image, image.tiles)
                return False
            elif not outline.upscaler:
                image.phase, image.done = image.phase + 1, 0
            elif outline.upscaler in LATENT_UPSCALERS:
                hires.begin(state, key.image, hires.enlarged_latent(state, image))
            elif image.pixels is None:
                image.pixels = hires.enlarged_pixels(state, image, self._decoder.pixels(state, image))
                return False
            else:
                hires.begin(state, key.image, hires.encoded(state, image.pixels))
        return True

    def _prepare_upscaled(self, state: JobState, image: ImageState, tiles: TileRun) -> None:
        """Decode the next tile of an upscaling model's, or after the last one merge them."""
        phase = state.phase(image)
        if tiles.latents:
            noise_level = phase.outline.noise_level
            tiles.pixels.append(self._decoder.tile_pixels(phase.bundle, *tiles.latents[0], noise_level))
            tiles.latents.popleft()
        else:
            enlarged = upscaling.merged(state, image, tiles)
            image.pixels, image.tiles = hires.enlarged_pixels(state, image, enlarged), None

    @translate_device_lost()
    @torch.inference_mode()
    def preview(self, key: ImageKey) -> Preview:
        state = self.jobs[key.job]
        return self._decoder.preview(state, state.images[key.image])

    @property
    def decode_batch(self) -> int:
        return self._decoder.batch

    @translate_device_lost()
    @torch.inference_mode()
    def decode(self, keys: Sequence[ImageKey]) -> None:
        self._line.start(keys, self.jobs)

    def decoded(self, wait: bool) -> Sequence[DecodedImage]:
        return self._line.take(wait, self.jobs)

    def discard(self, job: str) -> None:
        self.jobs.pop(job, None)
        self._precision.keep(self.jobs.values())
