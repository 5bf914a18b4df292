"""Settings: the one place that reads the environment, and the file of settings."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from service.worker.faults import Fault, read_faults

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float16", "bfloat16", "float32")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("auto", "json", "text")

PREFIX = "LDM_"
CONFIG = "LDM_CONFIG"  # names the file of settings; no setting itself

SWITCHES = {"1": True, "true": True, "0": False, "false": False}
WORD = re.compile(r"[^\s=()\[\]:\\]{1,64}=.")
NAMED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}=.")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
BYTES = "bytes, or a number with K, M or G"
KEY = re.compile(r"[!-+\--~]{8,}")  # an API key: visible ASCII without a comma


class SettingError(ValueError):
    """A setting that cannot be: its key, its value, where it came from and what was expected."""


@dataclass(frozen=True)
class Parser:
    """How text becomes a setting's value; read() raises ValueError for what is not `expected`.

    secret: its value is never shown.
    """

    read: Callable[[str], Any]
    expected: str
    secret: bool = False


class Given(NamedTuple):
    """The text of a setting, what it is called there, and where it came from."""

    text: str
    key: str
    source: str


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


def read_device(text: str) -> str:
    kind, _, index = text.partition(":")
    if text not in DEVICES and not (kind == "cuda" and index.isdecimal()):
        raise ValueError(text)
    return text


def read_paths(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def read_models(text: str) -> tuple[str, ...]:
    names = read_paths(text)
    if not names:
        raise ValueError(text)
    return names


def read_loras(text: str) -> tuple[str, ...]:
    named = read_paths(text)
    if not all(NAMED.match(part) for part in named):
        raise ValueError(text)
    return named


def read_embeddings(text: str) -> tuple[str, ...]:
    named = tuple(part.strip() for part in text.split(",") if part.strip())
    if not all(WORD.match(part) for part in named):
        raise ValueError(text)
    return named


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


def read_name(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text


def read_keys(text: str) -> tuple[str, ...]:
    keys = tuple(part.strip() for part in text.split(","))
    if not all(KEY.fullmatch(key) for key in keys):
        raise ValueError(text)
    return keys


def setting(default: Any, parser: Parser) -> Any:
    return field(default=default, metadata={"parser": parser}, repr=not parser.secret)


@dataclass(frozen=True)
class Settings:
    """What an operator chooses. Field `x_y` is read from LDM_X_Y and from `x_y` of a file.

    Comments say what a wrong value costs.
    """

    model: tuple[str, ...] = setting(
        ("emoji", "emoji-upscale"), Parser(read_models, "model names or folders, by commas")
    )
    host: str = setting("127.0.0.1", Parser(str, "an address to listen at"))
    port: int = setting(8000, number(int, 0, 65535))
    device: str = setting("auto", Parser(read_device, "auto, cpu, cuda or cuda:N"))
    dtype: str = setting("auto", choice(*DTYPES))
    # debug shows prompts, which no other level does.
    log_level: str = setting("info", choice(*LOG_LEVELS))
    log_format: str = setting("auto", choice(*LOG_FORMATS))  # auto: text for a terminal, else JSON
    # Who has none of these keys gets a 401; neither setting: everybody may ask. The file has one a line.
    api_keys: tuple[str, ...] = setting(
        (), Parser(read_keys, "keys of at least 8 visible characters, by commas", secret=True)
    )
    api_key_file: str = setting("", Parser(read_name, "a file of keys, one a line"))
    # Whether models named at start-up may be pickles (.ckpt, .bin). They never run code.
    allow_pickle: bool = setting(False, switch())

    # BERT's vocab.txt or its folder, for the paper's text models; none: beside each, or in the local cache.
    vocabulary: str = setting("", Parser(str, "a file vocab.txt, or its folder"))

    # VAEs in the place of models' own, of the same shape.
    vae: tuple[str, ...] = setting((), Parser(read_paths, "a path, or MODEL=PATH by commas"))
    # Words that models learn beside their own (textual inversion). Each must fit a model.
    embedding: tuple[str, ...] = setting((), Parser(read_embeddings, "NAME=PATH, by commas"))
    # LoRAs that requests can ask for, by name. Each must fit a model.
    lora: tuple[str, ...] = setting((), Parser(read_loras, "NAME=PATH, by commas"))
    # Sets of them (names and weights) that are merged at a time, each as large as the weights it changes. Too
    # few: jobs with another set wait until the jobs of one of these are done. Too many: out of memory.
    lora_sets: int = setting(4, number(int, 1, 1024))

    # What single files of Stable Diffusion 2 predict where no YAML file beside them says: no tensor shows it.
    # The wrong word: pictures of noise.
    prediction: str = setting("v_prediction", choice("epsilon", "v_prediction"))

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
    step_memory: int = setting(0, Parser(read_bytes, BYTES))
    # Bytes that weights may take; 0: no limit. Below all models' together: they take turns, and load again.
    model_memory: int = setting(0, Parser(read_bytes, BYTES))
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
    # Their pictures stay in memory: together at most so many bytes, or the newest job's alone. Too few of
    # any of these: a 404 for who asks late.
    jobs_kept: int = setting(256, number(int, 1, 1_000_000))
    jobs_bytes: int = setting(2**29, Parser(read_bytes, BYTES))
    jobs_seconds: float = setting(900.0, number(float, 0.1, 30 * 86_400))

    timeout: float = setting(600.0, number(float, 0.001, 86_400))  # seconds of a request that names none
    drain_seconds: float = setting(300.0, number(float, 0, 86_400))  # then running jobs are given up
    # A worker that shows no progress for so long is replaced. Below a slow UNet call: replaced for ever.
    stall_seconds: float = setting(120.0, number(float, 0.1, 86_400))

    @property
    def max_rows(self) -> int:
        """The most rows of one UNet call."""
        return self.buckets[-1]


def parse(name: str, given: Given) -> Any:
    """The value of setting `name`. Raises SettingError."""
    parser: Parser = next(f for f in fields(Settings) if f.name == name).metadata["parser"]
    try:
        return parser.read(given.text)
    except ValueError:
        shown = "one that is not shown" if parser.secret else repr(given.text)
        message = f"{given.key} is {shown} (from {given.source}); expected {parser.expected}"
        raise SettingError(message) from None


def read_settings(
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
    config: str | None = None,
) -> Settings:
    """Settings from flags, then LDM_* variables, then the file `config` or LDM_CONFIG, then the defaults.

    flags: setting -> text. Raises SettingError.
    """
    environ = os.environ if environ is None else environ
    names = [f.name for f in fields(Settings)]
    file = config or environ.get(CONFIG)
    given = dict(in_file(Path(file))) if file else {}
    for name in names:
        if (key := variable(name)) in environ:
            given[name] = Given(environ[key], key, "the environment")
    for name, text in (flags or {}).items():
        given[name] = Given(text, "--" + name.replace("_", "-"), "the command line")
    return Settings(**{name: parse(name, one) for name, one in given.items()})


def in_file(file: Path) -> Iterator[tuple[str, Given]]:
    """The settings of a TOML file. Raises SettingError for what is no setting, or cannot be read."""
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise SettingError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise SettingError(f"{file} is no TOML file: {error}") from None
    names = [f.name for f in fields(Settings)]
    for key, value in values.items():
        if key not in names:
            raise SettingError(f"{key} in {file} is no setting{instead(key, names)}")
        if isinstance(value, dict):
            raise SettingError(f"{key} in {file} is a table; settings have no tables")
        yield key, Given(as_text(value), key, str(file))


def instead(key: str, names: list[str]) -> str:
    """What may have been meant."""
    near = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(names)}"


def as_text(value: Any) -> str:
    """A setting's value, or one of TOML, as a variable would have it."""
    if isinstance(value, list | tuple):
        return ",".join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def misspelt(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that looks as if it were meant to be a setting, and is none."""
    known = [CONFIG, *(variable(f.name) for f in fields(Settings))]
    strange = (key for key in environ if key.startswith(PREFIX) and key not in known)
    near = ((key, difflib.get_close_matches(key, known, n=1, cutoff=0.8)) for key in strange)
    return [f"{key} is no setting; did you mean {match[0]}?" for key, match in near if match]


def variable(name: str) -> str:
    """The environment's name of a setting."""
    return PREFIX + name.upper()


def to_environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """An environment whose settings are these, for a child process. Keys of the API are not its business."""
    private = {CONFIG, variable("api_keys"), variable("api_key_file")}
    ours = {variable(f.name): as_text(getattr(settings, f.name)) for f in fields(Settings)}
    return {key: value for key, value in (environ | ours).items() if key not in private}
