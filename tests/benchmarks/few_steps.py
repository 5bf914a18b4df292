"""Whole images of few steps on a CPU: ours over HTTP and the pipeline of diffusers, on the same weights.

    python -m tests.benchmarks.few_steps FOLDER [--sizes 256 512] [--steps 1 4 8] [--backend openvino]

The model has the shape of Stable Diffusion 1.5 with random weights, and runs as models with LCM-LoRA or Turbo
do: without guidance, so one row a step, here by the sampler lcm. It and a tiny VAE are written to FOLDER if
they do not exist. Both sides have the same noise, run in turn, and the difference of their images is printed.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from pathlib import Path

import httpx
import numpy as np
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from PIL import Image

from models.dtypes import choose_dtype
from service.bench.command import started
from service.settings import read_settings
from tests.benchmarks.machine import heading, others
from tests.benchmarks.shapes import PROMPT, SD15, TINY
from tests.benchmarks.starts import write_model
from tests.checkpoints.tiny import fill_randomly
from tests.helpers.images import psnr

DECODERS = ("vae", "tiny")
SEED = 7


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512], help="sides in pixels")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=DECODERS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backend", default="openvino", help="as of ldm serve")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a trial run")
    args = parser.parse_args()
    write_model(args.folder / "model", TINY["sd15"].spec if args.tiny else SD15)
    write_tiny_vae(args.folder / "tiny-vae")
    print(heading())
    theirs = pipelines(args.folder)
    flags = {"model": str(args.folder / "model"), "tiny_vae": str(args.folder / "tiny-vae")}
    print(f"{'':>18} {'ours s':>15} {'diffusers s':>15} {'ratio of':>9} {'images':>8}")
    print(
        f"{'':>18} {'min':>7} {'median':>7} {'min':>7} {'median':>7} {'minima':>9} {'differ':>8}", flush=True
    )
    with (
        started(read_settings(flags=flags | {"backend": args.backend})) as (_, url),
        httpx.Client(base_url=url, timeout=None) as client,
        others() as beside,
    ):
        for size in args.sizes:
            for decoder in args.decoders:
                for steps in args.steps:
                    label = f"{size}, {decoder}, {steps} step{'s' * (steps > 1)}"
                    print(
                        f"{label:>18} {line(client, theirs[decoder], size, steps, decoder, args.rounds)}",
                        flush=True,
                    )
    print(f"other programs had {beside.share:.0%} of the cores")


def write_tiny_vae(folder: Path) -> None:
    if not folder.exists():
        network = AutoencoderTiny()
        fill_randomly(network, 0)
        network.save_pretrained(folder)


def pipelines(folder: Path) -> dict[str, DiffusionPipeline]:
    """By the decoder, with the same UNet."""
    dtype = choose_dtype("auto", torch.device("cpu"))
    first = StableDiffusionPipeline.from_pretrained(folder / "model", dtype=dtype, local_files_only=True)
    first.scheduler = LCMScheduler.from_config(first.scheduler.config)
    tiny = AutoencoderTiny.from_pretrained(folder / "tiny-vae", torch_dtype=dtype)
    second = StableDiffusionPipeline(**first.components | {"vae": tiny}, requires_safety_checker=False)
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    return {"vae": first, "tiny": second}


def line(
    client: httpx.Client, pipeline: DiffusionPipeline, size: int, steps: int, decoder: str, rounds: int
) -> str:
    """The seconds of both sides, and the PSNR between their images."""
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        ours = by_service(client, size, steps, decoder)
        middle = time.perf_counter()
        theirs = by_diffusers(pipeline, size, steps)
        seconds.append((middle - begin, time.perf_counter() - middle))
    cells = [f"{min(side):7.2f} {statistics.median(side):7.2f}" for side in zip(*seconds, strict=True)]
    first, second = (min(side) for side in zip(*seconds, strict=True))
    return f"{' '.join(cells)} {second / first:9.2f} {psnr(pixels(ours), pixels(theirs)):5.0f} dB"


def by_service(client: httpx.Client, size: int, steps: int, decoder: str) -> bytes:
    body = {"prompt": PROMPT, "width": size, "height": size, "seed": SEED, "sampler": "lcm", "steps": steps}
    body |= {"guidance_scale": 1.0} | ({"decoder": "tiny"} if decoder == "tiny" else {})
    return client.post("/generate", json=body, headers={"accept": "image/png"}).raise_for_status().content


@torch.inference_mode()
def by_diffusers(pipeline: DiffusionPipeline, size: int, steps: int) -> bytes:
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(1, 4, size // 8, size // 8, generator=generator)
    image = pipeline(
        PROMPT, width=size, height=size, num_inference_steps=steps, guidance_scale=1.0, generator=generator,
        latents=start.to(pipeline.dtype),
    ).images[0]  # fmt: skip
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


if __name__ == "__main__":
    main()
