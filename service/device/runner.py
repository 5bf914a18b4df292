"""TorchRunner: starts, steps and decodes jobs on the device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from cachetools import LRUCache
from torch import Tensor

from models.adapters.textual_inversion import change_words
from models.conditioning.conditioner import TextConditioner, TokenConditioner
from models.latent_diffusion import LatentDiffusion, to_uint8
from models.networks.autoencoder import Autoencoder
from models.networks.deep_features import shallow_share
from models.networks.tiling import tiled
from models.networks.tiny_autoencoder import TinyDecoder
from models.preview import Projection
from models.sampling.guidance import CONDITIONS
from models.sampling.samplers import plan
from models.sampling.schedule import Schedule
from models.sampling.table import Plan
from models.spec import NEIGHBOURS, ModelSpec
from models.tiles import cut
from models.transfer import download
from models.upscalers import LATENT_UPSCALERS
from service.catalogue import Catalogue
from service.device import hires, upscaling
from service.device.batch import advance
from service.device.contents import Contents
from service.device.controls import in_float32
from service.device.cuda_graphs import graphs_on
from service.device.finite import FiniteChecker
from service.device.graphs import Graphs
from service.device.inputs import (
    conditioning_input,
    masked_pixels,
    neighbours,
    pixels_of,
    prompt_options,
    start_control,
    start_images,
    start_reference,
)
from service.device.memory import free_cache, memory_of
from service.device.phases import Phase, PhaseOutline, Window, outlines
from service.device.registry import Registry
from service.device.state import ImageState, JobState, TileRun
from service.device.torch_errors import translate_device_lost, translate_oom
from service.engine.events import Incident
from service.engine.job import AdapterKey, ImageKey, Job, JobControl, ModelKey, Segment, Shape, WeightsKey
from service.engine.row_limits import MemoryUse
from service.engine.runner import Call, Preview, padded_size
from service.errors import ModelUnreadable, NonFinite, OutOfMemory

MEASURE_EVERY = 64  # calls of a group's largest size between two measurements of its memory
MAX_PLANS = 1024  # cached; a plan depends on the model, sampler, steps, eta, strength and spacing
MAX_WARNING_CHARS = 80  # of the ignored end of a prompt, which a warning quotes


class CallLoad(NamedTuple):
    """What a UNet call's memory depends on: its rows, padding included, and their uses of controls."""

    rows: int
    controls: int

    def exceeds(self, other: CallLoad) -> bool:
        return self.rows > other.rows or self.controls > other.controls


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
    ) -> None:
        """room: bytes that one UNet call may take, 0 for all that is free; graphs: None for the default."""
        self.registry = registry
        self.read = read  # what can be served of a catalogue, for install(); may run in another thread
        self.buckets = tuple(buckets[-1:] if invariant else buckets)
        self.invariant = invariant
        self.room = room
        self.jobs: dict[str, JobState] = {}
        self.plans: LRUCache[tuple[Any, ...], Plan] = LRUCache(MAX_PLANS)
        self.schedules = {name: Schedule(spec.schedule) for name, spec in registry.specs.items()}
        self.float32_copies: dict[ModelKey, LatentDiffusion] = {}  # for jobs that run again in float32
        # Latent to preview, for as long as the autoencoder is loaded.
        self.projections: WeakKeyDictionary[Autoencoder, Projection] = WeakKeyDictionary()
        self.report_incident: Callable[[Incident], None] = lambda incident: (
            None
        )  # also for failures that are recovered
        self.device = device = device or torch.device("cpu")
        self.memory = memory_of(device)
        self.graphs = graphs_on(device) if graphs is None else graphs
        self.finite_checker: FiniteChecker[JobState] = FiniteChecker(device)
        self.calls = 0
        self.measured: dict[Hashable, CallLoad] = {}  # group -> the largest call whose memory was measured

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """Name -> spec of every model, loaded or not."""
        return self.registry.specs

    def shape(self, job: Job, full_precision: bool = False) -> Shape:
        parts, segments = 1, list[Segment]()
        for outline in self._outlines(job):
            (h, w), parts = self._tiles(job, outline)
            running = self._running_controls(job) if outline.key == job.model_key else ()
            cache, spec = outline.cache, self.specs[outline.key.model]
            saves = 1 - shallow_share(spec.unet_spec, cache.branch) if cache else 0.0
            segments += outline.segments(self._group(job, outline, full_precision), h * w, running, saves)
        return Shape(tuple(segments), parts)

    def _outlines(self, job: Job) -> tuple[PhaseOutline, ...]:
        """The job's phases. Raises ModelUnreadable for a model that was served by an earlier worker only."""
        phases = outlines(job, self._plan, self.specs)
        if any(phase.key.model not in self.specs for phase in phases):
            raise ModelUnreadable
        return phases

    def _tiles(self, job: Job, outline: PhaseOutline) -> tuple[tuple[int, int], int]:
        """The latent's size (h, w) in a phase, or that of its tiles in upscaling, and the number of tiles."""
        spec = self.specs[outline.key.model]
        _, h, w = spec.latent_shape(outline.width, outline.height)
        size, corners = cut(h, w, spec.tile if job.scale else max(h, w))
        return size, len(corners)

    def _group(self, job: Job, outline: PhaseOutline, full_precision: bool) -> Hashable:
        """The group of a phase's calls: see Shape."""
        channels, *_ = self.specs[outline.key.model].latent_shape(outline.width, outline.height)
        size, _ = self._tiles(job, outline)
        shape, context = (channels, *size), self._context_shape(job, outline)
        return (outline.key, shape, context, full_precision, job.tiling)

    def _plan(self, job: Job) -> Plan:
        settings = (job.sampler, job.steps, job.eta, job.strength, job.spacing)
        key = (job.model, *settings)
        if key not in self.plans:
            self.plans[key] = plan(self.schedules[job.model], *settings)
        return self.plans[key]

    def _running_controls(self, job: Job) -> tuple[JobControl, ...]:
        """The job's controls whose networks run at every step."""
        once = {option.name for option in self.specs[job.model].controls if not option.every_step}
        return tuple(control for control in job.controls if control.name not in once)

    def _context_shape(self, job: Job, outline: PhaseOutline) -> tuple[int, int] | None:
        """(L, C). How many chunks a long prompt has is known only once the model's tokenizer is loaded."""
        model, spec = outline.key.model, self.specs[outline.key.model]
        shape = spec.context_shape
        if prompt_options(job).chunked and self.registry.is_loaded(model):
            shape = self.registry[model].context_shape(conditioning_input(job, outline, spec.label_cell))
        if shape is None or not spec.takes_neighbours:
            return shape
        return shape[0] + len(job.references), shape[1]

    def install(self, contents: Contents) -> tuple[str, ...]:
        """Serve other models; returns those to unload when no job uses them."""
        sources, words = self.registry.sources.copy(), self.registry.contents.embeddings
        unwanted = self.registry.install(contents)
        changed = {name for name, source in self.registry.sources.items() if source is not sources.get(name)}
        self.schedules |= {name: Schedule(self.specs[name].schedule) for name in changed}
        for key in [key for key in self.plans if key[0] in changed]:
            del self.plans[key]
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
        self._free()
        self._after_swap()

    @translate_device_lost()
    def unload_model(self, model: str) -> None:
        self.registry.unload(model)
        self._after_swap()
        free_cache()

    def _after_swap(self) -> None:
        """Drop the graphs of unloaded models, and measurements, since the free memory has changed."""
        self.measured.clear()
        self.graphs.prune()
        self.memory.reset()

    @translate_device_lost()
    @torch.inference_mode()
    def start(self, job: Job, full_precision: bool = False) -> tuple[str, ...]:
        with translate_oom():
            phases = self._phases(job, full_precision)
            state = JobState(job, phases)
            if job.scale:
                upscaling.start_tiles(state)
            else:
                start_images(state)
        self.jobs[job.id] = state
        return (*prompt_warnings(state), *window_warnings(state.phases[0]))

    def _phases(self, job: Job, full_precision: bool) -> tuple[Phase, ...]:
        """The phases of a job with their models and contexts."""
        phases = []
        for outline in self._outlines(job):
            key, group = outline.key, self._group(job, outline, full_precision)
            bundle = self._in_float32(key) if full_precision else self.registry.bundle(key)
            if job.tiling != "none":
                bundle = bundle.tiled(job.tiling)
            inputs = conditioning_input(job, outline, bundle.spec.label_cell)
            if bundle.spec.takes_neighbours and job.references:
                encoder = self.registry.adapters[AdapterKey("reference_adapter", NEIGHBOURS, job.model)]
                inputs = inputs._replace(neighbours=neighbours(job, encoder, self.device))
            phase = Phase(outline, group, bundle, bundle.context_pair(inputs))
            phases.append(self._with_adapters(job, phase, full_precision) if key == job.model_key else phase)
        return tuple(phases)

    def _with_adapters(self, job: Job, phase: Phase, full_precision: bool) -> Phase:
        """The phase with the job's controls, their images at the phase's size, and reference images."""
        size, adapters = (phase.outline.width, phase.outline.height), self.registry.adapters
        controls = []
        for own in job.controls:
            control = adapters[AdapterKey("control", own.name, job.model)]
            control = in_float32(control) if full_precision else control
            controls.append(start_control(job, own, control, size, self.device))
        references = [
            start_reference(
                own, adapters[AdapterKey("reference_adapter", own.adapter, job.model)], self.device
            )
            for own in job.references
            if own.adapter != NEIGHBOURS
        ]
        return replace(phase, controls=tuple(controls), references=tuple(references))

    def _in_float32(self, key: ModelKey) -> LatentDiffusion:
        """The model with its LoRAs in float32: a copy, unless the model is loaded in float32."""
        model = self.registry[key.model]
        if model.unet is not None and model.unet.dtype == torch.float32:
            return self.registry.bundle(key)
        if key not in self.float32_copies:
            self.float32_copies[key] = self.registry.merged(model.copy(torch.float32), key)
        return self.float32_copies[key]

    @translate_device_lost()
    @torch.inference_mode()
    def step(self, keys: Sequence[ImageKey]) -> Call:
        states = [self.jobs[key.job] for key in keys]
        images = [state.images[key.image] for state, key in zip(states, keys, strict=True)]
        rows = sum(len(state.rows(image).rows) for state, image in zip(states, images, strict=True))
        size = padded_size(rows, self.buckets)
        begin = self.finite_checker.now()
        self._encode_new_tiles(states, images)
        slow_calls = self.graphs.slow_calls
        new_states, use = self._advance(states, images, size)
        slow = self.graphs.slow_calls > slow_calls
        for state, image, new in zip(states, images, new_states, strict=True):
            history = state.phase(image).plan.history
            image.state, image.done, image.noise = new[: 1 + history], image.done + 1, None
            image.deep = None if state.ends_phase(image) else image.deep
            upscaling.after_step(state, image)
        # The only place in a step that waits for the device: on a CPU for this call, on CUDA for the last.
        finite = torch.isfinite(new_states).flatten(1).all(1)
        non_finite = self.finite_checker.submit(states, finite, begin)
        checker = self.finite_checker
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

    def _advance(
        self, states: list[JobState], images: list[ImageState], size: int
    ) -> tuple[Tensor, MemoryUse | None]:
        """The next states, and the call's memory use if it was measured.

        If one image alone does not fit in memory, it runs row by row, or with `invariant` in the same size
        again. Calls of several images are split by the engine.
        """
        try:
            return self._advance_measured(states, images, size)
        except OutOfMemory:
            if len(images) > 1:
                raise
            self.report_incident(Incident("out_of_memory", "step"))
        self._free()
        with translate_oom(), self.graphs.paused():
            size, sizes = (size, self.buckets) if self.invariant else (1, (1,))
            return advance(states, images, size, sizes=sizes), None

    def _advance_measured(
        self, states: list[JobState], images: list[ImageState], size: int
    ) -> tuple[Tensor, MemoryUse | None]:
        """As _advance(); measures the first call of each size, and the largest one again at intervals."""
        group = states[0].phase(images[0]).group
        largest, load = (
            self.measured.get(group, CallLoad(0, 0)),
            CallLoad(size, count_controls(states, images)),
        )
        self.calls += 1
        due = load.exceeds(largest) or (load == largest and self.calls % MEASURE_EVERY == 0)
        measuring = due and self.memory.begin()
        # The memory of a captured graph is allocated already, so only a call without graphs can be measured.
        with translate_oom(), self.graphs.paused() if measuring else nullcontext():
            new_states = advance(states, images, size, self.graphs, self.buckets)
        if not measuring:
            return new_states, None
        self.measured[group] = CallLoad(*map(max, load, largest))
        return new_states, self.memory.end(size, self.room)

    def _free(self) -> None:
        """Free captured graphs and cached memory, which only make later calls faster."""
        self.graphs.clear()
        free_cache()

    @translate_device_lost()
    @torch.inference_mode()
    def prepare(self, key: ImageKey) -> bool:
        """One decoding or encoding of an image at most."""
        state = self.jobs[key.job]
        image = state.images[key.image]
        outline = state.next_phase(image).outline
        with translate_oom():
            if outline.tiles:
                upscaling.begin(state, key.image, self._pixels(state, image))
            elif image.tiles:
                self._prepare_upscaled(state, image, image.tiles)
                return False
            elif not outline.upscaler:
                image.phase, image.done = image.phase + 1, 0
            elif outline.upscaler in LATENT_UPSCALERS:
                hires.begin(state, key.image, hires.enlarged_latent(state, image))
            elif image.pixels is None:
                image.pixels = hires.enlarged_pixels(state, image, self._pixels(state, image))
                return False
            else:
                hires.begin(state, key.image, hires.encoded(state, image.pixels))
        return True

    def _prepare_upscaled(self, state: JobState, image: ImageState, tiles: TileRun) -> None:
        """Decode the next tile of an upscaling model's, or after the last one merge them."""
        phase = state.phase(image)
        if tiles.latents:
            z, concat = tiles.latents[0]
            x = self._decode_full(phase.bundle, phase.bundle.add_residual_base(z[None], concat))
            if not torch.isfinite(x).all():
                raise NonFinite
            tiles.pixels.append(rgb_bytes(phase.bundle.correct(x, concat, phase.outline.noise_level)))
            tiles.latents.popleft()
        else:
            enlarged = upscaling.merged(state, image, tiles)
            image.pixels, image.tiles = hires.enlarged_pixels(state, image, enlarged), None

    @translate_device_lost()
    @torch.inference_mode()
    def preview(self, key: ImageKey) -> Preview:
        state = self.jobs[key.job]
        autoencoder, image = state.bundle.autoencoder, state.images[key.image]
        if image.tiles and image.pixels is not None:  # no tile shows the whole image
            return Preview(image.pixels.shape[1], image.pixels.shape[0], image.pixels.tobytes())
        z = state.latent_of(image)
        tiny = self._tiny_decoder(state.job)
        if state.job.preview_decoded and not (tiny and state.job.decoder == "tiny"):
            pixels = rgb_bytes(self._decode(state.bundle, z[None]))
        elif tiny:
            with translate_oom():
                pixels = rgb_bytes(tiny(z[None]))
        else:
            with translate_oom():
                if autoencoder not in self.projections:
                    # In float32: an overflow in the fit would spoil every preview of the model.
                    precise = state.bundle.with_autoencoder_dtype(torch.float32)
                    self.projections[autoencoder] = Projection(precise)
                pixels = self.projections[autoencoder](z).numpy()  # (h, w, 3)
        return Preview(pixels.shape[1], pixels.shape[0], pixels.tobytes())

    @translate_device_lost()
    @torch.inference_mode()
    def finish(self, key: ImageKey) -> bytes:
        state = self.jobs[key.job]
        image = state.images[key.image]
        # A job that was interrupted before its second pass shows the image of the first.
        pixels = self._pixels(state, image) if image.pixels is None else image.pixels
        if not state.job.scale:
            pixels = hires.resized_to(pixels, state.job.size)
        return with_kept_pixels(state.job, pixels).tobytes()

    def _pixels(self, state: JobState, image: ImageState) -> np.ndarray:
        """The decoded image (H, W, 3). Raises NonFinite."""
        z = state.bundle.add_residual_base(state.latent_of(image)[None], image.concat)  # (1, C, h, w)
        tiny = self._tiny_decoder(state.job) if state.job.decoder == "tiny" else None
        x = self._decode_tiny(tiny, z) if tiny else self._decode_full(state.bundle, z)
        if not torch.isfinite(x).all():
            raise NonFinite
        return rgb_bytes(state.bundle.correct(x, image.concat, state.job.noise_level))

    def _tiny_decoder(self, job: Job) -> TinyDecoder | None:
        """The tiny VAE's decoder for the job's model, with circular padding if its images repeat."""
        decoder = self.registry[job.model].tiny_decoder
        return tiled(decoder, job.tiling) if decoder and job.tiling != "none" else decoder

    def _decode_tiny(self, decoder: TinyDecoder, z: Tensor) -> Tensor:
        """x (1, 3, H, W) by a tiny VAE; in float32 if it would have non-finite values."""
        with translate_oom():
            x: Tensor = decoder(z.clone())
            if torch.isfinite(x).all() or decoder.dtype == torch.float32:
                return x
            self.report_incident(Incident("non_finite", "decode"))
            x = deepcopy(decoder).float()(z)
            return x

    def _decode_full(self, bundle: LatentDiffusion, z: Tensor) -> Tensor:
        """x (1, 3, H, W); in float32 if it would have non-finite values."""
        x = self._decode(bundle, z)
        if torch.isfinite(x).all() or bundle.autoencoder.dtype == torch.float32:
            return x
        self.report_incident(Incident("non_finite", "decode"))
        with translate_oom():
            return self._decode(bundle.with_autoencoder_dtype(torch.float32), z)

    def _decode(self, bundle: LatentDiffusion, z: Tensor) -> Tensor:
        """x (1, 3, H, W); out of memory: in tiles, or with `invariant` as a whole once more."""
        # The clone gives every latent the same alignment: as a row of a batch it may have another.
        try:
            with translate_oom():
                if bundle.decodes_in_tiles(*z.shape[-2:]):  # which no graph can record
                    return bundle.decode(z.clone())
                return self.graphs.run(bundle.autoencoder, bundle.decode, z.clone())
        except OutOfMemory:
            self.report_incident(Incident("out_of_memory", "decode"))
        self._free()  # after the except block: inside it, the exception keeps the failed call's tensors alive
        with translate_oom():
            return bundle.decode(z.clone()) if self.invariant else bundle.decode_tiles(z.clone())

    def discard(self, job: str) -> None:
        self.jobs.pop(job, None)
        if self.float32_copies:
            used = {id(phase.bundle) for state in self.jobs.values() for phase in state.phases}
            self.float32_copies = {n: b for n, b in self.float32_copies.items() if id(b) in used}


def rgb_bytes(x: Tensor) -> np.ndarray:
    """x (1, 3, H, W) -> uint8 (H, W, 3), on the CPU."""
    return download(to_uint8(x[0]).permute(1, 2, 0).contiguous()).numpy()


def with_kept_pixels(job: Job, pixels: np.ndarray) -> np.ndarray:
    """The image (H, W, 3), in inpainting jobs with the exact pixels of the input image outside the mask."""
    if not (job.mask and job.keeps_pixels):
        return pixels
    return np.where(masked_pixels(job)[:, :, None], pixels, pixels_of(job))


def prompt_warnings(state: JobState) -> Iterator[str]:
    """A warning for each text of the prompts that is longer than the model can read."""
    job, conditioner, composition = state.job, state.bundle.conditioner, state.phases[0].outline.composition
    if not isinstance(conditioner, TextConditioner | TokenConditioner):
        return
    texts = [("prompt", job.prompt), ("negative_prompt", job.negative_prompt)]
    if composition:
        names = ("negative_prompt" if is_negative else "prompt" for is_negative in composition.is_negative)
        texts = list(zip(names, composition.texts, strict=True))
    for name, text in texts:
        if cut_off := conditioner.overflow(text, prompt_options(job)):
            if len(cut_off) > MAX_WARNING_CHARS:
                cut_off = cut_off[:MAX_WARNING_CHARS] + "..."
            yield f"{name} is longer than the model can read; ignored: {cut_off}"


def count_controls(states: Sequence[JobState], images: Sequence[ImageState]) -> int:
    """How often rows of the next call use a control."""
    pairs = zip(states, images, strict=True)
    return sum(len(state.controls(image)) * len(state.rows(image).rows) for state, image in pairs)


def window_warnings(phase: Phase) -> Iterator[str]:
    """A warning for each control and reference image whose window contains no step."""
    groups: dict[str, Sequence[Window]] = {"controls": phase.controls, "reference_images": phase.references}
    outline = phase.outline
    for field, uses in groups.items():
        for index, use in enumerate(uses):
            if not any(outline.acts_at(use, call) for call in range(len(phase))):
                yield f"{field}.{index} has no effect: no step of the run lies in its window"
