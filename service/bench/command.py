"""`ldm bench`: starts a server if necessary, runs the load, prints and writes the results."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import httpx

from service.bench.chart import chart
from service.bench.load import Run, arrivals, closed, measure, opened
from service.bench.mix import DEFAULT, Entry, Request, draw, read_mix, to_request
from service.bench.report import report, table
from service.settings import Settings
from service.worker.child import environment

DEFAULT_REQUESTS = 64  # if neither --requests nor --seconds is given
PERMANENT_ERRORS = (400, 404, 413, 422)  # statuses that a retry would get again


@dataclass(frozen=True)
class Outcome:
    """The runs over HTTP, and their requests (empty with --seconds)."""

    warm_up: list[Request]
    requests: list[Request]
    solo: Run | None
    load: Run


def bench(args: argparse.Namespace, settings: Settings) -> int:
    """Run the command. Raises ValueError for invalid arguments."""
    check(args)
    mix = read_mix(args.mix) if args.mix else None
    with server(args.url, settings) as url:
        outcome = asyncio.run(over_http(args, mix, url, settings.api_keys[:1]))
    if args.chart:
        chart(outcome.load).save(args.chart)
    load = report(outcome.load)
    flags = {name: value for name, value in vars(args).items() if name != "command"}
    numbers: dict[str, Any] = {"flags": flags, "load": load}
    traffic = f"{args.rate:g} requests/s, Poisson" if args.rate else f"{args.clients} clients"
    print(*table(f"load ({traffic})", load), sep="\n")
    if outcome.solo:
        solo = numbers["solo"] = report(outcome.solo)
        gain = numbers["against_solo"] = ratio(load["images_per_second"], solo["images_per_second"])
        print(*table("one at a time", solo), f"images/s, load / one at a time: {gain:.2f}", sep="\n")
    if args.bare:
        bare = numbers["bare_images_per_second"] = without_http(args, settings, outcome)
        part = numbers["http_to_bare"] = ratio(load["images_per_second"], bare)
        print(f"in process: {bare:.3f} images/s; over HTTP / in process: {part:.1%}")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1, default=str) + "\n")
    return 0 if load["images"] else 1


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that cannot be combined, before anything runs."""
    if args.seconds is None and args.requests is None:
        args.requests = DEFAULT_REQUESTS
    if args.seconds and (args.against_solo or args.bare):
        raise ValueError("--against-solo and --bare repeat the same requests: use --requests, no --seconds")
    if args.bare and args.url:
        raise ValueError("--bare runs the model in this process: it cannot be combined with --url")
    if args.chart and args.chart.suffix.lower() != ".png":
        raise ValueError(f"--chart is {str(args.chart)!r}; expected the suffix .png")
    for file in filter(None, (args.json, args.chart)):
        if not file.absolute().parent.is_dir():
            raise ValueError(f"{file} cannot be written: its folder does not exist")


def ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


@contextmanager
def server(url: str | None, settings: Settings) -> Iterator[str]:
    """The URL of a ready server: `url`, or that of a server started for the duration of the context."""
    if url:
        yield url
        return
    with started(settings) as (_, url):
        yield url


@contextmanager
def started(settings: Settings) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and the URL of a ready server, which is stopped at the end of the context."""
    port = free_port()
    settings = replace(settings, host="127.0.0.1", port=port, log_level="warning")
    command = [sys.executable, "-P", "-m", "service.cli", "serve"]
    process = subprocess.Popen(command, env=environment(settings))
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}")
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until all replicas of the server are ready. Raises ValueError if it exits instead."""
    while process.poll() is None:
        with suppress(httpx.TransportError):
            if all(one["status"] == "ok" for one in httpx.get(f"{url}/health").json()["replicas"]):
                return
        time.sleep(0.1)
    raise ValueError("the server did not start")


async def over_http(
    args: argparse.Namespace, mix: Sequence[Entry] | None, url: str, keys: Sequence[str] = ()
) -> Outcome:
    """Warm up, then run the requests one at a time (--against-solo), then the load.

    `keys`: an API key, if the server needs one.
    """
    limits, headers = httpx.Limits(max_connections=None), {"X-API-Key": keys[0]} if keys else {}
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, headers=headers) as client:
        model = await find_model(client, args.model if args.url else None)
        entries = supported(mix, model)
        warm = await warm_up(client, entries, model)
        endless = draw(entries, model, args.seed)
        requests = list(islice(endless, args.requests)) if args.requests else []
        solo = None
        if args.against_solo:
            solo = await measure(client, "one at a time", len(requests), closed(iter(requests), 1, math.inf))
        source, seconds = iter(requests) if requests else endless, args.seconds or math.inf
        traffic = closed(source, args.clients, seconds)
        if args.rate:
            traffic = opened(source, arrivals(args.rate, args.seed), seconds)
        return Outcome(warm, requests, solo, await measure(client, "load", args.requests, traffic))


async def find_model(client: httpx.AsyncClient, name: str | None) -> Mapping[str, Any]:
    """The entry of GET /models with this name, or the first one. Raises ValueError."""
    try:
        response = await client.get("/models")
        models: dict[str, dict[str, Any]] = {
            model["name"]: model for model in response.raise_for_status().json()["models"]
        }
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ValueError(f"GET /models failed at {client.base_url}: {error}") from None
    if name is not None and name not in models:
        raise ValueError(f"--model is {name!r}; expected one of {', '.join(models)}")
    return models[name or next(iter(models))]


def supported(mix: Sequence[Entry] | None, model: Mapping[str, Any]) -> Sequence[Entry]:
    """The mix, or what a model can run of the default mix. Raises ValueError for a mix that it cannot run."""
    if mix is None:
        return [entry for entry in DEFAULT if not entry.problem(model)]
    if problem := next((text for entry in mix if (text := entry.problem(model))), None):
        raise ValueError(f"--mix {problem}")
    return mix


async def warm_up(
    client: httpx.AsyncClient, entries: Sequence[Entry], model: Mapping[str, Any]
) -> list[Request]:
    """Send a short request of each kind, all at once: first calls allocate memory, compile or capture graphs.

    Returns the requests. Raises ValueError if the server rejects one for good.
    """
    short = [entry.model_copy(update={"steps": 2}) for entry in entries]
    requests = [to_request(entry, model, "warm", 0) for entry in short]
    for response in await asyncio.gather(*(client.post(r.path, json=r.body) for r in requests)):
        if response.status_code in PERMANENT_ERRORS:
            raise ValueError(f"the server rejects this mix: {response.json()['error']['message']}")
    return requests


def without_http(args: argparse.Namespace, settings: Settings, outcome: Outcome) -> float:
    """Images per second of the same requests, at the same times, in this process."""
    from service.bench.bare import InProcessBaseline

    baseline, count = InProcessBaseline(settings), len(outcome.requests)
    baseline.images_per_second(outcome.warm_up, [0.0] * len(outcome.warm_up), len(outcome.warm_up))
    due = list(islice(arrivals(args.rate, args.seed), count)) if args.rate else [0.0] * count
    return baseline.images_per_second(outcome.requests, due, count if args.rate else args.clients)
