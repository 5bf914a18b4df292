"""Which device and dtype a model runs with."""

from __future__ import annotations

import pytest
import torch

from service.device import select
from service.device.select import prepare_for_device
from tests.checkpoints.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512", "vendor", "dtype"),
    [
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, True, "GenuineIntel", torch.float32),
        (False, True, "AuthenticAMD", torch.bfloat16),
        (False, False, "AuthenticAMD", torch.float32),
    ],
)
def test_a_cpu_uses_the_dtype_it_is_faster_in(monkeypatch, amx, avx512, vendor, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(select, "cpu_field", lambda name: f"{name} : {vendor}")
    assert select.choose_dtype("auto", CPU) == dtype
    assert select.choose_dtype("float32", CPU) == torch.float32


def test_a_network_that_overflows_float16_runs_in_bfloat16():
    quiet = prepare_for_device(tiny_model().to(dtype=torch.float16), CPU)
    assert (quiet.unet.dtype, quiet.autoencoder.dtype) == (torch.float16, torch.float16)
    overflowing = tiny_model()
    overflowing.autoencoder.decoder.conv_in.weight.mul_(5e4)
    overflowing = prepare_for_device(overflowing.to(dtype=torch.float16), CPU)
    assert (overflowing.unet.dtype, overflowing.autoencoder.dtype) == (torch.float16, torch.bfloat16)
    x = overflowing.sample(["a cat"], [0], 2, 3.0)
    assert x.isfinite().all()
