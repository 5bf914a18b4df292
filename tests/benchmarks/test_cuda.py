"""The GPU benchmark on a CPU with a small network: its checks pass, and can fail."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import cuda
from tests.benchmarks.shapes import TINY, Setting

SETTING = Setting(torch.device("cpu"), torch.float32)


@pytest.mark.slow
def test_checks_that_apply_to_a_cpu_pass():
    results = list(cuda.checks(TINY["ldm-text"], SETTING))
    assert [check.what for check in results if check.fine is False] == []
    assert sum(check.fine is True for check in results) == 3


@pytest.mark.slow
def test_a_wrong_fast_path_is_found(monkeypatch):
    prepare_for_device = cuda.prepare_for_device

    def prepare_wrongly(model, device):
        model = prepare_for_device(model, device)
        decode, eps = model.decode, model.denoiser
        monkeypatch.setattr(model, "decode", lambda z: decode(z) + 0.1)
        monkeypatch.setattr(model, "denoiser", lambda *given: 1.01 * eps(*given))
        return model

    monkeypatch.setattr(cuda, "prepare_for_device", prepare_wrongly)
    bad = [check.what for check in cuda.checks(TINY["ldm-text"], SETTING) if check.fine is False]
    assert bad == ["eps in torch.float32", "D in torch.float32"]
