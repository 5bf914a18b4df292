"""A server with thousands of open connections that ask for nothing: its memory, and how it serves others.

python -m tests.benchmarks.connections --connections 10000 --max-connections 12000

The connections are of three kinds in turn: silent, in the middle of the headers, in the middle of a body.
Each is opened again whenever the server closes it. --max-connections below their number shows eviction.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import httpx

from service.bench.command import started
from service.settings import read_settings

STARTS = (
    b"",
    b"GET /health HTTP/1.1\r\nHost: slow\r\nX-A: ",
    b"POST /generate HTTP/1.1\r\nHost: slow\r\nContent-Length: 100\r\n\r\n{",
)
BODY = {"prompt": "red apple", "steps": 4, "seed": 1}
OPENED_AT_ONCE = 200


def main() -> None:
    args = parse()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, args.connections + 512)), hard))
    flags = {"model": args.model, "max_connections": str(args.max_connections)}
    with started(read_settings(flags=flags)) as (process, url):
        print(f"{'':30s} memory MiB   /health ms: median, worst   /generate ms: median, worst")
        asyncio.run(compare(url, process.pid, args))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--max-connections", type=int, default=2048, help="setting of the server")
    parser.add_argument("--seconds", type=float, default=20.0, help="for which they are held")
    return parser.parse_args()


async def compare(url: str, server: int, args: argparse.Namespace) -> None:
    """Print a line without the connections, one while they are open, and one after they are closed."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await client.post("/generate", json=BODY)
        await report("before", client, server, args.seconds / 2)
        counts: Counter[str] = Counter()
        crowd = [asyncio.create_task(hold(url, number, counts)) for number in range(args.connections)]
        while counts["opened"] < args.connections:
            await asyncio.sleep(0.1)
        await report(f"{args.connections} connections", client, server, args.seconds)
        print(
            f"opened {counts['opened']}, closed by the server {counts['closed']}, failed {counts['failed']}"
        )
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        await asyncio.sleep(1)
        await report("after", client, server, args.seconds / 2)


async def hold(url: str, number: int, counts: Counter[str]) -> None:
    """Keep one connection open without ever completing a request."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    await asyncio.sleep(number / OPENED_AT_ONCE * 0.1)
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError:
            counts["failed"] += 1
            await asyncio.sleep(1)
            continue
        counts["opened"] += 1
        try:
            writer.write(STARTS[number % len(STARTS)])
            with suppress(OSError):
                await reader.read()
            counts["closed"] += 1
        finally:
            writer.transport.abort()
        await asyncio.sleep(1)


async def report(name: str, client: httpx.AsyncClient, server: int, seconds: float) -> None:
    health: list[float] = []
    images: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        health.append(await milliseconds(client, "GET", "/health"))
        if len(health) % 10 == 1:
            images.append(await milliseconds(client, "POST", "/generate"))
        await asyncio.sleep(0.02)
    print(f"{name:30s} {memory(server):10.0f}   {summary(health)}   {summary(images)}")


async def milliseconds(client: httpx.AsyncClient, method: str, path: str) -> float:
    begin = time.perf_counter()
    response = await client.request(method, path, json=BODY if method == "POST" else None)
    response.raise_for_status()
    return 1000 * (time.perf_counter() - begin)


def summary(values: Iterable[float]) -> str:
    values = list(values)
    return f"{len(values):5d} times {statistics.median(values):7.1f} {max(values):7.1f}"


def memory(process: int) -> float:
    """The resident memory of a process, MiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
