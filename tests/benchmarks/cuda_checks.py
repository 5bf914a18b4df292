"""Checks of the GPU code: each fast path against plain float32 on the same device, and faults.

Every check is independent: one that raises is reported as BAD with its message, and the others run.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoint import tokenizers
from models.latent_diffusion import LatentDiffusion, to_uint8
from models.networks import kernels
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from service.device.cuda_graphs import graphs_on
from service.device.runner import TorchRunner
from service.device.select import prepare_for_device
from service.engine.engine import Engine
from service.engine.events import Done, Event, Failed
from service.engine.job import ImageKey, Job
from service.errors import DeviceLost
from service.worker.faults import FaultyRunner, read_faults
from tests.benchmarks import shapes
from tests.benchmarks.shapes import GUIDANCE, PROMPT, Setting, random_network, registry_of

MAX_EPS_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # relative
MIN_IMAGE_DB = 35.0  # PSNR against float32
BUCKETS = (2, 4, 8, 16, 32)
INVARIANT_BUCKET = (8,)
SHORT_STEPS = 8  # of whole images that are compared
ASSERTION = """
import torch
from service.device.torch_errors import translate_device_lost
with translate_device_lost():
    torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")].sum().item()
"""


class Result(NamedTuple):
    """fine: None if the check does not apply to this device."""

    fine: bool | None
    figure: str = ""


NOT_HERE = Result(None)


@dataclass
class Subject:
    """A model with random weights in the dtype to check, and what the checks of it share."""

    shape: shapes.Shape
    setting: Setting

    @property
    def cuda(self) -> bool:
        return self.setting.device.type == "cuda"

    @cached_property
    def model(self) -> LatentDiffusion:
        return random_model(self.shape.spec, self.setting)

    @cached_property
    def exact(self) -> LatentDiffusion:
        return self.model.copy(torch.float32)

    @cached_property
    def eps(self) -> list[Tensor]:
        """Four times the same UNet call: the first runs directly, the others are replayed from a graph."""
        graphs, inputs = graphs_on(self.setting.device), self.unet_inputs(4)
        return [graphs.run(self.model.unet, self.model.denoiser, *inputs) for _ in range(4)]

    @cached_property
    def decoded(self) -> list[Tensor]:
        """Three times the same VAE decode."""
        graphs = graphs_on(self.setting.device)
        return [graphs.run(self.model.autoencoder, self.model.decode, self.z) for _ in range(3)]

    @cached_property
    def z(self) -> Tensor:
        return shapes.latents(self.shape.spec, 1, self.setting).float()

    def unet_inputs(self, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return shapes.unet_inputs(self.shape.spec, rows, self.setting)


def check_eps(subject: Subject) -> Result:
    with plain_kernels():
        exact = subject.exact.denoiser(*subject.unet_inputs(4))
    dtype, error = subject.model.unet.dtype, relative_error(subject.eps[0], exact)
    return Result(error <= MAX_EPS_ERROR[dtype], f"{error:.1e} in {dtype}")


def check_graph(subject: Subject) -> Result:
    first, *replayed = subject.eps
    return Result(all(torch.equal(first, again) for again in replayed)) if subject.cuda else NOT_HERE


def check_fused(subject: Subject) -> Result:
    return Result(kernels.fused_on(subject.setting.device) is not None) if subject.cuda else NOT_HERE


def check_decode(subject: Subject) -> Result:
    with plain_kernels():
        exact = subject.exact.decode(subject.z)
    db = decibels(subject.decoded[0], exact)
    return Result(db >= MIN_IMAGE_DB, f"{db:.0f} dB in {subject.model.autoencoder.dtype}")


def check_decode_graph(subject: Subject) -> Result:
    first, *replayed = subject.decoded
    return Result(all(torch.equal(first, again) for again in replayed)) if subject.cuda else NOT_HERE


def check_image(subject: Subject) -> Result:
    """A whole guided image by the engine, against the same in float32 without fused kernels."""
    job = job_of(subject.model, "one", SHORT_STEPS)
    with plain_kernels():
        [exact] = images(subject.exact, [job], BUCKETS)
    [ours] = images(subject.model, [job], BUCKETS)
    db = decibels(ours / 127.5 - 1, exact / 127.5 - 1)
    return Result(db >= MIN_IMAGE_DB, f"{db:.0f} dB after {SHORT_STEPS} steps")


def check_rows(subject: Subject) -> Result:
    """Whether a row's bits depend on the other rows or on its position, at one batch size."""
    size, model = 8, subject.model
    inputs = subject.unet_inputs(size)
    graphs = graphs_on(subject.setting.device)

    def row(order: Sequence[int]) -> Tensor:
        """The result for input 0 in a call with these inputs as rows."""
        index = torch.tensor(order, device=subject.setting.device)
        rows = [None if x is None else x[index] for x in inputs]
        return graphs.run(model.unet, model.denoiser, *rows)[order.index(0)]

    with deterministic():
        alone = row([0] * size)  # the first call runs directly; later ones are replayed from the graph
        others = [row([0, *range(1, size)]), row([*range(1, size), 0]), row([3, 3, 3, 0, 5, 5, 1, 1])]
    return Result(all(torch.equal(alone, other) for other in others))


def check_invariant(subject: Subject) -> Result:
    """A whole image by an engine with `invariant`: alone, among others, and by another new runner."""
    job = job_of(subject.model, "one", SHORT_STEPS)
    other = [job_of(subject.model, f"other {n}", SHORT_STEPS + n, seed=n, prompt=f"{n}") for n in (1, 2, 3)]
    with deterministic():
        alone, *repeated = (
            images(subject.model, jobs, INVARIANT_BUCKET, invariant=True)[0]
            for jobs in ([job], [job, *other], [job])
        )
    return Result(all(torch.equal(alone, each) for each in repeated))


def check_waits(subject: Subject) -> Result:
    """Whether a step waits for the device, by torch's own detection (set_sync_debug_mode).

    The only intended wait, for the event of the previous step, is not detected by it.
    """
    model = subject.model
    if not subject.cuda:
        return NOT_HERE
    runner = TorchRunner(registry_of(model), BUCKETS, device=model.device)
    job = job_of(model, "one", 20, sampler="euler_ancestral")
    runner.shape(job)
    runner.start(job)
    key = [ImageKey("one", 0)]
    for _ in range(4):  # these calls choose kernels and record the graph
        runner.step(key)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            runner.step(key)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    runner.settle()
    return Result(True)


def check_out_of_memory(subject: Subject) -> Result:
    """A job that really does not fit fails alone, and the next one is done."""
    if not subject.cuda:
        return NOT_HERE
    device, model = subject.setting.device, subject.model
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved(device) + 256 * 2**20
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    try:
        runner = TorchRunner(registry_of(model), BUCKETS, device=device)
        side = 8 * model.spec.defaults.width
        events, _ = run(runner, [job_of(model, "large", 2, width=side, height=side)])
        large = type(events[-1])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    events, _ = run(runner, [job_of(model, "small", 2)])
    return Result(isinstance(events[-1], Done), f"the large job ended with {large.__name__}")


CHECKS: dict[str, Callable[[Subject], Result]] = {
    "eps against float32": check_eps,
    "a replayed graph gives the same bits as the call": check_graph,
    "fused kernels are in use": check_fused,
    "VAE decode against float32": check_decode,
    "the decoder's graph gives the same bits": check_decode_graph,
    "a whole image against float32": check_image,
    "--invariant: a row has the same bits with any others": check_rows,
    "--invariant: an image has the same bits in any company": check_invariant,
    "no wait for the device in a step": check_waits,
    "out of memory: the next job is done": check_out_of_memory,
}


@torch.inference_mode()
def checks(shape: shapes.Shape, setting: Setting) -> Iterator[tuple[str, Result]]:
    """(what is checked, result) of every check of a shape."""
    subject = Subject(shape, setting)
    for what, check in CHECKS.items():
        try:
            yield what, check(subject)
        except Exception as error:
            yield what, Result(False, f"{type(error).__name__}: {error}".splitlines()[0])


def faults(setting: Setting) -> Iterator[tuple[str, Result]]:
    """Injected faults, with a small network; on a GPU also a real one, in its own process."""
    model = random_model(shapes.TINY["sd15"].spec, setting)
    for fault in ("step:nan:poison:1", "step:nan:poison", "step:oom:poison"):
        outcome = Done if fault.endswith("1") else Failed
        runner = FaultyRunner(
            TorchRunner(registry_of(model), BUCKETS, device=setting.device), read_faults(fault)
        )
        jobs = [job_of(model, "a", 3), job_of(model, "b", 3, prompt="poison"), job_of(model, "c", 4)]
        events, _ = run(runner, jobs)
        ends = {event.job: type(event) for event in events if isinstance(event, Done | Failed)}
        yield f"{fault}: its job alone", Result(ends == {"a": Done, "b": outcome, "c": Done})
    what = "an assertion in a kernel is a lost device"
    if setting.device.type != "cuda":
        yield what, NOT_HERE
        return
    done = subprocess.run([sys.executable, "-c", ASSERTION], capture_output=True, text=True, timeout=60)
    yield what, Result(DeviceLost.__name__ in done.stderr)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Switches fused kernels off."""
    fused, kernels.fused_on = kernels.fused_on, lambda device: None
    try:
        yield
    finally:
        kernels.fused_on = fused


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic algorithms; on a CPU one thread, as MKL cannot be configured any more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def random_model(spec, setting: Setting) -> LatentDiffusion:
    """A whole model with random weights, prepared as for serving."""
    words = [tokenizers.clip(text.pad_id) for text in spec.texts] or [shapes.bert_tokenizer()]
    unet = random_network(lambda: UNet(spec.unet), setting)
    autoencoder = random_network(lambda: Autoencoder(spec.autoencoder), setting)
    whole = LatentDiffusion(spec, unet, autoencoder, shapes.conditioner(spec, words, setting))
    return prepare_for_device(whole, setting.device)


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.float() - exact.float()).norm() / exact.float().norm()).item()


def decibels(x: Tensor, exact: Tensor) -> float:
    """PSNR in dB of images in [-1, 1], rounded to 8 bits."""
    error = (to_uint8(x).float() - to_uint8(exact).float()).square().mean().item()
    return float("inf") if not error else 10 * torch.log10(torch.tensor(255**2 / error)).item()


def job_of(model: LatentDiffusion, name: str, steps: int, n: int = 1, **changes) -> Job:
    defaults = model.spec.defaults
    size = (defaults.width, defaults.height)
    plain_job = Job(name, model.spec.name, PROMPT, "", *size, steps, GUIDANCE, 0, n, "ddim", eta=0.0)
    return replace(plain_job, **changes)


def run(runner, jobs: Sequence[Job], at_once: int = 10**6) -> tuple[list[Event], list[float]]:
    """All events, and each job's seconds from submission to end. at_once: jobs in the engine at a time."""
    events: list[Event] = []
    ended: dict[str, float] = {}

    def record(event: Event) -> None:
        events.append(event)
        if isinstance(event, Done | Failed):
            ended[event.job] = time.monotonic() - begun[event.job]

    engine = Engine(runner, record, runner.buckets[-1], 4, time.monotonic)
    waiting, begun = list(reversed(jobs)), {}
    while waiting or engine.busy:
        while waiting and len(engine.jobs) < at_once:
            job = waiting.pop()
            begun[job.id] = time.monotonic()
            engine.submit(job)
        engine.tick()
    return events, list(ended.values())


def images(
    model: LatentDiffusion, jobs: Sequence[Job], buckets: Sequence[int], invariant: bool = False
) -> list[Tensor]:
    """The first image of each job, uint8 values as float32, by a new runner."""
    runner = TorchRunner(registry_of(model), buckets, invariant, device=model.device)
    events, _ = run(runner, jobs)
    done = {event.job: event for event in events if isinstance(event, Done)}
    return [torch.frombuffer(bytearray(done[job.id].images[0]), dtype=torch.uint8).float() for job in jobs]
