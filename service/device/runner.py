"""Jobs on the device: start, step, finish. Of the service, this, batch.py and device.py load torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.adapters import lora, replacement_vae, textual_inversion
from models.checkpoint import load
from models.checkpoint.folder import weights_in
from models.conditioning.conditioner import Asked
from models.errors import CheckpointError
from models.formats import companions
from models.latent_diffusion import LatentDiffusion, to_uint8, told_rows
from models.preview import Projection
from models.sampling.samplers import Plan, plan
from models.sampling.schedule import Schedule
from models.spec import ModelSpec
from models.stopwatch import Stopwatch
from models.tiles import cut
from service.device.batch import (
    ImageState,
    JobState,
    advance,
    asked_of,
    encode,
    known_of,
    latent_mask,
    painted,
    picture_of,
    pixels_of,
    reading_of,
)
from service.device.graphs import graphs_on
from service.device.registry import Registry, locate_embeddings, locate_loras, locate_vaes
from service.device.select import (
    Verdicts,
    choose_device,
    choose_dtype,
    download,
    fix_arithmetic,
    free_cache,
    loss_told,
    memory_of,
    out_of_memory_refused,
    suited,
)
from service.engine.engine import Call, Preview
from service.engine.events import Incident
from service.engine.job import ImageKey, Job, ModelKey, Shape
from service.engine.row_limits import Use
from service.errors import NonFinite, OutOfMemory
from service.settings import Settings

MEASURE_EVERY = 64  # calls
TILE_SEED = 2**53  # between the seeds of two tiles: more than there are seeds of jobs
SHOWN = 80  # characters of a prompt's overflow that a warning repeats


class TorchRunner:
    """The engine's runner on real models.

    A row's last bits depend on how many rows run with it, never on which; so calls run in few sizes, the
    text of a job always runs as one pair, and E and D run one picture at a time. With one bucket (invariant)
    nothing is left to depend on company, and nothing is ever split.
    """

    def __init__(
        self,
        registry: Registry[LatentDiffusion],
        buckets: Sequence[int],
        invariant: bool = False,
        room: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.registry = registry
        self.buckets = tuple(buckets[-1:] if invariant else buckets)
        self.invariant = invariant
        self.room = room  # bytes that UNet calls may take; 0: what there is
        self.jobs: dict[str, JobState] = {}
        self.plans: dict[str, tuple[Plan, Shape]] = {}
        self.schedules = {name: Schedule(spec.schedule) for name, spec in registry.specs.items()}
        self.precise: dict[ModelKey, LatentDiffusion] = {}  # float32 copies, for as long as a job needs them
        self.projections: dict[str, Projection] = {}
        self.note: Callable[[Incident], None] = lambda trouble: None  # hears of what is mended here
        device = device or torch.device("cpu")
        self.memory = memory_of(device)
        self.graphs = graphs_on(device)
        self.verdicts: Verdicts[JobState] = Verdicts(device)
        self.calls = 0
        self.measured: dict[Hashable, int] = {}  # the most rows of a call that was measured, by group

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """Name -> spec of every model, loaded or not."""
        return self.registry.specs

    def shape(self, job: Job, precise: bool = False) -> Shape:
        spec = self.specs[job.model]
        channels, h, w = spec.latent_shape(job.width, job.height)
        size, corners = cut(h, w, spec.tile if job.scale else max(h, w))
        latent = (channels, *size)
        line, _ = self.plans.get(job.id) or (self._plan(job), None)
        group = (job.model_key, latent, self._context_shape(job), precise)
        self.plans[job.id] = line, Shape(group, len(line), size[0] * size[1], len(corners))
        return self.plans[job.id][1]

    def _plan(self, job: Job) -> Plan:
        schedule = self.schedules[job.model]
        return plan(schedule, job.sampler, job.steps, job.eta, job.strength, job.spacing)

    def _context_shape(self, job: Job) -> tuple[int, int] | None:
        """(L, C). How many chunks prompts take only the model can tell, once it is there."""
        if job.long_prompts == "cut" or not self.registry.holds(job.model):
            return self.specs[job.model].context_shape
        asked = Asked(job.prompt, job.negative_prompt, reading=reading_of(job))
        return self.registry[job.model].context_shape(asked)

    @loss_told()
    def ready(self, job: Job, busy: Collection[ModelKey]) -> bool:
        if self.registry.has(job.model_key):
            return True
        with out_of_memory_refused():
            room = self.registry.ready(job.model_key, busy)
        if room:
            self._after_swap()
        return room

    def _after_swap(self) -> None:
        """Forget what is left of models that have gone; memory is another now."""
        self.projections = {m: p for m, p in self.projections.items() if self.registry.holds(m)}
        self.measured.clear()
        self.graphs.prune()
        self.memory.reset()

    @loss_told()
    @torch.inference_mode()
    def start(self, job: Job, precise: bool = False) -> tuple[str, ...]:
        with out_of_memory_refused():
            bundle = self._precise(job.model_key) if precise else self.registry.bundle(job.model_key)
            rows, asked = told_rows(job.guidance_scale), asked_of(job, bundle.spec.label_cell)
            contexts = bundle.contexts(asked)
            contexts = None if contexts is None else contexts.rows(rows)
            state = JobState(job, bundle, self.plans[job.id][0], contexts, None, None, [])
            if job.scale:
                self._start_upscaling(state)
            else:
                self._start_whole(state, asked, rows)
        self.jobs[job.id] = state
        return tuple(warnings(bundle, job))

    def _start_whole(self, state: JobState, asked: Asked, rows: slice) -> None:
        """What images start from: noise, or the given picture with noise on it."""
        job, bundle, spec = state.job, state.bundle, state.bundle.spec
        device, shape = bundle.device, spec.latent_shape(job.width, job.height)
        known = known_of(bundle, job, device) if job.mask and spec.mask_channels else None
        # A UNet that sees what is known makes the rest out of noise alone, as it was trained to.
        if job.image and not (known and job.strength == 1.0):
            state.z = encode(bundle, job, device)
        if job.mask and not known:
            state.mask = latent_mask(job, spec.autoencoder.factor, device)
        beside = bundle.beside(*shape[1:], asked.regions, known)
        beside = None if beside is None else beside[rows]
        signal, rest = state.plan.start
        for index in range(job.n):
            generator = torch.Generator().manual_seed(job.seed + index)
            noise = torch.randn(shape, generator=generator).to(device)
            x = noise if state.z is None else signal * state.z + rest * noise
            first = None if state.mask is None else noise
            state.images.append(ImageState(remembering(x, state.plan), generator, beside, first))

    def _start_upscaling(self, state: JobState) -> None:
        """What tiles start from: each its part of one field of noise, and of the picture to enlarge."""
        job, bundle = state.job, state.bundle
        low = picture_of(job, bundle.device)[0]
        tiles = cut(*low.shape[1:], bundle.spec.tile)
        for index in range(job.n):
            noise, noised = bundle.start_upscaling(low, job.seed + index, job.noise_level)
            for tile in range(len(tiles.corners)):
                rows, columns = tiles.slices(tile)
                generator = torch.Generator().manual_seed((job.seed + index + tile * TILE_SEED) % 2**63)
                x = remembering(noise[:, rows, columns], state.plan)
                state.images.append(ImageState(x, generator, None, None, low=noised[:, rows, columns]))

    def _begin_tiles(self, states: Sequence[JobState], images: Sequence[ImageState]) -> None:
        """What the UNet takes beside tiles in their first step. E for all at once would make others wait."""
        for state, image in zip(states, images, strict=True):
            if image.low is not None:
                with out_of_memory_refused():
                    beside = state.bundle.beside_tile(image.low)
                image.beside, image.low = beside.expand(state.job.rows, -1, -1, -1), None

    def _precise(self, network: ModelKey) -> LatentDiffusion:
        """The network in float32: itself if it is, else a copy."""
        model = self.registry[network.model]
        if model.unet.dtype == torch.float32:
            return self.registry.bundle(network)
        if network not in self.precise:
            self.precise[network] = self.registry.changed(model.copy(torch.float32), network)
        return self.precise[network]

    @loss_told()
    @torch.inference_mode()
    def step(self, keys: Sequence[ImageKey]) -> Call:
        states = [self.jobs[key.job] for key in keys]
        images = [state.images[key.index] for state, key in zip(states, keys, strict=True)]
        rows = sum(state.job.rows for state in states)
        size = next((size for size in self.buckets if size >= rows), rows)
        begin = self.verdicts.now()
        self._begin_tiles(states, images)
        nexts, use = self._advance(states, images, size)
        for state, image, following in zip(states, images, nexts, strict=True):
            image.state, image.done, image.noise = following[: 1 + state.plan.memory], image.done + 1, None
        # The one wait for the device in a step: for this call on a CPU, for the one before on a GPU.
        broken = self.verdicts.give(states, torch.isfinite(nexts).flatten(1).all(1), begin)
        return Call(size, self._here(broken), use, self.verdicts.late, self.verdicts.seconds)

    def _here(self, states: Sequence[JobState]) -> tuple[str, ...]:
        """The jobs of states, each once, but those that have ended or begun again meanwhile."""
        here = (state.job.id for state in states if self.jobs.get(state.job.id) is state)
        return tuple(dict.fromkeys(here))

    @loss_told()
    def settle(self) -> tuple[str, ...]:
        return self._here(self.verdicts.settle())

    def _advance(
        self, states: list[JobState], images: list[ImageState], size: int
    ) -> tuple[Tensor, Use | None]:
        """The next states, and the memory it took if that is news. One image that does not fit goes row by
        row, or once more where bits matter; several are the engine's to split."""
        try:
            return self._measured(states, images, size)
        except OutOfMemory:
            if len(images) > 1:
                raise
            self.note(Incident("out_of_memory", "step"))
        self._free()
        with out_of_memory_refused(), self.graphs.paused():
            return advance(states, images, size if self.invariant else 1), None

    def _free(self) -> None:
        """All that is held for later calls."""
        self.graphs.clear()
        free_cache()

    def _measured(
        self, states: list[JobState], images: list[ImageState], size: int
    ) -> tuple[Tensor, Use | None]:
        group = self.plans[states[0].job.id][1].group
        most = self.measured.get(group, 0)
        self.calls += 1
        # Now and then the largest size again: what is free changes, and with it what fits.
        due = size > most or (size == most and self.calls % MEASURE_EVERY == 0)
        news = due and self.memory.begin()
        # A recording has its memory already: what a call takes is seen of one that is made as it is.
        with out_of_memory_refused(), self.graphs.paused() if news else nullcontext():
            nexts = advance(states, images, size, self.graphs)
        if not news:
            return nexts, None
        self.measured[group] = size
        return nexts, self.memory.end(size, self.room)

    @loss_told()
    @torch.inference_mode()
    def preview(self, key: ImageKey) -> Preview:
        state = self.jobs[key.job]
        model, image = state.job.model, state.images[key.index]
        z = image.x if image.x_0 is None else image.x_0
        if state.job.preview_decoded:
            pixels = rows_of(self._decode(state.bundle, z[None]))
            return Preview(pixels.shape[1], pixels.shape[0], pixels.tobytes())
        with out_of_memory_refused():
            if model not in self.projections:
                # In float32: numbers that overflow in fewer bits would spoil the fit for good.
                self.projections[model] = Projection(self.registry[model].with_autoencoder(torch.float32))
            pixels = self.projections[model](z)  # (h, w, 3)
        return Preview(pixels.shape[1], pixels.shape[0], pixels.numpy().tobytes())

    @loss_told()
    @torch.inference_mode()
    def finish(self, key: ImageKey) -> bytes:
        state = self.jobs[key.job]
        image = state.images[key.index]
        z = state.bundle.completed(image.x[None], image.beside)  # (1, C, h, w)
        x = self._decode(state.bundle, z)
        if not torch.isfinite(x).all() and state.bundle.autoencoder.dtype != torch.float32:
            self.note(Incident("non_finite", "decode"))
            with out_of_memory_refused():
                x = self._decode(state.bundle.with_autoencoder(torch.float32), z)
        if not torch.isfinite(x).all():
            raise NonFinite
        return as_given(state.job, rows_of(x)).tobytes()

    def _decode(self, bundle: LatentDiffusion, z: Tensor) -> Tensor:
        """x (1, 3, H, W); what does not fit goes in tiles, or once more where bits matter."""
        # The clone: a row of a batch may lie at an address that aligns otherwise.
        try:
            with out_of_memory_refused():
                return self.graphs.run(bundle.autoencoder, bundle.decode, z.clone())
        except OutOfMemory:
            self.note(Incident("out_of_memory", "decode"))
        self._free()  # here, not above: until there, the exception holds what the call had
        with out_of_memory_refused():
            return bundle.decode(z.clone()) if self.invariant else bundle.decode_tiles(z.clone())

    def discard(self, job: str) -> None:
        self.jobs.pop(job, None)
        self.plans.pop(job, None)
        if self.precise:
            used = {id(state.bundle) for state in self.jobs.values()}
            self.precise = {m: bundle for m, bundle in self.precise.items() if id(bundle) in used}


def remembering(x: Tensor, plan: Plan) -> Tensor:
    """x (C, h, w), and room for what its sampler remembers: (1 + memory, C, h, w)."""
    return torch.cat([x[None], torch.zeros(plan.memory, *x.shape, device=x.device)])


def rows_of(x: Tensor) -> np.ndarray:
    """x (1, 3, H, W) -> uint8 (H, W, 3), on the CPU."""
    return download(to_uint8(x[0]).permute(1, 2, 0).contiguous()).numpy()


def as_given(job: Job, pixels: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3), exactly the given one outside the mask."""
    return np.where(painted(job)[:, :, None], pixels, pixels_of(job)) if job.mask else pixels


def warnings(bundle: LatentDiffusion, job: Job):
    """What the client should know about its own words."""
    if not bundle.spec.reads_prompts:
        return
    for name, text in (("prompt", job.prompt), ("negative_prompt", job.negative_prompt)):
        if cut := bundle.conditioner.overflow(text, reading_of(job)):
            shown = cut if len(cut) <= SHOWN else cut[:SHOWN] + "..."
            yield f"{name} is longer than the model reads; left out: {shown}"


def knowing(spec: ModelSpec, learned: Sequence[textual_inversion.Embedding]) -> ModelSpec:
    """A model with the names of those words that it can learn."""
    return replace(spec, embeddings=tuple(one.name for one in learned if one.fits(spec)))


def build(settings: Settings, paths: Mapping[str, Path], watch: Stopwatch | None = None) -> TorchRunner:
    """A runner with as many models loaded as fit, the first at least; watch: takes the time of each part.

    Raises CheckpointError, or ValueError for a device that is not there.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    fix_arithmetic(settings.threads, settings.invariant)
    vocabulary = Path(settings.vocabulary) if settings.vocabulary else None
    pickles = settings.allow_pickle
    vaes = {paths[name]: path for name, path in locate_vaes(settings.vae, paths).items()}
    learned: list[textual_inversion.Embedding] = []

    def loaded(path: Path) -> LatentDiffusion:
        bundle = load(path, device, dtype, pickles, vocabulary, watch, settings.prediction)
        if path in vaes:
            bundle = replacement_vae.replaced(bundle, vaes[path], device, dtype, pickles)
        return suited(textual_inversion.teach(bundle, learned), device)

    registry = Registry(
        paths,
        loaded,
        lambda spec: weights_in(spec) * dtype.itemsize,
        settings.model_memory,
        settings.allow_pickle,
        settings.prediction,
    )
    for name, spec in registry.specs.items():
        if spec.reads_words and companions.find(paths[name], vocabulary) is None:
            raise CheckpointError(f"{name}: {companions.WANTED}")
        if paths[name] in vaes:
            replacement_vae.open_vae(vaes[paths[name]], spec.autoencoder, "cpu", pickles)
    if files := locate_embeddings(settings.embedding):
        learned += textual_inversion.read_all(files, registry.specs.values(), settings.allow_pickle)
        registry.specs = {name: knowing(spec, learned) for name, spec in registry.specs.items()}
    if files := locate_loras(settings.lora):
        loras = lora.open_loras(files, registry.specs, device, settings.allow_pickle)
        registry.offer(loras, lora.apply, partial(lora.changed_bytes, dtype=dtype), settings.lora_sets)
    if watch:
        watch.lap("device")
    registry.load_all()
    return TorchRunner(registry, settings.buckets, settings.invariant, settings.step_memory, device)
