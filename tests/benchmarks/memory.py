"""Memory of a worker on a CPU: python -m tests.benchmarks.memory [--sd15 FOLDER] [--jobs N]

The peak resident size with Stable Diffusion 1.5's shape at 512 x 512, against the size of its weights as they
are served: after the start, after one image, and after 16 images of one request. FOLDER is written if it does
not exist. Then the resident size while the bundled model runs many jobs.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import torch

from models.checkpoint.parts import count_parameters
from models.dtypes import DTYPES, choose_dtype
from service.bench.command import started
from service.settings import Settings, read_settings
from tests.benchmarks.shapes import SD15
from tests.benchmarks.starts import write_model

GIB = 2**30
CLIENTS = 4
PARTS = 10  # of the jobs of the bundled model, after each of which its memory is read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sd15", type=Path, help="measure this folder")
    parser.add_argument("--jobs", type=int, default=500, help="of the bundled model")
    parser.add_argument("--backend", default="auto", help="as of ldm serve")
    args = parser.parse_args()
    if args.sd15:
        write_model(args.sd15)
        stable_diffusion(read_settings(flags={"model": str(args.sd15), "backend": args.backend}))
    if args.jobs:
        bundled(read_settings(flags={"model": "emoji", "backend": args.backend}), args.jobs)


def stable_diffusion(settings: Settings) -> None:
    dtype = choose_dtype(settings.dtype, torch.device("cpu"))
    name = next(name for name, each in DTYPES.items() if each == dtype)
    weights = count_parameters(SD15) * dtype.itemsize
    print(f"Stable Diffusion 1.5 in {name}: weights {weights / GIB:.2f} GiB", flush=True)
    with started(settings) as (server, url):
        show_peak("ready", server.pid, weights)
        for n in (1, 16):
            body = {"prompt": "a red apple", "n": n, "steps": 2, "width": 512, "height": 512}
            httpx.post(f"{url}/generate", json=body, timeout=None).raise_for_status()
            show_peak(f"{n} images" if n > 1 else "1 image", server.pid, weights)


def show_peak(when: str, server: int, weights: int) -> None:
    status = Path(f"/proc/{worker_of(server).pid}/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(f"  {when}: peak {peak / GIB:.2f} GiB, {peak / weights:.2f} times the weights", flush=True)


def bundled(settings: Settings, jobs: int) -> None:
    """The worker's resident size after each part of the jobs."""
    with started(settings) as (server, url), httpx.Client(base_url=url, timeout=None) as client:

        def generate(number: int) -> None:
            body = {"prompt": f"apple {number}", "steps": 4 + number % 5, "n": 1 + number % 3, "seed": number}
            client.post("/generate", json=body).raise_for_status()

        sizes = []
        with ThreadPoolExecutor(CLIENTS) as pool:
            for part in range(PARTS):
                list(pool.map(generate, range(part * jobs // PARTS, (part + 1) * jobs // PARTS)))
                sizes.append(worker_of(server.pid).memory_info().rss / 2**20)
    print(f"emoji, MiB after each {jobs // PARTS} of {jobs} jobs:", *(f"{size:.0f}" for size in sizes))


def worker_of(server: int) -> psutil.Process:
    return psutil.Process(server).children()[0]


if __name__ == "__main__":
    main()
