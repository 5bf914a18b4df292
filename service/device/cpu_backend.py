"""Which library runs the UNet and the VAE decoder on a CPU: torch, or OpenVINO where it is faster.

Only a model as it was loaded runs by OpenVINO. Everything that changes weights, or takes part in the middle
of a network, runs by torch: LoRAs, tiling, copies in float32, controls, reference images, and calls that keep
or reuse deep features.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.dtypes import cpu_field
from models.latent_diffusion import LatentDiffusion
from service.device.mapped_weights import MappedWeights
from service.device.select import trial_inputs
from service.engine.job import Job
from service.settings import SettingError

log = logging.getLogger(__name__)

MIN_GAIN = 1.1  # least speed of a UNet call by OpenVINO, relative to torch's, with which auto chooses it
TRIAL_CELLS = 32  # largest side of the latent of the call that is timed
TRIAL_CALLS = 3
CHECK_CELLS = 8  # largest side of the latent of the call whose result is compared with torch's
MAX_ERROR = {torch.bfloat16: 0.05, torch.float32: 1e-3}  # of a compiled UNet, relative to torch's result
FILE = "backends.json"  # the measurements of earlier starts, in the cache folder


def is_installed() -> bool:
    return find_spec("openvino") is not None


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, invariant: bool) -> str:
    """The setting `backend` as given, but "torch" for an "auto" that cannot choose OpenVINO.

    With `invariant`, a measurement must not decide on the bytes of images, so auto is torch. In float32
    OpenVINO's last bits depend on a row's place in the call at some row counts. Raises SettingError.
    """
    if name == "openvino":
        if device.type != "cpu":
            raise SettingError(f"backend is openvino, which runs on a CPU, but the device is {device}")
        if not is_installed():
            raise SettingError("backend openvino needs the package openvino: pip install '.[openvino]'")
        if dtype not in MAX_ERROR or (invariant and dtype == torch.float32):
            kind = str(dtype).removeprefix("torch.")
            raise SettingError(f"backend openvino does not support {kind}{' with invariant' * invariant}")
    if name == "auto" and (device.type != "cpu" or invariant or dtype not in MAX_ERROR or not is_installed()):
        return "torch"
    return name


def needs_torch(job: Job) -> bool:
    """Whether some of a job's UNet calls have inputs that a compiled network does not take.

    Such jobs share no calls with jobs that OpenVINO runs, so that the library of a job does not depend on
    other jobs.
    """
    return bool(job.controls or job.references or job.feature_cache)


def backend_of(model: LatentDiffusion) -> str:
    """The library that runs a model."""
    return "openvino" if model.is_compiled else "torch"


class Seconds(NamedTuple):
    """The duration of a UNet call by each library."""

    torch: float
    openvino: float


class CpuBackend:
    """Lets OpenVINO run models. choice: "torch", "openvino", or "auto" for the faster one.

    cache: the folder in which measurements are kept, so that a worker that starts again chooses the same.
    """

    def __init__(self, choice: str = "torch", cache: Path | None = None) -> None:
        self.choice = choice
        self._file = (cache or cache_folder()) / FILE

    @torch.inference_mode()
    def apply(self, model: LatentDiffusion) -> None:
        """Compile a model's UNet and decoder if they are to run by OpenVINO."""
        if self.choice == "torch" or model.unet is None or model.denoiser is None:
            return
        from service.device.openvino_networks import CompiledDecoder, CompiledUNet  # takes half a second

        name, key = model.spec.name, trial_key(model)
        seconds = self._read().get(key) if self.choice == "auto" else None
        if seconds and not is_faster(seconds):
            log.info("%s runs by torch, as measured before: %s", name, describe(seconds))
            return
        weights = mapped(model.unet, model.autoencoder)
        unet, compiled, inputs = model.unet, CompiledUNet(model.unet), trial_inputs(model, CHECK_CELLS)
        decoder = CompiledDecoder(model.autoencoder)
        error = difference(compiled(*inputs), unet(*inputs))
        decoder.wait()
        if self.choice == "auto" and not seconds:
            inputs = trial_inputs(model, TRIAL_CELLS)
            seconds = Seconds(least_seconds(lambda: unet(*inputs)), least_seconds(lambda: compiled(*inputs)))
            self._keep(key, seconds)
        measured = f": {describe(seconds)}" if seconds else ""
        if error <= MAX_ERROR[unet.dtype] and (seconds is None or is_faster(seconds)):
            model.denoiser.unet, model.compiled_decoder = compiled, decoder
            log.info("%s runs by OpenVINO%s", name, measured)
            if weights:
                weights.release()
        else:
            log.info("%s runs by torch%s; OpenVINO's error is %.1e", name, measured, error)
            if weights:
                weights.restore()

    def _read(self) -> dict[str, Seconds]:
        """The kept measurements."""
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            return {key: Seconds(*map(float, seconds)) for key, seconds in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _keep(self, key: str, seconds: Seconds) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(self._read() | {key: seconds}), encoding="utf-8")
            part.replace(self._file)
        except OSError as error:
            log.warning("the measurement is repeated at the next start: %s", error)


def mapped(*networks: nn.Module) -> MappedWeights | None:
    """The weights in a file, so that torch's copy needs no memory besides OpenVINO's; None without a disk."""
    try:
        return MappedWeights(*networks)
    except OSError as error:
        log.warning("the weights stay in memory twice: %s", error)
        return None


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latent-diffusion-service"


def trial_key(model: LatentDiffusion) -> str:
    """What a measurement depends on, as a short text."""
    assert model.unet is not None
    parts = (model.unet.spec, model.spec.defaults, model.unet.dtype, torch.get_num_threads())
    machine = cpu_field("model name"), torch.__version__, version("openvino")
    return sha256(repr((parts, machine)).encode()).hexdigest()[:16]


def is_faster(seconds: Seconds) -> bool:
    """Whether OpenVINO is faster by enough."""
    return seconds.torch > MIN_GAIN * seconds.openvino


def describe(seconds: Seconds) -> str:
    return f"a UNet call takes {seconds.openvino:.3g} s by OpenVINO and {seconds.torch:.3g} s by torch"


def difference(out: Tensor, exact: Tensor) -> float:
    """The norm of the error, relative to that of `exact`."""
    error: float = ((out.float() - exact.float()).norm() / exact.float().norm()).item()
    return error


def least_seconds(call: Callable[[], object]) -> float:
    """The duration of the fastest of a few calls."""
    seconds: list[float] = []
    for _ in range(TRIAL_CALLS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
