"""Which dtype a device is served and trained in."""

from __future__ import annotations

import pytest
import torch

from models import dtypes

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
    monkeypatch.setattr(dtypes, "cpu_field", lambda name: f"{name} : {vendor}")
    assert dtypes.choose_dtype("auto", CPU) == dtype
    assert dtypes.choose_dtype("float32", CPU) == torch.float32
    with dtypes.mixed_precision(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
