"""SIGTERM under load: does every client get a complete response, or a 503 with Retry-After?

python -m tests.benchmarks.drains --rounds 10 --clients 16

Each round starts a server, lets clients generate images and follow jobs without pause, and ends the server at
a random moment. A client stops when it is refused.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
from PIL import Image

from service.bench.command import started
from service.settings import read_settings

MAX_RESPONSE_SECONDS = 300.0


def main() -> None:
    args = parse()
    draw = random.Random(args.seed)
    settings = read_settings(flags={"model": args.model, "queue_size": "1000"})
    total: Counter[str] = Counter()
    for number in range(args.rounds):
        seconds = draw.uniform(0.2, args.seconds)
        with started(settings) as (process, url):
            kinds = drain(process, url, args.clients, partial(time.sleep, seconds))
        print(f"round {number + 1}, SIGTERM after {seconds:.1f} s: {dict(sorted(kinds.items()))}")
        total += kinds
    broken = sum(count for kind, count in total.items() if kind.startswith("broken"))
    print(f"{total['made']} made, {total['refused']} refused, {total['closed']} too late; {broken} broken")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--seconds", type=float, default=5.0, help="the latest moment of the signal")
    for name, default in (("rounds", 10), ("clients", 16), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def drain(process: subprocess.Popen, url: str, clients: int, wait: Callable[[], None]) -> Counter[str]:
    """The number of requests of each outcome. The signal is sent when wait() returns."""

    def client(index: int) -> Counter[str]:
        return Counter(watch_jobs(url, index) if index % 4 == 3 else generate(url, index))

    with ThreadPoolExecutor(clients) as pool:
        ends = [pool.submit(client, index) for index in range(clients)]
        wait()
        process.send_signal(signal.SIGTERM)
        counts = sum((end.result() for end in ends), Counter())
    if code := process.wait(MAX_RESPONSE_SECONDS):
        counts[f"broken: exit code {code}"] += 1
    return counts


def generate(url: str, index: int) -> Iterator[str]:
    """Generate one image after the other on one connection, until the service refuses."""
    with httpx.Client(base_url=url, timeout=MAX_RESPONSE_SECONDS) as client:
        for count in itertools.count():
            kind = kind_of(lambda count=count: client.post("/generate", json=body(index, count)))
            yield kind
            if kind != "made":
                return


def watch_jobs(url: str, index: int) -> Iterator[str]:
    """Submit one job after the other and poll each until it has ended."""
    with httpx.Client(base_url=url, timeout=MAX_RESPONSE_SECONDS) as client:
        for count in itertools.count():
            job = {"task": "generate", "request": body(index, count)}
            kind = kind_of(lambda job=job: submitted_and_ended(client, job))
            yield kind
            if kind != "made":
                return


def submitted_and_ended(client: httpx.Client, job: dict) -> httpx.Response:
    """The response with the ended job, or the refusal of it."""
    answer = client.post("/jobs", json=job)
    if answer.status_code != 202:
        return answer
    path = answer.headers["location"]
    while answer.json()["status"] in ("queued", "running"):
        time.sleep(0.2)
        try:
            answer = client.get(path)
        except httpx.ConnectError as error:  # it was accepted, and nothing says how it ended
            raise httpx.ReadError("a job was lost") from error
    return answer


def body(index: int, count: int) -> dict:
    return {"prompt": "red apple", "steps": 5 + 5 * (index % 4), "seed": 1000 * index + count}


def kind_of(request: Callable[[], httpx.Response]) -> str:
    """made, refused (a correct 503), closed (the port is closed), or what is broken."""
    try:
        answer = request()
    except httpx.ConnectError:
        return "closed"
    except httpx.TransportError as error:
        return f"broken: {type(error).__name__}"
    if answer.status_code == 503 and int(answer.headers["retry-after"]) > 0:
        return "refused" if answer.json()["error"]["code"] == "draining" else "broken: another 503"
    if answer.status_code != 200:
        return f"broken: {answer.status_code}"
    made = answer.json().get("result", answer.json())
    for image in (made or {}).get("images", [{"data": ""}]):
        Image.open(io.BytesIO(base64.b64decode(image["data"]))).load()
    return "made"


if __name__ == "__main__":
    main()
