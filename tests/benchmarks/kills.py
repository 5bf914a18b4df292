"""kill -9 under load: is every request answered, and with the same bytes as alone?

python -m tests.benchmarks.kills --requests 200 --kills 20

Starts a server with --invariant, asks for each picture once in peace, then for all by 16 clients while its
worker is killed at random moments. Needs Linux, where a process's children can be read.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from service.bench.command import server
from service.settings import read_settings

# Seconds from ready to the next kill: long enough for some jobs to end, or no service could ever answer.
PAUSE = (2.0, 9.0)
NAMES = ("red apple", "ghost", "rocket", "cactus", "key", "snowman", "fire", "bell")


def main() -> None:
    args = parse()
    draw = random.Random(args.seed)
    settings = read_settings(flags={"model": args.model, "invariant": "true", "queue_size": "1000"})
    with server(None, settings) as url, httpx.Client(base_url=url, timeout=None) as client:
        bodies = [body(draw, index) for index in range(args.different)]
        expected = [client.post("/generate", json=b).content for b in bodies]
        asked = [draw.randrange(args.different) for _ in range(args.requests)]
        done = threading.Event()
        with ThreadPoolExecutor(args.clients + 1) as pool:
            killer = pool.submit(kill, draw, args.kills, url, done)
            answers = list(pool.map(lambda i: client.post("/generate", json=bodies[i]), asked))
            done.set()
    lost = Counter(a.status_code for a in answers if a.status_code != 200)
    pairs = zip(asked, answers, strict=True)
    other = sum(a.status_code == 200 and pictures(a.content) != pictures(expected[i]) for i, a in pairs)
    print(f"{args.requests} requests, {killer.result()} kills: {sum(lost.values())} lost {dict(lost) or ''}")
    print(f"answers with other bytes than alone: {other}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    for name, default in (("requests", 200), ("kills", 20), ("clients", 16), ("different", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def body(draw: random.Random, index: int) -> dict:
    return {
        "prompt": f"{draw.choice(NAMES)} on a {draw.choice(('blue', 'red', 'green'))} background",
        "steps": draw.randint(10, 25),
        "guidance_scale": draw.choice((1.0, 2.0, 3.0, 5.0)),
        "eta": draw.choice((0.0, 0.0, 1.0)),
        "seed": index,
    }


def pictures(content: bytes) -> list[str]:
    """The pictures of an answer, without its id and timings."""
    return [image["data"] for image in httpx.Response(200, content=content).json()["images"]]


def kill(draw: random.Random, times: int, url: str, done: threading.Event) -> int:
    """Kill the worker so many times, each at a random moment after it became ready; returns how often."""
    for count in range(times):
        while not done.is_set() and httpx.get(f"{url}/health/ready").status_code != 200:
            time.sleep(0.05)
        if done.wait(draw.uniform(*PAUSE)):
            return count
        os.kill(worker_of(os.getpid()), signal.SIGKILL)
        time.sleep(0.2)
    return times


def worker_of(pid: int) -> int:
    """The only grandchild of a process: the server's worker."""
    (child,) = children(pid)
    (worker,) = children(child)
    return worker


def children(pid: int) -> list[int]:
    return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]


if __name__ == "__main__":
    main()
