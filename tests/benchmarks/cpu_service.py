"""Mixed requests on a CPU: 16 at once over HTTP, and one after another by OpenVINO's own pipeline.

    python -m tests.benchmarks.cpu_service FOLDER [--shape half] [--size 256] [--steps 4 6 8 12] [--rounds 2]

The requests are all pairs of --steps and GUIDANCE, shuffled; guidance 1 is none. The other side is
openvino_genai.Text2ImagePipeline in this process, without HTTP, on the same random weights, from a folder as
optimum-intel exports it. Both have the same noise, and the difference of their images is printed. The model
and its export are written to FOLDER if they do not exist. --shape half: that of Stable Diffusion 1.5 with
half of its widths in UNet and VAE. Needs openvino-genai and openvino-tokenizers of openvino's version.
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openvino
import openvino_genai
import torch
from diffusers import StableDiffusionPipeline
from openvino_tokenizers import convert_tokenizer
from PIL import Image
from torch import Tensor, nn

from models.spec import ModelSpec
from service.bench.command import started
from service.settings import read_settings
from tests.benchmarks.cpu_rivals import Reference
from tests.benchmarks.machine import heading, others
from tests.benchmarks.shapes import PROMPT, SD15, TINY, Method
from tests.benchmarks.starts import write_model
from tests.helpers.images import psnr

GUIDANCE = (1.0, 1.0, 5.0, 7.5)  # half of the requests without
MIN_DB = 35.0  # of each image, against the pipeline's


def half(spec: ModelSpec) -> ModelSpec:
    """The same structure with half of the widths in UNet and VAE."""
    unet = replace(spec.unet_spec, channels=tuple(width // 2 for width in spec.unet_spec.channels))
    vae = replace(spec.autoencoder, channels=tuple(width // 2 for width in spec.autoencoder.channels))
    return replace(spec, name="half", unet=unet, autoencoder=vae)


SHAPES = {"half": half(SD15), "sd15": SD15, "tiny": TINY["sd15"].spec}


@dataclass(frozen=True)
class Request:
    """One image."""

    steps: int
    guidance: float
    seed: int
    size: int

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt": PROMPT, "steps": self.steps, "guidance_scale": self.guidance, "seed": self.seed,
            "width": self.size, "height": self.size, "sampler": "ddim",
        }  # fmt: skip


def export(model: Path, folder: Path) -> None:
    """Write a pipeline of diffusers for openvino_genai, in float32."""
    if folder.exists():
        return
    pipeline = StableDiffusionPipeline.from_pretrained(model, local_files_only=True)
    unet, vae, text = pipeline.unet, pipeline.vae, pipeline.text_encoder
    x = torch.randn(2, unet.config.in_channels, 16, 16)
    context = torch.randn(2, text.config.max_position_embeddings, unet.config.cross_attention_dim)
    ids = torch.zeros(2, text.config.max_position_embeddings, dtype=torch.long)
    names = ["sample", "timestep", "encoder_hidden_states"]
    write(Reference(unet), (x, torch.tensor([1]), context), names, "out_sample", folder / "unet")
    write(Reference(Method(vae, "decode")), (x,), ["latent_sample"], "sample", folder / "vae_decoder")
    write(Reference(text), (ids,), ["input_ids"], "last_hidden_state", folder / "text_encoder")
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae_decoder")
    text.config.save_pretrained(folder / "text_encoder")
    openvino.save_model(
        convert_tokenizer(pipeline.tokenizer), folder / "tokenizer" / "openvino_tokenizer.xml"
    )
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    shutil.copy(model / "model_index.json", folder)


@torch.no_grad()
def write(
    network: nn.Module, examples: tuple[Tensor, ...], names: list[str], output: str, folder: Path
) -> None:
    """Convert a network with inputs of any size."""
    model = openvino.convert_model(network.eval(), example_input=examples)
    for place, name in zip(model.inputs, names, strict=True):
        place.get_tensor().set_names({name})
    model.output(0).get_tensor().set_names({output})
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="half")
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 6, 8, 12])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backend", default="openvino", help="as of ldm serve")
    args = parser.parse_args()
    model = args.folder / args.shape
    write_model(model, SHAPES[args.shape])
    export(model, exported := args.folder / f"{args.shape}-openvino")
    requests = [Request(*pair, seed, args.size) for seed, pair in enumerate(product(args.steps, GUIDANCE))]
    random.Random(0).shuffle(requests)
    print(heading())
    print(
        f"{args.shape}, {args.size} x {args.size}, {len(requests)} requests, steps {args.steps}, "
        f"guidance {GUIDANCE}"
    )
    threads = torch.get_num_threads()  # the service uses as many
    pipeline = openvino_genai.Text2ImagePipeline(exported, "CPU", INFERENCE_NUM_THREADS=threads)
    settings = read_settings(flags={"model": str(model), "backend": args.backend})
    with started(settings) as (_, url), httpx.Client(base_url=url, timeout=None) as client:
        compare(client, pipeline, requests, args.rounds)


def compare(client: httpx.Client, pipeline: Any, requests: list[Request], rounds: int) -> None:
    """Print the seconds of all requests by each side, and the least PSNR of an image."""
    warm = [replace(request, steps=2) for request in requests[:4]]
    at_once(client, warm)
    one_at_a_time(pipeline, warm)
    sides = {
        "ours, all at once": lambda: at_once(client, requests),
        "openvino_genai, one at a time": lambda: one_at_a_time(pipeline, requests),
        "ours, one at a time": lambda: [by_service(client, request) for request in requests],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    images: dict[str, list[np.ndarray]] = {}
    with others() as beside:
        for _ in range(rounds):
            for name, run in sides.items():
                begin = time.perf_counter()
                files = run()
                seconds[name].append(time.perf_counter() - begin)
                images[name] = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    ours, theirs, _ = images.values()
    least = min(psnr(a, b) for a, b in zip(ours, theirs, strict=True))
    if least < MIN_DB:
        raise SystemExit(f"not compared: an image differs from the pipeline's by {least:.0f} dB")
    reference = min(seconds["openvino_genai, one at a time"])
    for name, own in seconds.items():
        runs = ", ".join(f"{each:.1f}" for each in own)
        print(
            f"{name:>30}: {runs} s, {len(requests) / min(own):.3f} images/s, {reference / min(own):.2f} times"
        )
    print(f"least PSNR between the two sides' images: {least:.0f} dB")
    print(f"other programs had {beside.share:.0%} of the cores", flush=True)


def at_once(client: httpx.Client, requests: list[Request]) -> list[bytes]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: by_service(client, request), requests))


def by_service(client: httpx.Client, request: Request) -> bytes:
    response = client.post("/generate", json=request.body, headers={"accept": "image/png"})
    return response.raise_for_status().content


def one_at_a_time(pipeline: Any, requests: list[Request]) -> list[bytes]:
    return [by_pipeline(pipeline, request) for request in requests]


def by_pipeline(pipeline: Any, request: Request) -> bytes:
    """The file of an image, as the service returns it."""
    tensor = pipeline.generate(
        PROMPT, width=request.size, height=request.size, num_inference_steps=request.steps,
        guidance_scale=request.guidance, generator=openvino_genai.TorchGenerator(request.seed),
    )  # fmt: skip
    file = io.BytesIO()
    Image.fromarray(tensor.data[0]).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
