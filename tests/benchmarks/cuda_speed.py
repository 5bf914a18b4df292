"""Measurements of the GPU benchmark: whole images in batches, a mixed load, diffusers, HTTP, a profile."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from models.latent_diffusion import LatentDiffusion
from service.device.runner import TorchRunner
from tests.benchmarks import shapes
from tests.benchmarks.cuda_checks import BUCKETS, job_of, random_model, run
from tests.benchmarks.cuda_report import Report, this_module
from tests.benchmarks.shapes import GUIDANCE, PROMPT, Setting, registry_of, unet_inputs

PEAK_FLOPS = 790e12  # FLOP/s that float16 matrix products reach on an H200
IMAGES = (1, 4, 8, 16)
CLIENTS = 16
MIXED_JOBS = 32
KERNELS = 25  # of a profile
PROFILED_ROWS = (2, 32)
HTTP_PACKAGES = ("fastapi", "uvicorn", "httpx", "pydantic")
SUBPROCESS_SECONDS = 120


def measure_speed(shape: shapes.Shape, setting: Setting, report: Report, small: bool) -> None:
    """Times whole images in batches, and a mixed load against the same jobs one at a time."""
    model = random_model(shape.spec, setting)
    runner = TorchRunner(registry_of(model), BUCKETS, device=setting.device)
    name, steps = shape.spec.name, setting.steps or shape.spec.defaults.steps
    work = flops_of(model, steps, setting)
    report.write(f"\n{name}, {steps} guided steps, {work / 1e12:.3g} TFLOP an image")
    for n in IMAGES[:2] if small else IMAGES:
        run(runner, [job_of(model, "warm", 5, n)])
        seconds = statistics.median(sum(run(runner, [job_of(model, "j", steps, n)])[1]) for _ in range(2))
        rate = n / seconds
        share = rate * work / PEAK_FLOPS
        text = f"{n:2} at once: {rate:8.3f} images/s, {seconds:.3f} s, {share:.1%} of 790 TFLOP/s"
        report.figure(text, shape=name, at_once=n, images_per_second=rate, seconds=seconds, share=share)
    jobs = mixed(model, 8 if small else MIXED_JOBS, setting.steps)
    run(runner, jobs)
    (one, _), (many, seconds) = (timed(lambda c=c: run(runner, jobs, c)[1]) for c in (1, CLIENTS))
    p50, p99 = (sorted(seconds)[int(share * (len(seconds) - 1))] for share in (0.5, 0.99))
    report.figure(
        f"mixed, {CLIENTS} clients: {len(jobs) / many:.3f} images/s, {one / many:.2f} times one at a time; "
        f"latency p50 {p50:.2f} s, p99 {p99:.2f} s",
        shape=name, clients=CLIENTS, images_per_second=len(jobs) / many, ratio=one / many, p50=p50, p99=p99,
    )  # fmt: skip


@torch.inference_mode()
def profile(shape: shapes.Shape, setting: Setting, report: Report) -> None:
    """The kernels that take most of the time of one UNet call."""
    model = random_model(shape.spec, setting)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for rows in PROFILED_ROWS:
        inputs = unet_inputs(shape.spec, rows, setting)
        for _ in range(3):
            model.denoiser(*inputs)
        with torch.profiler.profile(activities=activities) as profiler:
            model.denoiser(*inputs)
        order = f"self_{setting.device.type}_time_total"
        report.write(f"\n{shape.spec.name}, one UNet call of {rows} rows")
        report.write(
            profiler.key_averages().table(sort_by=order, row_limit=KERNELS, max_name_column_width=80)
        )


def compare(names: list[str], report: Report, options: list[str]) -> None:
    """Times whole images against diffusers: with its default options, and compiled."""
    if importlib.util.find_spec("diffusers") is None:
        report.write("\ndiffusers is not installed: not compared with it")
        return
    for theirs in ([], ["--compiled"]):
        report.write(f"\nagainst diffusers {'compiled' if theirs else 'with default options'}")
        with TemporaryDirectory() as folder:
            file = Path(folder) / "lines.json"
            command = this_module("compare", *names, "--parts", "images", "--rounds", "2", "--keep-differing")
            subprocess.run([*command, *options, *theirs, "--json", str(file)], check=False)
            for line in json.loads(file.read_text()) if file.exists() else []:
                ratio = line["theirs"] / line["ours"]
                text = f"{line['shape']}, {line['batch']} at once: {ratio:.2f} times diffusers"
                report.figure(text + ("" if line["agrees"] else ", images differ"), **line, ratio=ratio)


def serve(report: Report, device: str, small: bool) -> None:
    """Times the bundled model: from start to the first image, and over HTTP."""
    if missing := [name for name in HTTP_PACKAGES if importlib.util.find_spec(name) is None]:
        report.write(f"\nnot timed over HTTP: {', '.join(missing)} not installed")
        return
    cli = [sys.executable, "-m", "service.cli"]
    with TemporaryDirectory() as folder:
        one = [*cli, "generate", PROMPT, "-o", str(Path(folder) / "one.png"), "--device", device]
        begin = time.monotonic()
        subprocess.run(one, check=True, capture_output=True, timeout=SUBPROCESS_SECONDS)
        seconds = time.monotonic() - begin
    report.write(f"\nemoji: from start to the first image: {seconds:.1f} s", first_image_seconds=seconds)
    few = ["--requests", "8", "--clients", "4"] if small else ["--requests", "256", "--clients", "32"]
    load = [*cli, "bench", "--model", "emoji", "--device", device, *few]
    subprocess.run(load, check=True, stderr=subprocess.DEVNULL, timeout=SUBPROCESS_SECONDS)


def flops_of(model: LatentDiffusion, steps: int, setting: Setting) -> int:
    """Floating point operations of one guided image: UNet and VAE decoder, without the text encoder."""
    pair = shapes.flops_of(model.unet, *unet_inputs(model.spec, 2, setting))
    z = shapes.latents(model.spec, 1, setting)
    return steps * pair + shapes.flops_of(model.autoencoder, z, method="decode")


def mixed(model: LatentDiffusion, count: int, steps: int) -> list:
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
