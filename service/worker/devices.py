"""Which replicas the settings ask for: one for each device, or several on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

from service.setting_values import AUTO
from service.settings import SettingError, Settings

COUNT = "import torch; print(torch.cuda.device_count())"


def settings_of_replicas(settings: Settings, count_cuda: Callable[[], int] | None = None) -> list[Settings]:
    """The settings of each replica's workers: `device` is one device, `replicas` the number of replicas.

    count_cuda: the number of CUDA devices; called only if it matters. Raises SettingError.
    """
    devices = devices_of(settings, count_cuda or count_cuda_devices)
    return [replace(settings, device=device, replicas=str(len(devices))) for device in devices]


def devices_of(settings: Settings, count_cuda: Callable[[], int]) -> list[str]:
    """The device of each replica. Raises SettingError."""
    named, wanted = settings.device.split(","), settings.replicas
    is_list = len(named) > 1 or ":" in settings.device
    if is_list or wanted == "1" or (wanted == AUTO and settings.device != "cuda"):
        if wanted not in (AUTO, str(len(named))):
            raise SettingError(
                f"replicas is {wanted}, but device is {settings.device}: one replica per device"
            )
        return named
    found = 0 if settings.device == "cpu" else count_cuda()
    if settings.device == "cuda" and not found:
        raise SettingError("device is cuda, but there is no CUDA device")
    if not found:
        return ["cpu"] * int(wanted)
    number = found if wanted == AUTO else int(wanted)
    if number > found:
        raise SettingError(f"replicas is {wanted}, but the number of CUDA devices is {found}")
    return ["cuda"] if found == 1 else [f"cuda:{index}" for index in range(number)]


def count_cuda_devices() -> int:
    """The number of CUDA devices, counted by torch in another process: this one never loads torch."""
    command = [sys.executable, "-P", "-c", COUNT]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    last = done.stdout.split()[-1:] or ["0"]
    return int(last[0]) if last[0].isdecimal() else 0
