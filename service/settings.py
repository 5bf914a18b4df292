"""Settings from flags, environment variables and a file. No other module reads LDM_* variables."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from service.setting_values import (
    AUTO,
    BYTES,
    DEFAULT_BUCKETS,
    MAX_REPLICAS,
    NAMED_EMBEDDING,
    NAMED_LORA,
    NAMED_MODEL,
    Parser,
    boolean,
    choice,
    matching,
    number,
    read_buckets,
    read_bytes,
    read_devices,
    read_endpoint,
    read_hosts,
    read_job_store,
    read_keys,
    read_list,
    read_models,
    read_networks,
    read_non_blank,
    read_origins,
    read_replicas,
    read_root_path,
)

PREFIX = "LDM_"
CONFIG = "LDM_CONFIG"  # environment variable that names the settings file; not itself a setting

# Settings that worker processes do not get.
PRIVATE = ("api_keys", "api_key_file", "admin_key_file", "key_table", "job_store", "webhook_secret_file")

DTYPES = ("auto", "float16", "bfloat16", "float32")
BACKENDS = ("auto", "torch", "openvino")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("auto", "json", "text")


class SettingError(ValueError):
    """A setting has an invalid value; the message names key, value, source and the accepted values."""


class Given(NamedTuple):
    """The text of a setting, with the key (flag, variable or name in a file) and the source of the text."""

    text: str
    key: str
    source: str


# Offered with the bundled models, where neither models nor such adapters are given.
BUNDLED_ADAPTERS = {"controlnet": ("outline=emoji-outline",), "lora": ("few-steps=emoji-few-steps",)}


def setting(default: Any, parser: Parser, meaning: str) -> Any:
    """A field of Settings. `meaning` explains the setting and the effect of a wrong value, in the help of the
    command line and in the table of service/README.md."""
    metadata = {"parser": parser, "meaning": " ".join(meaning.split())}
    return field(default=default, metadata=metadata, repr=not parser.secret)


@dataclass(frozen=True)
class Settings:
    """All settings. The field `x_y` is the flag --x-y, the variable LDM_X_Y, and `x_y` in a file."""

    # models
    model: tuple[str, ...] = setting(
        ("emoji", "emoji-upscale"),
        Parser(
            read_models, "model names or paths, separated by commas (a path with a comma in double quotes)"
        ),
        """Models to serve: the name of a bundled model (emoji, emoji-upscale), or the path of a folder or a
        single file. A request that names no model gets the first one that can do its task. With model_dir,
        also the name of a model in its folders, which is then loaded at the start and comes first; no bundled
        model is served unless it is named here.""",
    )
    model_dir: tuple[str, ...] = setting(
        (),
        Parser(read_list, "folders, separated by commas"),
        """Folders of models, each served under its file's name without suffix and loaded at its first
        request. In a folder that is laid out as the models folder of AUTOMATIC1111 or ComfyUI, LoRAs,
        embeddings, VAEs, ControlNets and IP-Adapters are found too. Files that cannot be used are ignored
        with a warning. Read again by POST /models/rescan.""",
    )
    lora_dir: tuple[str, ...] = setting(
        (),
        Parser(read_list, "folders, separated by commas"),
        """Folders of LoRAs, each served under its file's name without suffix, with the models that it fits.
        Files that cannot be used are ignored with a warning. Read again by POST /models/rescan.""",
    )
    allow_pickle: bool = setting(
        False,
        boolean(),
        """Also read pickled weights (.ckpt, .bin, .pt). The reader never runs code that a file contains.""",
    )
    prediction: Literal["epsilon", "v_prediction"] = setting(
        "v_prediction",
        choice("epsilon", "v_prediction"),
        """Prediction type of single files of Stable Diffusion 2, whose tensors do not show it; a YAML file
        next to the checkpoint takes precedence. The wrong value gives images of noise.""",
    )
    weights: Literal["auto", "ema", "raw"] = setting(
        "auto",
        choice("auto", "ema", "raw"),
        """UNet weights to use of a single file that has both: raw, the weights at the end of training, or
        ema, their averages over training. auto: raw for Stable Diffusion, as in other programs, and ema for
        the LDM paper's models.""",
    )
    vocabulary: str = setting(
        "",
        Parser(str, "the file vocab.txt, or its folder"),
        """vocab.txt of bert-base-uncased, for the LDM paper's text models. Empty: the file is searched next
        to each model and in the local cache of Hugging Face.""",
    )
    vae: tuple[str, ...] = setting(
        (),
        Parser(read_list, "PATH, or MODEL=PATH separated by commas"),
        """A VAE (folder or file) that replaces a model's own; MODEL=PATH if several models are served. It
        must have the shape of the model's own.""",
    )
    tiny_vae: tuple[str, ...] = setting(
        (),
        Parser(read_list, "PATH, or MODEL=PATH separated by commas"),
        """A tiny VAE (TAESD, TAESDXL or an AutoencoderTiny of diffusers): previews show true colours, and
        requests may choose it to decode images faster and less exactly. MODEL=PATH if several models are
        served.""",
    )
    embedding: tuple[str, ...] = setting(
        (),
        Parser(matching(NAMED_EMBEDDING), "NAME=PATH, separated by commas"),
        """Textual inversion embeddings: NAME becomes a word that prompts can use. Each must fit at least
        one model.""",
    )
    lora: tuple[str, ...] = setting(
        (),
        Parser(matching(NAMED_LORA), "NAME=PATH, separated by commas"),
        """LoRAs that requests can use by NAME: LoRA, LoCon, LoHa, LoKr, GLoRA, DoRA or full differences. Each
        must fit at least one model; modules that a model does not have are ignored with a warning. If neither
        this setting nor model is given: the bundled few-steps=emoji-few-steps.""",
    )
    controlnet: tuple[str, ...] = setting(
        (),
        Parser(matching(NAMED_MODEL), "NAME=PATH, separated by commas"),
        """ControlNets and T2I-Adapters that requests can use by NAME in `controls`: single files, folders in
        the layout of diffusers, or the bundled emoji-outline. Each must fit at least one model. If neither
        this setting nor model is given: the bundled outline=emoji-outline.""",
    )
    reference_adapter: tuple[str, ...] = setting(
        (),
        Parser(matching(NAMED_MODEL), "NAME=PATH, separated by commas"),
        """IP-Adapters that requests can use by NAME in `reference_images`. Each must fit at least one model
        and one image_encoder.""",
    )
    image_encoder: tuple[str, ...] = setting(
        (),
        Parser(read_list, "PATH, separated by commas"),
        """CLIP image encoders (folders or files). Each reference adapter uses the first one that fits it;
        retrieval-augmented models need one to read reference images.""",
    )
    lora_sets: int = setting(
        4,
        number(int, 1, 1024),
        """Most combinations of LoRAs (names and weights) that are kept merged at the same time. Each takes
        as much memory as the weights that it changes. Too few: jobs with another combination wait. Too many:
        out of memory.""",
    )

    # device
    device: str = setting(
        "auto",
        Parser(read_devices, "auto, cpu, cuda, or different cuda:N separated by commas"),
        """Device to run on, or several: ldm serve runs one replica, with a worker process of its own, on
        each. auto is one CUDA device if there is one, otherwise the CPU; cuda is all CUDA devices.""",
    )
    replicas: str = setting(
        AUTO,
        Parser(read_replicas, f"auto, or a whole number from 1 to {MAX_REPLICAS}"),
        """Number of replicas, which share the requests. On a CPU they also share the threads; on CUDA each
        has its own device. auto is one for each device. With more replicas than CPU cores all are slower.""",
    )
    dtype: str = setting(
        "auto",
        choice(*DTYPES),
        """Floating-point type of the weights; auto is float16 on CUDA, and on a CPU bfloat16 if the CPU
        multiplies it faster than float32, otherwise float32.""",
    )
    backend: Literal["auto", "torch", "openvino"] = setting(
        "auto",
        choice(*BACKENDS),
        """Library that runs UNets and VAE decoders on a CPU. openvino needs the package of pip install
        '.[openvino]', and runs neither LoRAs, tiling, controls, reference images nor feature_cache, for which
        torch is used. auto measures a call of each model at its first start and chooses openvino if it is
        faster by a tenth; without the package, on CUDA and with invariant it is torch. The last bits of an
        image depend on the library.""",
    )
    threads: int = setting(
        0,
        number(int, 0, 1024),
        """CPU threads for tensor operations; 0: OMP_NUM_THREADS if it is set, otherwise the number of cores
        that the process may use (CPU affinity and cgroup quota). Replicas share the number. Too many: threads
        wait for each other and everything is slower. The last bits of an image can depend on this number.""",
    )
    buckets: tuple[int, ...] = setting(
        DEFAULT_BUCKETS,
        Parser(read_buckets, "increasing whole numbers from 2 to 1024, separated by commas"),
        """Row counts that UNet calls are padded to; the last one is the maximum. The last bits of an image
        depend on the bucket of its calls. Fewer buckets: more padding, which costs as much as rows of images
        do, and fewer differences. A bucket of one row is not possible, because its results differ most.""",
    )
    no_graphs: bool = setting(
        False,
        boolean(),
        """Do not record CUDA graphs; every network call is then launched from Python. If recording a graph
        ends a worker, later workers of its replica do not record any.""",
    )
    invariant: bool = setting(
        False,
        boolean(),
        """Make the bytes of an image independent of the other jobs: every UNet call has the size of the last
        bucket, which lowers the throughput under light load.""",
    )
    decode_chunk: int = setting(
        4,
        number(int, 1, 1024),
        """Most images decoded between two UNet calls. Decoding also stops after the duration of one UNet
        call.""",
    )
    step_memory: int = setting(
        0,
        Parser(read_bytes, BYTES),
        """Most bytes of one UNet call, without the weights; 0: all free memory of the device. Too many: calls
        run out of memory and are repeated with fewer rows. Too few: small calls.""",
    )
    model_memory: int = setting(
        0,
        Parser(read_bytes, BYTES),
        """Most bytes of the weights of all loaded models together; 0: no limit. If not all models fit, they
        are unloaded and loaded again as requests need them.""",
    )

    # server
    host: str = setting(
        "127.0.0.1",
        Parser(str, "an address to listen on"),
        """Address to listen on. 0.0.0.0 makes the service reachable from other machines.""",
    )
    port: int = setting(8000, number(int, 0, 65535), """Port to listen on.""")
    api_key_file: str = setting(
        "",
        Parser(read_non_blank, "a file of API keys, one on each line"),
        """File of API keys, one on each line. A request without a valid key gets a 401. If neither this
        setting nor key_table nor api_keys is set, no key is needed. Read again when it changes.""",
    )
    key_table: str = setting(
        "",
        Parser(read_non_blank, "a TOML file of keys"),
        """File of API keys with names, hashes and limits, a table [keys.NAME] for each, as `ldm keys new`
        prints it. Works together with the files of plain keys. Read again when it changes.""",
    )
    admin_key_file: str = setting(
        "",
        Parser(read_non_blank, "a file of API keys, one on each line"),
        """File of keys for the calls that load, unload and rescan models; each is an API key too,
        and may see and cancel the jobs of all keys. Where keys are set, a request for such a call with
        another key gets a 403. If no keys at all are set, no key is needed. Read again when it changes.""",
    )
    api_keys: tuple[str, ...] = setting(
        (),
        Parser(read_keys, "keys of at least 8 visible characters, separated by commas", secret=True),
        """API keys, in addition to those of api_key_file. There is no flag, because every user of a machine
        can read the flags of a process.""",
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        Parser(read_origins, "origins such as https://example.org separated by commas, or *"),
        """Origins whose web pages may call this service from a browser; * allows every page. Empty: none
        but the service's own.""",
    )
    alias: tuple[str, ...] = setting(
        (),
        Parser(matching(NAMED_MODEL), "NAME=MODEL, separated by commas"),
        """Other names for models in the OpenAI API, for clients whose model names are fixed:
        dall-e-3=emoji.""",
    )
    root_path: str = setting(
        "",
        Parser(read_root_path, "a path such as /images"),
        """Path prefix below which a reverse proxy publishes the service, whether or not the proxy removes it
        from requests. Without it, links in responses lack the prefix, unless the proxy sends
        X-Forwarded-Prefix.""",
    )
    no_page: bool = setting(
        False,
        boolean(),
        """Do not serve the page at /. The API and its documentation at /docs stay.""",
    )
    provenance: Literal["xmp", "none"] = setting(
        "xmp",
        choice("xmp", "none"),
        """Whether image files state that a model made them: xmp writes IPTC's DigitalSourceType into PNG,
        JPEG and WebP files, none writes nothing. Some laws require such a mark.""",
    )
    c2pa_cert: str = setting(
        "",
        Parser(str, "a file of certificates"),
        """Certificates in PEM, the signer's first, to sign image files with a C2PA manifest. Needs c2pa_key
        and the package c2pa-python. Empty: files have no manifest.""",
    )
    c2pa_key: str = setting(
        "", Parser(str, "a file"), """Private key of c2pa_cert in PEM, without a password."""
    )
    webhook_hosts: tuple[str, ...] = setting(
        (),
        Parser(read_hosts, "hosts such as hooks.example.org or hooks.example.org:8443, separated by commas"),
        """Hosts that requests of POST /jobs may name as webhook. Without a port, only the default port of
        the scheme is allowed. Needs webhook_secret_file. Empty: no webhooks.""",
    )
    webhook_secret_file: str = setting(
        "",
        Parser(read_non_blank, "a file of secrets, one on each line"),
        """File of the secrets that sign webhooks, one on each line, of at least 16 characters. With two,
        X-Signature has two signatures, so that a secret can be replaced while receivers know only one.""",
    )
    webhook_networks: tuple[str, ...] = setting(
        (),
        Parser(read_networks, "networks such as 10.0.0.0/8, or addresses, separated by commas"),
        """Networks besides the internet that webhooks may connect to. Without this setting, private,
        loopback, link-local, multicast and reserved addresses are refused.""",
    )
    webhook_http: bool = setting(
        False,
        boolean(),
        """Also accept webhooks with http://, whose contents everybody on the way can read.""",
    )
    webhook_seconds: float = setting(
        600.0,
        number(float, 0, 86_400),
        """Seconds from a job's end within which failed attempts to deliver its webhook are repeated. The
        pauses between them grow from 1 s to 60 s.""",
    )
    webhook_max_bytes: int = setting(
        2**20,
        Parser(read_bytes, BYTES),
        """Most bytes of a webhook's body. In a larger one the data of images is empty; receivers then fetch
        the job. 0: never images.""",
    )
    log_level: str = setting(
        "info",
        choice(*LOG_LEVELS),
        """Least severe messages to log. debug logs prompts; no other level does.""",
    )
    log_format: str = setting(
        "auto",
        choice(*LOG_FORMATS),
        """Format of the logs on stderr; auto is text on a terminal, otherwise JSON.""",
    )
    trace_endpoint: str = setting(
        "",
        Parser(read_endpoint, "a URL such as http://localhost:4318"),
        """OTLP/HTTP endpoint to which OpenTelemetry traces of requests are sent. Needs the packages of
        pip install '.[tracing]'; the SDK's variables OTEL_* apply. Empty: no traces.""",
    )

    # limits
    queue_size: int = setting(
        64,
        number(int, 1, 100_000),
        """Most requests accepted and not yet answered; further ones get a 429. Too few: needless 429s. Too
        many: answers that come too late.""",
    )
    max_images: int = setting(16, number(int, 1, 1024), """Most images of one request (n).""")
    max_pixels: int = setting(
        4 * 1024 * 1024, number(int, 1, 2**28), """Most pixels (width * height) of one generated image."""
    )
    max_work: int = setting(
        10**9, number(int, 1, 10**15), """Most work of one request: n * steps * width * height."""
    )
    max_input_pixels: int = setting(
        2**24, number(int, 1, 2**28), """Most pixels of one image that a client sends."""
    )
    max_body_bytes: int = setting(
        2**25,
        number(int, 1024, 2**30),
        """Most bytes of one request body, images in base64 included; a larger one gets a 413.""",
    )
    max_bodies_bytes: int = setting(
        2**28,
        number(int, 1024, 2**40),
        """Most bytes of all request bodies at the same time. Too few: needless 429s. Bodies take up to four
        times as much memory.""",
    )
    max_connections: int = setting(
        2048,
        number(int, 1, 1_000_000),
        """Most open connections. Beyond it, the one that has been idle longest is closed for a new one; while
        all wait for responses, new ones get a 503. The process needs as many open files (ulimit -n).""",
    )
    min_rate: int = setting(
        8192,
        number(int, 1, 2**30),
        """Least bytes per second at which clients must send request bodies and take responses; see
        body_seconds. Too many: clients with slow connections are cut off.""",
    )
    jobs_kept: int = setting(
        256,
        number(int, 1, 1_000_000),
        """Most finished jobs of POST /jobs that are kept. Too few: clients that fetch late get a 404.""",
    )
    jobs_bytes: int = setting(
        2**29,
        Parser(read_bytes, BYTES),
        """Most bytes of the images of kept jobs; the newest job is kept in any case.""",
    )
    jobs_seconds: float = setting(
        900.0,
        number(float, 0.1, 30 * 86_400),
        """Seconds that a finished job of POST /jobs is kept.""",
    )
    job_store: str = setting(
        "",
        Parser(read_job_store, "redis://HOST:PORT/DB, rediss://... or unix://PATH", secret=True),
        """Redis in which several servers share the jobs of POST /jobs, their events and idempotency keys, so
        that each server answers for all of them. jobs_kept, jobs_bytes and jobs_seconds then apply to all
        servers together. A password belongs in the environment, because every user of a machine can read
        flags. Empty: in memory.""",
    )

    # time
    timeout: float = setting(
        600.0,
        number(float, 0.001, 86_400),
        """Seconds until a request gets a 504, unless it has a timeout of its own.""",
    )
    drain_seconds: float = setting(
        300.0,
        number(float, 0, 86_400),
        """Seconds after SIGTERM until unfinished jobs are cancelled. The process manager must wait longer
        before it kills the service (docker stop -t).""",
    )
    header_seconds: float = setting(
        10.0,
        number(float, 0.1, 86_400),
        """Seconds in which a client must send the headers of a request, before its connection is closed.""",
    )
    body_seconds: float = setting(
        30.0,
        number(float, 0.1, 86_400),
        """A body of n bytes may take so many seconds and n / min_rate. A request that takes longer gets a
        408; if a client takes longer to receive a response, its connection is closed.""",
    )
    idle_seconds: float = setting(
        5.0,
        number(float, 0.1, 86_400),
        """Seconds for which a connection stays open between two requests. Too few: clients connect again for
        each request.""",
    )
    stall_seconds: float = setting(
        120.0,
        number(float, 0.1, 86_400),
        """Seconds without progress after which a worker is replaced; ten times as many while it starts or
        loads a model. If a UNet call takes longer, workers are replaced without end.""",
    )
    faults: str = setting(
        "",
        Parser(str, "stage:kind:word, separated by commas"),
        """Failures to inject, for tests only; parsed by the worker (service/worker/faults.py).""",
    )

    @property
    def replica_count(self) -> int:
        """The number of replicas, in a worker's settings; 1 if it is not decided yet."""
        return 1 if self.replicas == AUTO else int(self.replicas)

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
        value = "a value that is not shown" if parser.secret else repr(given.text)
        message = f"{given.key} is {value} (from {given.source}); expected {parser.expected}"
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
    values = {name: parse(name, one) for name, one in given.items()}
    if values.get("model_dir"):  # the bundled models would come before those of the folder
        values.setdefault("model", ())
    if "model" not in values:
        values = {**BUNDLED_ADAPTERS, **values}
    return Settings(**values)


def in_file(file: Path) -> Iterator[tuple[str, Given]]:
    """The settings of a TOML file. Raises SettingError if it cannot be read or has an unknown key."""
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise SettingError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # invalid TOML, or not UTF-8
        raise SettingError(f"{file} is not a TOML file: {error}") from None
    names = [f.name for f in fields(Settings)]
    for key, value in values.items():
        if key not in names:
            raise SettingError(f"{key} in {file} is not a setting{suggestion(key, names)}")
        if isinstance(value, dict):
            raise SettingError(f"{key} in {file} is a table; expected a value")
        yield key, Given(as_text(value), key, str(file))


def suggestion(key: str, names: list[str]) -> str:
    """The closest setting's name, or all names."""
    near = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(names)}"


def as_text(value: Any) -> str:
    """A value of a setting or of a TOML file, as the text of an environment variable."""
    if isinstance(value, tuple):  # of a setting: each item is one entry, even with a comma
        return ",".join(f'"{entry}"' if "," in str(entry) else as_text(entry) for entry in value)
    if isinstance(value, list):  # of flags or of a TOML file: an item may contain several entries
        return ",".join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def misspelled(environ: Mapping[str, str]) -> list[str]:
    """A warning for each environment variable that looks like a misspelled setting."""
    names = [CONFIG, *(variable(f.name) for f in fields(Settings))]
    unknown = (key for key in environ if key.startswith(PREFIX) and key not in names)
    closest = ((key, difflib.get_close_matches(key, names, n=1, cutoff=0.8)) for key in unknown)
    return [f"{key} is not a setting; did you mean {match[0]}?" for key, match in closest if match]


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def to_environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process with the same settings, without the API keys."""
    private = {CONFIG, *map(variable, PRIVATE)}
    own = {variable(f.name): as_text(getattr(settings, f.name)) for f in fields(Settings)}
    if not settings.model:  # the variable cannot hold an empty list
        private.add(variable("model"))
    return {key: value for key, value in {**environ, **own}.items() if key not in private}
