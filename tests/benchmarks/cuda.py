"""Checks and times the service's GPU code: first whether the fast paths are right, then how fast they are.

    python -m tests.benchmarks.cuda [--device cuda] [--shapes NAME ...] [--steps N] [--without-compare]
    python -m tests.benchmarks.cuda --tiny --device cpu   rehearsal with small networks; times mean nothing

A check ends in "ok", "BAD" or "-" (does not apply to this device, or a package is missing). Whole images come
from the service's engine, without HTTP. Weights are random, so images show noise, but can be compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for bit-identical results; before cuBLAS starts

import torch
from torch import Tensor

from models.checkpoint import tokenizers
from models.latent_diffusion import LatentDiffusion, to_uint8
from models.networks import kernels
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from service.device.determinism import configure_determinism
from service.device.graphs import graphs_on
from service.device.runner import TorchRunner
from service.device.select import choose_device, choose_dtype, prepare_for_device
from service.engine.engine import Engine
from service.engine.events import Done, Event, Failed
from service.engine.job import ImageKey, Job
from service.errors import DeviceLost
from service.worker.faults import FaultyRunner, read_faults
from tests.benchmarks import shapes
from tests.benchmarks.shapes import (
    GUIDANCE,
    PROMPT,
    Setting,
    SingleModelRegistry,
    random_network,
    unet_inputs,
)

PEAK_FLOPS = 790e12  # FLOP/s that float16 matrix products reach on an H200
MAX_EPS_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # relative
MIN_IMAGE_DB = 35.0  # PSNR against float32
BUCKETS = (2, 4, 8, 16, 32)
IMAGES = (1, 4, 8, 16)
CLIENTS = 16
ASSERTION = """
import torch
from service.device.torch_errors import translate_device_lost
with translate_device_lost():
    torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")].sum().item()
"""


@dataclass(frozen=True)
class Check:
    """The result of a check. fine: None if it does not apply here."""

    shape: str
    what: str
    fine: bool | None
    figure: str = ""


def main() -> None:
    args = parser().parse_args()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    configure_determinism(0, invariant=False)
    begin = time.monotonic()
    setting = Setting(device, dtype, steps=args.steps)
    all_shapes = shapes.TINY if args.tiny else shapes.SHAPES
    print(f"{time.strftime('%Y-%m-%d')}, {name_of(device)}, {dtype}, torch {torch.__version__}", flush=True)
    fine = True
    for name in args.shapes:
        for check in checks(all_shapes[name], setting):
            fine &= check.fine is not False
            verdict = {True: "ok", False: "BAD", None: "-"}[check.fine]
            print(f"{check.shape:10} {check.what:58} {verdict:4} {check.figure}", flush=True)
    logging.disable()  # jobs fail on purpose here
    fine &= print_faults(setting)
    logging.disable(logging.NOTSET)
    for name in args.shapes:
        print_speed(all_shapes[name], setting, args)
    if not args.without_compare:
        print_compared(args)
    print_served(args)
    print(f"{time.monotonic() - begin:.0f} s in all")
    raise SystemExit(0 if fine else 1)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    top.add_argument("--shapes", nargs="+", choices=tuple(shapes.SHAPES), default=tuple(shapes.SHAPES))
    top.add_argument("--device", default="cuda")
    top.add_argument("--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto")
    top.add_argument("--steps", type=int, default=0, help="of timed images (default: the model's own)")
    top.add_argument("--tiny", action="store_true", help="small networks, for a rehearsal")
    top.add_argument("--without-compare", action="store_true", help="leave diffusers out")
    return top


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def random_model(spec, setting: Setting) -> LatentDiffusion:
    """A whole model with random weights, prepared as for serving."""
    words = [tokenizers.clip(text.pad_id) for text in spec.texts] or [shapes.bert_tokenizer()]
    unet = random_network(lambda: UNet(spec.unet), setting)
    autoencoder = random_network(lambda: Autoencoder(spec.autoencoder), setting)
    whole = LatentDiffusion(spec, unet, autoencoder, shapes.conditioner(spec, words, setting))
    return prepare_for_device(whole, setting.device)


@contextmanager
def plain() -> Iterator[None]:
    """Switches fused kernels off."""
    fused, kernels.fused_on = kernels.fused_on, lambda device: None
    try:
        yield
    finally:
        kernels.fused_on = fused


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.float() - exact.float()).norm() / exact.float().norm()).item()


def decibels(x: Tensor, exact: Tensor) -> float:
    """PSNR in dB of images in [-1, 1], rounded to 8 bits."""
    error = (to_uint8(x).float() - to_uint8(exact).float()).square().mean().item()
    return float("inf") if not error else 10 * torch.log10(torch.tensor(255**2 / error)).item()


@torch.inference_mode()
def checks(shape: shapes.Shape, setting: Setting) -> Iterator[Check]:
    """Each fast path against plain float32 on the same device."""
    spec, name, device = shape.spec, shape.spec.name, setting.device
    model = random_model(spec, setting)
    exact = model.copy(torch.float32)
    x, t, context, pooled = unet_inputs(spec, 4, setting)
    with plain():
        wanted = exact.denoiser(x, t, context, pooled)
    graphs = graphs_on(device)

    def eps() -> Tensor:
        return graphs.run(model.unet, model.denoiser, x, t, context, pooled)

    first, *replayed = (eps() for _ in range(4))
    bound = MAX_EPS_ERROR[model.unet.dtype]
    yield Check(name, f"eps in {model.unet.dtype}", (e := relative_error(first, wanted)) <= bound, f"{e:.1e}")
    graph = all(torch.equal(first, again) for again in replayed) if device.type == "cuda" else None
    yield Check(name, "a replayed graph gives the same bits as the call", graph)
    fused = kernels.fused_on(device) is not None if device.type == "cuda" else None
    yield Check(name, "fused kernels are in use", fused)
    z = shapes.latents(spec, 1, setting).float()
    with plain():
        wanted = exact.decode(z)
    del exact
    first, *again = (graphs.run(model.autoencoder, model.decode, z) for _ in range(3))
    db = decibels(first, wanted)
    yield Check(name, f"D in {model.autoencoder.dtype}", db >= MIN_IMAGE_DB, f"{db:.0f} dB")
    if device.type == "cuda":
        yield Check(name, "D's graph gives the same bits", all(torch.equal(first, one) for one in again))
    yield from check_invariance(model, setting)
    yield check_waits(model)


def check_invariance(model: LatentDiffusion, setting: Setting) -> Iterator[Check]:
    """Whether a row's bits depend on the other rows or on its position, at one batch size."""
    size, name = 8, model.spec.name
    x, t, context, pooled = unet_inputs(model.spec, size, setting)
    graphs, threads = graphs_on(setting.device), torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # with more threads, MKL on a CPU would have to be configured before its first call
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False

    def row(order: Sequence[int]) -> Tensor:
        """The result for input 0 in a call with these inputs as rows."""
        index = torch.tensor(order, device=setting.device)
        given = [None if rows is None else rows[index] for rows in (x, t, context, pooled)]
        return graphs.run(model.unet, model.denoiser, *given)[order.index(0)]

    try:
        alone = row([0] * size)  # the first call runs directly; later ones are replayed from the graph
        others = [row([0, *range(1, size)]), row([*range(1, size), 0]), row([3, 3, 3, 0, 5, 5, 1, 1])]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    same = all(torch.equal(alone, other) for other in others)
    yield Check(name, "--invariant: same bits with any other rows, at any position", same)


def check_waits(model: LatentDiffusion) -> Check:
    """Whether a step waits for the device, by torch's own detection (set_sync_debug_mode).

    The only intended wait, for the event of the previous step, is not detected by it.
    """
    what = "no wait for the device in a step"
    if model.device.type != "cuda":
        return Check(model.spec.name, what, None)
    runner = TorchRunner(SingleModelRegistry(model), BUCKETS, device=model.device)
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
    except RuntimeError as error:
        return Check(model.spec.name, what, False, str(error).splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    runner.settle()
    return Check(model.spec.name, what, True)


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


def print_faults(setting: Setting) -> bool:
    """Injected faults, with a small network; on a GPU also a real one, in its own process."""
    model = random_model(shapes.TINY["sd15"].spec, setting)
    fine = True
    for fault in ("step:nan:poison:1", "step:nan:poison", "step:oom:poison"):
        outcome = Done if fault.endswith("1") else Failed
        runner = FaultyRunner(
            TorchRunner(SingleModelRegistry(model), BUCKETS, device=setting.device), read_faults(fault)
        )
        jobs = [job_of(model, "a", 3), job_of(model, "b", 3, prompt="poison"), job_of(model, "c", 4)]
        events, _ = run(runner, jobs)
        ends = {event.job: type(event) for event in events if isinstance(event, Done | Failed)}
        right = ends == {"a": Done, "b": outcome, "c": Done}
        fine &= right
        print(f"{'faults':10} {fault + ': its job alone':58} {'ok' if right else 'BAD'}", flush=True)
    if setting.device.type == "cuda":
        done = subprocess.run([sys.executable, "-c", ASSERTION], capture_output=True, text=True)
        right = DeviceLost.__name__ in done.stderr
        fine &= right
        print(f"{'faults':10} {'an assertion in a kernel is a lost device':58} {'ok' if right else 'BAD'}")
    return fine


def flops_of(model: LatentDiffusion, steps: int, setting: Setting) -> int:
    """Floating point operations of one guided image: UNet and D, without the text encoder."""
    pair = shapes.flops_of(model.unet, *unet_inputs(model.spec, 2, setting))
    z = shapes.latents(model.spec, 1, setting)
    return steps * pair + shapes.flops_of(model.autoencoder, z, method="decode")


def print_speed(shape: shapes.Shape, setting: Setting, args: argparse.Namespace) -> None:
    """Times whole images in batches, and a mixed load against the same jobs one at a time."""
    model = random_model(shape.spec, setting)
    runner = TorchRunner(SingleModelRegistry(model), BUCKETS, device=setting.device)
    steps = setting.steps or shape.spec.defaults.steps
    work = flops_of(model, steps, setting)
    print(f"\n{shape.spec.name}, {steps} guided steps, {work / 1e12:.3g} TFLOP an image")
    for n in IMAGES[:2] if args.tiny else IMAGES:
        run(runner, [job_of(model, "warm", 5, n)])
        seconds = statistics.median(sum(run(runner, [job_of(model, "j", steps, n)])[1]) for _ in range(2))
        rate = n / seconds
        share = f"{rate * work / PEAK_FLOPS:.1%} of 790 TFLOP/s"
        print(f"  {n:2} at once: {rate:8.3f} images/s, {seconds:.3f} s, {share}", flush=True)
    jobs = mixed(model, 8 if args.tiny else 32, setting.steps)
    run(runner, jobs)
    (one, _), (many, seconds) = (timed(lambda c=c: run(runner, jobs, c)[1]) for c in (1, CLIENTS))
    seconds.sort()
    at = [seconds[int(share * (len(seconds) - 1))] for share in (0.5, 0.99)]
    print(
        f"  mixed, {CLIENTS} clients: {len(jobs) / many:.3f} images/s, {one / many:.2f} times one at a time; "
        f"latency p50 {at[0]:.2f} s, p99 {at[1]:.2f} s",
        flush=True,
    )


def mixed(model: LatentDiffusion, count: int, steps: int) -> list[Job]:
    """Jobs with different step counts, 10 to 50 or half to all of `steps`; one in four without guidance."""
    draw = torch.Generator().manual_seed(0)
    low, high = (max(1, steps // 2), steps + 1) if steps else (10, 51)
    lengths = torch.randint(low, high, (count,), generator=draw).tolist()
    return [
        job_of(model, str(index), length, seed=index, guidance_scale=GUIDANCE if index % 4 else 1.0)
        for index, length in enumerate(lengths)
    ]


def timed(call: Callable[[], list[float]]) -> tuple[float, list[float]]:
    begin = time.monotonic()
    out = call()
    return time.monotonic() - begin, out


def print_compared(args: argparse.Namespace) -> None:
    """Times whole images against diffusers with its default options."""
    if importlib.util.find_spec("diffusers") is None:
        print("\ndiffusers is not installed: not compared with it")
        return
    print("\nagainst diffusers with default options", flush=True)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "lines.json"
        command = [sys.executable, "-m", "tests.benchmarks.compare", *args.shapes, "--parts", "images"]
        command += ["--rounds", "2"]
        command += ["--device", args.device, "--dtype", args.dtype, "--json", str(file)]
        command += ["--steps", str(args.steps)] if args.steps else []
        subprocess.run([*command, "--tiny"] if args.tiny else [*command, "--batches", "1", "8"], check=False)
        for line in json.loads(file.read_text()) if file.exists() else []:
            ratio = line["theirs"] / line["ours"]
            print(f"  {line['shape']}, {line['batch']} at once: {ratio:.2f} times diffusers")


def print_served(args: argparse.Namespace) -> None:
    """Times the bundled model: from start to the first image, and over HTTP."""
    wanted = ("fastapi", "uvicorn", "httpx", "pydantic")
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        print(f"\nnot timed over HTTP: {', '.join(missing)} not installed")
        return
    cli = [sys.executable, "-m", "service.cli"]
    with TemporaryDirectory() as folder:
        one = [*cli, "generate", PROMPT, "-o", str(Path(folder) / "one.png"), "--device", args.device]
        begin = time.monotonic()
        subprocess.run(one, check=True, capture_output=True)
        print(f"\nemoji: from start to the first image: {time.monotonic() - begin:.1f} s", flush=True)
    few = ["--requests", "8", "--clients", "4"] if args.tiny else ["--requests", "256", "--clients", "32"]
    load = [*cli, "bench", "--model", "emoji", "--device", args.device, *few]
    subprocess.run(load, check=False, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
