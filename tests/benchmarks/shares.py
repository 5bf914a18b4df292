"""Two clients of one server, of which one floods it: the latency of the other one's small requests.

python -m tests.benchmarks.shares --seconds 30

Client A keeps as many requests open as the server takes; client B sends small ones, one after the other. With
the same key the server cannot tell them apart; with two keys each has its share.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from service.keys.table import digest, to_toml
from tests.helpers.servers import serve

LARGE = {"prompt": "red apple", "n": 2, "steps": 25}
SMALL = {"prompt": "rocket", "steps": 8}
TIMEOUT = 600.0


def main() -> None:
    args = parse()
    print(f"{'small requests of B':28} count  refused   p50 s   p99 s   images/s of A")
    for name, crowd, key in (
        ("B alone", 0, "B"),
        ("A floods with B's key", args.clients, "B"),
        ("A floods with its own key", args.clients, "A"),
    ):
        with server(args) as url, flood(url, crowd, key) as made:
            time.sleep(args.seconds / 3 if crowd else 0)
            before, begin = made["images"], time.monotonic()
            latencies, refused = small_requests(url, args.seconds)
            rate = (made["images"] - before) / (time.monotonic() - begin)
        values = f"{statistics.median(latencies):7.2f} {latencies[int(0.99 * len(latencies))]:7.2f}"
        print(f"{name:28} {len(latencies):5} {refused:8} {values} {rate:11.2f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clients", type=int, default=64, help="connections of A")
    parser.add_argument("--seconds", type=float, default=30.0, help="of B's requests")
    return parser.parse_args()


@contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """A server with the keys A and B and room for 32 requests; gives its address."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "keys.toml"
        table.write_text("\n".join(to_toml(name, digest(f"key-of-{name}".encode()), {}) for name in "AB"))
        settings = {"LDM_KEY_TABLE": str(table), "LDM_QUEUE_SIZE": "32", "LDM_DTYPE": "auto"}
        with serve([args.model], Path(folder), subprocess.DEVNULL, settings) as made:
            yield str(made.client.base_url)


@contextmanager
def flood(url: str, clients: int, key: str) -> Iterator[Counter[str]]:
    """Clients that send one large request after the other while the context lasts; gives what they got."""
    made: Counter[str] = Counter()
    over = threading.Event()

    def client() -> None:
        with httpx.Client(base_url=url, timeout=TIMEOUT, headers={"X-API-Key": f"key-of-{key}"}) as http:
            while not over.is_set():
                answer = http.post("/generate", json=LARGE)
                made["images"] += LARGE["n"] if answer.status_code == 200 else 0
                over.wait(0 if answer.status_code == 200 else 0.5)

    with ThreadPoolExecutor(max(1, clients)) as pool:
        for _ in range(clients):
            pool.submit(client)
        try:
            yield made
        finally:
            over.set()


def small_requests(url: str, seconds: float) -> tuple[list[float], int]:
    """Sorted latencies of B's requests, repetitions after a 429 included; and the number of these."""
    latencies, refused, end = [], 0, time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=TIMEOUT, headers={"X-API-Key": "key-of-B"}) as http:
        while time.monotonic() < end:
            begin = time.monotonic()
            while (answer := http.post("/generate", json=SMALL)).status_code == 429:
                refused += 1
                time.sleep(0.1)
            answer.raise_for_status()
            latencies.append(time.monotonic() - begin)
    return sorted(latencies), refused


if __name__ == "__main__":
    main()
