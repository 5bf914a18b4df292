"""The flags of `ldm bench`. Apart from the rest, so that other commands start without loading it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from service import bench


def above_zero(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A number above 0, for argparse."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    return number


def add_arguments(command: argparse.ArgumentParser) -> None:
    """All but those of settings, which every command gets in the same way."""
    command.description = bench.__doc__
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    add = command.add_argument
    add(
        "--url",
        help="a server that runs, asked with a key of LDM_API_KEYS if that is set; --model is a name "
        "there; left out: one is started and stopped again",
    )
    loop = command.add_mutually_exclusive_group()
    clients = "closed loop: so many wait for their answers before they ask again (default: 16)"
    loop.add_argument("--clients", type=above_zero(int), default=16, metavar="N", help=clients)
    loop.add_argument("--rate", type=above_zero(float), metavar="X", help="open loop: Poisson, X requests/s")
    add("--requests", type=above_zero(int), metavar="N", help="how many (default: 64, without --seconds)")
    add("--seconds", type=above_zero(float), metavar="X", help="send so long; what was sent is waited for")
    add("--seed", type=int, default=0, metavar="N", help="of what is asked for, and when (default: 0)")
    add("--mix", type=Path, metavar="FILE", help="kinds of requests, as above (default: a mix of all tasks)")
    add("--against-solo", action="store_true", help="run the same requests one at a time before")
    add("--bare", action="store_true", help="run the same requests without HTTP and worker after")
    add("--json", type=Path, metavar="FILE", help="write the numbers")
    add("--chart", type=Path, metavar="FILE.png", help="draw rows per UNet call over time, and latencies")
