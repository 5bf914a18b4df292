"""Two replicas against one on the same CPU, alternating: python -m tests.benchmarks.replicas

calls: UNet calls alone, without a server: as many processes as replicas, each with one thread. Nothing that
shares this machine's cores and caches can gain more. images: `ldm bench` on a server with one and with two
replicas, each with one thread, and the CPU seconds that each process needs for an image. small: the latency
of small requests while a large one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import httpx

from service.bench.command import started
from service.settings import Settings, read_settings
from service.worker.child import environment
from tests.benchmarks.policies import quantile

REPLICAS = (1, 2)
LARGE = {"prompt": "red apple", "n": 16, "steps": 50, "seed": 1}
SMALL = {"prompt": "ghost", "n": 1, "steps": 10, "seed": 2}
PAUSE_SECONDS = 0.2  # between two small requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measure", nargs="+", choices=[*MEASURES, "loop"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=48, help="of images")
    parser.add_argument("--clients", type=int, default=16, help="of images")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32], help="of calls")
    parser.add_argument("--seconds", type=float, default=5.0, help="of calls")
    args = parser.parse_args()
    for name in args.measure:
        MEASURES[name](args)


def settings_for(replicas: int) -> Settings:
    return read_settings(flags={"replicas": str(replicas), "threads": str(replicas), "queue_size": "1000"})


# calls


def calls(args: argparse.Namespace) -> None:
    """Rows per second of UNet calls in one and in two processes."""
    for rows in args.rows:
        for _ in range(args.pairs):
            one, two = (sum(loops(number, rows, args.seconds)) for number in REPLICAS)
            show(f"calls of {rows} rows", one, two, "rows/s")


def loops(processes: int, rows: int, seconds: float) -> list[float]:
    """Rows per second of each of several processes that run at the same time."""
    command = [sys.executable, "-P", "-m", "tests.benchmarks.replicas", "loop"]
    command += ["--rows", str(rows), "--seconds", str(seconds)]
    env = environment(settings_for(1)) | {"OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            for _ in range(processes)
        ]
        for child in children:  # all are warm before any is timed
            assert child.stdout
            child.stdout.readline()
        for child in children:
            assert child.stdin
            child.stdin.write("go\n")
            child.stdin.flush()
        return [float(child.stdout.readline()) for child in children if child.stdout]


def loop(args: argparse.Namespace) -> None:
    """UNet calls of the bundled model until the time is over, after a line on stdin."""
    import torch

    from models.checkpoint import load
    from models.dtypes import choose_dtype
    from models.latent_diffusion import LatentDiffusion
    from service.model_paths import bundled

    torch.set_num_threads(1)
    model: LatentDiffusion = load(bundled("emoji"), dtype=choose_dtype("auto", torch.device("cpu")))
    [rows], spec = args.rows, model.spec
    _, *size = spec.latent_shape(spec.defaults.width, spec.defaults.height)
    x = torch.randn(rows, spec.unet.in_channels, *size)
    context, t = torch.randn(rows, *spec.context_shape), torch.linspace(1, 981, rows)
    with torch.inference_mode():
        for _ in range(2):
            model.unet(x, t, context)
        print("ready", flush=True)
        input()
        done, begin = 0, time.monotonic()
        while time.monotonic() - begin < args.seconds:
            model.unet(x, t, context)
            done += rows
        print(done / (time.monotonic() - begin), flush=True)


# images


class Served(NamedTuple):
    """Images per second, rows per UNet call, padding rows per call, and CPU seconds per image by process."""

    speed: float
    rows: float
    padding: float
    cpu: dict[str, float]


def images(args: argparse.Namespace) -> None:
    """Images per second over HTTP of one and of two replicas."""
    for _ in range(args.pairs):
        one, two = (serve(number, args) for number in REPLICAS)
        show("images", one.speed, two.speed, "images/s")
        for served in (one, two):
            parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in served.cpu.items())
            print(
                f"    {served.rows:.1f} rows per call and {served.padding:.1f} of padding; "
                f"CPU seconds per image: {parts}"
            )


def serve(replicas: int, args: argparse.Namespace) -> Served:
    with started(settings_for(replicas)) as (server, url), TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-P", "-m", "service.cli", "bench", "--url", url, "--json", str(report)]
        command += ["--requests", str(args.requests), "--clients", str(args.clients)]
        before = cpu_seconds(server.pid)
        own = os.times()
        subprocess.run(
            command,
            env=environment(settings_for(1)),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        used = {name: seconds - before[name] for name, seconds in cpu_seconds(server.pid).items()}
        after = os.times()
        used["ldm bench"] = sum(after[2:4]) - sum(own[2:4])
        load = json.loads(report.read_text())["load"]
    cpu = {name: seconds / load["images"] for name, seconds in used.items()}
    return Served(load["images_per_second"], load["rows_per_call"], load["padding_per_call"], cpu)


def cpu_seconds(server: int) -> dict[str, float]:
    """CPU seconds of the API process and of each of its workers so far."""
    workers = [int(child) for child in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
    named = {"API process": server} | {f"worker {number}": pid for number, pid in enumerate(sorted(workers))}
    return {name: seconds_of(pid) for name, pid in named.items()}


def seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# small


def small(args: argparse.Namespace) -> None:
    """Latencies of small requests, one after the other, while a large one runs."""
    found: dict[int, list[float]] = {number: [] for number in REPLICAS}
    for _ in range(args.pairs):
        for number, latencies in found.items():
            with started(settings_for(number)) as (_, url):
                latencies += beside_large(url)
    for q in (0.5, 0.99):
        one, two = (quantile(sorted(latencies), q) for latencies in found.values())
        print(f"small beside large, p{q * 100:g}: {one:.2f} s with one replica, {two:.2f} s with two")
    print(f"  of {' and '.join(str(len(latencies)) for latencies in found.values())} small requests")


def beside_large(url: str) -> Iterator[float]:
    """The latency of each small request that was answered while a large one ran."""
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=url, timeout=None) as client:
        client.post("/generate", json=SMALL).raise_for_status()
        large = pool.submit(httpx.post, f"{url}/generate", json=LARGE, timeout=None)
        time.sleep(1.0)
        while True:
            begin = time.monotonic()
            client.post("/generate", json=SMALL).raise_for_status()
            if large.done():
                return
            yield time.monotonic() - begin
            time.sleep(PAUSE_SECONDS)


def show(name: str, one: float, two: float, unit: str) -> None:
    print(f"{name}: {one:.2f} and {two:.2f} {unit}, {two / one:.2f} times", flush=True)


MEASURES = {"calls": calls, "images": images, "small": small, "loop": loop}

if __name__ == "__main__":
    main()
