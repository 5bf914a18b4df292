"""Settings: the one place that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from service.faults import Fault, read_faults

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float16", "bfloat16", "float32")
LOG_LEVELS = ("debug", "info", "warning", "error")

SWITCHES = {"1": True, "true": True, "0": False, "false": False}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class SettingError(ValueError):
    """A setting that names its key, its value and what was expected."""

    def __init__(self, key: str, value: str, expected: str) -> None:
        super().__init__(f"{key} is {value!r}; expected {expected}")


@dataclass(frozen=True)
class Parser:
    """How text becomes a setting's value; read() raises ValueError for what is not `expected`."""

    read: Callable[[str], Any]
    expected: str


def number(kind: type[int] | type[float], low: float, high: float) -> Parser:
    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    noun = "a whole number" if kind is int else "a number"
    return Parser(read, f"{noun} from {low:g} to {high:g}")


def choice(*options: str) -> Parser:
    def read(text: str) -> str:
        if text not in options:
            raise ValueError(text)
        return text

    return Parser(read, "one of " + ", ".join(options))


def read_device(text: str) -> str:
    kind, _, index = text.partition(":")
    if text not in DEVICES and not (kind == "cuda" and index.isdecimal()):
        raise ValueError(text)
    return text


def read_models(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise ValueError(text)
    return names


def read_buckets(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if sizes != tuple(sorted(set(sizes))) or sizes[0] < 2 or sizes[-1] > 1024:
        raise ValueError(text)
    return sizes


def switch() -> Parser:
    def read(text: str) -> bool:
        if text.lower() not in SWITCHES:
            raise ValueError(text)
        return SWITCHES[text.lower()]

    return Parser(read, "1 or 0, true or false")


def read_bytes(text: str) -> int:
    """Whole bytes, or a number with k, M or G (powers of 1024)."""
    unit = UNITS.get(text[-1:].upper(), 1)
    value = float(text[:-1] if unit > 1 else text) * unit
    if not 0 <= value < 2**50:
        raise ValueError(text)
    return int(value)


def setting(default: Any, parser: Parser) -> Any:
    return field(default=default, metadata={"parser": parser})


@dataclass(frozen=True)
class Settings:
    """What an operator chooses. Field `x_y` is read from LDM_X_Y. Comments say what a wrong value costs."""

    model: tuple[str, ...] = setting(
        ("emoji", "emoji-upscale"), Parser(read_models, "model names or folders, by commas")
    )
    host: str = setting("127.0.0.1", Parser(str, "an address to listen at"))
    port: int = setting(8000, number(int, 0, 65535))
    device: str = setting("auto", Parser(read_device, "auto, cpu, cuda or cuda:N"))
    dtype: str = setting("auto", choice(*DTYPES))
    log_level: str = setting("info", choice(*LOG_LEVELS))
    # Whether models named at start-up may be pickles (.ckpt, .bin). They never run code.
    allow_pickle: bool = setting(False, switch())

    # BERT's vocab.txt or its folder, for the paper's text models; none: beside each, or in the local cache.
    vocabulary: str = setting("", Parser(str, "a file vocab.txt, or its folder"))

    # Row counts that a UNet call is padded to; the last is the most rows of a call. Kernels are chosen by
    # row count, so a picture's last bits depend on the bucket: fewer buckets, fewer differences, more pad.
    # Never one row alone: that is where kernels differ most.
    buckets: tuple[int, ...] = setting(
        (2, 4, 8, 16, 32), Parser(read_buckets, "rising whole numbers from 2 to 1024, by commas")
    )
    # Pictures decoded between two steps at most; they also end where they have taken a step's time.
    decode_chunk: int = setting(4, number(int, 1, 1024))
    # One bucket and nothing left to chance: the same bytes in any company, at the last bucket's cost a call.
    invariant: bool = setting(False, switch())
    threads: int = setting(0, number(int, 0, 1024))  # of a CPU; 0: torch's choice. Bits may depend on it

    # Bytes that one UNet call may take beside the weights; 0: what the device has free. Too many: jobs run
    # out of memory, and run again in smaller calls. Too few: smaller calls.
    step_memory: int = setting(0, Parser(read_bytes, "bytes, or a number with K, M or G"))
    # Bytes that weights may take; 0: no limit. Below all models' together: they take turns, and load again.
    model_memory: int = setting(0, Parser(read_bytes, "bytes, or a number with K, M or G"))
    # What breaks, and where: for tests only (service/faults.py).
    faults: tuple[Fault, ...] = setting((), Parser(read_faults, "stage:kind:word, by commas"))

    # Jobs accepted and not answered. Too few: needless 429s. Too many: answers that come too late.
    queue_size: int = setting(64, number(int, 1, 100_000))
    max_images: int = setting(16, number(int, 1, 1024))  # n of one request
    max_pixels: int = setting(1024 * 1024, number(int, 1, 2**28))  # width * height of one picture
    max_work: int = setting(10**9, number(int, 1, 10**15))  # n * steps * width * height of one request
    max_input_pixels: int = setting(2**24, number(int, 1, 2**28))  # of one picture that a client sends
    max_body_bytes: int = setting(2**25, number(int, 1024, 2**30))  # pictures in base64 included
    # Of all bodies at a time. Too few: needless 429s. The memory that they take is up to four times that.
    max_bodies_bytes: int = setting(2**28, number(int, 1024, 2**40))

    # Jobs of POST /jobs that have ended and can still be asked for: at most so many, for at most so long.
    # Their pictures stay in memory: a job of one 512x512 PNG is about half a megabyte.
    jobs_kept: int = setting(256, number(int, 1, 1_000_000))
    jobs_seconds: float = setting(900.0, number(float, 0.1, 30 * 86_400))

    timeout: float = setting(600.0, number(float, 0.001, 86_400))  # seconds of a request that names none
    drain_seconds: float = setting(300.0, number(float, 0, 86_400))  # then running jobs are given up
    # A worker that shows no progress for so long is replaced. Below a slow UNet call: replaced for ever.
    stall_seconds: float = setting(120.0, number(float, 0.1, 86_400))

    @property
    def max_rows(self) -> int:
        """The most rows of one UNet call."""
        return self.buckets[-1]


def parse(key: str, name: str, text: str) -> Any:
    """The value of setting `name`; `key` is what an error calls it. Raises SettingError."""
    parser: Parser = next(f for f in fields(Settings) if f.name == name).metadata["parser"]
    try:
        return parser.read(text)
    except ValueError:
        raise SettingError(key, text, parser.expected) from None


def read_settings(environ: Mapping[str, str] | None = None, **given: Any) -> Settings:
    """Settings from LDM_* variables; `given` values that are not None come first.

    Raises SettingError for a value that does not parse or an LDM_ name that is no setting's.
    """
    environ = os.environ if environ is None else environ
    names = {f"LDM_{f.name.upper()}": f.name for f in fields(Settings) if f.default is not MISSING}
    values = {names[key]: parse(key, names[key], environ[key]) for key in names if key in environ}
    return Settings(**(values | {key: value for key, value in given.items() if value is not None}))


def to_environment(settings: Settings) -> dict[str, str]:
    """The inverse of read_settings, for a child process."""

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return {f"LDM_{f.name.upper()}": text(getattr(settings, f.name)) for f in fields(Settings)}
