"""The benchmark of a GPU, rehearsed on a CPU with a small network: its checks pass, and can fail."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import cuda
from tests.benchmarks.shapes import TINY, Setting

SETTING = Setting(torch.device("cpu"), torch.float32)


@pytest.mark.slow
def test_checks_pass_or_were_not_made():
    made = list(cuda.checks(TINY["ldm-text"], SETTING))
    assert [check.what for check in made if check.fine is False] == []
    assert sum(check.fine is True for check in made) == 3


@pytest.mark.slow
def test_a_fast_path_that_is_off_is_found(monkeypatch):
    prepare_for_device = cuda.prepare_for_device

    def off(bundle, device):
        bundle = prepare_for_device(bundle, device)
        decode, eps = bundle.decode, bundle.denoiser
        monkeypatch.setattr(bundle, "decode", lambda z: decode(z) + 0.1)
        monkeypatch.setattr(bundle, "denoiser", lambda *given: 1.01 * eps(*given))
        return bundle

    monkeypatch.setattr(cuda, "prepare_for_device", off)
    bad = [check.what for check in cuda.checks(TINY["ldm-text"], SETTING) if check.fine is False]
    assert bad == ["eps in torch.float32", "D in torch.float32"]
