"""The command: the server, the runs, and what is printed and written."""

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

REQUESTS = 64  # where neither --requests nor --seconds says how long
REFUSED = (400, 404, 413, 422)  # what no other try changes


@dataclass(frozen=True)
class Outcome:
    """What was run over HTTP, and the requests of it; with --seconds those are not kept."""

    warm: list[Request]
    requests: list[Request]
    solo: Run | None
    load: Run


def bench(args: argparse.Namespace, settings: Settings) -> int:
    """Run it all. Raises ValueError for what cannot be asked."""
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
        print(f"bare loop: {bare:.3f} images/s; over HTTP / bare: {part:.1%}")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1, default=str) + "\n")
    return 0 if load["images"] else 1


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything runs."""
    if args.seconds is None and args.requests is None:
        args.requests = REQUESTS
    if args.seconds and (args.against_solo or args.bare):
        raise ValueError(
            "--against-solo and --bare run the same requests again: give --requests, not --seconds"
        )
    if args.bare and args.url:
        raise ValueError("--bare needs the model and the settings of the server: leave --url out")
    if args.chart and args.chart.suffix.lower() != ".png":
        raise ValueError(f"--chart is {str(args.chart)!r}; expected the ending .png")
    for file in filter(None, (args.json, args.chart)):
        if not file.absolute().parent.is_dir():
            raise ValueError(f"{file} cannot be written: expected a folder that exists")


def ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


@contextmanager
def server(url: str | None, settings: Settings) -> Iterator[str]:
    """The address of a server that is ready: the one at url, or one that lives as long as the context."""
    if url:
        yield url
        return
    with started(settings) as (_, url):
        yield url


@contextmanager
def started(settings: Settings) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and the address of a server that is ready, and that lives as long as the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = replace(settings, host="127.0.0.1", port=port, log_level="warning")
    command = [sys.executable, "-P", "-m", "service.cli", "serve"]
    process = subprocess.Popen(command, env=environment(settings))
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}")
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Raises ValueError where it ends instead."""
    while process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise ValueError("the server did not start")


async def over_http(
    args: argparse.Namespace, mix: Sequence[Entry] | None, url: str, keys: Sequence[str] = ()
) -> Outcome:
    """Warm up, then one at a time if that is wanted, then the load; keys: one of the API, if it needs one."""
    limits, headers = httpx.Limits(max_connections=None), {"X-API-Key": keys[0]} if keys else {}
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, headers=headers) as client:
        model = await find_model(client, args.model if args.url else None)
        entries = able(mix, model["tasks"])
        warm = await warm_up(client, entries, model)
        endless = draw(entries, model, args.seed)
        known = list(islice(endless, args.requests)) if args.requests else []
        solo = None
        if args.against_solo:
            solo = await measure(client, "one at a time", len(known), closed(iter(known), 1, math.inf))
        source, seconds = iter(known) if known else endless, args.seconds or math.inf
        traffic = closed(source, args.clients, seconds)
        if args.rate:
            traffic = opened(source, arrivals(args.rate, args.seed), seconds)
        return Outcome(warm, known, solo, await measure(client, "load", args.requests, traffic))


async def find_model(client: httpx.AsyncClient, name: str | None) -> Mapping[str, Any]:
    """The model of that name, or the first. Raises ValueError."""
    try:
        response = await client.get("/models")
        models = {model["name"]: model for model in response.raise_for_status().json()["models"]}
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ValueError(f"no model can be had at {client.base_url}: {error}") from None
    if name is not None and name not in models:
        raise ValueError(f"--model is {name!r}; expected one of {', '.join(models)}")
    return models[name or next(iter(models))]


def able(mix: Sequence[Entry] | None, tasks: Sequence[str]) -> Sequence[Entry]:
    """The mix, or what the model can do of the built-in one. Raises ValueError where it cannot."""
    if mix is None:
        return [entry for entry in DEFAULT if entry.task in tasks]
    if strange := {entry.task for entry in mix} - set(tasks):
        raise ValueError(f"--mix asks for {', '.join(strange)}; the model does {', '.join(tasks)}")
    return mix


async def warm_up(
    client: httpx.AsyncClient, entries: Sequence[Entry], model: Mapping[str, Any]
) -> list[Request]:
    """A short request of each kind, all at once: first calls allocate, and some compile or capture.

    Returns them. Raises ValueError where one can never be answered.
    """
    short = [entry.model_copy(update={"steps": 2}) for entry in entries]
    requests = [to_request(entry, model, "warm", 0) for entry in short]
    for response in await asyncio.gather(*(client.post(r.path, json=r.body) for r in requests)):
        if response.status_code in REFUSED:
            raise ValueError(f"the server refuses this mix: {response.json()['error']['message']}")
    return requests


def without_http(args: argparse.Namespace, settings: Settings, outcome: Outcome) -> float:
    """Images a second of the same requests, at the same times, in this process."""
    from service.bench.bare import Bare

    bare, count = Bare(settings), len(outcome.requests)
    bare.images_per_second(outcome.warm, [0.0] * len(outcome.warm), len(outcome.warm))
    due = list(islice(arrivals(args.rate, args.seed), count)) if args.rate else [0.0] * count
    return bare.images_per_second(outcome.requests, due, count if args.rate else args.clients)
