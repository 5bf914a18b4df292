"""How long a server needs until it is ready, in parts: python -m tests.benchmarks.starts [--sd15 FOLDER]

The bundled models, and a Stable Diffusion 1.5 of the published shape with random weights in float32, which is
written to FOLDER if that does not exist. One start is not counted, so that files are in the page cache.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import torch

from models.checkpoint import save, tokenizers
from models.latent_diffusion import LatentDiffusion
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from models.spec import ModelSpec
from service.bench.command import free_port
from service.settings import read_settings
from service.worker.child import environment
from tests.benchmarks.shapes import SD15, Setting, conditioner, random_network

PART = re.compile(r'^ldm_start_seconds\{part="(.*?)",replica="0"\} (\S+)$', re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sd15", type=Path, help="also measure this folder")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--backend", default="auto", help="as of ldm serve")
    args = parser.parse_args()
    models = {"bundled models": {}}
    if args.sd15:
        write_model(args.sd15)
        models["Stable Diffusion 1.5"] = {"model": str(args.sd15)}
    for name, flags in models.items():
        starts = [start({"backend": args.backend, **flags}) for _ in range(args.times + 1)][1:]
        middle = {part: statistics.median(each[part] for each in starts) for part in starts[0]}
        shown = ", ".join(f"{part} {seconds:.2f}" for part, seconds in middle.items() if seconds >= 0.005)
        print(f"{name}: {shown}", flush=True)


def start(flags: dict[str, str]) -> dict[str, float]:
    """Seconds until /health/ready, those of the worker and each of its parts."""
    settings = read_settings(flags={"log_level": "error", "port": str(port := free_port()), **flags})
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "service.cli", "serve"], env=environment(settings)
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait_until_ready(process, client)
            ready = time.monotonic() - begin
            parts = dict(PART.findall(client.get("/metrics").text))
        return {"ready": ready} | {part: float(seconds) for part, seconds in parts.items()}
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], client: httpx.Client) -> None:
    while process.poll() is None:
        with suppress(httpx.TransportError):
            if client.get("/health/ready").status_code == 200:
                return
        time.sleep(0.02)
    raise RuntimeError("the server did not start")


def write_model(folder: Path, spec: ModelSpec = SD15) -> None:
    """A folder of this shape with random weights in float32 (SD 1.5: 4 GB); one that exists is left alone."""
    if folder.exists():
        return
    setting = Setting(torch.device("cpu"), torch.float32)
    save(
        LatentDiffusion(
            spec,
            random_network(lambda: UNet(spec.unet_spec), setting),
            random_network(lambda: Autoencoder(spec.autoencoder), setting),
            conditioner(spec, [tokenizers.clip(text.pad_id) for text in spec.texts], setting),
        ),
        folder,
        torch.float32,
    )


if __name__ == "__main__":
    main()
