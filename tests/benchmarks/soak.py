"""Mixed load for a long time: do memory, file descriptors and threads stay flat?

python -m tests.benchmarks.soak --minutes 30 --chart soak.png

Clients generate, edit and upscale images in all APIs, follow, cancel and abandon jobs, send bad bodies, and
load and unload a second model. Every few seconds the resident memory, the file descriptors and the threads of
the server's processes are read. The table compares the means of two spans of a fifth of the run: the one that
follows the first sixth (five minutes of thirty), and the last one.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import psutil
from PIL import Image, ImageDraw

from service.bench.chart import Panel
from service.bench.command import started
from service.settings import read_settings
from tests.benchmarks.soak_load import SECOND_MODEL, client_loop
from tests.helpers.environment import ROOT

SAMPLE_SECONDS = 5.0
QUANTITIES = ("MiB", "file descriptors", "threads")
COLOURS = {"API process": "#2a78d6", "worker": "#eb6834"}
COLOUR_NAMES = {"API process": "blue", "worker": "orange"}
MARGIN, WIDTH, HEIGHT, SCALE = 70, 900, 220, 2


class Sample(NamedTuple):
    """One process at one moment, `at` seconds after the start."""

    at: float
    mib: float
    descriptors: int
    threads: int


Samples = dict[str, list[Sample]]  # by process


def main() -> None:
    args = parse()
    outcomes: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "weights" / "emoji", Path(folder) / SECOND_MODEL)
        flags = {"model": "emoji,emoji-upscale", "model_dir": folder, "controlnet": "outline=emoji-outline"}
        flags |= {"jobs_kept": "16"}  # so that the kept jobs are as many as they may be within minutes
        flags |= {"lora": f"few-steps={ROOT / 'weights' / 'emoji-few-steps'}", "queue_size": "64"}
        with started(read_settings(flags=flags)) as (process, url):
            samples = run(args, url, process.pid, outcomes)
    for name, outcome in sorted(outcomes):
        print(f"{name:16}{outcome:24}{outcomes[name, outcome]:7}")
    print(*table(samples), sep="\n")
    if args.chart:
        chart(samples).save(args.chart)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chart", type=Path, help="a PNG file to write")
    return parser.parse_args()


def run(args: argparse.Namespace, url: str, pid: int, outcomes: Counter[tuple[str, str]]) -> Samples:
    """Run the clients; returns the samples of the server's processes."""
    begin, lock = time.monotonic(), threading.Lock()
    end = begin + 60 * args.minutes

    def record(name: str, outcome: str) -> None:
        with lock:
            outcomes[name, outcome] += 1

    samples: Samples = {name: [] for name in COLOURS}
    with ThreadPoolExecutor(args.clients) as pool:
        clients = [
            pool.submit(client_loop, url, 1000 * args.seed + index, end, record)
            for index in range(args.clients)
        ]
        while time.monotonic() < end:
            time.sleep(SAMPLE_SECONDS)
            server = psutil.Process(pid)
            (worker,) = server.children()
            for name, process in (("API process", server), ("worker", worker)):
                samples[name].append(sample(process, time.monotonic() - begin))
        for client in clients:
            client.result()
    return samples


def sample(process: psutil.Process, at: float) -> Sample:
    with process.oneshot():
        return Sample(at, process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())


def table(samples: Samples) -> list[str]:
    """The lines of the table: early mean, late mean, growth."""
    lines = [f"{'':32}{'early':>10}{'late':>10}{'growth':>10}"]
    for name, taken in samples.items():
        early, late = spans(taken)
        for index, quantity in enumerate(QUANTITIES, start=1):
            before, after = (mean(float(each[index]) for each in span) for span in (early, late))
            lines.append(f"{name + ', ' + quantity:32}{before:10.1f}{after:10.1f}{after / before - 1:10.1%}")
    return lines


def spans(taken: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The samples of the two spans that are compared."""
    last = taken[-1].at
    early = [each for each in taken if last / 6 <= each.at <= last / 6 + last / 5]
    return early, [each for each in taken if each.at >= last * 4 / 5]


def chart(samples: Samples) -> Image.Image:
    """The three quantities over time, one panel each."""
    size = (WIDTH + 2 * MARGIN, len(QUANTITIES) * (HEIGHT + 2 * MARGIN))
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    draw = ImageDraw.Draw(image)
    for index, quantity in enumerate(QUANTITIES, start=1):
        top = (index - 1) * (HEIGHT + 2 * MARGIN) + MARGIN
        most = max(float(each[index]) for taken in samples.values() for each in taken)
        last = max(taken[-1].at for taken in samples.values()) / 60
        panel = Panel(draw, (MARGIN, top, MARGIN + WIDTH, top + HEIGHT), last, 1.2 * most)
        panel.axes(quantity, "minutes", " and ".join(f"{name} ({COLOUR_NAMES[name]})" for name in samples))
        for name, taken in samples.items():
            panel.line([(each.at / 60, float(each[index])) for each in taken], COLOURS[name], 2)
    return image.resize(size, Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
