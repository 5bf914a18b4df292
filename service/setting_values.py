"""Parsers from text to values of settings, each with a description of the accepted texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_network
from typing import Any

AUTO = "auto"
DEVICES = (AUTO, "cpu", "cuda")
CUDA_DEVICE = re.compile(r"cuda:(0|[1-9]\d{0,3})")
MAX_REPLICAS = 64
DEFAULT_BUCKETS = (2, 4, 6, 8, 12, 16, 20, 24, 28, 32)  # rows of UNet calls
BOOLEANS = {"1": True, "true": True, "0": False, "false": False}
LORA_NAME = re.compile(r"(?!\s)[^:<>\x00-\x1f]{1,128}(?<!\s)")  # the name is used in <lora:name:1>
NAMED_LORA = re.compile(r"(?!\s)[^=,:<>\x00-\x1f]{1,128}(?<!\s)=.")
PROMPT_WORD = re.compile(r"[^\s=()\[\]:\\]{1,64}")
NAMED_EMBEDDING = re.compile(PROMPT_WORD.pattern + "=.")
NAMED_MODEL = re.compile(r"[^\s=][^=]*=.")
ORIGIN = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
BYTES = "a number of bytes, or a number with K, M or G"
QUOTED_COMMA = "\0"  # no path has this character
API_KEY = re.compile(r"[!-+\--~]{8,}")  # visible ASCII without a comma
ENDPOINT = re.compile(r"https?://[^\s/?#]+(/[^\s?#]*)?")
STORE_URL = re.compile(r"(rediss?://[^\s/?]+(/\d*)?(\?\S+)?|unix://\S+)")
HOST_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}$)({HOST_LABEL}\.)*{HOST_LABEL}")
NUMERIC_HOST = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)")  # an IPv4 address in one of its spellings
IPV4 = re.compile(r"((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(\.(?!$)|$)){4}")  # its usual spelling
HOST_AND_PORT = re.compile(r"(.+):([1-9]\d{0,4})")
ROOT_PATH = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")


@dataclass(frozen=True)
class Parser:
    """Parses the text of a setting. read() raises ValueError for a text other than `expected` describes.

    secret: messages do not show the value.
    """

    read: Callable[[str], Any]
    expected: str
    secret: bool = False


def number(kind: type[int] | type[float], low: float, high: float) -> Parser:
    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    noun = "a whole number" if kind is int else "a number"
    return Parser(read, f"{noun} from {low} to {high}")


def choice(*options: str) -> Parser:
    def read(text: str) -> str:
        if text not in options:
            raise ValueError(text)
        return text

    return Parser(read, "one of " + ", ".join(options))


def boolean() -> Parser:
    def read(text: str) -> bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(text)
        return BOOLEANS[text.lower()]

    return Parser(read, "1 or 0, true or false")


def read_devices(text: str) -> str:
    """One device, or different CUDA devices separated by commas."""
    names = [name.strip() for name in text.split(",")]
    numbered = all(CUDA_DEVICE.fullmatch(name) for name in names)
    if text not in DEVICES and not (numbered and len(set(names)) == len(names)):
        raise ValueError(text)
    return ",".join(names)


def read_replicas(text: str) -> str:
    if text != AUTO and not (text.isdecimal() and 1 <= int(text) <= MAX_REPLICAS):
        raise ValueError(text)
    return text


def read_list(text: str) -> tuple[str, ...]:
    """Entries between commas; a comma in double quotes belongs to its entry."""
    pieces = text.split('"')
    if len(pieces) % 2 == 0:  # an unpaired quote has no special meaning
        return tuple(part.strip() for part in text.split(",") if part.strip())
    inside = [piece.replace(",", QUOTED_COMMA) if index % 2 else piece for index, piece in enumerate(pieces)]
    parts = (part.strip().replace(QUOTED_COMMA, ",") for part in "".join(inside).split(","))
    return tuple(part for part in parts if part)


def read_models(text: str) -> tuple[str, ...]:
    names = read_list(text)
    if not names:
        raise ValueError(text)
    return names


def matching(pattern: re.Pattern[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of lists in which every entry begins with the pattern."""

    def read(text: str) -> tuple[str, ...]:
        entries = read_list(text)
        if not all(pattern.match(entry) for entry in entries):
            raise ValueError(text)
        return entries

    return read


def read_origins(text: str) -> tuple[str, ...]:
    """Origins of web pages, or * alone."""
    origins = read_list(text)
    if origins != ("*",) and not all(ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError(text)
    return origins


def read_buckets(text: str) -> tuple[int, ...]:
    """Sizes in ascending order; an empty text stands for the default."""
    if not text:
        return DEFAULT_BUCKETS
    sizes = tuple(int(part) for part in text.split(","))
    if sizes != tuple(sorted(set(sizes))) or sizes[0] < 2 or sizes[-1] > 1024:
        raise ValueError(text)
    return sizes


def read_bytes(text: str) -> int:
    """Whole bytes, or a number with K, M or G (powers of 1024)."""
    unit = UNITS.get(text[-1:].upper(), 1)
    value = float(text[:-1] if unit > 1 else text) * unit
    if not 0 <= value < 2**50:
        raise ValueError(text)
    return int(value)


def read_job_store(text: str) -> str:
    if text and not STORE_URL.fullmatch(text):
        raise ValueError(text)
    return text


def read_endpoint(text: str) -> str:
    if text and not ENDPOINT.fullmatch(text):
        raise ValueError(text)
    return text


def read_non_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text


def read_root_path(text: str) -> str:
    path = text.removesuffix("/")
    if path and not ROOT_PATH.fullmatch(path):
        raise ValueError(text)
    return path


def read_keys(text: str) -> tuple[str, ...]:
    keys = tuple(part.strip() for part in text.split(","))
    if not all(API_KEY.fullmatch(key) for key in keys):
        raise ValueError(text)
    return keys


def split_host(text: str) -> tuple[str, int | None]:
    """The name and the port of NAME, NAME:PORT, or the same with an address (IPv6 in brackets).

    Raises ValueError, also for unusual spellings of IPv4 addresses (2130706433, 0177.0.0.1, 127.1).
    """
    name, port = text.lower(), None
    if (match := HOST_AND_PORT.fullmatch(name)) and not name.endswith("]"):
        name, port = match[1], int(match[2])
    if port is not None and port > 65535:
        raise ValueError(text)
    if name.startswith("[") and name.endswith("]"):
        return str(IPv6Address(name[1:-1])), port
    if not HOST_NAME.fullmatch(name) or (NUMERIC_HOST.fullmatch(name) and not IPV4.fullmatch(name)):
        raise ValueError(text)
    return name, port


def read_hosts(text: str) -> tuple[str, ...]:
    entries = read_list(text)
    for entry in entries:
        split_host(entry)
    return entries


def read_networks(text: str) -> tuple[str, ...]:
    """Networks such as 10.0.0.0/8, and single addresses."""
    return tuple(str(ip_network(entry)) for entry in read_list(text))
