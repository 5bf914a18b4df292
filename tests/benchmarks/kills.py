"""kill -9 under load: does every request get a response, with the same bytes as without load?

python -m tests.benchmarks.kills --requests 200 --kills 20 --moments random ready

Starts a server with --invariant and generates each image once. Then, once for each kind of moment, 16 clients
request all images while a worker is killed: at random moments, or each time within 0.2 s after it became
ready. Needs Linux, where the children of a process can be read.

--model tiny: a small model with random weights, for many requests on a slow machine. LDM_BUCKETS=2 makes its
requests last longer, so that there is time for more kills.
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
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from PIL import Image, ImageDraw

from service.bench.command import server
from service.settings import read_settings
from tests.helpers.images import base64_of

# Seconds from ready to the kill. Random moments leave time for some jobs to finish; right after ready, none.
DELAYS = {"random": (2.0, 9.0), "ready": (0.0, 0.2)}
POLL_SECONDS = 0.02
NAMES = ("red apple", "ghost", "rocket", "cactus", "key", "snowman", "fire", "bell")


def main() -> None:
    args = parse()
    flags = {"invariant": "true", "queue_size": "1000", "replicas": args.replicas}
    flags |= {"timeout": "86400"}  # a deadline that passes on a slow machine is no loss
    if args.model == "emoji":
        flags["controlnet"] = "outline=emoji-outline"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        model = write_tiny(folder / "tiny") if args.model == "tiny" else args.model
        settings = read_settings(flags=flags | {"model": str(model)})
        url = stack.enter_context(server(None, settings))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=None))
        draw = random.Random(args.seed)
        bodies = [body(draw, index, controls=args.model == "emoji") for index in range(args.different)]
        expected = [images(client.post("/generate", json=b)) for b in bodies]
        for moment in args.moments:
            run(args, client, url, draw, bodies, expected, moment)


def write_tiny(folder: Path) -> Path:
    from tests.checkpoints.tiny import write_tiny_model  # imports torch, which only this needs

    return write_tiny_model(folder)


def run(
    args: argparse.Namespace,
    client: httpx.Client,
    url: str,
    draw: random.Random,
    bodies: list[dict],
    expected: list[list[str]],
    moment: str,
) -> None:
    """Request everything while the worker is killed, and print what was lost."""
    numbers = [draw.randrange(args.different) for _ in range(args.requests)]
    done, begin = threading.Event(), time.monotonic()
    with ThreadPoolExecutor(args.clients + 1) as pool:
        killer = pool.submit(kill, random.Random(args.seed), args.kills, url, done, DELAYS[moment])
        answers = list(pool.map(lambda number: client.post("/generate", json=bodies[number]), numbers))
        done.set()
    lost = Counter(answer.status_code for answer in answers if answer.status_code != 200)
    pairs = zip(numbers, answers, strict=True)
    differing = sum(a.status_code == 200 and images(a) != expected[number] for number, a in pairs)
    print(
        f"{moment}: {args.requests} requests, {killer.result()} kills, {time.monotonic() - begin:.0f} s: "
        f"{sum(lost.values())} lost {dict(lost) or ''}; {differing} with other bytes",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--replicas", default="auto", help="as of ldm serve; each kill is of one of them")
    parser.add_argument("--moments", nargs="+", choices=list(DELAYS), default=list(DELAYS))
    for name, default in (("requests", 200), ("kills", 20), ("clients", 16), ("different", 8), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def body(draw: random.Random, index: int, controls: bool) -> dict:
    """A request; with `controls`, one in three has none, the others have one or two."""
    outlines = [outline(draw) for _ in range(draw.randrange(3))] if controls else []
    return {
        "controls": outlines,
        "prompt": f"{draw.choice(NAMES)} on a {draw.choice(('blue', 'red', 'green'))} background",
        "steps": draw.randint(10, 25),
        "guidance_scale": draw.choice((1.0, 2.0, 3.0, 5.0)),
        "eta": draw.choice((0.0, 0.0, 1.0)),
        "seed": index,
    }


def outline(draw: random.Random) -> dict:
    """A control: the outline of a disc, at another place and with other settings each time."""
    image, (x, y) = Image.new("RGB", (128, 128)), (draw.randint(10, 50), draw.randint(10, 50))
    ImageDraw.Draw(image).ellipse((x, y, x + 70, y + 70), outline="white", width=3)
    start, mode = draw.choice((0.0, 0.2)), draw.choice(("balanced", "prompt", "control"))
    scale = draw.choice((0.5, 1.0, 1.5))
    return {"model": "outline", "image": base64_of(image), "scale": scale, "start": start, "mode": mode}


def images(answer: httpx.Response) -> list[str]:
    """The image files of a response, without its id and timings."""
    return [image["data"] for image in answer.json()["images"]]


def kill(draw: random.Random, times: int, url: str, done: threading.Event, delay: tuple[float, float]) -> int:
    """Kill the worker so many times, each so many seconds after it became ready; returns how often."""
    for count in range(times):
        while not done.is_set() and not all_ready(url):
            time.sleep(POLL_SECONDS)
        if done.wait(draw.uniform(*delay)):
            return count
        os.kill(draw.choice(workers_of(os.getpid())), signal.SIGKILL)
        time.sleep(0.2)
    return times


def all_ready(url: str) -> bool:
    """Whether every replica takes jobs."""
    return all(replica["status"] == "ok" for replica in httpx.get(f"{url}/health").json()["replicas"])


def workers_of(pid: int) -> list[int]:
    """The grandchildren of a process: the server's workers."""
    (child,) = children(pid)
    return children(child)


def children(pid: int) -> list[int]:
    return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]


if __name__ == "__main__":
    main()
