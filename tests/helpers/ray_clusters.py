"""The Ray application on simulated nodes of this machine, in a process of its own.

The process is this module, run with the applications as JSON. It ends, with all nodes, when its input does.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import IO

import httpx

from tests.helpers.environment import ROOT
from tests.helpers.servers import DEFAULTS, MAX_WAIT_SECONDS, Server, wait_until

STARTS = 3  # attempts: on a busy machine Ray may give up, since a node must be there after 30 seconds
MEMORY = 200 * 2**20  # bytes of each node's object store
LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # without a token, which Ray would write to the home folder
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_raylet_start_wait_time_s": "150",  # on a busy machine
    "RAY_worker_niceness": "0",  # otherwise 15: other programs would go first
}


@dataclass(frozen=True)
class RayApplication:
    """An application: below which path it is served, its LDM_* variables, and its arguments."""

    name: str
    prefix: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, object] = field(default_factory=dict)


@dataclass
class RayCluster:
    """Running applications. raylets: the process of each node, the head first."""

    process: subprocess.Popen[str]
    port: int
    raylets: list[int]


@contextmanager
def ray_cluster(
    applications: Sequence[RayApplication],
    cpus: Sequence[int] = (8,),
    stderr: IO[str] | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[RayCluster]:
    """Start a node with as many CPUs as the first number, applications on it, then nodes with the others.

    What does not fit on the first node goes to the others. With one node, returns when the applications run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"port": port, "cpus": cpus, "applications": [asdict(each) for each in applications]}
    folder = tempfile.mkdtemp(prefix="ray-")  # a short path: Ray's sockets are in it
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": folder}
    command = [sys.executable, "-P", "-m", "tests.helpers.ray_clusters", json.dumps(given)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    try:
        for _ in range(STARTS):
            with subprocess.Popen(
                command, env=os.environ | own | LOCAL | (environment or {}), cwd=folder, **pipes
            ) as process:  # at the end, closes its input, at which it ends, and waits
                if ready := process.stdout.readline():
                    yield RayCluster(process, port, json.loads(ready))
                    return
        raise AssertionError(f"the applications did not start: exit code {process.returncode}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def servers_of(cluster: RayCluster, applications: Sequence[RayApplication]) -> Iterator[list[Server]]:
    """A server and a client of each application, when it accepts requests."""
    with ExitStack() as stack:
        servers = []
        for application in applications:
            url = f"http://127.0.0.1:{cluster.port}{application.prefix}"
            client = stack.enter_context(httpx.Client(base_url=url, timeout=MAX_WAIT_SECONDS))
            servers.append(Server(cluster.process, client))
            wait_until(lambda: servers[-1].is_ready)
        yield servers


def main() -> None:
    given = json.loads(sys.argv[1])
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from service.cluster import app

    head, *others = given["cpus"]
    node = {"object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head, **node})
    ray.init(address=cluster.address, log_to_driver=True)
    serve.start(http_options={"host": "127.0.0.1", "port": given["port"]}, proxy_location="HeadOnly")
    inherited, targets = dict(os.environ), []
    for each in given["applications"]:
        os.environ.clear()
        os.environ.update(inherited | DEFAULTS | each["settings"])
        prefix = each["prefix"] or "/"
        targets.append(serve.RunTarget(app(each["arguments"]), name=each["name"], route_prefix=prefix))
    serve.run_many(targets, wait_for_applications_running=not others)
    while others and ray.available_resources().get("CPU", 0) >= 1:
        time.sleep(0.1)
    nodes = [cluster.head_node, *(cluster.add_node(num_cpus=cpus, **node) for cpus in others)]
    raylets = [each.all_processes["raylet"][0].process.pid for each in nodes]
    print(json.dumps(raylets), flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
