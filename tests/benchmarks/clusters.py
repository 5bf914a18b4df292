"""The Ray application on simulated nodes of this machine: what is lost by kill -9, and what it costs.

python -m tests.benchmarks.clusters kills --kills 10
python -m tests.benchmarks.clusters cost --rounds 3

kills: with --invariant, under the requests of `ldm bench`. The first node has the API replica and an engine
replica; under load Ray starts another one on the second node. Then engine replicas are killed, and at last
the second node with all its processes. Each response is compared with that to the same request without load.
cost: text-to-image requests of `ldm bench` to `ldm serve` and to the Ray application with one engine replica,
in turn; both with one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import httpx
import psutil

from service.bench.command import find_model, over_http, started
from service.bench.load import Run
from service.bench.mix import DEFAULT, Entry, Request, draw
from service.settings import read_settings
from tests.helpers.ray_clusters import RayApplication, RayCluster, ray_cluster, servers_of

QUEUE_SIZE = 1000
ENGINE = "ServeReplica:ldm:Engine"  # in the title of an engine replica's process


def main() -> None:
    args = parse()
    args.run(args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    kill = commands.add_parser("kills")
    kill.set_defaults(run=kills)
    for name, default in (("kills", 10), ("clients", 12), ("different", 6)):
        kill.add_argument(f"--{name}", type=int, default=default)
    cost_of = commands.add_parser("cost")
    cost_of.set_defaults(run=cost)
    for name, default in (("rounds", 4), ("requests", 32), ("clients", 16), ("singles", 10)):
        cost_of.add_argument(f"--{name}", type=int, default=default)
    cost_of.add_argument("--haproxy", action="store_true", help="with HAProxy in place of Ray's proxy")
    return parser.parse_args()


@contextmanager
def application(
    settings: dict[str, str], arguments: dict[str, object], cpus: tuple[int, ...], haproxy: bool = False
) -> Iterator[tuple[RayCluster, httpx.Client]]:
    """A running application with the bundled model, and a client of it."""
    own = {"LDM_MODEL": "emoji", "LDM_QUEUE_SIZE": str(QUEUE_SIZE), "LDM_MAX_BODY_BYTES": str(2**25)}
    own |= {"LDM_BACKEND": "torch", "LDM_LOG_LEVEL": "warning"}
    each = RayApplication("ldm", "", own | settings, arguments)
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "1"} if haproxy else {}
    with ray_cluster([each], cpus, environment=environment) as cluster, servers_of(cluster, [each]) as (one,):
        one.client.timeout = None
        yield cluster, one.client


# kills


def kills(args: argparse.Namespace) -> None:
    """Print how many requests were lost, and how many had other bytes."""
    arguments = {"max_engines": 2, "jobs_per_engine": 2}
    settings = {"LDM_INVARIANT": "1", "LDM_BUCKETS": "4", "LDM_DTYPE": "auto"}
    with application(settings, arguments, (2, 1)) as (cluster, client):
        begin = time.monotonic()
        with ThreadPoolExecutor(args.clients) as pool:  # the second replica goes to the second node
            short = requests_of(client, 1)[0]
            while ready_engines(client) < 2:
                list(pool.map(lambda _: send(client, short), range(args.clients)))
        print(f"the second engine replica was ready after {time.monotonic() - begin:.0f} s of load")
        print(f"engine replicas on each node: {[len(engines_of(raylet)) for raylet in cluster.raylets]}")
        different = requests_of(client, args.different)
        expected = [images(send(client, request)) for request in different]
        begin, over = time.monotonic(), threading.Event()

        def one_client(seed: int) -> list[str]:
            chance, results = random.Random(seed), []
            while not over.is_set():
                number = chance.randrange(args.different)
                answer = send(client, different[number])
                if answer.status_code != 200:
                    results.append(str(answer.status_code))
                else:
                    results.append("same" if images(answer) == expected[number] else "other bytes")
            return results

        with ThreadPoolExecutor(args.clients) as pool:
            clients = [pool.submit(one_client, seed) for seed in range(args.clients)]
            try:
                killed = kill_in_turn(cluster, client, args.kills)
            finally:
                over.set()
        results = Counter(result for one in clients for result in one.result())
    total = sum(results.values())
    print(f"kill -9 of {killed}, {time.monotonic() - begin:.0f} s, {total} requests: {dict(results)}")


def requests_of(client: httpx.Client, count: int) -> list[Request]:
    """The first requests of `ldm bench`."""

    async def model() -> dict:
        async with httpx.AsyncClient(base_url=client.base_url) as other:
            return dict(await find_model(other, None))

    one = asyncio.run(model())
    return list(islice(draw([entry for entry in DEFAULT if not entry.problem(one)], one, 0), count))


def send(client: httpx.Client, request: Request) -> httpx.Response:
    return client.post(request.path, json=request.body)


def images(answer: httpx.Response) -> list[str]:
    """The image files of a response, without its id and timings."""
    return [image["data"] for image in answer.json()["images"]]


def ready_engines(client: httpx.Client) -> int:
    return sum(one["status"] == "ok" for one in client.get("/health").json()["replicas"])


def engines_of(raylet: int) -> list[psutil.Process]:
    """The processes of the engine replicas on a node."""
    children = psutil.Process(raylet).children(recursive=True)
    return [child for child in children if ENGINE in "".join(child.cmdline())]


def kill_in_turn(cluster: RayCluster, client: httpx.Client, times: int) -> str:
    """Kill engine replicas while one is ready, then the last node."""
    chance = random.Random(0)
    for number in range(times):
        time.sleep(chance.uniform(1.5, 4.0))
        while not (ready_engines(client) and (running := engines_on(cluster))):
            time.sleep(0.1)
        chance.choice(running).send_signal(signal.SIGKILL)
        print(f"kill {number + 1} of {len(running)} engine replicas", flush=True)
    while not (ready_engines(client) == 2 and engines_of(cluster.raylets[-1])):
        time.sleep(0.1)
    time.sleep(3.0)
    node = psutil.Process(cluster.raylets[-1])
    for process in (*node.children(recursive=True), node):
        process.send_signal(signal.SIGKILL)
    print("kill of the second node", flush=True)
    time.sleep(10.0)
    return f"{times} replicas and one node"


def engines_on(cluster: RayCluster) -> list[psutil.Process]:
    return [engine for raylet in cluster.raylets for engine in engines_of(raylet)]


# cost


def cost(args: argparse.Namespace) -> None:
    """Print images per second under load and the latency of single requests, of both servers."""
    flags = {"model": "emoji", "queue_size": str(QUEUE_SIZE), "backend": "torch", "threads": "1"}
    arguments = {"jobs_per_engine": 32}
    with (
        started(read_settings(flags=flags)) as (_, bare),
        application({"LDM_DTYPE": "auto"}, arguments, (4,), args.haproxy) as (_, client),
    ):
        urls = {"ldm serve": bare, "Ray": str(client.base_url)}
        speeds: dict[str, list[float]] = {name: [] for name in urls}
        latencies: dict[str, list[float]] = {name: [] for name in urls}
        for number in range(args.rounds):
            for name, url in list(urls.items())[:: 1 - 2 * (number % 2)]:  # the other one first in each round
                run = load(url, args.requests, args.clients)
                speeds[name].append(sum(answer.images for answer in run.answers) / run.seconds)
                print(f"{name}: {speeds[name][-1]:.3f} images/s", flush=True)
            for name, url in list(urls.items()) * args.singles:
                latencies[name].append(single(url))
    for name in urls:
        middle = statistics.median(latencies[name])
        print(
            f"{name:10} {statistics.median(speeds[name]):6.3f} images/s {json.dumps(rounded(speeds[name]))}, "
            f"single request: median {1000 * middle:.1f} ms, fastest {1000 * min(latencies[name]):.1f} ms"
        )
    part = statistics.median(speeds["Ray"]) / statistics.median(speeds["ldm serve"])
    added = statistics.median(latencies["Ray"]) - statistics.median(latencies["ldm serve"])
    print(f"Ray: {part:.1%} of the images/s, {1000 * added:+.1f} ms at the median")


def load(url: str, requests: int, clients: int) -> Run:
    """A closed loop of `ldm bench`."""
    flags = argparse.Namespace(
        url=url, model=None, seed=0, requests=requests, seconds=None, clients=clients, rate=None,
        against_solo=False,
    )  # fmt: skip
    return asyncio.run(over_http(flags, [Entry(steps=25)], url)).load


def single(url: str) -> float:
    """Seconds of one short request to an idle server."""
    body = {"prompt": "red apple", "seed": 1, "steps": 4, "guidance_scale": 1.0}
    with httpx.Client(base_url=url, timeout=None) as client:
        client.get("/health/live")  # connects
        begin = time.perf_counter()
        client.post("/generate", json=body).raise_for_status()
        return time.perf_counter() - begin


def rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values if math.isfinite(value)]


if __name__ == "__main__":
    main()
