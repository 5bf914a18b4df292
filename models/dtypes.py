"""Which dtypes there are, and the one that a device is fastest in."""

from __future__ import annotations

import platform

import torch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a setting names; "auto" is the fastest one of the device."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if cpu_is_faster_in_bfloat16() else torch.float32


def mixed_precision(device: torch.device) -> torch.autocast:
    """A context for training: matrix products and convolutions in bfloat16, unless float32 is faster."""
    enabled = choose_dtype("auto", device) != torch.float32
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def cpu_is_faster_in_bfloat16() -> bool:
    """True with AMX, or with AVX512-BF16 on a CPU that is not Intel's.

    Intel's AVX512-BF16 alone is slower than float32: 0.16 against 0.32 TFLOP/s for large matrix products, and
    0.96 s against 0.68 s an image with the bundled model, on two cores of a Xeon (2026-11-26). The choice
    depends on the CPU model and not on a measurement, which other load on the machine could change: a worker
    that is started again must choose the same dtype.
    """
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    amx, avx512 = (getattr(torch.cpu, name, bool)() for name in names)
    return bool(amx or (avx512 and "GenuineIntel" not in cpu_field("vendor_id")))


def cpu_field(name: str) -> str:
    """The line of /proc/cpuinfo with this name; without such a file, what Python knows of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.strip() for line in file if line.startswith(name)), "")
    except OSError:
        return platform.processor()
