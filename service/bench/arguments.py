"""The flags of `ldm bench`. A separate module, so that other commands do not import the benchmark itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from service import bench


def above_zero(kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argparse type: a finite number above 0."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    return number


def add_arguments(command: argparse.ArgumentParser) -> None:
    """All flags except those for settings."""
    command.description = bench.__doc__
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    add = command.add_argument
    add(
        "--url",
        help="measure this running server, with the first key of LDM_API_KEYS if set; --model is then the "
        "name of one of its models (default: start a server and stop it afterwards)",
    )
    loop = command.add_mutually_exclusive_group()
    clients = "closed loop: N clients, each sends its next request after a response (default: 16)"
    loop.add_argument("--clients", type=above_zero(int), default=16, metavar="N", help=clients)
    loop.add_argument(
        "--rate", type=above_zero(float), metavar="X", help="open loop: Poisson arrivals, X requests/s"
    )
    add(
        "--requests",
        type=above_zero(int),
        metavar="N",
        help="number of requests (default: 64, unless --seconds is given)",
    )
    add(
        "--seconds",
        type=above_zero(float),
        metavar="X",
        help="send for X seconds, then wait for the responses",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the drawn requests and arrival times (default: 0)",
    )
    add("--mix", type=Path, metavar="FILE", help="mix of requests, in the format above (default: all tasks)")
    add("--against-solo", action="store_true", help="first run the same requests one at a time")
    add(
        "--bare",
        action="store_true",
        help="afterwards run the same requests in this process, without HTTP and worker",
    )
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add("--chart", type=Path, metavar="FILE.png", help="draw rows per UNet call over time, and latencies")
